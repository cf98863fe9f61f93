"""Runs the manager through whole streams, and has every question answered from the memories that it writes.

Plain Python around two workers, the manager and the reader: `_Manager` observes, samples and applies, chunk by chunk;
`_Questions` retrieves evidence and asks readers and judges. Neither waits for the other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence

from finemem_jax.memory import retrieval
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.retrieval import EmbedFn
from finemem_jax.models.tokenizer import EncodedChat
from finemem_jax.reading.judges import AnswerJudge, ContentJudge
from finemem_jax.reading.qa import PendingAnswer, QuestionAnswering
from finemem_jax.reading.reader import AnswerFn, LikelihoodScorer, Reader
from finemem_jax.rl import probes
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import (
    Action,
    Answer,
    Completion,
    Constraint,
    Memory,
    MemoryItem,
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
    needs: frozenset[str] = frozenset()  # What the credit rule must have measured (`credit_rules.Rule.needs`).
    keep_prompts: bool = True  # Whether steps hold their prompts, which training needs, and nobody else.
    view_top_k: int = 32  # Items found for the manager's view of the memory, where it is searched.
    cited_by: str = "reader"  # Who says which evidence an answer rests on, where the rule needs it.
    draw_top_k: int = 0  # Which tokens the manager may sample (`SamplingParams`); `top_k` is of retrieval.
    draw_top_p: float = 1.0
    constraint: Constraint | None = None  # What the manager's responses must keep to.
    chunk_answers: bool = True  # Whether answers to the chunks' own questions are generated, ...
    chunk_likelihoods: bool = False  # ... and whether the likelihoods of their gold answers are computed.
    final_likelihoods: bool = False  # The same for the global questions, whose answers are always generated.
    probe_likelihoods: bool = False  # Whether probes are likelihoods, and not scores of generated answers.

    def request(self, prompt: EncodedChat, key: tuple[int, int]) -> Request:
        """Returns the request to the manager for one prompt."""
        return Request(
            prompt.ids,
            prompt.cuts,
            self.max_new_tokens,
            self.temperature,
            key,
            self.draw_top_k,
            self.draw_top_p,
            self.constraint,
        )


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
    manager, questions = _Manager(options, players, key), _Questions(options, players)
    try:
        for state in states:
            manager.submit(state)
        while manager.busy:
            stepped = manager.collect()
            questions.ask(stepped)
            for state in stepped:
                if not state.is_written:
                    manager.submit(state)
            # What servers have answered meanwhile may be what judges are to be asked about.
            questions.collect(wait=False)
        questions.finish()
    except BaseException:
        manager.cancel()
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
        index: One for the whole rollout: from step to step, only few items change.
        memory: M_t of the last step.
        verdicts, chunk_answers: Of each step; filled in as judges and readers get to it.
        answers: To `asked`, once all is written.
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
    def is_written(self) -> bool:
        """Whether the manager has come to the end of the stream."""
        return len(self.steps) == len(self.stream.chunks)

    def search(self, text: str, k: int) -> tuple[MemoryItem, ...]:
        """Finds the K items of the memory, as it is now, that are most like a text."""
        self.index.update(self.memory.items)
        return self.index.retrieve(text, k)

    def finish(self) -> Trajectory:
        """Returns the trajectory; all that was asked must have been answered."""
        steps = tuple(
            dataclasses.replace(step, answers=_finished(pending), verdicts=tuple(verdicts))
            for step, pending, verdicts in zip(self.steps, self.chunk_answers, self.verdicts, strict=True)
        )
        return Trajectory(self.stream, self.rollout, steps, _finished(self.answers), self.probes)


def _finished(pending: Sequence[PendingAnswer]) -> tuple[Answer, ...]:
    return tuple(one.finish() for one in pending)


class _Manager:
    """Runs the manager: observe, sample, apply."""

    def __init__(self, options: RolloutOptions, players: Players, key: Sequence[int | str]):
        self._options, self._environment, self._key = options, players.environment, key
        self._policy: Policy = workers.as_worker(players.policy)
        # What has been submitted, by request id.
        self._waiting: dict[int, tuple[RolloutState, EncodedChat]] = {}
        # Rollouts of a group often hold equal memories (at t = 0, all of them): they share one prompt object. By stream
        # and step, until the whole group is past it.
        self._prompts: dict[tuple[int, int], dict[Memory, EncodedChat]] = collections.defaultdict(dict)
        self._past: collections.Counter[tuple[int, int]] = collections.Counter()

    @property
    def busy(self) -> bool:
        """Whether responses are still to come."""
        return bool(self._waiting)

    def submit(self, state: RolloutState) -> None:
        """Asks the manager for a rollout's next step."""
        t = len(state.steps)
        prompts = self._prompts[state.number, t]
        if state.memory not in prompts:
            search = functools.partial(state.search, k=self._options.view_top_k)
            prompts[state.memory] = self._environment.observe(state.stream.chunks[t], state.memory, search)
        prompt = prompts[state.memory]
        key = random_key(*self._key, state.stream.stream_id, state.rollout, t)
        self._waiting[self._policy.submit(self._options.request(prompt, key))] = state, prompt

    def collect(self) -> list[RolloutState]:
        """Applies the responses that are there, and returns the rollouts that have made a step."""
        stepped = []
        for request_id, completion in self._policy.collect():
            state, prompt = self._waiting.pop(request_id)
            if isinstance(completion, Refusal):
                raise ValueError(completion.reason)
            t = len(state.steps)
            state.memory, outcomes, owners = self._environment.act(state.memory, completion.ids, t)
            ids, cuts = (prompt.ids, prompt.cuts) if self._options.keep_prompts else ((), ())
            state.steps.append(Step(ids, cuts, completion, outcomes, state.memory, token_operations=owners))
            self._past[state.number, t] += 1
            if self._past[state.number, t] == self._options.group_size:
                self._prompts.pop((state.number, t))
            stepped.append(state)
        return stepped

    def cancel(self) -> None:
        """Gives up all responses that are still to come."""
        for request_id in self._waiting:
            self._policy.cancel(request_id)


class _Questions:
    """Has questions answered and scored: retrieves evidence for each, and asks readers and judges."""

    def __init__(self, options: RolloutOptions, players: Players):
        self._options, self._embed = options, players.embed
        cited_by = options.cited_by if "citations" in options.needs else ""
        self._answers = QuestionAnswering(
            players.reader,
            content_judge=players.content_judge,
            answer_judge=players.answer_judge,
            likelihood_scorer=players.likelihood_scorer,
            cited_by=cited_by,
        )
        # The questions that a credit rule asks beyond the ones that are scored: each once, whatever rollouts ask it.
        self._planner = probes.Planner(options.needs, options.top_k, full=options.probe_likelihoods)
        self._probes: list[PendingAnswer] = []
        self._plans: list[tuple[RolloutState, probes.Plan]] = []

    def ask(self, states: Sequence[RolloutState]) -> None:
        """Asks all that is to be asked after the last step of some rollouts."""
        if self._embed is not None:
            # In one call, which is all an embedder needs to be fast; it remembers, and the indexes ask it again.
            self._embed(sorted({text for state in states for text in _texts(state)}))
        options = self._options
        for state in states:
            state.verdicts.append(self._judge_content(state.steps[-1]))
            pending = self._with_evidence(state, state.stream.chunks[len(state.steps) - 1].questions)
            state.chunk_answers.append(pending)
            self._answers.ask(pending, options.chunk_answers, options.chunk_likelihoods)
            if state.is_written:
                state.answers = self._with_evidence(state, state.asked)
                self._answers.ask(state.answers, True, options.final_likelihoods)
                self._plans.append((state, self._probe(state)))

    def _with_evidence(self, state: RolloutState, questions: Sequence[Question]) -> list[PendingAnswer]:
        if questions:
            state.index.update(state.memory.items)
        return [
            PendingAnswer(question, state.index.retrieve(question.text, self._options.top_k)) for question in questions
        ]

    def _judge_content(self, step: Step) -> list[bool | None]:
        """Asks for a verdict on every INSERT and UPDATE that is well-formed; returns where the verdicts will be."""
        if "content" not in self._options.needs:
            return []
        verdicts: list[bool | None] = [None] * len(step.outcomes)
        for place, outcome in enumerate(step.outcomes):
            if isinstance(outcome.operation, Operation) and outcome.operation.action in (Action.INSERT, Action.UPDATE):
                self._answers.judge_content(outcome.operation, functools.partial(verdicts.__setitem__, place))
        return verdicts

    def _probe(self, state: RolloutState) -> probes.Plan:
        """Asks the further questions of the credit rule, of which other rollouts may have asked some already."""
        options, known = self._options, len(self._planner.pairs)
        final = [(one.question, one.items) for one in state.answers]
        plan = self._planner.plan(state.steps, final, state.index)
        pending = [PendingAnswer(*pair) for pair in self._planner.pairs[known:]]
        self._probes += pending
        self._answers.ask(pending, not options.probe_likelihoods, options.probe_likelihoods)
        return plan

    def collect(self, wait: bool) -> None:
        """Takes in what has been answered; see `QuestionAnswering.collect`."""
        self._answers.collect(wait)

    def finish(self) -> None:
        """Waits for all answers, and fills in what they say of the probes."""
        self._answers.finish()
        if self._options.probe_likelihoods:
            scores = [one.likelihood.value if one.likelihood else None for one in self._probes]
        else:
            scores = [one.score for one in self._probes]
        for state, plan in self._plans:
            state.probes = plan.fill(scores)
            for number in plan.undecided(scores):
                # Half of what a rule needs to know of a question is no use to it.
                state.answers[number].score = None

    def cancel(self) -> None:
        """Gives up all answers that are still to come."""
        self._answers.cancel()


def _global_questions(stream: Stream, options: RolloutOptions, key: Sequence[int | str]) -> tuple[Question, ...]:
    """Chooses the global questions to ask: a random part where there are many, the same for a stream's rollouts."""
    count = len(stream.questions)
    if count <= options.global_question_threshold:
        return stream.questions
    draw = random.Random(repr((*key, stream.stream_id)))
    kept = sorted(draw.sample(range(count), int(options.global_question_fraction * count)))
    return tuple(stream.questions[i] for i in kept)


def _texts(state: RolloutState) -> Iterator[str]:
    """Lists what retrieval is about to compare after a rollout's last step."""
    yield from (question.text for question in state.stream.chunks[len(state.steps) - 1].questions)
    yield from (item.text for item in state.memory.items)
    if state.is_written:
        yield from (question.text for question in state.asked)
