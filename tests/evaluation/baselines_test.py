"""Tests of finemem_jax/evaluation/baselines.py: what each keeps of a stream, and what the reader is shown."""

import json

import pytest

from finemem_jax.evaluation import baselines
from finemem_jax.memory.environment import Environment
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.runtime import workers
from finemem_jax.types import Chunk, Completion, Question, Stream

TOKENS = ByteTokenizer()
RULES = Environment(TOKENS, num_examples=0, view_tokens=500, chunk_tokens=500, long_chunk="split", repair_json=False)
STREAM = Stream(
    "s",
    "test",
    (
        Chunk("Ada lives in Oslo. Bo has a dog.", (Question("Where does Ada live?", ("Oslo",)),)),
        Chunk("Cy met Bo in Rome.\nThe dog is called Rex!"),
    ),
    (
        Question("Where does Ada live?", ("Oslo",), instruction="In a word."),
        Question("What is the dog called?", ("Rex",), metric="judge"),
    ),
)


class Reader:
    """Answers with its evidence, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, queries):
        self.asked += queries
        return [" | ".join(query.evidence) for query in queries]


def judge(items):
    return [item.question.answers[0] in item.answer for item in items]


def play(keep, streams=(STREAM,)):
    reader = Reader()
    played = baselines.without_manager(keep, RULES, reader, answer_judge=workers.Batched(judge))(list(streams))
    return played, [query.evidence for query in reader.asked], reader.asked


def test_nothing_is_kept():
    (one,), evidence, asked = play(baselines.nothing)
    assert evidence == [(), ()] and asked[0].question == "In a word.\nWhere does Ada live?"
    assert [answer.score for answer in one.answers] == [0.0, 0.0]
    assert (one.memory_tokens, one.operations, one.reader_calls) == (0, 0, 2)


@pytest.mark.parametrize(
    "count, kept", [(1000, None), (41, "Cy met Bo in Rome.\nThe dog is called Rex!"), (10, "alled Rex!")]
)
def test_the_last_tokens(count, kept):
    whole = "\n".join(chunk.text for chunk in STREAM.chunks)
    (one,), evidence, _ = play(baselines.last_tokens(RULES, count))
    shown = evidence[0][0].strip()
    assert shown == (kept or whole) if count != 41 else shown.endswith(kept)
    assert evidence[0] == evidence[1]
    assert one.memory_tokens <= count + 1 and one.answers[1].score == 1.0


def test_chunks_are_retrieved():
    (one,), evidence, _ = play(baselines.chunks("lucene", 1))
    assert evidence == [("Ada lives in Oslo. Bo has a dog.",), ("Cy met Bo in Rome.\nThe dog is called Rex!",)]
    assert [answer.score for answer in one.answers] == [1.0, 1.0]
    assert one.memory_tokens == sum(RULES.count_tokens(chunk.text) for chunk in STREAM.chunks)


def test_sentences_are_retrieved():
    _, evidence, _ = play(baselines.sentences("lucene", 1))
    assert evidence == [("Ada lives in Oslo.",), ("The dog is called Rex!",)]


def test_a_summary_is_rewritten_chunk_by_chunk():
    seen = []

    def model(chats):
        for chat in chats:
            seen.append("".join(chat.messages[-1].parts))
        return [f"<think>hm</think> note {len(seen)}" for _ in chats]

    short = Stream("t", "test", STREAM.chunks[:1], STREAM.questions[:1])
    keep = baselines.summaries(workers.Batched(model), 40, "My own words.")
    played, evidence, _ = play(keep, [STREAM, short])
    # Both streams' first chunks together, then the longer one's second.
    assert len(seen) == 3 and "(empty)" in seen[0] and "note 2" in seen[2] and "Cy met Bo" in seen[2]
    assert evidence == [("note 3",), ("note 3",), ("note 2",)]
    assert [one.operations for one in played] == [2, 1]
    assert played[0].memory_tokens == len("note 3")


def test_thinking_that_never_ends_changes_no_summary():
    replies = iter(["kept", "<think> for ever"])
    keep = baselines.summaries(workers.Batched(lambda chats: [next(replies) for _ in chats]), 40)
    _, evidence, _ = play(keep)
    assert evidence[0] == ("kept",)


def test_a_question_that_needs_a_judge_is_refused_without_one():
    with pytest.raises(ValueError, match="needs a judge"):
        baselines.without_manager(baselines.nothing, RULES, Reader())([STREAM])


def test_a_manager():
    def policy(requests):
        text = json.dumps({"name": "memory_insert", "arguments": {"content": "Ada lives in Oslo."}})
        ids = tuple(TOKENS.encode(text)) + TOKENS.end_ids
        return [Completion(ids, (0.0,) * len(ids), "stop", 0) for _ in requests]

    options = RolloutOptions(1, 200, 0.0, "lucene", 2, 1.0, 100)

    players = Players(RULES, policy, Reader(), answer_judge=workers.Batched(judge))
    (one,) = baselines.manager(options, players, (0,))([STREAM])
    # The second time the same is written it changes nothing.
    assert (one.operations, one.valid_operations, one.reader_calls) == (2, 1, 3)
    assert one.memory_tokens == len("Ada lives in Oslo.")
    assert [answer.score for answer in one.answers] == [1.0, 0.0]
    assert [[answer.score for answer in chunk] for chunk in one.chunk_answers] == [[1.0], []]
