"""What is asked for where chunk questions are made: settings, and the chats that follow from them."""

from __future__ import annotations

import dataclasses

from finemem_jax.questions import prompts
from finemem_jax.reading import scoring
from finemem_jax.types import Chat, Chunk, Question


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    """What is asked for, and what is kept. The fields of the config's section `questions`.

    Attributes:
        keep: K_c, at most so many questions are kept for each chunk (paper: 5).
        proposals: Questions that the generator is asked for at a time.
        rounds: How often it is asked about one chunk at most.
        temperature: Of the generator. The verifier is greedy.
        seed: Of the generator's first round; each further one adds 1.
        max_answer_words: Longest answer.
        duplicate: Two questions are near-duplicates from this F1 of their words on; see `near_duplicates`.
        metric: Scores the verifier's answers, and later the reader's; a key of `scoring.METRICS`.
        min_score: From this score on an answer of the verifier counts as right.
        closed_book: Drop questions that the verifier can answer without the chunk.
        keep_existing: Keep the questions that chunks have already, and only fill up to `keep`.
        num_examples: Worked examples in every prompt, 0 or 1.
        proposal_tokens: Longest reply of the generator.
        answer_tokens: Longest reply of the verifier. Short: one that repeats the chunk holds every answer.
        generator_system, verifier_system, closed_book_system: Replace the system messages in `prompts` if not empty.
        max_tokens: Budget of a split, for all that goes in and out of both workers; 0 for none.
        max_money: Budget in the currency of the prices; 0 for none.
        samples: Examples of what was kept, and of what was rejected for each reason, in the report.
        chunks_in_flight: Chunks that are worked on at the same time.

    Raises:
        ValueError: naming the field, what it must be, and its value.
    """

    keep: int = 5
    proposals: int = 10
    rounds: int = 2
    temperature: float = 0.7
    seed: int = 0
    max_answer_words: int = 5
    duplicate: float = 0.8
    metric: str = "substring"
    min_score: float = 0.5
    closed_book: bool = False
    keep_existing: bool = False
    num_examples: int = 1
    proposal_tokens: int = 1_024
    answer_tokens: int = 32
    generator_system: str = ""
    verifier_system: str = ""
    closed_book_system: str = ""
    max_tokens: int = 0
    max_money: float = 0.0
    samples: int = 5
    chunks_in_flight: int = 256

    def __post_init__(self):
        at_least_one = ("keep", "proposals", "rounds", "max_answer_words", "proposal_tokens", "answer_tokens")
        least = dict.fromkeys((*at_least_one, "chunks_in_flight"), 1)
        least |= dict.fromkeys(("temperature", "max_tokens", "max_money", "samples"), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"questions.{name} must be at least {low}, got {getattr(self, name)}.")
        for name in ("duplicate", "min_score"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"questions.{name} must lie in (0, 1], got {getattr(self, name)}.")
        if self.num_examples not in (0, 1):
            raise ValueError(f"questions.num_examples must be 0 or 1, got {self.num_examples}.")
        if self.metric not in scoring.METRICS:
            judged = " (the verifier's answers are scored by rule, not judged)" * (self.metric in scoring.JUDGED)
            raise ValueError(
                f"questions.metric must be one of {', '.join(sorted(scoring.METRICS))}{judged}; got {self.metric!r}."
            )
        # Some need a package: better known now than when the first answer comes.
        scoring.METRICS[self.metric]("1", ("1",))
        if self.rounds > 1 and self.temperature == 0:
            raise ValueError(
                f"questions.temperature must be above 0 for questions.rounds={self.rounds}: greedy rounds are all "
                "alike. Raise it, or set questions.rounds=1."
            )
        if self.proposals * self.rounds < self.keep:
            raise ValueError(
                f"questions.proposals={self.proposals} in each of questions.rounds={self.rounds} can never make "
                f"questions.keep={self.keep}; raise one of the first two."
            )


def generator_chat(options: QuestionOptions, text: str, turn: int) -> Chat:
    """What the generator is asked about a chunk with this text in round `turn`, from 1."""
    system = options.generator_system or prompts.GENERATOR_SYSTEM
    messages = prompts.generator(text, options.proposals, options.num_examples, system)
    return Chat(tuple(messages), options.proposal_tokens, options.temperature, options.seed + turn - 1)


def verifier_chat(options: QuestionOptions, text: str, question: str) -> Chat:
    """What the verifier is asked about a chunk with this text."""
    system = options.verifier_system or prompts.VERIFIER_SYSTEM
    messages = prompts.verifier(text, question, options.num_examples, system)
    return Chat(tuple(messages), options.answer_tokens)


def closed_book_chat(options: QuestionOptions, question: str) -> Chat:
    """What the verifier is asked without the chunk."""
    system = options.closed_book_system or prompts.CLOSED_BOOK_SYSTEM
    return Chat(tuple(prompts.closed_book(question, options.num_examples, system)), options.answer_tokens)


def existing(chunk: Chunk, options: QuestionOptions) -> tuple[Question, ...]:
    """The questions that a chunk has already, where they stay."""
    return chunk.questions if options.keep_existing else ()
