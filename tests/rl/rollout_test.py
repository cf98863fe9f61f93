"""Tests of finemem_jax/rl/rollout.py with a scripted manager and a lambda reader."""

import dataclasses
import json
import math

import pytest

from finemem_jax.memory.environment import Environment
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.rl import rollout
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.runtime import workers
from finemem_jax.types import Chunk, Completion, Likelihood, Probes, Question, Refusal, Stream

TOKENS = ByteTokenizer()
RULES = Environment(TOKENS, num_examples=0, view_tokens=500, chunk_tokens=500, long_chunk="split", repair_json=False)
OPTIONS = RolloutOptions(
    group_size=2,
    max_new_tokens=200,
    temperature=1.0,
    retrieval="lucene",
    top_k=2,
    global_question_fraction=0.5,
    global_question_threshold=3,
)


def insert(text):
    return json.dumps({"name": "memory_insert", "arguments": {"content": text}})


class Scripted:
    """A manager that writes `write(request)`; it ends its turn as a model does."""

    def __init__(self, write):
        self.write, self.seen = write, []

    def __call__(self, requests):
        self.seen += requests
        return [
            Completion(tuple(TOKENS.encode(text)) + TOKENS.end_ids, (0.0,) * (len(text) + 1), "stop", 0)
            for text in map(self.write, requests)
        ]


def first_note(queries):
    """A reader that repeats the first piece of evidence."""
    return [query.evidence[0] if query.evidence else "" for query in queries]


def stream(name="s", chunks=2, questions=1):
    asked = tuple(
        Question(f"What is the colour number {i}?", (f"red{i}",), gold_steps=(i % chunks,)) for i in range(questions)
    )

    def chunk(t):
        return Chunk(f"The colour number {t} is red{t}.", (Question(f"What is colour number {t}?", (f"red{t}",)),))

    return Stream(name, "test", tuple(chunk(t) for t in range(chunks)), asked)


def copy_the_chunk(request):
    text = TOKENS.decode(request.prompt_ids)
    return insert(text.split("New text:\n")[-1].split("\n")[0])


def test_a_manager_that_copies_everything_scores_everywhere():
    (group,) = rollout.run([stream()], OPTIONS, Players(RULES, Scripted(copy_the_chunk), first_note), (0,))
    assert len(group) == 2
    for trajectory in group:
        assert [item.text for item in trajectory.steps[-1].memory.items] == [
            "The colour number 0 is red0.",
            "The colour number 1 is red1.",
        ]
        assert [item.source_step for item in trajectory.steps[-1].memory.items] == [0, 1]
        assert [answer.score for step in trajectory.steps for answer in step.answers] == [1.0, 1.0]
        assert trajectory.answers[0].score == 1.0


def test_chunk_questions_are_asked_of_the_memory_as_it_was_then():
    (group,) = rollout.run([stream()], OPTIONS, Players(RULES, Scripted(copy_the_chunk), first_note), (0,))
    first_step = group[0].steps[0]
    assert len(first_step.memory.items) == 1
    assert first_step.answers[0].evidence == first_step.memory.items


def test_streams_of_different_length():
    groups = rollout.run(
        [stream("a", 1), stream("b", 3)], OPTIONS, Players(RULES, Scripted(lambda r: insert("x")), first_note), (0,)
    )
    assert [[len(t.steps) for t in group] for group in groups] == [[1, 1], [3, 3]]


def test_the_manager_never_sees_questions():
    policy = Scripted(lambda r: insert("x"))
    rollout.run([stream()], OPTIONS, Players(RULES, policy, first_note), (0,))
    assert all("What is" not in TOKENS.decode(request.prompt_ids) for request in policy.seen)


def test_every_request_has_its_own_key_and_the_same_one_again():
    policies = [Scripted(lambda r: insert("x")) for _ in range(2)]
    for policy in policies:
        rollout.run([stream("a"), stream("b")], OPTIONS, Players(RULES, policy, first_note), (0, "train", 7))
    keys = [[request.key for request in policy.seen] for policy in policies]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 2 * 2 * 2  # streams × rollouts × steps
    other = Scripted(lambda r: insert("x"))
    rollout.run([stream("a"), stream("b")], OPTIONS, Players(RULES, other, first_note), (0, "train", 8))
    assert not set(keys[0]) & {request.key for request in other.seen}


@pytest.mark.parametrize(("questions", "asked"), [(0, 0), (3, 3), (4, 2), (9, 4)])
def test_global_questions_are_drawn_only_from_many(questions, asked):
    """Convention 9: int(fraction · n) of those with more than the threshold, the same for all rollouts."""
    (group,) = rollout.run(
        [stream(questions=questions)], OPTIONS, Players(RULES, Scripted(lambda r: insert("x")), first_note), (0,)
    )
    texts = [[answer.question.text for answer in trajectory.answers] for trajectory in group]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == asked


def test_nonsense_is_data():
    (group,) = rollout.run(
        [stream()], OPTIONS, Players(RULES, Scripted(lambda r: "}{ <|end|> nonsense"), first_note), (0,)
    )
    step = group[0].steps[0]
    assert [outcome.status.value for outcome in step.outcomes] == ["malformed"]
    assert step.answers[0].evidence == ()
    assert step.answers[0].score == 0.0


def test_a_failing_reader_is_an_error_not_a_score():
    def down(queries):
        raise ConnectionError("the reader is down")

    with pytest.raises(ConnectionError):
        rollout.run([stream()], OPTIONS, Players(RULES, Scripted(copy_the_chunk), down), (0,))


# --------------------------------------------------------------------------------------
# Each at its own pace
# --------------------------------------------------------------------------------------


class Clock:
    """A worker that does one item a call: the newest, or the oldest. Notes in a log what it was given and when."""

    def __init__(self, name, function, log, newest=False):
        self.name, self.function, self.log, self.newest = name, function, log, newest
        self.waiting, self.cancelled, self.request_ids = {}, [], 0

    def submit(self, item):
        self.request_ids += 1
        self.waiting[self.request_ids] = item
        self.log.append(f"{self.name} gets {self.request_ids}")
        return self.request_ids

    def collect(self, wait=True):
        if not (wait and self.waiting):
            return []
        request_id = (max if self.newest else min)(self.waiting)
        self.log.append(f"{self.name} does {request_id}")
        return [(request_id, self.function([self.waiting.pop(request_id)])[0])]

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        return self.waiting.pop(request_id, None) is not None


@pytest.mark.parametrize("newest", [False, True])
def test_order_and_time_do_not_matter(newest):
    streams = [stream("a", 1), stream("b", 3, 2)]
    expected = rollout.run(streams, OPTIONS, Players(RULES, Scripted(copy_the_chunk), first_note), (0,))
    log = []
    policy = Clock("manager", Scripted(copy_the_chunk), log, newest)
    got = rollout.run(streams, OPTIONS, Players(RULES, policy, Clock("reader", first_note, log, not newest)), (0,))
    assert got == expected


def test_nobody_waits_for_the_slowest():
    """The newest request first: one rollout comes to its end before another has begun."""
    log = []
    policy = Clock("manager", Scripted(copy_the_chunk), log, newest=True)
    rollout.run([stream("a", 3)], OPTIONS, Players(RULES, policy, Clock("reader", first_note, log)), (0,))
    done = [line for line in log if line.startswith("manager does")]
    assert done == [f"manager does {i}" for i in (2, 3, 4, 1, 5, 6)]


def test_questions_are_handed_in_as_they_arise_and_hold_nobody_up():
    log = []
    rollout.run(
        [stream("a", 2)],
        OPTIONS,
        Players(RULES, Clock("manager", Scripted(copy_the_chunk), log), Clock("reader", first_note, log)),
        (0,),
    )
    assert log.index("reader gets 1") < log.index("manager does 2")
    assert log.index("reader does 1") > log.index("manager does 4")


def test_a_refused_prompt_is_an_error_and_the_rest_is_taken_back():
    log = []
    policy = Clock("manager", lambda requests: [Refusal("too long; lower it")], log)
    with pytest.raises(ValueError, match="too long; lower it"):
        rollout.run([stream("a")], OPTIONS, Players(RULES, policy, first_note), (0,))
    assert policy.waiting == {} and policy.cancelled == [2]


def test_what_a_failing_reader_leaves_is_taken_back():
    def down(queries):
        raise ConnectionError("the reader is down")

    asked = Clock("reader", down, [])
    with pytest.raises(ConnectionError):
        rollout.run([stream()], OPTIONS, Players(RULES, Scripted(copy_the_chunk), asked), (0,))
    assert asked.waiting == {}


# --------------------------------------------------------------------------------------
# What credit rules need
# --------------------------------------------------------------------------------------


def rolled(needs, policy, answer=first_note, judge=None, **options):
    chosen = dataclasses.replace(OPTIONS, needs=frozenset(needs), **options)
    ((trajectory, _),) = rollout.run(
        [stream()], chosen, Players(RULES, Scripted(policy), answer, content_judge=judge), (0,)
    )
    return trajectory


def test_nobody_is_asked_more_than_the_rule_needs():
    counts = []

    def counting(queries):
        counts.append(len(queries))
        return first_note(queries)

    plain = rolled([], copy_the_chunk, counting)
    assert plain.probes == Probes() and plain.answers[0].cited == () and plain.steps[0].verdicts == ()
    assert counts == [2 * (2 + 1)]  # Two rollouts: two chunk questions and a global one each.


def test_probes_are_asked_in_the_same_call_and_scored():
    counts = []

    def counting(queries):
        counts.append(len(queries))
        return first_note(queries)

    got = rolled(["states"], copy_the_chunk, counting)
    # From nothing; after the only operation of each step. "red0" is there from step 0 on.
    assert got.probes.empty == (0.0,)
    assert got.probes.states == (((1.0,),), ((1.0,),))
    assert len(counts) == 1
    assert got.answers == rolled([], copy_the_chunk).answers


def test_the_reader_cites():
    def answer(queries):
        return [f"{query.evidence[-1]} [{len(query.evidence)}]" if query.evidence else "no [1]" for query in queries]

    got = rolled(["citations"], copy_the_chunk, answer)
    (final,) = got.answers
    assert len(final.evidence) == 2
    assert final.cited == (False, True)
    assert final.text == final.evidence[1].text


def test_citations_by_overlap():
    got = rolled(["citations"], copy_the_chunk, cited_by="overlap")
    assert got.answers[0].cited == (True, False)


def test_a_judge_sees_every_insert_and_update_once():
    def write(request):
        # The second line says the same for all rollouts and steps; the third is no operation.
        return f"{copy_the_chunk(request)}\n{insert('always')}\nno call"

    seen = []

    def judge(operations):
        seen.append([operation.content for operation in operations])
        return [None if operation.content == "always" else True for operation in operations]

    got = rolled(["content"], write, judge=workers.Memoized(workers.Batched(judge)))
    assert sorted(seen[0]) == ["The colour number 0 is red0.", "The colour number 1 is red1.", "always"]
    assert [step.verdicts for step in got.steps] == [(True, None, None)] * 2


# --------------------------------------------------------------------------------------
# Judges of answers, and likelihoods
# --------------------------------------------------------------------------------------


def judged_stream():
    questions = tuple(Question(f"What is the colour number {t}?", (f"red{t}",), "judge") for t in range(2))
    plain = stream()
    chunks = tuple(dataclasses.replace(c, questions=(q,)) for c, q in zip(plain.chunks, questions, strict=True))
    return dataclasses.replace(plain, chunks=chunks, questions=questions)


def test_answers_that_no_rule_can_score_are_judged():
    seen = []

    def mark(items):
        seen.extend(items)
        return [{"0": True, "1": None}[item.question.text[-2]] for item in items]

    ((got, _),) = rollout.run(
        [judged_stream()],
        OPTIONS,
        Players(RULES, Scripted(copy_the_chunk), first_note, answer_judge=workers.Batched(mark)),
        (0,),
    )
    assert [answer.score for answer in got.answers] == [1.0, None]
    assert [[answer.score for answer in step.answers] for step in got.steps] == [[1.0], [None]]
    assert {item.answer for item in seen} == {"The colour number 0 is red0.", "The colour number 1 is red1."}


def test_without_a_judge_they_are_refused():
    with pytest.raises(ValueError, match="'judge' of 'What is the colour number 0.*needs a judge"):
        rollout.run([judged_stream()], OPTIONS, Players(RULES, Scripted(copy_the_chunk), first_note), (0,))


class Ready(Clock):
    """A worker that is always done: what comes in can be collected at once."""

    def collect(self, wait=True):
        return super().collect(True)


def test_judges_are_asked_while_others_still_write():
    log = []
    rollout.run(
        [judged_stream()],
        OPTIONS,
        Players(
            RULES,
            Clock("manager", Scripted(copy_the_chunk), log),
            Ready("reader", first_note, log),
            answer_judge=Clock("judge", lambda items: [True for _ in items], log),
        ),
        (0,),
    )
    assert log.index("judge gets 1") < log.index("manager does 4")


def rolled_likely(needs=(), **options):
    """A rollout with likelihoods: 1 / (2 + the number of pieces of evidence)."""
    claims = []

    def likely(some):
        claims.extend(some)
        return [Likelihood(-math.log(2 + len(claim.query.evidence)), False) for claim in some]

    counted = []

    def answer(queries):
        counted.extend(queries)
        return first_note(queries)

    chosen = dataclasses.replace(OPTIONS, needs=frozenset(needs), **options)
    ((got, _),) = rollout.run(
        [stream()],
        chosen,
        Players(RULES, Scripted(copy_the_chunk), answer, likelihood_scorer=workers.Batched(likely)),
        (0,),
    )
    return got, claims, counted


def test_likelihoods_beside_answers():
    got, claims, queries = rolled_likely(chunk_likelihoods=True)
    assert [[a.likelihood.value for a in step.answers] for step in got.steps] == [[pytest.approx(1 / 3)], [0.25]]
    assert [[a.score for a in step.answers] for step in got.steps] == [[1.0], [1.0]]
    assert [answer.likelihood for answer in got.answers] == [None]
    assert {claim.query for claim in claims} < set(queries) and claims[0].golds == ("red0",)


def test_likelihoods_in_place_of_answers():
    got, _, queries = rolled_likely(chunk_answers=False, chunk_likelihoods=True, final_likelihoods=True)
    assert [[(a.text, a.score) for a in step.answers] for step in got.steps] == [[("", None)]] * 2
    # Only the global question is answered, as ever.
    assert [query.question for query in queries] == ["What is the colour number 0?"] * 2
    assert got.answers[0].score == 1.0 and got.answers[0].likelihood.value == 0.25


@pytest.mark.parametrize("needs", ["states", "without", "subsets"])
def test_probes_are_likelihoods(needs):
    got, _, queries = rolled_likely([needs], probe_likelihoods=True)
    generated = rolled([needs], copy_the_chunk)
    # Nothing more is generated than without probes, and what is asked is the same.
    assert len(queries) == 2 * (2 + 1)
    if needs == "states":
        assert got.probes.empty == (0.5,) and got.probes.states == (((pytest.approx(1 / 3),),), ((0.25,),))
    if needs == "without":
        assert got.probes.full == (0.25,) and got.probes.without == ((pytest.approx(1 / 3),) * 2,)
        assert generated.probes.full == ()
    if needs == "subsets":
        (game,), (other,) = got.probes.games, generated.probes.games
        assert game.players == other.players and game.scores == pytest.approx((1 / 2, 1 / 3, 1 / 3, 1 / 4))


def test_probes_without_a_verdict_leave_their_question_out():
    def mark(items):
        return [None if item.answer == "" else True for item in items]

    options = dataclasses.replace(OPTIONS, needs=frozenset(["states"]))
    ((got, _),) = rollout.run(
        [judged_stream()],
        options,
        Players(RULES, Scripted(copy_the_chunk), first_note, answer_judge=workers.Batched(mark)),
        (0,),
    )
    # Nobody could say what the empty memory is worth.
    assert [answer.score for answer in got.answers] == [None, None]
    assert got.probes.empty == (0.0, 0.0)


def test_streams_of_one_name_do_not_mix():
    """Two sources may number their streams alike."""
    one, two = stream("00000"), dataclasses.replace(stream("00000", chunks=3), source="other")
    asked = dataclasses.replace(two, questions=(Question("What is the colour number 2?", ("red2",)),))
    groups = rollout.run([one, asked], OPTIONS, Players(RULES, Scripted(copy_the_chunk), first_note), (0,))
    assert [len(group[0].steps) for group in groups] == [2, 3]
    assert [group[0].answers[0].question.text for group in groups] == [
        "What is the colour number 0?", "What is the colour number 2?"
    ]  # fmt: skip
    assert groups[1][0].answers[0].score == 1.0


def test_prompts_are_held_for_training_only():
    options = dataclasses.replace(OPTIONS, keep_prompts=False)
    (group,) = rollout.run([stream()], options, Players(RULES, Scripted(copy_the_chunk), first_note), (0,))
    assert all(step.prompt_ids == step.prompt_cuts == () for one in group for step in one.steps)
    (other,) = rollout.run([stream()], OPTIONS, Players(RULES, Scripted(copy_the_chunk), first_note), (0,))
    assert all(step.prompt_ids for one in other for step in one.steps)
    assert [step.memory for step in group[0].steps] == [step.memory for step in other[0].steps]


def test_the_view_is_searched_in_the_memory_as_it_is():
    rules = dataclasses.replace(RULES, view="retrieved", view_tokens=60)
    policy = Scripted(copy_the_chunk)
    rollout.run(
        [stream(chunks=4)], dataclasses.replace(OPTIONS, view_top_k=1), Players(rules, policy, first_note), (0,)
    )
    last = TOKENS.decode(policy.seen[-1].prompt_ids)
    # One item is found, all share words with the chunk, and the oldest comes first among equals.
    assert '"id": 1,' in last and "(2 other items are not shown)" in last
