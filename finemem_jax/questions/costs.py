"""What making chunk questions takes, before anything is asked and while it is: tokens, money, budgets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from finemem_jax.config.sections import Prices
from finemem_jax.questions import options as question_options
from finemem_jax.questions import prompts
from finemem_jax.questions.options import QuestionOptions
from finemem_jax.types import Chat, Stream, StreamSource

# Of an answer of the verifier, where nothing is known yet.
_ANSWER_TOKENS = 6


class BudgetError(RuntimeError):
    """The budget is used up; the message says how far it came and how to go on."""


@dataclasses.dataclass
class Tokens:
    """What went into and came out of both workers. What a chat template adds around messages is not counted."""

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
    prices: Prices | None = None,
) -> Estimate:
    """What questions for these streams will take, before anything is asked.

    Args:
        count_tokens: Length of a text in tokens, for both workers.

    Raises:
        ValueError: there are no streams, or two with the same id.
    """
    prices, expected, most = prices or Prices(), Tokens(), Tokens()
    count, names, chunks, asked = counter(count_tokens), set(), 0, 0
    per_proposal = count_tokens(prompts.proposal_line(*prompts.GENERATOR_EXAMPLE[1][0]) + "\n")
    closed_book = options.closed_book * (count(question_options.closed_book_chat(options, "")) + per_proposal)
    replies = per_proposal * options.proposals, _ANSWER_TOKENS
    longest = options.proposal_tokens, options.answer_tokens
    for stream in (streams[i] for i in range(len(streams))):
        if stream.stream_id in names:
            raise ValueError(f"Two streams have the id {stream.stream_id!r}; ids must differ within a split.")
        names.add(stream.stream_id)
        chunks += len(stream.chunks)
        for chunk in stream.chunks:
            needed = options.keep - len(question_options.existing(chunk, options))
            if needed <= 0:
                continue
            asked += 1
            proposed = count(question_options.generator_chat(options, chunk.text, 1))
            verified = count(question_options.verifier_chat(options, chunk.text, "")) + per_proposal + closed_book
            each = proposed, verified, options.closed_book
            _add(expected, 1, min(2 * needed, options.proposals), *each, *map(min, replies, longest))
            _add(most, options.rounds, options.rounds * options.proposals, *each, *longest)
    if not names:
        raise ValueError("There are no streams to ask questions about; check the source and the number of streams.")
    return Estimate(len(names), chunks, asked, expected, expected.money(prices), most, most.money(prices))


def _add(tokens, rounds, num_verified, proposed, verified, is_closed_book, proposal_tokens, answer_tokens):
    tokens.generator_prompt += rounds * proposed
    tokens.generator_new += rounds * proposal_tokens
    tokens.verifier_prompt += num_verified * verified
    tokens.verifier_new += num_verified * answer_tokens * (1 + is_closed_book)


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
    remedy = "ask for fewer questions (questions.keep, questions.proposals) or of fewer streams"
    for name, value in (("max_tokens", estimated.expected.total), ("max_money", estimated.money)):
        limit = getattr(options, name)
        if limit and value > limit:
            raise ValueError(
                f"questions.{name}={limit:,} will not do: this is estimated to take {estimated}. Raise "
                f"questions.{name}, or {remedy}."
            )


def counter(count_tokens: Callable[[str], int]) -> Callable[[Chat], int]:
    """Counts the tokens of a chat's prompt; parts that come again are remembered."""
    count = functools.lru_cache(maxsize=1024)(count_tokens)
    return lambda chat: sum(count(part) for message in chat.messages for part in message.parts)
