"""Answers questions from evidence: the frozen reader. Knows nothing of memories or rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from finemem_jax.clients import chat as chat_lib
from finemem_jax.clients.chat import LanguageModel
from finemem_jax.config import sections
from finemem_jax.reading import prompts
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import Chat, Likelihood, Question


@dataclasses.dataclass(frozen=True)
class Query:
    """A question and the texts it may be answered from, best first."""

    question: str
    evidence: tuple[str, ...]


# Answers every query, in order. Raises when a machine failed; a bad answer is still an answer.
AnswerFn = Callable[[Sequence[Query]], list[str]]
# The same, query by query.
Reader = Worker[Query, str]


@dataclasses.dataclass(frozen=True)
class LikelihoodQuery:
    """Asks how likely these answers are to a question with some evidence.

    Attributes:
        golds: Any of them is right.
        choices: All answers that are possible, the right ones included or not; () for an open question.
    """

    query: Query
    golds: tuple[str, ...]
    choices: tuple[str, ...] = ()


LikelihoodScorer = Worker[LikelihoodQuery, Likelihood]


def likelihood_query(question: Question, evidence: Sequence[str]) -> LikelihoodQuery:
    """Asks for the likelihood of a question's gold answers."""
    query = Query(question.prompt, tuple(evidence))
    # Where the question asks for a box, the reader is not asked for a bare label.
    boxed = prompts.BOXED in question.prompt
    golds, choices = (tuple(map(_in_box, x)) if boxed else x for x in (question.answers, question.choices))
    return LikelihoodQuery(query, golds, choices)


def _in_box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def language_model(model: LanguageModel, settings: sections.Reader, cite: bool = False) -> Reader:
    """Makes a reader of a language model. Equal queries are put to it once.

    Rollouts of a group often hold the same facts, and early on hold nothing at all.

    Args:
        cite: Have it name the notes it answers from (`prompts.split_citations` reads that).
    """
    return workers.Memoized(workers.Transformed(model, lambda query: to_chat(query, settings, cite), _answer))


def to_chat(query: Query, settings: sections.Reader, cite: bool = False) -> Chat:
    """Writes what a language model is asked; arguments as of `language_model`."""
    messages = prompts.reader(query.evidence, query.question, settings.num_examples, system=settings.system, cite=cite)
    return Chat(tuple(messages), settings.max_new_tokens, settings.temperature)


def evidence(cite: bool = False) -> AnswerFn:
    """Makes a reader without a model: its answer is what was retrieved, word for word, best item first.

    So a score says whether the gold answer stands in the evidence: for quick work, and for tests.

    Args:
        cite: Answer with the best item alone, and name it.
    """

    def answer(queries: Sequence[Query]) -> list[str]:
        if cite:
            return [f"{query.evidence[0]} [1]" if query.evidence else "" for query in queries]
        return ["\n".join(query.evidence) for query in queries]

    return answer


def _answer(reply: str) -> str:
    # Thinking that never came to an end is no answer.
    return (chat_lib.after_thinking(reply) or "").strip()
