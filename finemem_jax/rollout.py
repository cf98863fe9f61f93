"""Rollouts: the manager through whole streams, and every question answered. Plain Python around batched calls."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from finemem_jax import retrieval, scoring
from finemem_jax.environment import Environment
from finemem_jax.episode import (
    Answer,
    Completion,
    Memory,
    MemoryItem,
    Question,
    Request,
    Step,
    Stream,
    Trajectory,
    random_key,
)
from finemem_jax.reader import AnswerFn, Query

# The manager as rollouts see it: prompts in, completions out, in order.
PolicyFn = Callable[[Sequence[Request]], list[Completion]]


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How streams are rolled out; see `config.default()` for what each means."""

    group_size: int
    max_new_tokens: int
    temperature: float
    retrieval: str
    top_k: int
    global_question_fraction: float
    global_question_threshold: int


def run(
    streams: Sequence[Stream],
    options: RolloutOptions,
    environment: Environment,
    policy: PolicyFn,
    answer: AnswerFn,
    key: Sequence[int | str],
) -> list[list[Trajectory]]:
    """Rolls out every stream `group_size` times.

    Args:
        streams: Already fitted to the environment.
        policy: The manager.
        answer: The frozen reader.
        key: Names this call; with stream, rollout and step it determines all that is random.

    Returns:
        trajectories[s][i], rollout i of stream s.
    """
    starts = [(stream, i) for stream in streams for i in range(options.group_size)]
    walks = [_Walk(stream, rollout) for stream, rollout in starts]
    for t in range(max(len(stream.chunks) for stream in streams)):
        _advance([walk for walk in walks if t < len(walk.stream.chunks)], t, options, environment, policy, key)
    asked = {stream.stream_id: _global_questions(stream, options, key) for stream in streams}
    _answer(walks, asked, options, answer)
    trajectories = [walk.finish() for walk in walks]
    return [trajectories[s : s + options.group_size] for s in range(0, len(trajectories), options.group_size)]


@dataclasses.dataclass
class _Walk:
    """A trajectory in the making."""

    stream: Stream
    rollout: int
    memory: Memory = dataclasses.field(default_factory=Memory)
    steps: list[Step] = dataclasses.field(default_factory=list)
    chunk_answers: list[tuple[Answer, ...]] = dataclasses.field(default_factory=list)
    answers: tuple[Answer, ...] = ()

    def finish(self) -> Trajectory:
        pairs = zip(self.steps, self.chunk_answers, strict=True)
        steps = tuple(dataclasses.replace(step, answers=answers) for step, answers in pairs)
        return Trajectory(self.stream, self.rollout, steps, self.answers)


def _advance(walks, t, options, environment, policy, key):
    """Step t of every walk: observe, write, apply."""
    # Rollouts of a group often hold equal memories (at t = 0, all of them): their prompt is the same object.
    seen: dict = {}
    chats = []
    for walk in walks:
        state = (walk.stream.stream_id, walk.memory)
        if state not in seen:
            seen[state] = environment.observe(walk.stream.chunks[t], walk.memory)
        chats.append(seen[state])
    requests = [
        Request(
            chat.ids,
            chat.cuts,
            options.max_new_tokens,
            options.temperature,
            random_key(*key, walk.stream.stream_id, walk.rollout, t),
        )
        for walk, chat in zip(walks, chats, strict=True)
    ]
    for walk, chat, completion in zip(walks, chats, policy(requests), strict=True):
        walk.memory, outcomes = environment.act(walk.memory, completion.ids, t)
        walk.steps.append(Step(chat.ids, chat.cuts, completion, outcomes, walk.memory))


def _global_questions(stream, options, key):
    """The global questions asked this time: a draw for streams with many, the same for all their rollouts."""
    count = len(stream.questions)
    if count <= options.global_question_threshold:
        return stream.questions
    draw = random.Random(repr((*key, stream.stream_id)))
    kept = sorted(draw.sample(range(count), int(options.global_question_fraction * count)))
    return tuple(stream.questions[i] for i in kept)


def _answer(walks, asked, options, answer):
    """Retrieves evidence for every question of every walk, and asks them all in one call."""
    pending: list[tuple[Question, tuple[MemoryItem, ...]]] = []

    def ask(questions, memory):
        index = retrieval.Index(memory.items, options.retrieval) if questions else None
        for question in questions:
            assert index is not None
            pending.append((question, index.retrieve(question.text, options.top_k)))

    for walk in walks:
        for chunk, step in zip(walk.stream.chunks, walk.steps, strict=True):
            ask(chunk.questions, step.memory)
        ask(asked[walk.stream.stream_id], walk.memory)
    texts = answer([Query(question.text, tuple(item.text for item in items)) for question, items in pending])
    answers = iter(
        Answer(question, items, text, scoring.score(text, question))
        for (question, items), text in zip(pending, texts, strict=True)
    )
    for walk in walks:
        walk.chunk_answers = [tuple(next(answers) for _ in chunk.questions) for chunk in walk.stream.chunks]
        walk.answers = tuple(next(answers) for _ in asked[walk.stream.stream_id])
