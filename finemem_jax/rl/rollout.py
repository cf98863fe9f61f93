"""Rollouts: the manager through whole streams, and every question answered. Plain Python around two workers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence

from finemem_jax.memory import retrieval
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.retrieval import EmbedFn
from finemem_jax.models.tokenizer import EncodedChat
from finemem_jax.reading import qa as asking
from finemem_jax.reading.judges import AnswerJudge, ContentJudge
from finemem_jax.reading.qa import Asking, Desk, Draft
from finemem_jax.reading.reader import AnswerFn, LikelihoodReader, Reader
from finemem_jax.rl import probes
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import (
    Action,
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

# The manager: prompts in, completions out, as they are done; or as a function, in order.
Policy = Worker[Request, Completion | Refusal]
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
    keep_prompts: bool = True  # Whether steps hold their prompts, which training needs, and nobody else.
    view_top_k: int = 32  # Items found for the manager's view of the memory, where it is searched.
    cited_by: str = "reader"  # Who says which evidence an answer rests on, where the rule needs it.
    draw_top_k: int = 0  # Which tokens the manager may draw (`drawing.Sampling`); `top_k` is of retrieval.
    draw_top_p: float = 1.0
    constraint: Constraint | None = None  # What the manager's responses must keep to.
    chunk_answers: bool = True  # Whether answers to the chunks' own questions are generated, ...
    chunk_likelihoods: bool = False  # ... and whether the likelihoods of their gold answers are computed.
    final_likelihoods: bool = False  # The same for the global questions, whose answers are always generated.
    probe_likelihoods: bool = False  # Whether probes are likelihoods, and not scores of generated answers.


def run(
    streams: Sequence[Stream],
    options: RolloutOptions,
    environment: Environment,
    policy: Policy | PolicyFn,
    answer: Reader | AnswerFn,
    key: Sequence[int | str],
    embed: EmbedFn | None = None,
    judge: ContentJudge | None = None,
    mark: AnswerJudge | None = None,
    likely: LikelihoodReader | None = None,
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
        mark: Judges answers that no rule can score (`scoring.JUDGED`).
        likely: Computes the likelihoods that `options` asks for.

    Returns:
        trajectories[s][i], rollout i of stream s.

    Raises:
        ValueError: the manager or the reader refuses a prompt; what it says names the remedy. Or a question needs a
            judge, and there is none.
    """
    walks = [
        _Walk(number, stream, rollout, asked, retrieval.Index(options.retrieval, embed))
        for number, stream in enumerate(streams)
        for asked in [_global_questions(stream, options, key)]
        for rollout in range(options.group_size)
    ]
    writing = _Writing(options, environment, workers.Batched(policy) if callable(policy) else policy, key)
    questions = _Asking(options, answer, embed, judge, mark, likely)
    try:
        for walk in walks:
            writing.go_on(walk)
        while writing.walks:
            moved = writing.collect()
            questions.ask(moved)
            for walk in moved:
                if not walk.written:
                    writing.go_on(walk)
            # What servers have answered meanwhile may be what judges are to be asked about.
            questions.collect(wait=False)
        questions.finish()
    except BaseException:
        writing.cancel()
        questions.cancel()
        raise
    trajectories = [walk.finish() for walk in walks]
    return [trajectories[s : s + options.group_size] for s in range(0, len(trajectories), options.group_size)]


@dataclasses.dataclass(eq=False)
class _Walk:
    """A trajectory in the making.

    Attributes:
        number: Of its stream in this call; streams of several sources may have one id.
        asked: The global questions, put to it once all is written.
        index: One for the whole walk: from step to step, only few items change.
    """

    number: int
    stream: Stream
    rollout: int
    asked: tuple[Question, ...]
    index: retrieval.Index
    memory: Memory = dataclasses.field(default_factory=Memory)
    steps: list[Step] = dataclasses.field(default_factory=list)
    verdicts: list[list[bool | None]] = dataclasses.field(default_factory=list)
    chunk_answers: list[list[Draft]] = dataclasses.field(default_factory=list)
    answers: list[Draft] = dataclasses.field(default_factory=list)
    probes: Probes = dataclasses.field(default_factory=Probes)

    @property
    def written(self) -> bool:
        """Whether it has come to the end of its stream."""
        return len(self.steps) == len(self.stream.chunks)

    def finish(self) -> Trajectory:
        steps = tuple(
            dataclasses.replace(step, answers=_finished(drafts), verdicts=tuple(verdicts))
            for step, drafts, verdicts in zip(self.steps, self.chunk_answers, self.verdicts, strict=True)
        )
        return Trajectory(self.stream, self.rollout, steps, _finished(self.answers), self.probes)


def _finished(drafts):
    return tuple(draft.finish() for draft in drafts)


class _Writing:
    """The manager at work: observe, write, apply."""

    def __init__(self, options, environment, policy, key):
        self._options, self._environment, self._policy, self._key = options, environment, policy, key
        self.walks: dict[int, tuple[_Walk, EncodedChat]] = {}
        # Rollouts of a group often hold equal memories (at t = 0, all of them): their prompt is the same object. By
        # stream and step, until the whole group is past it.
        self._prompts: dict[tuple[int, int], dict[Memory, EncodedChat]] = collections.defaultdict(dict)
        self._past: collections.Counter[tuple[int, int]] = collections.Counter()

    def go_on(self, walk):
        """Asks the manager for the walk's next step."""
        t = len(walk.steps)
        prompts = self._prompts[walk.number, t]
        if walk.memory not in prompts:
            search = functools.partial(self._search, walk)
            prompts[walk.memory] = self._environment.observe(walk.stream.chunks[t], walk.memory, search)
        chat, options = prompts[walk.memory], self._options
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

    def _search(self, walk, text):
        walk.index.update(walk.memory.items)
        return walk.index.retrieve(text, self._options.view_top_k)

    def collect(self):
        """Applies what the manager has written, and returns whose steps these are."""
        moved = []
        for ticket, completion in self._policy.collect():
            walk, chat = self.walks.pop(ticket)
            if isinstance(completion, Refusal):
                raise ValueError(completion.reason)
            t = len(walk.steps)
            walk.memory, outcomes, owners = self._environment.act(walk.memory, completion.ids, t)
            prompt = (chat.ids, chat.cuts) if self._options.keep_prompts else ((), ())
            walk.steps.append(Step(*prompt, completion, outcomes, walk.memory, token_operations=owners))
            self._past[walk.number, t] += 1
            if self._past[walk.number, t] == self._options.group_size:
                self._prompts.pop((walk.number, t))
            moved.append(walk)
        return moved

    def cancel(self):
        for ticket in self.walks:
            self._policy.cancel(ticket)


class _Asking:
    """Readers and judges at work: evidence for every question, then its answer and score."""

    def __init__(self, options, reader, embed, judge, mark, likely):
        self._options, self._embed = options, embed
        cited_by = options.cited_by if "citations" in options.needs else ""
        self._answers, self._judge = Asking(reader, mark, likely, cited_by), Desk(judge)
        self._desks = (*self._answers.desks, self._judge)
        self._probed, self._plans = probes.Asked(), []
        self._probes: list[Draft] = []

    def ask(self, walks):
        """Asks all that is to be asked after the walks' last step."""
        if self._embed is not None:
            # In one call, which is all an embedder needs to be fast; it remembers, and the indexes ask it again.
            self._embed(sorted({text for walk in walks for text in _texts(walk)}))
        options = self._options
        for walk in walks:
            walk.verdicts.append(self._judge_content(walk.steps[-1]))
            chunk = walk.stream.chunks[len(walk.steps) - 1]
            drafts = self._drafts(walk, chunk.questions)
            walk.chunk_answers.append(drafts)
            self._answers.put(drafts, options.chunk_answers, options.chunk_likelihoods)
            if walk.written:
                walk.answers = self._drafts(walk, walk.asked)
                self._answers.put(walk.answers, True, options.final_likelihoods)
                self._plans.append((walk, self._probe(walk)))

    def _drafts(self, walk, questions):
        if questions:
            walk.index.update(walk.memory.items)
        return [Draft(question, walk.index.retrieve(question.text, self._options.top_k)) for question in questions]

    def _judge_content(self, step):
        """Asks for a verdict on every INSERT and UPDATE that is well-formed; returns where the verdicts will be."""
        if "content" not in self._options.needs:
            return []
        assert self._judge.is_manned, "the rule needs a content judge"
        verdicts = [None] * len(step.outcomes)
        for place, outcome in enumerate(step.outcomes):
            if isinstance(outcome.operation, Operation) and outcome.operation.action in (Action.INSERT, Action.UPDATE):
                self._judge.put(outcome.operation, functools.partial(verdicts.__setitem__, place))
        return verdicts

    def _probe(self, walk):
        options, known = self._options, len(self._probed.pairs)
        final = [(draft.question, draft.items) for draft in walk.answers]
        plan = probes.plan(
            options.needs, walk.steps, final, walk.index, options.top_k, self._probed, options.probe_likelihoods
        )
        drafts = [Draft(*pair) for pair in self._probed.pairs[known:]]
        self._probes += drafts
        self._answers.put(drafts, not options.probe_likelihoods, options.probe_likelihoods)
        return plan

    def collect(self, wait):
        """Takes in what has been answered; see `asking.collect`."""
        asking.collect(self._desks, wait)

    def finish(self):
        """Waits for all answers, and fills them in."""
        asking.finish(self._desks)
        if self._options.probe_likelihoods:
            scores = [draft.likelihood.value if draft.likelihood else None for draft in self._probes]
        else:
            scores = [draft.score for draft in self._probes]
        for walk, plan in self._plans:
            walk.probes = plan.fill(scores)
            for number in plan.undecided(scores):
                # Half of what a rule needs to know of a question is no use to it.
                walk.answers[number].score = None

    def cancel(self):
        asking.cancel(self._desks)


def _global_questions(stream, options, key):
    """The global questions asked this time: a draw for streams with many, the same for all their rollouts."""
    count = len(stream.questions)
    if count <= options.global_question_threshold:
        return stream.questions
    draw = random.Random(repr((*key, stream.stream_id)))
    kept = sorted(draw.sample(range(count), int(options.global_question_fraction * count)))
    return tuple(stream.questions[i] for i in kept)


def _texts(walk):
    """What retrieval is about to compare."""
    yield from (question.text for question in walk.stream.chunks[len(walk.steps) - 1].questions)
    yield from (item.text for item in walk.memory.items)
    if walk.written:
        yield from (question.text for question in walk.asked)
