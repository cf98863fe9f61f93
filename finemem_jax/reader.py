"""The frozen reader: questions with evidence in, answers out. Knows nothing of memories or rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from finemem_jax import prompts, tokenizer
from finemem_jax.episode import Operation
from finemem_jax.tokenizer import EncodedChat, Tokenizer


@dataclasses.dataclass(frozen=True)
class Query:
    """A question and the texts it may be answered from, best first."""

    question: str
    evidence: tuple[str, ...]


# Answers every query, in order. Raises when a machine failed; a bad answer is still an answer.
AnswerFn = Callable[[Sequence[Query]], list[str]]
# Completes prompts with token ids. Reading needs no more of a sampler than this.
GenerateFn = Callable[[Sequence[EncodedChat]], list[tuple[int, ...]]]


# Says of operations whether they were worth writing, in order; None where it comes to no verdict.
JudgeFn = Callable[[Sequence[Operation]], list[bool | None]]


def language_model(generate: GenerateFn, tokens: Tokenizer, num_examples: int, cite: bool = False) -> AnswerFn:
    """A reader that is a language model with this tokenizer.

    Args:
        cite: Have it name the notes it answers from (`prompts.split_citations` reads that).
    """

    def answer(queries: Sequence[Query]) -> list[str]:
        return _replies(
            generate, tokens, [prompts.reader(q.evidence, q.question, num_examples, cite=cite) for q in queries]
        )

    return answer


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


def content_judge(generate: GenerateFn, tokens: Tokenizer) -> JudgeFn:
    """A judge of what was written that is a language model: Mem-alpha's content reward (2509.25911)."""

    def judge(operations: Sequence[Operation]) -> list[bool | None]:
        replies = _replies(generate, tokens, [prompts.judge(operation) for operation in operations])
        return [prompts.verdict(reply) for reply in replies]

    return judge


def _replies(generate, tokens, prompted):
    chats = [tokenizer.encode_chat(tokens, messages) for messages in prompted]
    return [tokens.decode(tokenizer.strip_end(tokens, ids)).strip() for ids in generate(chats)]


def once_each(answer: AnswerFn) -> AnswerFn:
    """Asks equal queries once. Rollouts of a group often hold the same facts, and early on hold nothing at all."""

    def deduplicated(queries: Sequence[Query]) -> list[str]:
        distinct = list(dict.fromkeys(queries))
        answers = dict(zip(distinct, answer(distinct), strict=True))
        return [answers[query] for query in queries]

    return deduplicated
