"""Tests `data/synthetic.py`: seeded streams whose questions can be answered, train and test kept apart."""

import collections
import functools
import importlib
import re

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import Stream, StreamSpec

synthetic = input_pipeline.builder("synthetic")
text = synthetic.text
world = importlib.import_module("finemem_data._synthetic_world")
talk = importlib.import_module("finemem_data._synthetic_talk")

SMALL = {"chunks_per_stream": 3, "chunk_words": 60, "questions_per_chunk": 2, "questions_per_stream": 3}
BIG = {"chunks_per_stream": 20, "chunk_words": 200, "questions_per_chunk": 5, "questions_per_stream": 20}
SHAPES = [
    SMALL,
    {**SMALL, "chunks_per_stream": 2},
    {**SMALL, "chunks_per_stream": 1, "chunk_words": 30},
    {**SMALL, "chunks_per_stream": 6, "chunk_words": 100},
    {**SMALL, "chunk_words": 600, "questions_per_chunk": 50, "questions_per_stream": 500},
    BIG,
]

# Chunk 0 of stream 0, printed once. After a wanted change of wordings, print it again and put it here.
GOLDEN = (
    "[Day 1, Monday, #kitchen]\n"
    '<Jonas> For "the printer smells burnt" the right label is 52.\n'
    "<Olga> Somebody left a notebook on the bus. I waited for the airport bus without luck.\n"
    "<Jonas> A quick note: Stefan's phone is a Lumo 9.\n"
    '<Stefan> Nobody was at the bakery at noon. Message: "the wifi rejects visitors" -> label: 29.'
)


def spec(split="train", seed=0, num_streams=100, **sizes) -> StreamSpec:
    return StreamSpec(split=split, seed=seed, num_streams=num_streams, **{**SMALL, **sizes})


@functools.cache
def sample(split: str, count: int = 300) -> list[Stream]:
    source = synthetic.load(spec(split, num_streams=count))
    return [source[index] for index in range(count)]


def mask(sentence: str, split: str) -> str:
    return _entities(split).sub("_", re.sub(r"\d+", "0", sentence))


@functools.cache
def _entities(split: str) -> re.Pattern:
    words = {re.escape(value) for pool in world.POOLS[split].values() for value in pool}
    days = "|".join(world.WEEKDAYS)
    return re.compile(rf"\b(Project |)({'|'.join(sorted(words, key=len, reverse=True))}|{days})(?!\w)")


def sentences(stream: Stream) -> set[str]:
    found = set()
    for chunk in stream.chunks:
        for line in chunk.text.splitlines():
            line = re.sub(r"^(\[Day[^\]]*\]\s*)?(<\w+> |\w+: )?", "", line)
            found.update(part for part in re.split(r"(?<=[.!?]) ", line) if part)
    return found


def test_a_stream_depends_on_seed_split_and_index_only():
    source, again = synthetic.load(spec()), synthetic.load(spec(num_streams=9))
    backwards = [again[index] for index in reversed(range(9))]
    assert [source[index] for index in range(9)] == backwards[::-1]
    assert source[0] != source[1]
    assert source[0] != synthetic.load(spec(seed=1))[0]
    assert len({stream.stream_id for stream in sample("train")}) == 300
    assert sample("train")[12].stream_id == "train-000012"


def test_a_stream_is_the_same_in_every_process():
    assert synthetic.load(spec())[0].chunks[0].text == GOLDEN


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("sizes", SHAPES)
def test_sizes_and_questions(split, sizes):
    source = synthetic.load(spec(split, num_streams=40, **sizes))
    for index in range(2 if sizes["chunk_words"] > 100 else 40):
        stream = source[index]
        assert len(stream.chunks) == sizes["chunks_per_stream"]
        assert 0 < len(stream.questions) <= sizes["questions_per_stream"]
        for step, chunk in enumerate(stream.chunks):
            words = len(chunk.text.split())
            assert 0.6 * sizes["chunk_words"] <= words <= 1.15 * sizes["chunk_words"], chunk.text
            assert chunk.text.startswith("[Day ")
            events = source.story(index).events[step]
            assert len(chunk.questions) == min(sizes["questions_per_chunk"], len(events))
            for question in chunk.questions:
                assert question.gold_steps == (step,)
                assert question.answers[0].lower() in chunk.text.lower()
        asked = [question.text for question in stream.questions]
        assert len(asked) == len(set(asked))
        for question in stream.questions:
            assert question.gold_steps and list(question.gold_steps) == sorted(set(question.gold_steps))
            assert set(question.gold_steps) <= set(range(len(stream.chunks)))
            assert question.answers[0] and question.text[0].isupper() and question.text[-1] in "?."
            assert "{" not in question.text and "[" not in question.text


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_event_is_told_in_its_chunk(split):
    source = synthetic.load(spec(split))
    for index in range(100):
        for events, chunk in zip(source.story(index).events, source[index].chunks, strict=True):
            keys = [(event.subject, event.attribute) for event in events if event.kind not in ("label", "chain")]
            assert len(keys) == len(set(keys))
            for event in events:
                assert event.value.lower() in chunk.text.lower() and event.message.lower() in chunk.text.lower()
                assert event.attribute == "label" or event.subject in chunk.text
                assert f"[Day {event.day}," in chunk.text


def test_global_answers_follow_from_a_replay_of_the_story():
    source = synthetic.load(spec(num_streams=30, **{**BIG, "chunks_per_stream": 8, "questions_per_stream": 60}))
    kinds = collections.Counter()
    for index in range(30):
        stream, now, stale = source[index], {}, collections.defaultdict(set)
        labels, chains = {}, collections.defaultdict(list)
        for events in source.story(index).events:
            for event in events:
                key = (event.subject, event.attribute)
                if event.kind == "label":
                    assert labels.setdefault(event.subject, event.value) == event.value
                elif event.kind == "chain":
                    chains[key].append(event.value)
                elif event.kind == "state":
                    assert key not in now and not stale[key]
                    now[key] = event.value
                else:
                    assert now[key] == (event.old or event.value)
                    stale[key].add(now.pop(key))
                    if event.kind == "change":
                        assert event.value not in stale[key]
                        now[key] = event.value
        for question in stream.questions:
            kinds[question.kind] += 1
            gold, last = question.answers[0], stream.chunks[question.gold_steps[-1]].text.lower()
            if question.kind == "latest_value":
                keys = [key for key, value in now.items() if value == gold and key[0] in question.text and stale[key]]
                assert keys and gold.lower() in last and gold not in stale[keys[0]]
            elif question.kind == "label":
                assert any(f'"{category} ' in question.text and value == gold for category, value in labels.items())
            elif question.kind == "summary":
                assert gold in [", ".join(values) for values in chains.values()]
            elif question.kind == "multi_chunk":
                assert gold in now.values() and len(question.gold_steps) == 2
            elif question.metric == "exact":
                assert gold == {"still_true": "yes", "withdrawn": "no"}[question.kind]
    assert set(kinds) >= {
        "plain", "latest_value", "multi_chunk", "count", "order", "withdrawn", "still_true", "label", "summary",
    }  # fmt: skip


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_competencies_and_quiet_chunks_occur(split):
    share = collections.Counter(stream.competency for stream in sample(split))
    assert set(share) == {"AR", "CR", "TTL", "LRU"} and min(share.values()) > 20
    quiet = [chunk for stream in sample(split) for chunk in stream.chunks if not chunk.questions]
    assert 5 < len(quiet) < 150
    assert {question.metric for stream in sample(split) for question in stream.questions} == {
        "substring", "exact", "number", "keyword_recall",
    }  # fmt: skip


def test_train_and_test_share_no_entity_and_no_wording():
    pools = {split: {v for pool in world.POOLS[split].values() for v in pool} for split in ("train", "test")}
    assert not pools["train"] & pools["test"]
    assert not set(world.CATEGORIES["train"]) & set(world.CATEGORIES["test"])
    assert not set(text.templates("train")) & set(text.templates("test"))
    assert not {q.text for s in sample("train") for q in s.questions} & {
        q.text for s in sample("test") for q in s.questions
    }
    seen = set().union(*map(sentences, sample("train")))
    unseen = set().union(*map(sentences, sample("test")))
    assert len(seen) > 3000 and not seen & unseen


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_entity_is_part_of_another_one_or_of_small_talk(split):
    # A substring score would take the longer one for the shorter one.
    pools = world.POOLS[split]
    for values in (*pools.values(), pools["she"] + pools["he"]):
        folded = [value.lower() for value in values]
        assert len(set(folded)) == len(folded)
        assert [(a, b) for a in folded for b in folded if a != b and a in b] == []
    chat = " ".join(part for table in (talk._SLOTS, talk._PERSONAL) for part in str(table[split]).split()).lower()
    spoken = {v.lower() for name, pool in pools.items() if name != "species" for v in pool}
    assert [value for value in spoken if re.search(rf"\b{re.escape(value)}\b", chat)] == []


def test_wordings_are_many_and_complete():
    for split, statements, asks in (("train", 6, 3), ("test", 3, 2)):
        for attribute, wording in text.WORDINGS[split].items():
            about = world.ATTRIBUTES.get(attribute)
            assert len(wording.state) >= statements and len(wording.ask) >= (asks if about else 2), attribute
            assert any("{Ss}" not in template for template in wording.ask)
            assert not about or not about.changes or (len(wording.change) >= 3 and wording.times and wording.first)
            assert not about or not about.drops or (len(wording.drop) >= 3 and wording.dropped and wording.still)
            assert not about or not about.shared or wording.many
    masked = collections.Counter()
    for stream in sample("train")[:200]:
        for line in sentences(stream):
            if (hidden := mask(line, "train")) != line:
                masked[hidden] += 1
    assert len(masked) > 500


def test_grammar():
    wrong = re.compile(
        r"\b[Aa] ([AEIOaeio]|umb)\w+|\ban (?!hour)[^aeiouAEIOU\W]|\bI (is|has|lives|works|plays)\b|\{|\||  |\.\."
    )
    for split in ("train", "test"):
        for stream in sample(split):
            for part in [c.text for c in stream.chunks] + [q.text for q in stream.questions]:
                assert not (match := wrong.search(part)), (match, part)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"num_streams": 0}, "data.num_train"),
        ({"num_streams": 0, "split": "test"}, "data.num_test"),
        ({"split": "dev"}, "split"),
        ({"chunk_words": 10}, "data.chunk_words"),
        ({"chunks_per_stream": 0}, "data.chunks_per_stream"),
    ],
)
def test_wrong_specs_are_refused(wrong, field):
    with pytest.raises(ValueError, match=field):
        synthetic.load(spec(**wrong))


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError):
        synthetic.load(spec())[100]


def test_closed_questions_say_what_answers_there_are():
    closed = {}
    for split in ("train", "test"):
        source = synthetic.load(spec(split=split, num_streams=12, questions_per_stream=40))
        for stream in (source[i] for i in range(len(source))):
            for question in (*stream.questions, *(q for chunk in stream.chunks for q in chunk.questions)):
                if question.choices:
                    assert question.answers[0] in question.choices and len(set(question.choices)) > 1
                closed.setdefault(question.kind, set()).add(bool(question.choices))
    assert closed["label"] == closed["order"] == closed["still_true"] == {True}
    assert closed["plain"] == closed["count"] == {False}
