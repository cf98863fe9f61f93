"""The frozen reader: questions with evidence in, answers out. Knows nothing of memories or rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from finemem_jax import prompts, tokenizer
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


def language_model(generate: GenerateFn, tokens: Tokenizer, num_examples: int) -> AnswerFn:
    """A reader that is a language model with this tokenizer."""

    def answer(queries: Sequence[Query]) -> list[str]:
        chats = [
            tokenizer.encode_chat(tokens, prompts.reader(query.evidence, query.question, num_examples))
            for query in queries
        ]
        return [tokens.decode(tokenizer.strip_end(tokens, ids)).strip() for ids in generate(chats)]

    return answer


def once_each(answer: AnswerFn) -> AnswerFn:
    """Asks equal queries once. Rollouts of a group often hold the same facts, and early on hold nothing at all."""

    def deduplicated(queries: Sequence[Query]) -> list[str]:
        distinct = list(dict.fromkeys(queries))
        answers = dict(zip(distinct, answer(distinct), strict=True))
        return [answers[query] for query in queries]

    return deduplicated
