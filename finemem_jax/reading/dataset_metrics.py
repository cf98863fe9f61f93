"""Names the metric that each published data source is scored by: as published, or with the bugs mended."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class SourceRule:
    """The metric of a data source under each set of rules.

    Attributes:
        ours: As published, with the bugs mended.
        published: Of Mem-alpha's evaluation script.
        published_training: Of Mem-alpha's training reward.
    """

    ours: str
    published: str
    published_training: str


# A key is a data_source of Mem-alpha or MemoryAgentBench, or a pattern of them ("longmemeval_s*" is also a name). At
# most one key fits a name. For what it does not list itself, Mem-alpha calls MemoryAgentBench's router in evaluation as
# in training, so those rows say the same twice.
SOURCES: Mapping[str, SourceRule] = {
    "squad": SourceRule("contains", "contains", "contains"),
    "hotpotqa": SourceRule("contains", "contains", "contains"),
    "perltqa": SourceRule("parts", "parts_cased", "parts_cased"),
    "booksum": SourceRule("keyword_recall", "keyword_recall", "keyword_recall_comma"),
    "pubmed*": SourceRule("boxed", "boxed", "boxed"),
    # The router's own rule for these, `scoring.answer_substring`, is never reached: Mem-alpha sees to them first.
    "icl_*": SourceRule("boxed", "boxed", "boxed"),
    "ttl_train*": SourceRule("boxed", "boxed", "boxed"),
    "lme_train": SourceRule("judge_longmemeval", "judge_preference", "judge_preference"),
    # The training reward judges lme_train alone; this falls to the router's default.
    "longmemeval_s*": SourceRule("judge_longmemeval", "judge_preference", "parsed_substring"),
    "infbench_sum*": SourceRule("keyword_list", "keyword_list", "parsed_rouge_l"),
    "infbench_qa*": SourceRule("parsed_rouge_l", "parsed_rouge_l", "parsed_rouge_l"),
    "ruler_qa*": SourceRule("parsed_substring", "parsed_substring", "parsed_substring"),
    "factconsolidation_*": SourceRule("parsed_substring", "parsed_substring", "parsed_substring"),
    "eventqa_*": SourceRule("all_elements", "all_elements", "all_elements"),
    # The router looks for "detectiveqa" and so misses MemoryAgentBench's own spelling, for which its default is left.
    # Ours is MemoryAgentBench's own rule, as the question asks for no box.
    "detectiveqa*": SourceRule("parsed_exact", "boxed_text", "boxed_text"),
    "detective_qa*": SourceRule("parsed_exact", "parsed_substring", "parsed_substring"),
    # Left out: recsys_redial_full, whose recall@5 needs the list of all movies (the nearest by edit distance counts),
    # and ruler_niah*, on which the router fails.
}

RULES = tuple(field.name for field in dataclasses.fields(SourceRule))


def metric_of(source: str, rules: str) -> str:
    """Gives the name of a data source's metric, a key of `scoring.METRICS` or one of `scoring.JUDGED`.

    Args:
        source: A published name, e.g. "icl_nlu_8296shot_balance".
        rules: "ours", "published" or "published_training"; see `SourceRule`.

    Raises:
        ValueError: the source or the rules are unknown.
    """
    if rules not in RULES:
        raise ValueError(f"rules must be one of {', '.join(RULES)}; got {rules!r}.")
    for pattern, rule in SOURCES.items():
        if fnmatch.fnmatchcase(source, pattern):
            return getattr(rule, rules)
    raise ValueError(
        f"No rule is known for the data source {source!r}, only for {', '.join(SOURCES)}; "
        "set Question.metric of its questions in the data builder."
    )
