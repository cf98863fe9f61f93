"""Tests of finemem_jax/evaluation/evaluate.py: estimates and paired differences by hand, and what a table shows."""

import math

import pytest

from finemem_jax.evaluation import evaluate
from finemem_jax.memory import operations
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.types import Action, Chunk, Completion, Operation, Question, Stream
from small_trajectories import ENVIRONMENT, MALFORMED, TOKENS, answers, inserted, item, step, trajectory

ONE = trajectory(
    [
        step([inserted(), MALFORMED], answers(1.0, 0.0)),
        step(),
        step([inserted()], answers(0.25), [item(text="Ærø")]),
    ],
    answers(1.0, 0.5, kind="plain") + answers(0.0, kind="latest_value"),
    name="one",
)
TWO = trajectory([step()], answers(0.5, kind="plain"), name="two")
SILENT = trajectory([step([MALFORMED], memory=[item(text="abcd")])], name="silent")


def test_estimate_by_hand():
    # Mean 5/2; sample variance (9/4 + 1/4 + 1/4 + 9/4) / 3 = 5/3; its share per stream 5/12.
    got = evaluate.estimate([1.0, 2.0, 3.0, 4.0])
    assert got.mean == pytest.approx(2.5)
    assert got.standard_error == pytest.approx(math.sqrt(5 / 12))
    assert got.n == 4


def test_estimate_of_too_little_says_nothing():
    assert evaluate.estimate([0.25]) == evaluate.Estimate(0.25, None, 1)
    assert evaluate.estimate([]) == evaluate.Estimate(None, None, 0)


def test_equal_values_have_no_error():
    assert evaluate.estimate([0.5] * 3) == evaluate.Estimate(0.5, 0.0, 3)


def test_difference_is_paired():
    # a: +1/2, b: +1/4; c and d have no partner. Mean 3/8, sample variance 1/32, standard error 1/8.
    got = evaluate.difference({"a": 0.5, "b": 0.0, "c": 9.0}, {"b": 0.25, "a": 1.0, "d": 7.0})
    assert got.mean == pytest.approx(3 / 8)
    assert got.standard_error == pytest.approx(1 / 8)
    assert got.n == 2


def test_pairing_takes_out_how_hard_streams_are():
    # Streams differ by much, all improve alike: the difference is certain though the means are not.
    before = {"a": 0.0, "b": 0.4, "c": 0.8}
    after = {name: value + 0.1 for name, value in before.items()}
    assert evaluate.difference(before, after).standard_error == pytest.approx(0, abs=1e-12)
    assert (evaluate.estimate(list(after.values())).standard_error or 0.0) > 0.2


def test_per_stream_by_hand():
    got = evaluate.per_stream([ONE, TWO, SILENT], ENVIRONMENT)
    assert got == {
        "score": {"one": 0.5, "two": 0.5},  # `silent` has no questions: no score, which is not a score of 0.
        "chunk_score": {"one": (0.5 + 0.25) / 2},  # Over chunks that have questions.
        "valid_operations": {"one": pytest.approx(2 / 3), "two": 0.0, "silent": 0.0},
        "memory_tokens": {"one": 5.0, "two": 0.0, "silent": 4.0},  # ByteTokenizer: Ærø has 5 bytes.
    }


def test_by_kind_is_over_questions():
    got = evaluate.by_kind([ONE, TWO])
    assert list(got) == ["latest_value", "plain"]
    assert got["plain"].n == 3
    assert got["plain"].mean == pytest.approx(2 / 3)
    assert got["latest_value"].mean == 0.0


def summary(*scores):
    """The summary of streams a, b, … whose global score, chunk score and valid fraction is each of `scores`."""
    named = {name: score for name, score in zip("abcdefg", scores, strict=False)}
    per_stream = {metric: named for metric in evaluate.METRICS}
    per_stream["memory_tokens"] = {name: 100 * score for name, score in named.items()}
    estimates = {metric: vars(evaluate.estimate(list(values.values()))) for metric, values in per_stream.items()}
    return {"estimates": estimates, "per_stream": per_stream, "by_kind": {}}


def test_table_of_two_shows_their_difference():
    header, rows = evaluate.table({"before": summary(0.0, 0.5), "after": summary(0.5, 0.75)})
    assert header == ["on held-out streams", "before", "after", "difference", "n"]
    assert rows[0] == ["held-out score", "0.250 ± 0.250", "0.625 ± 0.125", "+0.375 ± 0.125", "2"]
    assert rows[3] == ["memory length (tokens)", "25.0 ± 25.0", "62.5 ± 12.5", "+37.5 ± 12.5", "2"]


@pytest.mark.parametrize("names", [["after"], ["before", "step 5", "after"]])
def test_table_of_others_shows_none(names):
    header, rows = evaluate.table({name: summary(0.0, 0.5) for name in names})
    assert header == ["on held-out streams", *names, "n"]
    assert all(len(row) == len(header) for row in rows)


def test_table_of_a_single_stream():
    _, rows = evaluate.table({"before": summary(0.5), "after": summary(0.25)})
    assert rows[0] == ["held-out score", "0.500 ± –", "0.250 ± –", "-0.250 ± –", "1"]


def test_table_says_nothing_of_what_was_not_asked():
    found = evaluate.summary([SILENT], ENVIRONMENT)
    _, rows = evaluate.table({"before": found, "after": found})
    assert rows[0] == ["held-out score", "–", "–", "–", "0"]


def test_summary_holds_what_the_table_needs():
    found = evaluate.summary([ONE, TWO, SILENT], ENVIRONMENT)
    _, rows = evaluate.table({"before": found, "after": found})
    assert rows[0] == ["held-out score", "0.500 ± 0.000", "0.500 ± 0.000", "+0.000 ± 0.000", "2"]
    assert found["by_kind"]["plain"]["n"] == 3


def test_run_rolls_each_stream_out_once():
    insert = operations.render(Operation(Action.INSERT, "Ana lives in Oslo."))

    def policy(requests):
        assert all(request.temperature == 0.0 for request in requests)
        return [Completion(tuple(TOKENS.encode(insert)), (), "stop", 0) for _ in requests]

    def reader(queries):
        return ["Oslo" for _ in queries]

    options = RolloutOptions(
        group_size=1,
        max_new_tokens=9,
        temperature=0.0,
        retrieval="lucene",
        top_k=2,
        global_question_fraction=1.0,
        global_question_threshold=5,
    )
    asked = Question("Where does Ana live?", ("Oslo",))
    streams = [Stream(name, "made up", (Chunk("c", (asked,)), Chunk("d")), (asked,)) for name in ("a", "b")]
    got = evaluate.run(streams, options, Players(ENVIRONMENT, policy, reader), key=(0, "evaluate"))
    assert [one.stream.stream_id for one in got] == ["a", "b"]
    assert evaluate.summary(got, ENVIRONMENT)["estimates"]["score"]["mean"] == 1.0
    # The second INSERT says the same again.
    assert evaluate.per_stream(got, ENVIRONMENT)["valid_operations"] == {"a": 0.5, "b": 0.5}
