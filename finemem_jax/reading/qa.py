"""Questions with their evidence put to a reader, and to whoever else has a word on the answers, as they arise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from finemem_jax.reading import prompts, scoring
from finemem_jax.reading.judges import AnswerJudge, JudgedAnswer
from finemem_jax.reading.reader import AnswerFn, LikelihoodScorer, Query, Reader, likelihood_query
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import Answer, Likelihood, MemoryItem, Question


@dataclasses.dataclass(eq=False)
class PendingAnswer:
    """An `Answer` in the making."""

    question: Question
    items: tuple[MemoryItem, ...]
    text: str = ""
    score: float | None = None
    cited: tuple[bool, ...] = ()
    likelihood: Likelihood | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(item.text for item in self.items)

    def finish(self) -> Answer:
        return Answer(self.question, self.items, self.text, self.score, self.cited, self.likelihood)


class Pending:
    """A worker with what it has been handed, and what is to be done with each result."""

    def __init__(self, worker: Worker | None):
        self._worker: Any = worker
        self._wanted: dict[int, Callable[[Any], None]] = {}

    @property
    def has_worker(self) -> bool:
        """Whether there is a worker."""
        return self._worker is not None

    @property
    def busy(self) -> bool:
        """Whether results are still to come."""
        return bool(self._wanted)

    def submit(self, item: Any, receive: Callable[[Any], None]) -> None:
        """Hands an item to the worker; `receive` is called with its result."""
        self._wanted[self._worker.submit(item)] = receive

    def collect(self, wait: bool) -> None:
        """Takes in the results that there are; at least one if `wait`."""
        for request_id, result in self._worker.collect(wait) if self._wanted else ():
            self._wanted.pop(request_id)(result)

    def cancel(self) -> None:
        """Gives up all that is still to come."""
        for request_id in self._wanted:
            self._worker.cancel(request_id)
        self._wanted.clear()


class QuestionAnswering:
    """Readers and judges at work on answers_to_come: the answer, its score, its likelihood."""

    def __init__(
        self,
        reader: Reader | AnswerFn,
        mark: AnswerJudge | None = None,
        likely: LikelihoodScorer | None = None,
        cited_by: str = "",
    ):
        """Initializes.

        Args:
            mark: Judges answers that no rule can score (`scoring.JUDGED`).
            likely: Computes likelihoods, where they are asked for.
            cited_by: Who says which evidence an answer rests on: the "reader", word "overlap", or "" nobody.
        """
        self._cited_by = cited_by
        reader = workers.Batched(reader) if callable(reader) else reader
        self._reader, self._mark, self._likely = map(Pending, (reader, mark, likely))

    @property
    def pending(self) -> tuple[Pending, ...]:
        """In the order in which they are looked at."""
        # What is answered may have to be marked; and what this machine computes can be computed while servers answer.
        return self._likely, self._reader, self._mark

    def put(self, answers_to_come: Sequence[PendingAnswer], answers: bool = True, likelihoods: bool = False) -> None:
        """Asks for the answers to some answers, for the likelihoods of the right ones, or for both."""
        for draft in answers_to_come:
            if answers:
                query = Query(draft.question.prompt, draft.texts)
                self._reader.submit(query, functools.partial(self._answered, draft))
            if likelihoods:
                self._likely.submit(
                    likelihood_query(draft.question, draft.texts), functools.partial(setattr, draft, "likelihood")
                )

    def _answered(self, draft, text):
        draft.text = text
        if self._cited_by == "reader":
            draft.text, draft.cited = prompts.split_citations(text, len(draft.items))
        elif self._cited_by:
            draft.cited = tuple(scoring.supports(item.text, text) for item in draft.items)
        if draft.question.metric not in scoring.JUDGED:
            draft.score = scoring.score(draft.text, draft.question)
        elif self._mark.has_worker:
            self._mark.submit(JudgedAnswer(draft.question, draft.text), functools.partial(_marked, draft))
        else:
            raise ValueError(f"The metric {draft.question.metric!r} of {draft.question.text!r} needs a judge.")


def _marked(draft, verdict):
    draft.score = None if verdict is None else float(verdict)


def collect(pending: Sequence[Pending], wait: bool) -> None:
    """Takes in what there is at some pending.

    Args:
        wait: Until something is there, at whichever.
    """
    for one in pending:
        one.collect(wait=False)
    busy = next((one for one in pending if one.busy), None)
    if wait and busy is not None:
        busy.collect(wait=True)


def finish(pending: Sequence[Pending]) -> None:
    """Waits until nothing is left to come at any one."""
    while any(one.busy for one in pending):
        collect(pending, wait=True)


def cancel(pending: Sequence[Pending]) -> None:
    """Gives up all that is still to come."""
    for one in pending:
        one.cancel()
