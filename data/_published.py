"""What a published data source is called, what it tests, and how its questions are to be answered, in our own words.

Knows nothing of files.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from finemem_jax.reading import dataset_metrics as source_rules
from finemem_jax.types import Question, StreamSpec

# Patterns of a row's data source, as in `source_rules.SOURCES`.
_COMPETENCIES: Mapping[str, str] = {
    "squad": "AR",
    "hotpotqa": "AR",
    "perltqa": "AR",
    "lme_train": "AR",
    "ruler_*": "AR",
    "longmemeval_s*": "AR",
    "eventqa_*": "AR",
    "infbench_qa*": "LRU",
    "pubmed*": "TTL",
    "icl_*": "TTL",
    "ttl_train*": "TTL",
    "recsys_*": "TTL",
    "booksum": "LRU",
    "infbench_sum*": "LRU",
    "detective*": "LRU",
    "factconsolidation_*": "CR",
}

_BOXED = (
    "The notes hold labelled examples, or rules for the labels, of a classification. Give the label of the following "
    "as \\boxed{n}, where n is its number."
)
_SUMMARY = "From the notes about the book, write a full summary: who takes part, what happens, where and why."
# For streams as Mem-alpha made them, whose questions do not say so themselves.
MEMALPHA: Mapping[str, str] = {
    "pubmed*": _BOXED,
    "icl_*": _BOXED,
    "ttl_train*": _BOXED,
    "booksum": _SUMMARY,
    "infbench_sum*": _SUMMARY,
    "infbench_qa*": "Answer as briefly as possible.",
}
# For MemoryAgentBench itself.
MEMORYAGENTBENCH: Mapping[str, str] = {
    **MEMALPHA,
    "ruler_*": "Give the answer alone, without any other words.",
    "longmemeval_s*": "Answer from the past conversations, in a short phrase.",
    "eventqa_*": "Which of the events named comes next in the story? Give that event alone, as it is written.",
    "factconsolidation_*": (
        "The notes hold numbered facts. Where two contradict each other, the one with the larger number is newer and "
        "true. Answer in a few words."
    ),
    "detective*": "Give the answer alone, in the form that the question asks for.",
}


def competency(source: str) -> str:
    """Returns the competency that a data source tests, "" for an unknown one."""
    return next((tag for pattern, tag in _COMPETENCIES.items() if fnmatch.fnmatchcase(source, pattern)), "")


def question(
    text: str,
    answers: tuple[str, ...],
    source: str,
    spec: StreamSpec,
    instructions: Mapping[str, str],
    kind: str = "",
) -> Question:
    """Returns a question about a published data source, with its metric and instruction.

    Raises:
        ValueError: no rule is known for the source.
    """
    told = (instruction for pattern, instruction in instructions.items() if fnmatch.fnmatchcase(source, pattern))
    return Question(
        text=text,
        answers=answers,
        metric=source_rules.metric_of(source, spec.rules),
        kind=kind or source,
        instruction=next(told, ""),
    )
