"""Ways to answer questions about streams, trained managers and what they are compared with, all by the same reader.

A method reads streams and answers their questions. What it may keep of a stream, and how it is asked, is all that
tells one from another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from finemem_jax.clients import chat
from finemem_jax.clients.chat import LanguageModel
from finemem_jax.memory import retrieval
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.prompts import _chunk_part
from finemem_jax.memory.retrieval import EmbedFn
from finemem_jax.reading import qa
from finemem_jax.reading.judges import AnswerJudge
from finemem_jax.reading.qa import PendingAnswer, QuestionAnswering
from finemem_jax.reading.reader import AnswerFn, Reader
from finemem_jax.runtime import workers
from finemem_jax.types import (
    Answer,
    Chat,
    MemoryItem,
    Message,
    Stream,
    Trajectory,
)

# A sentence ends, or a line.
_PIECE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a method made of a stream.

    Attributes:
        answers: To the global questions.
        chunk_answers: To the questions of each chunk, from what was known after it; () where they were not asked.
        memory_tokens: Length of what it kept, in the manager's tokens.
        operations: How many times it wrote, valid or not.
        valid_operations: How many of these changed the memory, or said rightly that nothing needs to be.
        reader_calls: How many questions were put to the reader.
    """

    stream: Stream
    answers: tuple[Answer, ...]
    chunk_answers: tuple[tuple[Answer, ...], ...]
    memory_tokens: float
    operations: int
    valid_operations: int
    reader_calls: int


class Method(Protocol):
    """Plays streams; each one's result depends on that stream alone."""

    def __call__(self, streams: Sequence[Stream], /) -> list[Result]: ...


def manager(roll_out: Callable[[Sequence[Stream]], list[Trajectory]], environment: Environment) -> Method:
    """A memory manager: what it has written is the memory, and retrieval finds the evidence.

    Args:
        roll_out: Rolls out each stream once (`evaluate.run`).
    """

    def play(trajectory: Trajectory) -> Result:
        outcomes = [outcome for step in trajectory.steps for outcome in step.outcomes]
        chunk_answers = tuple(step.answers for step in trajectory.steps)
        return Result(
            stream=trajectory.stream,
            answers=trajectory.answers,
            chunk_answers=chunk_answers if any(chunk_answers) else (),
            memory_tokens=environment.memory_tokens(trajectory.steps[-1].memory),
            operations=len(outcomes),
            valid_operations=sum(outcome.valid for outcome in outcomes),
            reader_calls=len(trajectory.answers) + sum(map(len, chunk_answers)),
        )

    return lambda streams: [play(trajectory) for trajectory in roll_out(streams)]


@dataclasses.dataclass(frozen=True)
class BaselineMemory:
    """What a method without a manager keeps of a stream.

    Attributes:
        texts: As they are kept.
        evidence: For a question, those of them that the reader is shown.
        written: How many times a model wrote.
    """

    texts: tuple[str, ...]
    evidence: Callable[[str], tuple[MemoryItem, ...]]
    written: int = 0


# Reads streams to their ends.
KeepFn = Callable[[Sequence[Stream]], list[BaselineMemory]]


def baseline(
    keep: KeepFn, environment: Environment, answer: Reader | AnswerFn, mark: AnswerJudge | None = None
) -> Method:
    """A method without a manager, which is asked when it has read everything.

    Args:
        mark: Judges answers that no rule can score.
    """

    def play(streams: Sequence[Stream]) -> list[Result]:
        kept = keep(streams)
        questions = QuestionAnswering(answer, mark)
        pending = [
            [PendingAnswer(question, one.evidence(question.text)) for question in stream.questions]
            for stream, one in zip(streams, kept, strict=True)
        ]
        try:
            for some in pending:
                questions.put(some)
            qa.finish(questions.pending)
        except BaseException:
            qa.cancel(questions.pending)
            raise
        return [
            Result(
                stream=stream,
                answers=tuple(one.finish() for one in some),
                chunk_answers=(),
                memory_tokens=sum(map(environment.count_tokens, one.texts)),
                operations=one.written,
                valid_operations=one.written,
                reader_calls=len(some),
            )
            for stream, one, some in zip(streams, kept, pending, strict=True)
        ]

    return play


def nothing(streams: Sequence[Stream]) -> list[BaselineMemory]:
    """No memory: the reader is left with the question."""
    return [BaselineMemory((), lambda _: ()) for _ in streams]


def last_tokens(environment: Environment, count: int) -> KeepFn:
    """Long context: the last `count` tokens of the stream are shown with every question."""

    def keep(stream: Stream) -> BaselineMemory:
        ids: list[int] = []
        texts: list[str] = []
        for chunk in reversed(stream.chunks):  # From the end, so that no more is encoded than is kept.
            encoded = environment.tokenizer.encode(chunk.text)
            room = count - len(ids)
            if len(encoded) > room:
                texts += [environment.tokenizer.decode(encoded[-room:])] if room else []
                break
            ids += encoded
            texts.append(chunk.text)
        text = "\n".join(reversed(texts))
        return BaselineMemory((text,), lambda _: _items([text]))

    return lambda streams: [keep(stream) for stream in streams]


def chunks(method: str, k: int, embed: EmbedFn | None = None) -> KeepFn:
    """RAG: the chunks as they are, of which each question retrieves k."""
    return _stored(lambda stream: [chunk.text for chunk in stream.chunks], method, k, embed)


def sentences(method: str, k: int, embed: EmbedFn | None = None) -> KeepFn:
    """Verbatim memory: every sentence is an item, none is ever changed, and each question retrieves k."""

    def pieces(stream: Stream) -> list[str]:
        found = (piece.strip() for chunk in stream.chunks for piece in _PIECE.split(chunk.text))
        return [piece for piece in found if piece]

    return _stored(pieces, method, k, embed)


def _stored(texts_of, method, k, embed):
    def keep(stream):
        texts = texts_of(stream)
        index = retrieval.Index(method, embed)
        index.update(_items(texts))
        return BaselineMemory(tuple(texts), lambda question: index.retrieve(question, k))

    return lambda streams: [keep(stream) for stream in streams]


def summaries(model: LanguageModel, max_tokens: int, system: str = "") -> KeepFn:
    """Recurrent memory (MemAgent, 2507.02259): one text, rewritten by a model after every chunk; all of it is shown.

    Args:
        model: Rewrites it, greedily.
        max_tokens: Longest memory, in the model's tokens.
        system: Replaces the model's system message if not empty.
    """
    system = system or SUMMARY_SYSTEM

    def keep(streams: Sequence[Stream]) -> list[BaselineMemory]:
        memories = [""] * len(streams)
        for t in range(max(len(stream.chunks) for stream in streams)):
            at = [i for i, stream in enumerate(streams) if t < len(stream.chunks)]
            asked = (summary(memories[i], streams[i].chunks[t].text, max_tokens, system) for i in at)
            chats = [Chat(tuple(messages), max_tokens) for messages in asked]
            for i, reply in zip(at, workers.run_all(model, chats), strict=True):
                # Of thinking that never ended nothing is kept; the memory then stays as it was.
                memories[i] = (chat.after_thinking(reply) or memories[i]).strip()
        return [
            BaselineMemory((memory,), lambda _, memory=memory: _items([memory] if memory else []), len(stream.chunks))
            for stream, memory in zip(streams, memories, strict=True)
        ]

    return keep


def _items(texts: Sequence[str]) -> tuple[MemoryItem, ...]:
    return tuple(MemoryItem(i, text, 0) for i, text in enumerate(texts, start=1))


SUMMARY_SYSTEM = """\
You keep a memory of a long text that you are given piece by piece, as one note. Questions about the whole text will \
be answered from this note alone. Given the note so far and the next piece, write the new note: keep names, numbers, \
dates and facts, correct what has changed, drop what nobody would ask about. Write the note and nothing else."""


def summary(memory: str, chunk: str, max_tokens: int, system: str = SUMMARY_SYSTEM) -> list[Message]:
    """What a model is told that keeps one text as its memory.

    Args:
        memory: The text so far; "" at first.
        max_tokens: How long it may become, in the model's tokens.
    """
    room = f"The new note, in at most {max(max_tokens * 2 // 3, 1)} words:"
    return [
        Message("system", (system,)),
        Message("user", (_chunk_part(chunk), f"Note so far:\n{memory or '(empty)'}\n\n{room}")),
    ]
