"""Estimates what making chunk questions takes in tokens and money, and checks that against the budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from finemem_jax.config.sections import Prices
from finemem_jax.questions import prompts
from finemem_jax.questions.options import QuestionOptions
from finemem_jax.types import Chat, Stream, StreamSource

# Of an answer of the verifier, where nothing is known yet.
_ANSWER_TOKENS = 6


class BudgetError(RuntimeError):
    """The budget is used up; the message says how far it came and how to go on."""


@dataclasses.dataclass
class Tokens:
    """What went into and came out of both models. What a chat template adds around messages is not counted."""

    generator_prompt: int = 0
    generator_new: int = 0
    verifier_prompt: int = 0
    verifier_new: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def money(self, prices: Prices) -> float:
        """In the currency of the prices."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(prices), strict=True)
        return sum(tokens * price for tokens, price in pairs) / 1e6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What questions for some streams will take; `str()` says it in words.

    Attributes:
        streams, chunks: How many there are; `asked` of the chunks need questions.
        expected, money: If the assumptions hold, which `str()` names.
        most, most_money: If every round is needed, every proposal is verified, and every reply is as long as it may be.
    """

    streams: int
    chunks: int
    asked: int
    expected: Tokens
    money: float
    most: Tokens
    most_money: float

    def __str__(self) -> str:
        tokens = self.expected
        return (
            f"{tokens.total:,} tokens for {self.asked:,} of {self.chunks:,} chunks in {self.streams:,} streams "
            f"(generator {tokens.generator_prompt:,} in, {tokens.generator_new:,} out; verifier "
            f"{tokens.verifier_prompt:,} in, {tokens.verifier_new:,} out), money {self.money:,.2f}; at most "
            f"{self.most.total:,} tokens, money {self.most_money:,.2f}. Assumed: one round for each chunk, twice "
            "as many proposals verified as are needed, questions as long as the first of the prompt's example, "
            f"answers of {_ANSWER_TOKENS} tokens"
        )


def estimate(
    streams: Sequence[Stream] | StreamSource,
    options: QuestionOptions,
    count_tokens: Callable[[str], int],
    *,
    prices: Prices | None = None,
) -> Estimate:
    """Estimates what questions for these streams will take, before anything is asked.

    Args:
        count_tokens: Length of a text in tokens, for both models.

    Raises:
        ValueError: there are no streams, or two with the same id.
    """
    prices, expected, most = prices or Prices(), Tokens(), Tokens()
    count, names, chunks, asked = counter(count_tokens), set(), 0, 0
    per_proposal = count_tokens(prompts.proposal_line(*prompts.GENERATOR_EXAMPLE[1][0]) + "\n")
    closed_book = options.closed_book * (count(options.closed_book_chat("")) + per_proposal)
    # Tokens of a reply of the generator, and of the verifier.
    longest = options.proposal_tokens, options.answer_tokens
    typical = min(per_proposal * options.proposals, longest[0]), min(_ANSWER_TOKENS, longest[1])
    for stream in (streams[i] for i in range(len(streams))):
        if stream.stream_id in names:
            raise ValueError(f"Two streams have the id {stream.stream_id!r}; ids must differ within a split.")
        names.add(stream.stream_id)
        chunks += len(stream.chunks)
        for chunk in stream.chunks:
            needed = options.keep - len(options.existing(chunk))
            if needed <= 0:
                continue
            asked += 1
            proposing = count(options.generator_chat(chunk.text, 1))
            verifying = count(options.verifier_chat(chunk.text, "")) + per_proposal + closed_book
            for tokens, rounds, verified, (proposed, answered) in (
                (expected, 1, min(2 * needed, options.proposals), typical),
                (most, options.rounds, options.rounds * options.proposals, longest),
            ):
                tokens.generator_prompt += rounds * proposing
                tokens.generator_new += rounds * proposed
                tokens.verifier_prompt += verified * verifying
                tokens.verifier_new += verified * answered * (1 + options.closed_book)
    if not names:
        raise ValueError("There are no streams to ask questions about; check the source and the number of streams.")
    return Estimate(len(names), chunks, asked, expected, expected.money(prices), most, most.money(prices))


def check_budget(estimated: Estimate, options: QuestionOptions, prices: Prices) -> None:
    """Refuses what a budget will not do for.

    Raises:
        ValueError: naming the estimate and the setting.
    """
    if options.max_money and not any(dataclasses.astuple(prices)):
        raise ValueError(
            f"questions.max_money={options.max_money:g} cannot be kept to without prices; set "
            "questions.prices, or limit questions.max_tokens."
        )
    if name := exceeded(options, estimated.expected, estimated.money):
        raise ValueError(
            f"questions.{name}={getattr(options, name):,} will not do: this is estimated to take {estimated}. Raise "
            f"questions.{name}, or ask for fewer questions (questions.keep, questions.proposals) or of fewer streams."
        )


def exceeded(options: QuestionOptions, tokens: Tokens, money: float) -> str:
    """Names the first budget that is exceeded: "max_tokens", "max_money", or "" for none."""
    used = (("max_tokens", tokens.total), ("max_money", money))
    return next((name for name, value in used if 0 < getattr(options, name) < value), "")


def counter(count_tokens: Callable[[str], int]) -> Callable[[Chat], int]:
    """Counts the tokens of a chat's prompt; parts that come again are remembered."""
    count = functools.lru_cache(maxsize=1024)(count_tokens)
    return lambda chat: sum(count(part) for message in chat.messages for part in message.parts)
