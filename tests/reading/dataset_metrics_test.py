"""Tests of finemem_jax/reading/dataset_metrics.py: which published source has which metric."""

import fnmatch
import importlib.util

import pytest

from finemem_jax.reading import dataset_metrics, scoring

# Published names: ours, published, published in training.
NAMES = {
    "squad": ("contains", "contains", "contains"),
    "hotpotqa": ("contains", "contains", "contains"),
    "perltqa": ("parts", "parts_cased", "parts_cased"),
    "booksum": ("keyword_recall", "keyword_recall", "keyword_recall_comma"),
    "pubmed-rct": ("boxed", "boxed", "boxed"),
    "ttl_train": ("boxed", "boxed", "boxed"),
    "icl_nlu_8296shot_balance": ("boxed", "boxed", "boxed"),
    "icl_trec_coarse_6600shot_balance": ("boxed", "boxed", "boxed"),
    "icl_trec_fine_6400shot_balance": ("boxed", "boxed", "boxed"),
    "icl_banking77_5900shot_balance": ("boxed", "boxed", "boxed"),
    "icl_clinic150_7050shot_balance": ("boxed", "boxed", "boxed"),
    "lme_train": ("judge_longmemeval", "judge_preference", "judge_preference"),
    "longmemeval_s*": ("judge_longmemeval", "judge_preference", "parsed_substring"),
    "infbench_sum_eng_shots2": ("keyword_list", "keyword_list", "parsed_rouge_l"),
    "infbench_qa_eng_shots2": ("parsed_rouge_l", "parsed_rouge_l", "parsed_rouge_l"),
    "ruler_qa1_197K": ("parsed_substring", "parsed_substring", "parsed_substring"),
    "ruler_qa2_421K": ("parsed_substring", "parsed_substring", "parsed_substring"),
    "factconsolidation_mh_262k": ("parsed_substring", "parsed_substring", "parsed_substring"),
    "eventqa_full": ("all_elements", "all_elements", "all_elements"),
    "detectiveqa": ("parsed_exact", "boxed_text", "boxed_text"),
    "detective_qa": ("parsed_exact", "parsed_substring", "parsed_substring"),
}


@pytest.mark.parametrize("name", NAMES)
def test_metric_of(name):
    got = tuple(dataset_metrics.metric_of(name, rules) for rules in ("ours", "published", "published_training"))
    assert got == NAMES[name]


def test_each_name_fits_one_row_and_each_row_has_a_name():
    fitting = [[pattern for pattern in dataset_metrics.SOURCES if fnmatch.fnmatchcase(name, pattern)] for name in NAMES]
    assert all(len(patterns) == 1 for patterns in fitting)
    assert {pattern for (pattern,) in fitting} == set(dataset_metrics.SOURCES)


def test_rows_name_metrics_that_exist():
    named = {metric for rule in dataset_metrics.SOURCES.values() for metric in vars(rule).values()}
    assert named <= set(scoring.METRICS) | set(scoring.JUDGED)


@pytest.mark.parametrize("name", ["recsys_redial_full", "ruler_niah_multikey_1", "squad2", "SQuAD", "", "article_1"])
def test_unknown_sources(name):
    with pytest.raises(ValueError, match=rf"data source '{name}', only for squad, hotpotqa, .*detective_qa\*; set"):
        dataset_metrics.metric_of(name, "ours")


def test_unknown_rules():
    with pytest.raises(ValueError, match="rules must be one of ours, published, published_training; got 'paper'"):
        dataset_metrics.metric_of("squad", "paper")


@pytest.mark.parametrize(
    "prediction, golds, mended, published",
    [
        ("oslo in may", ["Oslo; Bergen"], 1 / 2, 1 / 2),
        # The published bug: parts are lowercased, the prediction is not.
        ("Oslo in May", ["Oslo; Bergen"], 1 / 2, 0),
        ("Oslo, bergen", ["Oslo;Bergen"], 1, 1 / 2),
        # Without ";" both ignore case.
        ("A trip to OSLO", ["Oslo"], 1, 1),
        ("ÜBER Zürich", ["zürich; über"], 1, 0),
        ("a+b? (sure)", ["A+B?; (sure); .*"], 2 / 3, 2 / 3),
        # Empty parts are none.
        ("x", ["x;; "], 1, 1),
        ("x", [";"], 0, 0),
        ("x", [" ; "], 0, 0),
        ("x", [""], 0, 0),
        ("y", ["x", "y"], 0, 0),  # First gold only.
        ("", ["x; y"], 0, 0),
    ],
)
def test_parts(prediction, golds, mended, published):
    assert scoring.parts(prediction, golds) == pytest.approx(mended)
    assert scoring.parts_cased(prediction, golds) == pytest.approx(published)


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("Ana met a WHALE in Oslo", ["ana", "Whale", "Bob", "the sea"], 2 / 4),
        ("Anabel", ["Ana"], 1),  # Plain containment.
        ("1,204 ships", ["1,204", "whale, sea"], 1 / 2),  # Golds are not split.
        ("ÉMILE (n.)", ["émile", "(n.)", ".*"], 2 / 3),
        ("x", ["x", "", " "], 1),
        ("x x", ["x", "x", "y"], 2 / 3),
        ("x", ["", " "], 0),
        ("", ["x"], 0),
    ],
)
def test_keyword_list_and_all_elements(prediction, golds, expected):
    assert scoring.keyword_list(prediction, golds) == pytest.approx(expected)
    assert scoring.all_elements(prediction, golds) == (expected == 1)


@pytest.mark.parametrize(
    "prediction, golds, by_comma_and_space, by_comma",
    [
        ("Ana met a whale", ["Ana, Whale, Bob, the sea"], 2 / 4, 2 / 4),
        # A comma without a space: one keyword or two.
        ("Ana met a whale", ["Ana,Whale"], 0, 1),
        ("1,204 ships", ["1,204, whale"], 1 / 2, 2 / 3),
        ("x", ["x,,  ,"], 0, 1),
        ("été", ["ÉTÉ, hiver"], 1 / 2, 1 / 2),
        ("(x|y)", ["(x|y), x.y"], 1 / 2, 1 / 2),
        ("y", ["x", "y"], 0, 0),  # First gold only.
        ("x", [""], 0, 0),
        ("x", [","], 0, 0),
    ],
)
def test_splits_of_keywords(prediction, golds, by_comma_and_space, by_comma):
    assert scoring.keyword_recall(prediction, golds) == pytest.approx(by_comma_and_space)
    assert scoring.keyword_recall_comma(prediction, golds) == pytest.approx(by_comma)


@pytest.mark.parametrize(
    "prediction, golds, whole, parsed",
    [
        ("It is the New-York\nsurely", ["newyork"], 1, 1),
        ("a party", ["art"], 1, 1),  # Not whole words.
        ("label 11", ["1"], 1, 1),
        # The first line, or what follows "Answer:" on its line.
        ("I think.\nOslo", ["Oslo"], 1, 0),
        ("I think.\nANSWER: Oslo\nor Bergen", ["oslo"], 1, 1),
        ("Oslo. Answer: Bergen", ["Oslo"], 1, 0),
        ("Answer: Bergen\nAnswer: Oslo", ["Oslo"], 1, 0),
        ("\nOslo", ["Oslo"], 1, 0),
        ("Bergen", ["Oslo", "Bergen"], 1, 1),
        ("Cats of the Nile", ["cats of Nile"], 1, 1),
        # Only ASCII punctuation goes, and no characters are composed.
        ("“Oslo–Bergen”", ["oslobergen"], 0, 0),
        ("Cafe\u0301", ["Caf\u00e9"], 0, 0),
        ("$5.00 [net]", ["5.00 (net)"], 1, 1),
        # Golds that normalising empties; published, they are in everything.
        ("A", ["A"], 0, 0),
        ("what?", ["?"], 0, 0),
        ("x", [""], 0, 0),
        ("", [" "], 0, 0),
    ],
)
def test_parsed_and_answer_substring(prediction, golds, whole, parsed):
    assert scoring.parsed_substring(prediction, golds) == whole
    assert scoring.answer_substring(prediction, golds) == parsed


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        ("The Oslo.", ["oslo"], 1),
        ("Answer: Oslo", ["Oslo"], 1),
        ("So:\nanswer: ANSWER:  Oslo!\nor so", ["Oslo"], 1),
        ("Oslo\nbecause of the fjord", ["Oslo"], 1),
        ("Oslo, Norway", ["Oslo"], 0),
        ("label: 43", ["43"], 0),
        # The whole prediction counts too.
        ("Oslo\nBergen", ["Oslo Bergen"], 1),
        ("Bergen", ["Oslo", "Bergen"], 1),
        ("Größe", ["GRÖße"], 1),
        ("Answer: .*", ["Oslo"], 0),
        ("Answer:", ["Oslo"], 0),
        ("Answer:", [""], 0),
    ],
)
def test_parsed_exact(prediction, golds, expected):
    assert scoring.parsed_exact(prediction, golds) == expected


@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        (r"So \boxed{B. The cook}, or \boxed{A}", ["B. The cook"], 1),
        (r"\boxed{ B }", ["B"], 1),
        ("B\n", [" B"], 1),
        (r"\boxed{b}", ["B"], 0),
        (r"\boxed{B.}", ["B"], 0),
        ("It is B", ["B"], 0),
        (r"\boxed{B}", ["A", "B"], 1),
        (r"\boxed{é}", ["é"], 1),
        (r"\boxed{(a|b)*}", ["(a|b)*"], 1),
        (r"\boxed{B", ["B"], 0),
        (r"\boxed{}", [""], 0),
        ("", [" "], 0),
    ],
)
def test_boxed_text(prediction, golds, expected):
    assert scoring.boxed_text(prediction, golds) == expected


@pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None, reason="Porter stemming needs the rouge-score package"
)
@pytest.mark.parametrize(
    "prediction, golds, expected",
    [
        # Of the whole, 2 * 2 / (4 + 2); of the first line, 1.
        ("Cats running\nfrom dogs", ["cat runs"], 1),
        # Of the whole, 2 * 2 / (5 + 2); after "Answer:", 1.
        ("I see.\nAnswer: cats running", ["cat runs"], 1),
        # Of the whole, 2 * 3 / (3 + 3); of the first line, 2 * 1 / (1 + 3).
        ("one\ntwo\nthree", ["one two three"], 1),
        ("one", ["two", "one two"], 2 / 3),
        ("", [""], 0),
    ],
)
def test_parsed_rouge_l(prediction, golds, expected):
    assert scoring.parsed_rouge_l(prediction, golds) == pytest.approx(expected)
