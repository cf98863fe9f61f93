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
from finemem_jax.reading import qa
from finemem_jax.reading.judges import AnswerJudge, ContentJudge
from finemem_jax.reading.qa import Pending, PendingAnswer, QuestionAnswering
from finemem_jax.reading.reader import AnswerFn, LikelihoodScorer, Reader
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


@dataclasses.dataclass(frozen=True)
class Players:
    """Who takes part in a rollout.

    Attributes:
        environment: What the manager sees of stream and memory, and what its text does to the memory.
        policy: The manager.
        reader: The frozen model that answers from memory.
        embed: Embeds texts, for the retrieval methods that need it; it should remember them (`embedders.cached`).
        content_judge: Says which operations were worth writing, for credit rules that need "content".
        answer_judge: Judges answers that no rule can score (`scoring.JUDGED`).
        likelihood_scorer: Computes the likelihoods of gold answers that the options ask for.
    """

    environment: Environment
    policy: Policy | PolicyFn
    reader: Reader | AnswerFn
    embed: EmbedFn | None = None
    content_judge: ContentJudge | None = None
    answer_judge: AnswerJudge | None = None
    likelihood_scorer: LikelihoodScorer | None = None


def run(
    streams: Sequence[Stream], options: RolloutOptions, players: Players, key: Sequence[int | str]
) -> list[list[Trajectory]]:
    """Rolls out every stream `group_size` times.

    Every rollout goes on to its next chunk as soon as it has written to the last one, whatever the others do. Questions
    are handed to the reader as they arise; what a rollout writes does not depend on the answers, so the manager has
    the device first, and a reader on the same one comes to them when it can fill its slots.

    Args:
        streams: Already fitted to the environment.
        key: Names this call; with stream, rollout and step it determines all that is random.

    Returns:
        trajectories[s][i], rollout i of stream s.

    Raises:
        ValueError: the manager or the reader refuses a prompt; what it says names the remedy. Or a question needs a
            judge, and there is none.
    """
    states = [
        RolloutState(number, stream, rollout, asked, retrieval.Index(options.retrieval, players.embed))
        for number, stream in enumerate(streams)
        for asked in [_global_questions(stream, options, key)]
        for rollout in range(options.group_size)
    ]
    writing = _Writing(options, players, key)
    questions = _Asking(options, players)
    try:
        for state in states:
            writing.go_on(state)
        while writing.states:
            moved = writing.collect()
            questions.ask(moved)
            for state in moved:
                if not state.written:
                    writing.go_on(state)
            # What servers have answered meanwhile may be what judges are to be asked about.
            questions.collect(wait=False)
        questions.finish()
    except BaseException:
        writing.cancel()
        questions.cancel()
        raise
    trajectories = [state.finish() for state in states]
    return [trajectories[s : s + options.group_size] for s in range(0, len(trajectories), options.group_size)]


@dataclasses.dataclass(eq=False)
class RolloutState:
    """A trajectory in the making.

    Attributes:
        number: Of its stream in this call; streams of several sources may have one id.
        asked: The global questions, put to it once all is written.
        index: One for the whole state: from step to step, only few items change.
    """

    number: int
    stream: Stream
    rollout: int
    asked: tuple[Question, ...]
    index: retrieval.Index
    memory: Memory = dataclasses.field(default_factory=Memory)
    steps: list[Step] = dataclasses.field(default_factory=list)
    verdicts: list[list[bool | None]] = dataclasses.field(default_factory=list)
    chunk_answers: list[list[PendingAnswer]] = dataclasses.field(default_factory=list)
    answers: list[PendingAnswer] = dataclasses.field(default_factory=list)
    probes: Probes = dataclasses.field(default_factory=Probes)

    @property
    def written(self) -> bool:
        """Whether it has come to the end of its stream."""
        return len(self.steps) == len(self.stream.chunks)

    def finish(self) -> Trajectory:
        steps = tuple(
            dataclasses.replace(step, answers=_finished(pending), verdicts=tuple(verdicts))
            for step, pending, verdicts in zip(self.steps, self.chunk_answers, self.verdicts, strict=True)
        )
        return Trajectory(self.stream, self.rollout, steps, _finished(self.answers), self.probes)


def _finished(pending):
    return tuple(one.finish() for one in pending)


class _Writing:
    """The manager at work: observe, write, apply."""

    def __init__(self, options: RolloutOptions, players: Players, key: Sequence[int | str]):
        policy = players.policy
        self._options, self._environment, self._key = options, players.environment, key
        self._policy: Policy = workers.Batched(policy) if callable(policy) else policy
        self.states: dict[int, tuple[RolloutState, EncodedChat]] = {}
        # Rollouts of a group often hold equal memories (at t = 0, all of them): their prompt is the same object. By
        # stream and step, until the whole group is past it.
        self._prompts: dict[tuple[int, int], dict[Memory, EncodedChat]] = collections.defaultdict(dict)
        self._past: collections.Counter[tuple[int, int]] = collections.Counter()

    def go_on(self, state):
        """Asks the manager for the state's next step."""
        t = len(state.steps)
        prompts = self._prompts[state.number, t]
        if state.memory not in prompts:
            search = functools.partial(self._search, state)
            prompts[state.memory] = self._environment.observe(state.stream.chunks[t], state.memory, search)
        chat, options = prompts[state.memory], self._options
        request = Request(
            chat.ids,
            chat.cuts,
            options.max_new_tokens,
            options.temperature,
            random_key(*self._key, state.stream.stream_id, state.rollout, t),
            options.draw_top_k,
            options.draw_top_p,
            options.constraint,
        )
        self.states[self._policy.submit(request)] = state, chat

    def _search(self, state, text):
        state.index.update(state.memory.items)
        return state.index.retrieve(text, self._options.view_top_k)

    def collect(self):
        """Applies what the manager has written, and returns whose steps these are."""
        moved = []
        for request_id, completion in self._policy.collect():
            state, chat = self.states.pop(request_id)
            if isinstance(completion, Refusal):
                raise ValueError(completion.reason)
            t = len(state.steps)
            state.memory, outcomes, owners = self._environment.act(state.memory, completion.ids, t)
            prompt = (chat.ids, chat.cuts) if self._options.keep_prompts else ((), ())
            state.steps.append(Step(*prompt, completion, outcomes, state.memory, token_operations=owners))
            self._past[state.number, t] += 1
            if self._past[state.number, t] == self._options.group_size:
                self._prompts.pop((state.number, t))
            moved.append(state)
        return moved

    def cancel(self):
        for request_id in self.states:
            self._policy.cancel(request_id)


class _Asking:
    """Readers and judges at work: evidence for every question, then its answer and score."""

    def __init__(self, options: RolloutOptions, players: Players):
        self._options, self._embed = options, players.embed
        cited_by = options.cited_by if "citations" in options.needs else ""
        self._answers = QuestionAnswering(players.reader, players.answer_judge, players.likelihood_scorer, cited_by)
        self._judge = Pending(players.content_judge)
        self._pending = (*self._answers.pending, self._judge)
        self._probed, self._plans = probes.Asked(), []
        self._probes: list[PendingAnswer] = []

    def ask(self, states):
        """Asks all that is to be asked after the states' last step."""
        if self._embed is not None:
            # In one call, which is all an embedder needs to be fast; it remembers, and the indexes ask it again.
            self._embed(sorted({text for state in states for text in _texts(state)}))
        options = self._options
        for state in states:
            state.verdicts.append(self._judge_content(state.steps[-1]))
            chunk = state.stream.chunks[len(state.steps) - 1]
            pending = self._drafts(state, chunk.questions)
            state.chunk_answers.append(pending)
            self._answers.put(pending, options.chunk_answers, options.chunk_likelihoods)
            if state.written:
                state.answers = self._drafts(state, state.asked)
                self._answers.put(state.answers, True, options.final_likelihoods)
                self._plans.append((state, self._probe(state)))

    def _drafts(self, state, questions):
        if questions:
            state.index.update(state.memory.items)
        return [
            PendingAnswer(question, state.index.retrieve(question.text, self._options.top_k)) for question in questions
        ]

    def _judge_content(self, step):
        """Asks for a verdict on every INSERT and UPDATE that is well-formed; returns where the verdicts will be."""
        if "content" not in self._options.needs:
            return []
        assert self._judge.has_worker, "the rule needs a content judge"
        verdicts = [None] * len(step.outcomes)
        for place, outcome in enumerate(step.outcomes):
            if isinstance(outcome.operation, Operation) and outcome.operation.action in (Action.INSERT, Action.UPDATE):
                self._judge.submit(outcome.operation, functools.partial(verdicts.__setitem__, place))
        return verdicts

    def _probe(self, state):
        options, known = self._options, len(self._probed.pairs)
        final = [(one.question, one.items) for one in state.answers]
        plan = probes.plan(
            options.needs, state.steps, final, state.index, options.top_k, self._probed, options.probe_likelihoods
        )
        pending = [PendingAnswer(*pair) for pair in self._probed.pairs[known:]]
        self._probes += pending
        self._answers.put(pending, not options.probe_likelihoods, options.probe_likelihoods)
        return plan

    def collect(self, wait):
        """Takes in what has been answered; see `qa.collect`."""
        qa.collect(self._pending, wait)

    def finish(self):
        """Waits for all answers, and fills them in."""
        qa.finish(self._pending)
        if self._options.probe_likelihoods:
            scores = [one.likelihood.value if one.likelihood else None for one in self._probes]
        else:
            scores = [one.score for one in self._probes]
        for state, plan in self._plans:
            state.probes = plan.fill(scores)
            for number in plan.undecided(scores):
                # Half of what a rule needs to know of a question is no use to it.
                state.answers[number].score = None

    def cancel(self):
        qa.cancel(self._pending)


def _global_questions(stream, options, key):
    """The global questions asked this time: a draw for streams with many, the same for all their rollouts."""
    count = len(stream.questions)
    if count <= options.global_question_threshold:
        return stream.questions
    draw = random.Random(repr((*key, stream.stream_id)))
    kept = sorted(draw.sample(range(count), int(options.global_question_fraction * count)))
    return tuple(stream.questions[i] for i in kept)


def _texts(state):
    """What retrieval is about to compare."""
    yield from (question.text for question in state.stream.chunks[len(state.steps) - 1].questions)
    yield from (item.text for item in state.memory.items)
    if state.written:
        yield from (question.text for question in state.asked)
