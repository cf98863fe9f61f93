"""The frozen reader: questions with evidence in, answers out. Knows nothing of memories or rewards."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from finemem_jax import prompts, tokenizer, workers
from finemem_jax.episode import Operation
from finemem_jax.tokenizer import EncodedChat, Tokenizer
from finemem_jax.workers import Worker


@dataclasses.dataclass(frozen=True)
class Query:
    """A question and the texts it may be answered from, best first."""

    question: str
    evidence: tuple[str, ...]


# Answers every query, in order. Raises when a machine failed; a bad answer is still an answer.
AnswerFn = Callable[[Sequence[Query]], list[str]]
# Completes prompts with token ids. Reading needs no more of a sampler than this.
Generator = Worker[EncodedChat, tuple[int, ...]]
# Says of operations whether they were worth writing, in order; None where it comes to no verdict.
JudgeFn = Callable[[Sequence[Operation]], list[bool | None]]


def language_model(
    generator: Generator, tokens: Tokenizer, num_examples: int, cite: bool = False
) -> Worker[Query, str]:
    """A reader that is a language model with this tokenizer. Equal queries are put to it once.

    Rollouts of a group often hold the same facts, and early on hold nothing at all.

    Args:
        cite: Have it name the notes it answers from (`prompts.split_citations` reads that).
    """

    before = functools.partial(prompt, tokens, num_examples=num_examples, cite=cite)
    return workers.Once(workers.Mapped(generator, before, functools.partial(_reply, tokens)))


def prompt(tokens: Tokenizer, query: Query, num_examples: int, cite: bool = False) -> EncodedChat:
    """What a language model is asked."""
    return tokenizer.encode_chat(tokens, prompts.reader(query.evidence, query.question, num_examples, cite=cite))


def evidence(cite: bool = False) -> AnswerFn:
    """A reader without a model: its answer is what was retrieved, word for word, best item first.

    So a score says whether the gold answer stands in the evidence: for quick work, and for tests.

    Args:
        cite: Answer with the best item alone, and name it.
    """

    def answer(queries: Sequence[Query]) -> list[str]:
        if cite:
            return [f"{query.evidence[0]} [1]" if query.evidence else "" for query in queries]
        return ["\n".join(query.evidence) for query in queries]

    return answer


def content_judge(generator: Generator, tokens: Tokenizer) -> JudgeFn:
    """A judge of what was written that is a language model: Mem-alpha's content reward (2509.25911)."""

    def judge(operations: Sequence[Operation]) -> list[bool | None]:
        chats = [tokenizer.encode_chat(tokens, prompts.judge(operation)) for operation in operations]
        return [prompts.verdict(_reply(tokens, ids)) for ids in workers.work(generator, chats)]

    return judge


def _reply(tokens, ids):
    return tokens.decode(tokenizer.strip_end(tokens, ids)).strip()
