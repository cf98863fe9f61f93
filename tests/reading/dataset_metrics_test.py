"""Tests of finemem_jax/reading/dataset_metrics.py: which published source has which metric."""

import fnmatch

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
