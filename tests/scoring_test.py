"""Tests of finemem_jax/scoring.py: each metric by hand, and the laws that all of them obey."""

import hypothesis
import pytest
from hypothesis import strategies as st

from finemem_jax import scoring
from finemem_jax.episode import Question

few_examples = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)

metric_names = st.sampled_from(sorted(scoring.METRICS))
answers = st.text(st.characters(), max_size=30)


def short(value):
    """Names a parametrized case; some inputs here are too long to be the name of a test."""
    return repr(value)[:40]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Quick,\tbrown fox!", "quick brown fox"),
        ("“A well-known” – an O'Neil", "wellknown oneil"),
        ("Cafe\u0301", "caf\u00e9"),  # e and a combining accent become one character.
        ("theatre an-a", "theatre ana"),
        ("the A an", ""),
        ("$5.00", "500"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert scoring.normalise(text) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("She lives in Oslo, Norway.", ["oslo"], 1),
        ("a party", ["art"], 0),
        ("It is the New   York!", ["new york"], 1),
        ("York New", ["new york"], 0),
        ("Bergen", ["Oslo", "Bergen"], 1),
        ("the beatles", ["Beatles, The"], 1),
        ("", ["Oslo"], 0),
        # Golds of articles: as words. Of punctuation: as they stand. Blank: never.
        ("Answer: A.", ["A"], 1),
        ("Answer: B, not C", ["A"], 0),
        ("what?", ["?"], 1),
        ("what", ["?"], 0),
        ("anything", [""], 0),
        ("", [" "], 0),
    ],
)
def test_substring(prediction, golds, expected):
    assert scoring.substring(prediction, golds) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("a PARTY", ["Art"], 1),
        ("O'Neil", ["oneil"], 0),
        ("Bergen", ["Oslo", "Bergen"], 0),  # First gold only.
        ("anything", [""], 0),
    ],
)
def test_contains(prediction, golds, expected):
    assert scoring.contains(prediction, golds) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("The Oslo.", ["oslo"], 1),
        ("Oslo, Norway", ["Oslo"], 0),
        ("Bergen", ["Oslo", "Bergen"], 1),
        ("the", ["The"], 1),
        ("a", ["The"], 0),
        ("", [""], 0),
    ],
)
def test_exact(prediction, golds, expected):
    assert scoring.exact(prediction, golds) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("Ana met a whale in Oslo", ["ana, Whale, Bob, the sea"], 2 / 4),
        ("Anabel", ["Ana"], 1),  # Plain containment.
        ("x, y", ["x, y", "z"], 1),
        ("x", ["x, , "], 1),  # Empty keywords are none.
        ("x", [", "], 0),
    ],
)
def test_keyword_recall(prediction, golds, expected):
    assert scoring.keyword_recall(prediction, golds) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("There are 12 cats, not 3.", ["12"], 1),
        ("There are 12 cats, not 3.", ["3"], 0),
        ("Twelve.", ["12"], 1),
        ("12", ["twelve cats"], 1),
        ("a dozen", ["12"], 0),
        ("ZERO", ["0"], 1),
        ("1,204 people", ["1204"], 1),
        ("1204", ["1,204"], 1),
        ("at -3 degrees", ["-3"], 1),
        ("at -3 degrees", ["3"], 0),
        ("pages 2-3", ["2"], 1),
        ("Covid-19", ["19"], 1),
        ("3.5 litres", ["3"], 0),
        ("3.5 litres", ["3.5"], 1),
        ("007", ["7"], 1),
        ("the 12th", ["12"], 1),
        ("someone tended stones", ["1"], 0),
        ("thirty-one", ["1"], 0),
        ("5", ["4", "5"], 1),
        ("none", ["none"], 0),
        ("9" * 10_000, ["9" * 10_000], 1),
    ],
    ids=short,
)
def test_number(prediction, golds, expected):
    assert scoring.number(prediction, golds) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        (r"So it is \boxed{12}.", ["12"], 1),
        (r"\boxed{3} or \boxed{12}", ["12"], 0),  # The first box.
        ("12", ["12"], 1),
        (' "12" ', ["12"], 1),
        ("label 12", ["12"], 0),
        (r"\boxed{'12'}", ["12"], 1),
        (r"\boxed{label}", ["label"], 0),
        (r"\boxed{}", ["12"], 0),
        (r"\boxed{012}", ["12"], 0),
        (r"\boxed{1}", ["11"], 0),
        (r"\boxed{\text{12}}", ["12"], 0),
        (r"\boxed{" * 100_000, ["12"], 0),
        (r"\boxed{12", ["12"], 0),
        (r"\boxed{2}", ["1", "2"], 0),  # First gold only.
    ],
    ids=short,
)
def test_boxed(prediction, golds, expected):
    assert scoring.boxed(prediction, golds) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        # p = {cat, sat, on, mat}, g = {cat, on, big, mat}: 3 in common, 2 * 3 / (4 + 4).
        ("The cat sat on the mat", ["a cat on a big mat"], 3 / 4),
        # Multisets: "very" is shared once, 2 * 1 / (3 + 1).
        ("very very very", ["very"], 1 / 2),
        ("cat", ["dog", "cat"], 1),
        ("cat", ["dog"], 0),
        ("", ["dog"], 0),
        ("the", ["The"], 1),
        ("", [""], 0),
    ],
)
def test_token_f1(prediction, golds, expected):
    assert scoring.token_f1(prediction, golds) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        # LCS("the cat sat here", "the big cat here") = "the cat here": 2 * 3 / (4 + 4).
        ("The cat sat here.", ["the big cat here"], 3 / 4),
        # Order matters: LCS("b a", "a b") = 1, 2 * 1 / (2 + 2).
        ("b a", ["a b"], 1 / 2),
        ("x", ["y", "x z"], 2 / 3),
        ("", ["y"], 0),
        ("", [""], 0),
    ],
)
def test_rouge_l(prediction, golds, expected):
    assert scoring.rouge_l(prediction, golds) == pytest.approx(expected)


def slow_common_subsequence(left, right):
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@few_examples
@hypothesis.given(st.lists(st.sampled_from("abc"), max_size=80), st.lists(st.sampled_from("abcd"), max_size=80))
def test_rouge_l_agrees_with_the_textbook_table(left, right):
    total = len(left) + len(right)
    expected = 2 * slow_common_subsequence(left, right) / total if total else 0
    assert scoring.rouge_l(" ".join(left), [" ".join(right)]) == pytest.approx(expected)


# --------------------------------------------------------------------------------------
# Laws and bad input
# --------------------------------------------------------------------------------------


@few_examples
@hypothesis.given(metric_names, answers, st.lists(answers, min_size=1, max_size=3))
def test_every_score_lies_between_0_and_1(metric, prediction, golds):
    got = scoring.score(prediction, Question("?", tuple(golds), metric))
    assert isinstance(got, float)
    assert 0 <= got <= 1


@pytest.mark.parametrize("metric", scoring.METRICS)
def test_the_gold_itself_scores_1_and_something_else_0(metric):
    assert scoring.score("7", Question("?", ("7",), metric)) == 1
    assert scoring.score("green", Question("?", ("7",), metric)) == 0
    assert scoring.score("", Question("?", ("",), metric)) == 0


@few_examples
@hypothesis.given(answers, st.lists(answers, min_size=1, max_size=3))
def test_the_stricter_the_lower(prediction, golds):
    assert scoring.exact(prediction, golds) <= scoring.substring(prediction, golds)
    assert scoring.exact(prediction, golds) <= scoring.token_f1(prediction, golds)


@few_examples
@hypothesis.given(
    st.sampled_from(["substring", "exact", "number", "token_f1", "rouge_l"]),
    answers,
    st.permutations(["7", "a cat", "?"]),
)
def test_order_of_golds_does_not_matter(metric, prediction, golds):
    assert scoring.METRICS[metric](prediction, golds) == scoring.METRICS[metric](prediction, sorted(golds))


def test_bad_questions():
    with pytest.raises(ValueError, match=r"Question\.metric must be one of boxed, contains, .*got 'rouge'"):
        scoring.score("x", Question("?", ("x",), "rouge"))
    with pytest.raises(ValueError, match=r"Question\.answers must hold at least one gold answer.*'Who\?'"):
        scoring.score("x", Question("Who?", ()))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Ana lives in Oslo, in the north.", "the north of Oslo", False),
        ("Ana lives in the north of Oslo.", "Oslo, north!", True),
        ("Ana lives in Oslo.", "", False),
        ("Ana lives in Oslo.", "the", False),
    ],
)
def test_supports(text, answer, expected):
    assert scoring.supports(text, answer) is expected
