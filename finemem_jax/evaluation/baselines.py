"""Answers questions about streams with a memory manager, or with a baseline in its place, all by the same reader.

A method reads streams and answers their questions. Methods differ in what they keep of a stream and in what of that
the reader is shown.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from finemem_jax.clients import chat
from finemem_jax.clients.chat import LanguageModel
from finemem_jax.evaluation import evaluate
from finemem_jax.memory import retrieval
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.prompts import chunk_part
from finemem_jax.memory.retrieval import EmbedFn
from finemem_jax.reading.judges import AnswerJudge
from finemem_jax.reading.qa import PendingAnswer, QuestionAnswering
from finemem_jax.reading.reader import AnswerFn, Reader
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.runtime import workers
from finemem_jax.types import (
    Answer,
    Chat,
    MemoryItem,
    Message,
    Stream,
    Trajectory,
)

# Where a sentence or a line ends.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds a method's answers about one stream, and what they cost.

    Attributes:
        answers: To the global questions.
        chunk_answers: To the questions of each chunk, from the memory after it; () where they were not asked.
        memory_tokens: Length of the final memory, in the manager's tokens.
        operations: How many operations were written, valid or not.
        valid_operations: How many of these changed the memory, or rightly skipped.
        reader_calls: How many questions the reader was asked.
    """

    stream: Stream
    answers: tuple[Answer, ...]
    chunk_answers: tuple[tuple[Answer, ...], ...]
    memory_tokens: float
    operations: int
    valid_operations: int
    reader_calls: int


class Method(Protocol):
    """Reads streams and answers their questions; each result depends on its stream alone."""

    def __call__(self, streams: Sequence[Stream], /) -> list[Result]: ...


def manager(options: RolloutOptions, players: Players, key: Sequence[int | str]) -> Method:
    """Makes a method of a memory manager: what it has written is the memory, and retrieval finds the evidence.

    Args:
        options, players, key: As of `evaluate.run`, which rolls out each stream once.
    """

    def result(trajectory: Trajectory) -> Result:
        outcomes = [outcome for step in trajectory.steps for outcome in step.outcomes]
        chunk_answers = tuple(step.answers for step in trajectory.steps)
        return Result(
            stream=trajectory.stream,
            answers=trajectory.answers,
            chunk_answers=chunk_answers if any(chunk_answers) else (),
            memory_tokens=players.environment.memory_tokens(trajectory.steps[-1].memory),
            operations=len(outcomes),
            valid_operations=sum(outcome.valid for outcome in outcomes),
            reader_calls=len(trajectory.answers) + sum(map(len, chunk_answers)),
        )

    return lambda streams: [result(trajectory) for trajectory in evaluate.run(streams, options, players, key=key)]


@dataclasses.dataclass(frozen=True)
class BaselineMemory:
    """Holds what a baseline keeps of one stream.

    Attributes:
        texts: As they are kept.
        evidence: Returns, for a question, the texts that the reader is shown.
        written: How many times a model wrote.
    """

    texts: tuple[str, ...]
    evidence: Callable[[str], tuple[MemoryItem, ...]]
    written: int = 0


# Reads streams to their ends and returns what is kept of each.
Baseline = Callable[[Sequence[Stream]], list[BaselineMemory]]


def without_manager(
    baseline: Baseline, environment: Environment, answer: Reader | AnswerFn, *, answer_judge: AnswerJudge | None = None
) -> Method:
    """Makes a method of a baseline, whose questions are asked when it has read everything.

    Args:
        answer_judge: Scores answers that no rule can score.
    """

    def run(streams: Sequence[Stream]) -> list[Result]:
        memories = baseline(streams)
        questions = QuestionAnswering(answer, answer_judge=answer_judge)
        pending = [
            [PendingAnswer(question, memory.evidence(question.text)) for question in stream.questions]
            for stream, memory in zip(streams, memories, strict=True)
        ]
        try:
            for of_stream in pending:
                questions.ask(of_stream)
            questions.finish()
        except BaseException:
            questions.cancel()
            raise
        return [
            Result(
                stream=stream,
                answers=tuple(answer.finish() for answer in of_stream),
                chunk_answers=(),
                memory_tokens=sum(map(environment.count_tokens, memory.texts)),
                operations=memory.written,
                valid_operations=memory.written,
                reader_calls=len(of_stream),
            )
            for stream, memory, of_stream in zip(streams, memories, pending, strict=True)
        ]

    return run


def nothing(streams: Sequence[Stream]) -> list[BaselineMemory]:
    """Keeps nothing: the reader is left with the question."""
    return [BaselineMemory((), lambda _: ()) for _ in streams]


def last_tokens(environment: Environment, count: int) -> Baseline:
    """Keeps the last `count` tokens of a stream, and shows them with every question: long context."""

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


def chunks(method: str, k: int, embed: EmbedFn | None = None) -> Baseline:
    """Keeps the chunks as they are, of which each question retrieves k: RAG."""

    def index(stream: Stream) -> BaselineMemory:
        return _indexed([chunk.text for chunk in stream.chunks], retrieval.Index(method, embed), k)

    return lambda streams: [index(stream) for stream in streams]


def sentences(method: str, k: int, embed: EmbedFn | None = None) -> Baseline:
    """Keeps every sentence as an item, of which each question retrieves k: verbatim memory."""

    def index(stream: Stream) -> BaselineMemory:
        found = (sentence.strip() for chunk in stream.chunks for sentence in _SENTENCE_END.split(chunk.text))
        return _indexed([sentence for sentence in found if sentence], retrieval.Index(method, embed), k)

    return lambda streams: [index(stream) for stream in streams]


def _indexed(texts: Sequence[str], index: retrieval.Index, k: int) -> BaselineMemory:
    index.update(_items(texts))
    return BaselineMemory(tuple(texts), lambda question: index.retrieve(question, k))


def summaries(model: LanguageModel, max_tokens: int, system: str = "") -> Baseline:
    """Has a model rewrite one text after every chunk, all of which is shown: recurrent memory (MemAgent, 2507.02259).

    Args:
        model: Rewrites it, greedily.
        max_tokens: Longest memory, in the model's tokens.
        system: Replaces the model's system message if not empty.
    """

    def messages(memory: str, chunk: str) -> tuple[Message, ...]:
        limit = f"The new note, in at most {max(max_tokens * 2 // 3, 1)} words:"
        asked = (chunk_part(chunk), f"Note so far:\n{memory or '(empty)'}\n\n{limit}")
        return Message("system", (system or _SUMMARY_SYSTEM,)), Message("user", asked)

    def keep(streams: Sequence[Stream]) -> list[BaselineMemory]:
        memories = [""] * len(streams)
        for t in range(max(len(stream.chunks) for stream in streams)):
            # All streams that have a chunk t, together.
            at = [i for i, stream in enumerate(streams) if t < len(stream.chunks)]
            chats = [Chat(messages(memories[i], streams[i].chunks[t].text), max_tokens) for i in at]
            for i, reply in zip(at, workers.run_all(model, chats), strict=True):
                # A reply whose thinking never ended leaves the memory as it was.
                memories[i] = (chat.after_thinking(reply) or memories[i]).strip()
        return [
            BaselineMemory((memory,), lambda _, memory=memory: _items([memory] if memory else []), len(stream.chunks))
            for stream, memory in zip(streams, memories, strict=True)
        ]

    return keep


_SUMMARY_SYSTEM = """\
You keep a memory of a long text that you are given piece by piece, as one note. Questions about the whole text will \
be answered from this note alone. Given the note so far and the next piece, write the new note: keep names, numbers, \
dates and facts, correct what has changed, drop what nobody would ask about. Write the note and nothing else."""


def _items(texts: Sequence[str]) -> tuple[MemoryItem, ...]:
    return tuple(MemoryItem(i, text, 0) for i, text in enumerate(texts, start=1))
