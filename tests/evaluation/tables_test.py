"""Tests of finemem_jax/evaluation/tables.py: scores, costs and comparisons by hand, and what tables show."""

import math
import random

import pytest

from finemem_jax.evaluation import published_results, tables


def line(method, source, stream, scores, **changes):
    fields = {
        "method": method, "source": source, "stream_id": stream, "chunks": 2, "scores": scores, "chunk_scores": [],
        "memory_tokens": 10.0, "operations": 4, "valid_operations": 1, "reader_calls": 3, "seconds": 2.0,
    }  # fmt: skip
    return fields | changes


LINES = [
    line("a", "x", "1", [1.0, 0.0]),
    line("a", "x", "2", [1.0, None, 1.0], memory_tokens=20.0, operations=0, valid_operations=0),
    line("a", "y", "3", [1.0, 0.0, 0.0, 1.0]),
    line("b", "x", "1", [0.0, 0.0]),
    line("b", "x", "2", [0.0, 1.0, 1.0]),
    line("b", "y", "3", [1.0, 0.0, 0.0, 0.0]),
]


def test_scores_by_hand():
    found = tables.scores(LINES)
    x, y, average = found["a"].values()
    # Streams 1/2 and 1: mean 3/4, standard error 1/4. The only stream of y: over its four questions.
    assert (x.mean, x.standard_error, x.n) == (0.75, pytest.approx(0.25), 2)
    assert (y.mean, y.n) == (0.5, 4) and y.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))
    assert average.mean == 0.625 and average.standard_error == pytest.approx(math.sqrt(1 / 16 + 1 / 12) / 2)
    assert list(found) == ["a", "b"] and list(found["b"]) == ["x", "y", tables.AVERAGE]


def test_a_method_that_lacks_a_source_has_no_average():
    found = tables.scores(LINES[:5])
    assert tables.AVERAGE in found["a"] and list(found["b"]) == ["x"]
    _, rows = tables.score_table(LINES[:5])
    assert rows[1][2:] == ["–", "–"]


def test_chunk_scores_by_hand():
    lines = [line("a", "x", "1", [0.0], chunk_scores=[[1.0, 0.0], [], [None]])]
    assert tables.scores(lines, "chunk_scores")["a"]["x"].mean == 0.5
    assert tables.scores(LINES, "chunk_scores")["a"] == {}


def test_costs_by_hand():
    found = tables.costs(LINES)["a"]
    assert found["memory_tokens"] == pytest.approx(40 / 3) and found["valid_fraction"] == 2 / 8
    assert "valid_fraction" not in tables.costs([line("a", "x", "1", [], operations=0)])["a"]


def compared(lines, method="a", other="b", **options):
    found = tables.compare(lines, method, other, **options)
    assert found is not None
    return found


def test_comparison_is_paired_and_seeded():
    one = compared(LINES)
    # x: +1/2 and +1/3; y, by question: 0 0 0 1.
    assert one.mean == pytest.approx(((0.5 + 1 / 3) / 2 + 0.25) / 2)
    assert one == compared(LINES) and one.units == 6
    other = compared(LINES, "b", "a")
    assert other.mean == -one.mean and other.low == pytest.approx(-one.high, abs=0.02)
    assert set(tables.comparisons(LINES)) == {("b", "a")}


def test_only_what_both_have_played_is_compared():
    lines = [line("a", "x", "1", [1.0]), line("b", "x", "2", [0.0])]
    # Of a source with one stream each, questions are compared, of the same stream only.
    assert tables.compare(lines, "a", "b") is None
    assert compared([*LINES, line("a", "z", "9", [1.0, 1.0])]).units == 6


def test_intervals_cover_the_truth():
    rng, hits = random.Random(0), 0
    for _ in range(60):
        lines = []
        for i in range(40):
            base = rng.random()
            lines.append(line("a", "x", str(i), [base + rng.gauss(0.1, 0.3)]))
            lines.append(line("b", "x", str(i), [base]))
        one = compared(lines, resamples=500)
        hits += one.low <= 0.1 <= one.high
    assert 50 <= hits <= 60


def test_no_difference_is_not_significant():
    lines = [line(m, "x", str(i), [float(i % 3 == 0)]) for m in "ab" for i in range(9)]
    one = compared(lines)
    assert (one.mean, one.low, one.high, one.p) == (0, 0, 0, 1)


def test_published_rows_stand_below():
    lines = [line("ours", source, "1", [0.5, 1.0]) for source in ("squad", "booksum")]
    header, rows = tables.score_table(lines, ["memalpha", "synthetic"])
    assert header == ["score", "squad", "booksum", "average"]
    assert rows[0][0] == "ours" and rows[-1] == ["Mem-α-4B (published)", "0.786", "0.187", "0.487"]
    assert "| --- | ---: |" in tables.markdown(["a", "b"], [["x|y", "1"]])


def test_published_means_are_those_of_their_rows():
    means = {
        name: sum(v for k, v in row.items() if k != "memory_tokens") / (len(row) - 1)
        for results in published_results.RESULTS.values() for name, row in results.items() if "Mem-α-4B" in name
    }  # fmt: skip
    assert means["Mem-α-4B"] == pytest.approx(0.592, abs=5e-4)
    first = published_results.RESULTS["memalpha"]["Mem-α-4B"]
    assert sum(v for k, v in first.items() if k != "memory_tokens") / 7 == pytest.approx(0.619, abs=5e-4)
