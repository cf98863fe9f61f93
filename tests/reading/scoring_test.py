"""Tests of finemem_jax/reading/scoring.py: each metric by hand, and the laws that all of them obey.

The rules of single data sources, and which source has which, are tested in tests/scoring_sources_test.py.
"""

import importlib.util
import itertools
import re
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from finemem_jax.reading import scoring
from finemem_jax.types import Question

few_examples = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)

STEMMED = ("rouge_l_stemmed", "parsed_rouge_l")
FIRST_GOLD_ONLY = {"contains", "boxed", "keyword_recall", "keyword_recall_comma", "parts", "parts_cased"}
has_rouge_score = importlib.util.find_spec("rouge_score") is not None
needs_rouge_score = pytest.mark.skipif(not has_rouge_score, reason="Porter stemming needs the rouge-score package")
every_metric = [
    pytest.param(name, marks=[needs_rouge_score] if name in STEMMED else []) for name in sorted(scoring.METRICS)
]

metric_names = st.sampled_from(sorted(name for name in scoring.METRICS if has_rouge_score or name not in STEMMED))
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
def test_normalize(text, expected):
    assert scoring.normalize(text) == expected


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


@needs_rouge_score
@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        # LCS("the cat sit", "the mat sit") = "the sit": 2 * 2 / (3 + 3).
        ("The cats, sitting", ["the mat sits"], 2 / 3),
        ("relational", ["relate"], 1),
        # Up to three letters, words stay as they are.
        ("gas", ["ga"], 0),
        ("x", ["y", "x z"], 2 / 3),
        ("a_b", ["a b"], 1),
        ("Zürich", ["z rich"], 1),  # ü parts words.
        ("日本", ["日本"], 0),
        ("", ["y"], 0),
        ("y", [" "], 0),
    ],
)
def test_rouge_l_stemmed(prediction, golds, expected):
    assert scoring.rouge_l_stemmed(prediction, golds) == pytest.approx(expected)


# Words with common stems, words that stemming keeps apart, short ones, and such as are no words, or several.
ROUGE_WORDS = [
    "The",
    "the",
    "relate",
    "relational",
    "running",
    "runs",
    "ran",
    "sky",
    "skies",
    "is",
    "7th",
    "can't",
    "é",
]


@needs_rouge_score
@pytest.mark.parametrize("stemmed", [False, True])
def test_rouge_l_agrees_with_the_package(stemmed):
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmed)
    metric = scoring.rouge_l_stemmed if stemmed else scoring.rouge_l
    words = ROUGE_WORDS if stemmed else [word for word in ROUGE_WORDS if word.isascii()]
    texts = st.lists(st.sampled_from(words), max_size=30).map(" ".join)

    @hypothesis.settings(few_examples, max_examples=300)
    @hypothesis.given(texts, st.lists(texts, min_size=1, max_size=3))
    def check(prediction, golds):
        expected = scorer.score_multi(golds, prediction)["rougeL"].fmeasure
        assert metric(prediction, golds) == pytest.approx(expected)

    check()


@pytest.mark.parametrize("metric", STEMMED)
def test_stemming_without_its_package(metric, monkeypatch):
    # None in sys.modules is what Python finds for a package that is not installed.
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    scoring._stemming_tokenizer.cache_clear()
    with pytest.raises(ValueError, match="rouge"):
        scoring.score("x", Question("?", ("x",), metric))


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
# SQuAD's and HotpotQA's scripts
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction, golds, exact, f1",
    [
        ("The Oslo.", ["oslo"], 1, 1),
        ("Bergen", ["Oslo", "Bergen"], 1, 1),
        # p = {cat, sat, on, mat}, g = {cat, on, big, mat}: 2 * 3 / (4 + 4).
        ("The cat sat on the mat", ["a cat on a big mat"], 0, 3 / 4),
        # ASCII punctuation only: the quotes stick to the word, and a dash parts articles.
        ("“Oslo”", ["Oslo"], 0, 0),
        ("the–cat", ["–cat"], 1, 1),
        ("Cafe\u0301", ["Caf\u00e9"], 0, 0),
        ("C++ (.*)", ["c"], 1, 1),
        # Emptied golds are equal, but share no word.
        ("a", ["The"], 1, 0),
        ("", ["?"], 1, 0),
        ("", [" "], 0, 0),
        ("x", ["", "x"], 1, 1),
    ],
)
def test_squad(prediction, golds, exact, f1):
    assert scoring.squad_exact(prediction, golds) == exact
    assert scoring.squad_f1(prediction, golds) == pytest.approx(f1)


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("Yes.", ["yes"], 1),
        ("yes, it is", ["yes"], 0),
        ("no", ["no one"], 0),
        ("noanswer", ["noanswer here"], 0),
        ("no one", ["no man"], 1 / 2),
        ("no one", ["no", "no one"], 1),
        ("yes", [""], 0),
    ],
)
def test_hotpot_f1(prediction, golds, expected):
    assert scoring.hotpot_f1(prediction, golds) == pytest.approx(expected)


def squad_words(text):
    """The words that SQuAD v1.1's script compares, found without regular expressions."""
    kept = [c for c in text.lower() if not ("!" <= c <= "~" and not c.isalnum())]
    runs = ["".join(run) for _, run in itertools.groupby(kept, str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


SQUAD_PIECES = ["the", "The", "a", "An", "cat", "yes", "no", "noanswer", ".", "_", "–", "’", "É", "Ⅷ", "İ", "²", "\n"]
squad_texts = st.lists(st.sampled_from([*SQUAD_PIECES, " ", " "]) | st.characters(), max_size=15).map("".join)


@hypothesis.settings(few_examples, max_examples=500)
@hypothesis.given(squad_texts, squad_texts.filter(str.strip))
def test_squad_agrees_with_another_writing_of_its_script(prediction, gold):
    predicted, wanted = squad_words(prediction), squad_words(gold)
    assert scoring.squad_exact(prediction, [gold]) == (predicted == wanted)
    common = sum(min(predicted.count(word), wanted.count(word)) for word in set(wanted))
    precision, recall = common / max(len(predicted), 1), common / max(len(wanted), 1)
    f1 = 2 * precision * recall / (precision + recall) if common else 0
    assert scoring.squad_f1(prediction, [gold]) == pytest.approx(f1)
    strict = predicted != wanted and any(words in (["yes"], ["no"], ["noanswer"]) for words in (predicted, wanted))
    assert scoring.hotpot_f1(prediction, [gold]) == pytest.approx(0 if strict else f1)


# --------------------------------------------------------------------------------------
# Laws and bad input
# --------------------------------------------------------------------------------------


@few_examples
@hypothesis.given(metric_names, answers, st.lists(answers, min_size=1, max_size=3))
def test_every_score_lies_between_0_and_1(metric, prediction, golds):
    got = scoring.score(prediction, Question("?", tuple(golds), metric))
    assert isinstance(got, float)
    assert 0 <= got <= 1


@pytest.mark.parametrize("metric", every_metric)
def test_the_gold_itself_scores_1_and_something_else_0(metric):
    assert scoring.score("7", Question("?", ("7",), metric)) == 1
    assert scoring.score("green", Question("?", ("7",), metric)) == 0
    assert scoring.score("", Question("?", ("",), metric)) == 0
    assert scoring.score("\n", Question("?", (" ", "\t"), metric)) == 0


# What takes quadratic time where a pattern is tried at every place; each would then take many seconds.
@pytest.mark.parametrize(
    "text",
    ["answer:" * 9_000, r"\boxed{" * 9_000, "the " * 9_000, "y" * 99_000, "7," * 9_000, ";" * 99_000, "\n" * 99_000],
    ids=short,
)
@pytest.mark.parametrize("metric", every_metric)
def test_long_texts_are_scored_soon(metric, text):
    assert 0 <= scoring.score(text, Question("?", (text, "x"), metric)) <= 1


@few_examples
@hypothesis.given(answers, st.lists(answers, min_size=1, max_size=3))
def test_the_stricter_the_lower(prediction, golds):
    assert scoring.exact(prediction, golds) <= scoring.substring(prediction, golds)
    assert scoring.exact(prediction, golds) <= scoring.token_f1(prediction, golds)
    assert scoring.answer_substring(prediction, golds) <= scoring.parsed_substring(prediction, golds)
    assert scoring.squad_exact(prediction, golds) <= scoring.parsed_exact(prediction, golds)
    assert scoring.hotpot_f1(prediction, golds) <= scoring.squad_f1(prediction, golds)
    assert scoring.all_elements(prediction, golds) <= scoring.keyword_list(prediction, golds)


@few_examples
@hypothesis.given(
    st.sampled_from(sorted(set(scoring.METRICS) - FIRST_GOLD_ONLY - set(STEMMED))),
    answers,
    st.permutations(["7", "a cat", "?"]),
)
def test_order_of_golds_does_not_matter(metric, prediction, golds):
    assert scoring.METRICS[metric](prediction, golds) == scoring.METRICS[metric](prediction, sorted(golds))


def test_bad_questions():
    judged = re.escape(", ".join(scoring.JUDGED))
    with pytest.raises(ValueError, match=rf"Question\.metric must be one of all_elements, .*{judged}; got 'rouge'"):
        scoring.score("x", Question("?", ("x",), "rouge"))
    with pytest.raises(ValueError, match=r"Question\.answers must hold at least one gold answer.*'Who\?'"):
        scoring.score("x", Question("Who?", ()))


@pytest.mark.parametrize("metric", scoring.JUDGED)
def test_what_a_language_model_decides_is_not_scored_here(metric):
    assert metric not in scoring.METRICS
    with pytest.raises(ValueError, match=f"metric='{metric}' is decided by a language model"):
        scoring.score("x", Question("?", ("x",), metric))


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
