"""Rollouts: the manager through whole streams, and every question answered. Plain Python around batched calls."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from finemem_jax import probes, prompts, retrieval, scoring
from finemem_jax.environment import Environment
from finemem_jax.episode import (
    Action,
    Answer,
    Completion,
    Memory,
    Operation,
    Probes,
    Request,
    Step,
    Stream,
    Trajectory,
    random_key,
)
from finemem_jax.reader import AnswerFn, JudgeFn, Query
from finemem_jax.retrieval import EmbedFn

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
    needs: frozenset[str] = frozenset()  # What the credit rule must have measured (`rules.Rule.needs`).
    cited_by: str = "reader"  # Who says which evidence an answer rests on, where the rule needs it.
    draw_top_k: int = 0  # Which tokens the manager may draw (`drawing.Sampling`); `top_k` is of retrieval.
    draw_top_p: float = 1.0


def run(
    streams: Sequence[Stream],
    options: RolloutOptions,
    environment: Environment,
    policy: PolicyFn,
    answer: AnswerFn,
    key: Sequence[int | str],
    embed: EmbedFn | None = None,
    judge: JudgeFn | None = None,
) -> list[list[Trajectory]]:
    """Rolls out every stream `group_size` times.

    Args:
        streams: Already fitted to the environment.
        policy: The manager.
        answer: The frozen reader.
        key: Names this call; with stream, rollout and step it determines all that is random.
        embed: What retrieval embeds texts with, for the methods that do; it remembers them (`embedding.cached`).
        judge: Says which of the operations were worth writing, for rules that need "content".

    Returns:
        trajectories[s][i], rollout i of stream s.
    """
    starts = [(stream, i) for stream in streams for i in range(options.group_size)]
    walks = [_Walk(stream, rollout) for stream, rollout in starts]
    for t in range(max(len(stream.chunks) for stream in streams)):
        _advance([walk for walk in walks if t < len(walk.stream.chunks)], t, options, environment, policy, key)
    asked = {stream.stream_id: _global_questions(stream, options, key) for stream in streams}
    _answer(walks, asked, options, answer, embed)
    if "content" in options.needs:
        assert judge is not None, "the rule needs a content judge"
        _judge(walks, judge)
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
    probes: Probes = dataclasses.field(default_factory=Probes)

    def finish(self) -> Trajectory:
        pairs = zip(self.steps, self.chunk_answers, strict=True)
        steps = tuple(dataclasses.replace(step, answers=answers) for step, answers in pairs)
        return Trajectory(self.stream, self.rollout, steps, self.answers, self.probes)


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
            options.draw_top_k,
            options.draw_top_p,
        )
        for walk, chat in zip(walks, chats, strict=True)
    ]
    for walk, chat, completion in zip(walks, chats, policy(requests), strict=True):
        walk.memory, outcomes, owners = environment.act(walk.memory, completion.ids, t)
        walk.steps.append(Step(chat.ids, chat.cuts, completion, outcomes, walk.memory, token_operations=owners))


def _global_questions(stream, options, key):
    """The global questions asked this time: a draw for streams with many, the same for all their rollouts."""
    count = len(stream.questions)
    if count <= options.global_question_threshold:
        return stream.questions
    draw = random.Random(repr((*key, stream.stream_id)))
    kept = sorted(draw.sample(range(count), int(options.global_question_fraction * count)))
    return tuple(stream.questions[i] for i in kept)


def _answer(walks, asked, options, answer, embed):
    """Retrieves evidence for every question of every walk, and asks them all, and all probes, in one call."""
    pending: list[probes.Pair] = []
    extra, plans = probes.Asked(), []
    if embed is not None:
        # In one call, which is all an embedder needs to be fast; it remembers, and the indexes ask it again.
        embed(sorted(set(_texts(walks, asked))))

    def retrieved(index, questions, memory):
        if questions:
            index.update(memory.items)
        return [(question, index.retrieve(question.text, options.top_k)) for question in questions]

    for walk in walks:
        # One index for the whole walk: from step to step, only few items change.
        index = retrieval.Index(options.retrieval, embed)
        for chunk, step in zip(walk.stream.chunks, walk.steps, strict=True):
            pending += retrieved(index, chunk.questions, step.memory)
        final = retrieved(index, asked[walk.stream.stream_id], walk.memory)
        pending += final
        plans.append(probes.plan(options.needs, walk.steps, final, index, options.top_k, extra))
    pairs = [*pending, *extra.pairs]
    texts = answer([Query(question.text, tuple(item.text for item in items)) for question, items in pairs])
    answers = [_answered(question, items, text, options) for (question, items), text in zip(pairs, texts, strict=True)]
    scores = [one.score for one in answers[len(pending) :]]
    following = iter(answers)
    for walk, plan in zip(walks, plans, strict=True):
        walk.chunk_answers = [tuple(next(following) for _ in chunk.questions) for chunk in walk.stream.chunks]
        walk.answers = tuple(next(following) for _ in asked[walk.stream.stream_id])
        walk.probes = plan.fill(scores)


def _answered(question, items, text, options):
    cited: tuple[bool, ...] = ()
    if "citations" in options.needs:
        if options.cited_by == "reader":
            text, cited = prompts.split_citations(text, len(items))
        else:
            cited = tuple(scoring.supports(item.text, text) for item in items)
    return Answer(question, items, text, scoring.score(text, question), cited)


def _judge(walks, judge):
    """Asks for a verdict on every INSERT and UPDATE that is well-formed; other lines get none."""
    judged = (Action.INSERT, Action.UPDATE)
    written = [
        outcome.operation
        for walk in walks
        for step in walk.steps
        for outcome in step.outcomes
        if isinstance(outcome.operation, Operation) and outcome.operation.action in judged
    ]
    distinct = list(dict.fromkeys(written))
    verdicts = dict(zip(distinct, judge(distinct), strict=True))
    for walk in walks:
        walk.steps = [
            dataclasses.replace(step, verdicts=tuple(verdicts.get(outcome.operation) for outcome in step.outcomes))
            for step in walk.steps
        ]


def _texts(walks, asked):
    """What retrieval is about to compare."""
    for walk in walks:
        for chunk, step in zip(walk.stream.chunks, walk.steps, strict=True):
            yield from (question.text for question in chunk.questions)
            yield from (item.text for item in step.memory.items)
        yield from (question.text for question in asked[walk.stream.stream_id])
