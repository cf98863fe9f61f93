"""Rollouts: the manager through whole streams, and every question answered. Plain Python around two workers."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from finemem_jax import probes, prompts, retrieval, scoring, workers
from finemem_jax.environment import Environment
from finemem_jax.episode import (
    Action,
    Answer,
    Completion,
    Constraint,
    Memory,
    Operation,
    Probes,
    Question,
    Refusal,
    Request,
    Step,
    Stream,
    Trajectory,
    random_key,
)
from finemem_jax.reader import AnswerFn, JudgeFn, Query
from finemem_jax.retrieval import EmbedFn
from finemem_jax.tokenizer import EncodedChat
from finemem_jax.workers import Worker

# The manager: prompts in, completions out, as they are done; or as a function, in order.
Policy = Worker[Request, Completion | Refusal]
PolicyFn = Callable[[Sequence[Request]], list[Completion]]
# The reader: queries in, answers out, likewise.
Reader = Worker[Query, str]


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
    constraint: Constraint | None = None  # What the manager's responses must keep to.


def run(
    streams: Sequence[Stream],
    options: RolloutOptions,
    environment: Environment,
    policy: Policy | PolicyFn,
    answer: Reader | AnswerFn,
    key: Sequence[int | str],
    embed: EmbedFn | None = None,
    judge: JudgeFn | None = None,
) -> list[list[Trajectory]]:
    """Rolls out every stream `group_size` times.

    Every rollout goes on to its next chunk as soon as it has written to the last one, whatever the others do. Questions
    are handed to the reader as they arise; what a rollout writes does not depend on the answers, so the manager has
    the device first, and a reader on the same one comes to them when it can fill its slots.

    Args:
        streams: Already fitted to the environment.
        policy: The manager.
        answer: The frozen reader.
        key: Names this call; with stream, rollout and step it determines all that is random.
        embed: What retrieval embeds texts with, for the methods that do; it remembers them (`embedding.cached`).
        judge: Says which of the operations were worth writing, for rules that need "content".

    Returns:
        trajectories[s][i], rollout i of stream s.

    Raises:
        ValueError: the manager or the reader refuses a prompt; what it says names the remedy.
    """
    asked = {stream.stream_id: _global_questions(stream, options, key) for stream in streams}
    walks = [
        _Walk(stream, rollout, asked[stream.stream_id], retrieval.Index(options.retrieval, embed))
        for stream in streams
        for rollout in range(options.group_size)
    ]
    writing = _Writing(options, environment, workers.Batched(policy) if callable(policy) else policy, key)
    asking = _Asking(options, workers.Batched(answer) if callable(answer) else answer, embed)
    try:
        for walk in walks:
            writing.go_on(walk)
        while writing.walks:
            moved = writing.collect()
            asking.ask(moved)
            for walk in moved:
                if not walk.written:
                    writing.go_on(walk)
        asking.finish()
    except BaseException:
        writing.cancel()
        asking.cancel()
        raise
    if "content" in options.needs:
        assert judge is not None, "the rule needs a content judge"
        _judge(walks, judge)
    trajectories = [walk.finish() for walk in walks]
    return [trajectories[s : s + options.group_size] for s in range(0, len(trajectories), options.group_size)]


@dataclasses.dataclass(eq=False)
class _Walk:
    """A trajectory in the making.

    Attributes:
        asked: The global questions, put to it once all is written.
        index: One for the whole walk: from step to step, only few items change.
    """

    stream: Stream
    rollout: int
    asked: tuple[Question, ...]
    index: retrieval.Index
    memory: Memory = dataclasses.field(default_factory=Memory)
    steps: list[Step] = dataclasses.field(default_factory=list)
    chunk_answers: list[list[Answer]] = dataclasses.field(default_factory=list)
    answers: list[Answer] = dataclasses.field(default_factory=list)
    probes: Probes = dataclasses.field(default_factory=Probes)

    @property
    def written(self) -> bool:
        """Whether it has come to the end of its stream."""
        return len(self.steps) == len(self.stream.chunks)

    def finish(self) -> Trajectory:
        pairs = zip(self.steps, self.chunk_answers, strict=True)
        steps = tuple(dataclasses.replace(step, answers=tuple(answers)) for step, answers in pairs)
        return Trajectory(self.stream, self.rollout, steps, tuple(self.answers), self.probes)


class _Writing:
    """The manager at work: observe, write, apply."""

    def __init__(self, options, environment, policy, key):
        self._options, self._environment, self._policy, self._key = options, environment, policy, key
        self.walks: dict[int, tuple[_Walk, EncodedChat]] = {}
        # Rollouts of a group often hold equal memories (at t = 0, all of them): their prompt is the same object.
        self._prompts: dict[Any, EncodedChat] = {}

    def go_on(self, walk):
        """Asks the manager for the walk's next step."""
        t = len(walk.steps)
        state = (walk.stream.stream_id, t, walk.memory)
        if state not in self._prompts:
            self._prompts[state] = self._environment.observe(walk.stream.chunks[t], walk.memory)
        chat, options = self._prompts[state], self._options
        request = Request(
            chat.ids,
            chat.cuts,
            options.max_new_tokens,
            options.temperature,
            random_key(*self._key, walk.stream.stream_id, walk.rollout, t),
            options.draw_top_k,
            options.draw_top_p,
            options.constraint,
        )
        self.walks[self._policy.submit(request)] = walk, chat

    def collect(self):
        """Applies what the manager has written, and returns whose steps these are."""
        moved = []
        for ticket, completion in self._policy.collect():
            walk, chat = self.walks.pop(ticket)
            if isinstance(completion, Refusal):
                raise ValueError(completion.reason)
            walk.memory, outcomes, owners = self._environment.act(walk.memory, completion.ids, len(walk.steps))
            walk.steps.append(Step(chat.ids, chat.cuts, completion, outcomes, walk.memory, token_operations=owners))
            moved.append(walk)
        return moved

    def cancel(self):
        for ticket in self.walks:
            self._policy.cancel(ticket)


class _Asking:
    """The reader at work: evidence for every question, then its answer and score."""

    def __init__(self, options, reader, embed):
        self._options, self._reader, self._embed = options, reader, embed
        # What to do with an answer once it is there.
        self._wanted: dict[int, tuple[probes.Pair, Callable[[Answer], None]]] = {}
        self._probed, self._plans = probes.Asked(), []
        self._scores: list[float] = []

    def ask(self, walks):
        """Asks all that is to be asked after the walks' last step."""
        if self._embed is not None:
            # In one call, which is all an embedder needs to be fast; it remembers, and the indexes ask it again.
            self._embed(sorted({text for walk in walks for text in _texts(walk)}))
        for walk in walks:
            chunk, answers = walk.stream.chunks[len(walk.steps) - 1], []
            walk.chunk_answers.append(answers)
            self._submit(walk, chunk.questions, answers)
            if walk.written:
                final = self._submit(walk, walk.asked, walk.answers)
                self._plans.append((walk, self._probe(walk, final)))

    def _submit(self, walk, questions, answers):
        """Asks questions of the walk's memory; `answers` gets a place for each."""
        if questions:
            walk.index.update(walk.memory.items)
        pairs = [(question, walk.index.retrieve(question.text, self._options.top_k)) for question in questions]
        answers += [None] * len(pairs)
        for i, pair in enumerate(pairs):
            self._put(pair, functools.partial(answers.__setitem__, i))
        return pairs

    def _probe(self, walk, final):
        options, known = self._options, len(self._probed.pairs)
        plan = probes.plan(options.needs, walk.steps, final, walk.index, options.top_k, self._probed)
        for pair in self._probed.pairs[known:]:
            place = len(self._scores)
            self._scores.append(0.0)
            self._put(pair, lambda answer, place=place: self._scores.__setitem__(place, answer.score))
        return plan

    def _put(self, pair, receive):
        question, items = pair
        ticket = self._reader.submit(Query(question.text, tuple(item.text for item in items)))
        self._wanted[ticket] = pair, receive

    def finish(self):
        """Waits for all answers, and fills them in."""
        while self._wanted:
            for ticket, text in self._reader.collect():
                (question, items), receive = self._wanted.pop(ticket)
                receive(_answered(question, items, text, self._options))
        for walk, plan in self._plans:
            walk.probes = plan.fill(self._scores)

    def cancel(self):
        for ticket in self._wanted:
            self._reader.cancel(ticket)


def _global_questions(stream, options, key):
    """The global questions asked this time: a draw for streams with many, the same for all their rollouts."""
    count = len(stream.questions)
    if count <= options.global_question_threshold:
        return stream.questions
    draw = random.Random(repr((*key, stream.stream_id)))
    kept = sorted(draw.sample(range(count), int(options.global_question_fraction * count)))
    return tuple(stream.questions[i] for i in kept)


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


def _texts(walk):
    """What retrieval is about to compare."""
    yield from (question.text for question in walk.stream.chunks[len(walk.steps) - 1].questions)
    yield from (item.text for item in walk.memory.items)
    if walk.written:
        yield from (question.text for question in walk.asked)
