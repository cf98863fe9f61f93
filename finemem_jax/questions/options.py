"""What is asked for where chunk questions are made: settings, and the chats that follow from them."""

from __future__ import annotations

import dataclasses

from finemem_jax.config.sections import Questions
from finemem_jax.questions import prompts
from finemem_jax.reading import scoring
from finemem_jax.types import Chat, Chunk, Question


@dataclasses.dataclass(frozen=True)
class QuestionOptions(Questions):
    """What is asked for, and what is kept: the section `questions`, and what goes with it.

    Attributes:
        seed: Of the generator's first round; each further one adds 1.
        samples: Examples of what was kept, and of what was rejected for each reason, in the report.
        chunks_in_flight: Chunks that are worked on at the same time.

    Raises:
        ValueError: naming the field, what it must be, and its value.
    """

    seed: int = 0
    samples: int = 5
    chunks_in_flight: int = 256

    def __post_init__(self):
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
    system = options.generator.system or prompts.GENERATOR_SYSTEM
    messages = prompts.generator(text, options.proposals, options.num_examples, system)
    return Chat(tuple(messages), options.proposal_tokens, options.temperature, options.seed + turn - 1)


def verifier_chat(options: QuestionOptions, text: str, question: str) -> Chat:
    """What the verifier is asked about a chunk with this text."""
    system = options.verifier.system or prompts.VERIFIER_SYSTEM
    messages = prompts.verifier(text, question, options.num_examples, system)
    return Chat(tuple(messages), options.answer_tokens)


def closed_book_chat(options: QuestionOptions, question: str) -> Chat:
    """What the verifier is asked without the chunk."""
    system = options.closed_book_system or prompts.CLOSED_BOOK_SYSTEM
    return Chat(tuple(prompts.closed_book(question, options.num_examples, system)), options.answer_tokens)


def existing(chunk: Chunk, options: QuestionOptions) -> tuple[Question, ...]:
    """The questions that a chunk has already, where they stay."""
    return chunk.questions if options.keep_existing else ()
