"""Puts questions with their evidence to a reader, and the answers to those who score them, as they arise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from finemem_jax.reading import prompts, scoring
from finemem_jax.reading.judges import AnswerJudge, ContentJudge, JudgedAnswer
from finemem_jax.reading.reader import AnswerFn, LikelihoodScorer, Query, Reader, likelihood_query
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Pending, Worker
from finemem_jax.types import Answer, Likelihood, MemoryItem, Operation, Question


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


class QuestionAnswering:
    """Has questions answered and the answers scored by a reader, judges and a likelihood scorer.

    What is asked for (`ask`, `judge_content`) is filled in as results come: call `collect` now and then, `finish` in
    the end, or `cancel` to give up what is still to come.
    """

    def __init__(
        self,
        reader: Reader | AnswerFn,
        *,
        content_judge: ContentJudge | None = None,
        answer_judge: AnswerJudge | None = None,
        likelihood_scorer: LikelihoodScorer | None = None,
        cited_by: str = "",
    ):
        """Asks nothing yet.

        Args:
            content_judge: Says whether operations were worth writing.
            answer_judge: Judges answers that no rule can score (`scoring.JUDGED`).
            likelihood_scorer: Computes likelihoods, where they are asked for.
            cited_by: Who says which evidence an answer rests on: the "reader", word "overlap", or "" nobody.
        """
        self._cited_by = cited_by
        # What each has been asked, with the function that takes the result. In the order in which they are looked at:
        # an answer may have to be judged, and what this machine computes can be computed while servers answer.
        given: dict[str, Worker[Any, Any] | None] = {
            "likelihood": likelihood_scorer,
            "reader": workers.as_worker(reader),
            "answer judge": answer_judge,
            "content judge": content_judge,
        }
        self._pending: dict[str, Pending[Any, Any, Callable[[Any], None]]] = {
            name: Pending(worker) for name, worker in given.items() if worker is not None
        }

    def ask(self, pending: Sequence[PendingAnswer], answers: bool = True, likelihoods: bool = False) -> None:
        """Asks for the answers to some questions, for the likelihoods of their gold answers, or for both."""
        for one in pending:
            if answers:
                query = Query(one.question.prompt, one.texts)
                self._pending["reader"].submit(query, functools.partial(self._answered, one))
            if likelihoods:
                query = likelihood_query(one.question, one.texts)
                self._pending["likelihood"].submit(query, functools.partial(setattr, one, "likelihood"))

    def _answered(self, one: PendingAnswer, text: str) -> None:
        one.text = text
        if self._cited_by == "reader":
            one.text, one.cited = prompts.split_citations(text, len(one.items))
        elif self._cited_by:
            one.cited = tuple(scoring.supports(item.text, text) for item in one.items)
        if one.question.metric not in scoring.JUDGED:
            one.score = scoring.score(one.text, one.question)
        elif "answer judge" in self._pending:
            self._pending["answer judge"].submit(
                JudgedAnswer(one.question, one.text), functools.partial(_set_verdict, one)
            )
        else:
            raise ValueError(f"The metric {one.question.metric!r} of {one.question.text!r} needs a judge.")

    def judge_content(self, operation: Operation, receive: Callable[[bool | None], None]) -> None:
        """Asks whether an INSERT or UPDATE was worth writing; `receive` is called with the verdict."""
        assert "content judge" in self._pending, "the rule needs a content judge"
        self._pending["content judge"].submit(operation, receive)

    def collect(self, wait: bool) -> None:
        """Takes in the results that there are.

        Args:
            wait: Wait until there is one, of whomever; False: do no work.
        """
        for pending in self._pending.values():
            _receive(pending, wait=False)
        busy = next((pending for pending in self._pending.values() if pending.busy), None)
        if wait and busy is not None:
            _receive(busy, wait=True)

    def finish(self) -> None:
        """Waits until all that was asked for is filled in."""
        while any(pending.busy for pending in self._pending.values()):
            self.collect(wait=True)

    def cancel(self) -> None:
        """Gives up all that is still to come."""
        for pending in self._pending.values():
            pending.cancel_all()


def _set_verdict(one: PendingAnswer, verdict: bool | None) -> None:
    one.score = None if verdict is None else float(verdict)


def _receive(pending: Pending[Any, Any, Callable[[Any], None]], wait: bool) -> None:
    for receive, result in pending.collect(wait):
        receive(result)
