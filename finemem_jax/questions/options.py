"""Says how chunk questions are made: the settings, and the chats that follow from them."""

from __future__ import annotations

import dataclasses

from finemem_jax.config.sections import Questions
from finemem_jax.questions import prompts
from finemem_jax.reading import scoring
from finemem_jax.types import Chat, Chunk, Question


@dataclasses.dataclass(frozen=True)
class QuestionOptions(Questions):
    """The settings `questions`, and what else decides which questions are made.

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

    def existing(self, chunk: Chunk) -> tuple[Question, ...]:
        """Returns the questions that a chunk has already, where they stay."""
        return chunk.questions if self.keep_existing else ()

    def generator_chat(self, text: str, turn: int) -> Chat:
        """Asks the generator about a chunk with this text in round `turn`, from 1."""
        messages = prompts.generator(text, self.proposals, self.num_examples, system=self.generator.system)
        return Chat(tuple(messages), self.proposal_tokens, self.temperature, self.seed + turn - 1)

    def verifier_chat(self, text: str, question: str) -> Chat:
        """Asks the verifier about a chunk with this text."""
        messages = prompts.verifier(text, question, self.num_examples, system=self.verifier.system)
        return Chat(tuple(messages), self.answer_tokens)

    def closed_book_chat(self, question: str) -> Chat:
        """Asks the verifier without the chunk."""
        messages = prompts.closed_book(question, self.num_examples, system=self.closed_book_system)
        return Chat(tuple(messages), self.answer_tokens)
