"""Says of each published data source what it tests, and tells in our own words how its questions are to be answered.

Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping

from finemem_jax.reading import dataset_metrics
from finemem_jax.types import Question

# Patterns of a row's data source, as in `dataset_metrics.SOURCES`.
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
    return _first_match(_COMPETENCIES, source)


def _first_match(values: Mapping[str, str], source: str) -> str:
    """Returns the value under the first pattern that fits a data source, "" where none does."""
    return next((value for pattern, value in values.items() if fnmatch.fnmatchcase(source, pattern)), "")


@dataclasses.dataclass(frozen=True)
class Asker:
    """Makes questions about published data sources.

    Attributes:
        rules: `StreamSpec.rules`, by which they are scored.
        instructions: `MEMALPHA` or `MEMORYAGENTBENCH`.
    """

    rules: str
    instructions: Mapping[str, str]

    def question(self, source: str, text: str, answers: tuple[str, ...], *, kind: str = "") -> Question:
        """Returns a question with the metric and the instruction of its source.

        Raises:
            ValueError: no rule is known for the source.
        """
        metric = dataset_metrics.metric_of(source, self.rules)
        told = _first_match(self.instructions, source)
        return Question(text=text, answers=answers, metric=metric, kind=kind or source, instruction=told)
