"""Has language models judge what was written, and answers that no rule can score.

A judge may come to no verdict. It is then asked again, and in the end that is what is returned, never a low score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from finemem_jax.clients.chat import LanguageModel
from finemem_jax.config import sections
from finemem_jax.reading import prompts
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Pending, Worker
from finemem_jax.types import Chat, Message, Operation, Question

Item = TypeVar("Item", bound=Hashable)

# Of a judge that is asked again: at its own, low one it would say the same once more.
_LEAST_TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """A question with the answer that was given to it."""

    question: Question
    answer: str


# Says of operations whether they were worth writing; None where it comes to no verdict.
ContentJudge = Worker[Operation, bool | None]
# Says of answers to questions whose metric is one of `scoring.JUDGED` whether they are right.
AnswerJudge = Worker[JudgedAnswer, bool | None]


def content_judge(model: LanguageModel, settings: sections.Judge) -> Judge[Operation]:
    """Makes Mem-alpha's judge of contents (2509.25911)."""

    def ask(operation: Operation) -> Chat:
        return _chat(prompts.content_judge(operation, settings.content_system), settings)

    return Judge(model, ask, prompts.verdict, tries=settings.tries)


def answer_judge(model: LanguageModel, settings: sections.Judge) -> Judge[JudgedAnswer]:
    """Makes a judge of answers, by the metric and kind of their questions: LongMemEval's, and a general one."""

    def ask(item: JudgedAnswer) -> Chat:
        messages = prompts.answer_judge(
            item.question, item.answer, rule=rule_of(item.question), system=settings.answer_system
        )
        return _chat(messages, settings)

    return Judge(model, ask, prompts.yes_or_no, tries=settings.tries)


def rule_of(question: Question) -> str:
    """Names which of `prompts.ANSWER_RULES` a question is judged by."""
    if question.metric == "judge_preference":
        return "single-session-preference"
    if question.metric == "judge_longmemeval":
        # Its questions without an answer have types of their own, which end so.
        return "abstention" if question.kind.endswith("_abs") else question.kind
    return ""


def _chat(messages: Sequence[Message], settings: sections.Judge) -> Chat:
    return Chat(tuple(messages), settings.max_new_tokens, settings.temperature)


# What a `Judge` counts.
COUNTS = ("retried", "undecided")


class Judge(Generic[Item]):
    """A worker that asks a language model about items, and reads yes or no from what it says; equal items once.

    Attributes:
        retried: How often the model was asked again.
        undecided: How many items it came to no verdict about in the end.
    """

    def __init__(
        self, model: LanguageModel, ask: Callable[[Item], Chat], read: Callable[[str], bool | None], *, tries: int
    ):
        """Puts a judge in front of a language model.

        Args:
            ask: The chat that asks about an item; is asked again with other seeds.
            read: What a reply says; None for nothing, or for both.
            tries: How often to ask in all; at least 1.
        """
        self.retried = self.undecided = 0
        retrying: Worker[Chat, bool | None] = _Retry(self, model, read, tries=tries)
        self._worker: Worker[Item, bool | None] = workers.Memoized(
            workers.Transformed(retrying, ask, lambda verdict: verdict)
        )
        self.submit, self.collect, self.cancel = self._worker.submit, self._worker.collect, self._worker.cancel


class _Retry:
    """Asks for a verdict until there is one, or for the last time."""

    def __init__(self, counts: Judge[Any], model: LanguageModel, read: Callable[[str], bool | None], *, tries: int):
        self._counts, self._read, self._tries = counts, read, tries
        self._last_id = 0
        # What the model has been asked, for which of our own request ids and at which try; and its id of that.
        self._pending: Pending[Chat, str, tuple[int, Chat, int]] = Pending(model)
        self._asked: dict[int, int] = {}

    def submit(self, chat: Chat) -> int:
        self._last_id += 1
        self._ask(self._last_id, chat, 1)
        return self._last_id

    def _ask(self, request_id: int, chat: Chat, number: int) -> None:
        again = max(chat.temperature, _LEAST_TEMPERATURE)
        put = chat if number == 1 else dataclasses.replace(chat, seed=chat.seed + number - 1, temperature=again)
        self._asked[request_id] = self._pending.submit(put, (request_id, chat, number))

    def collect(self, wait: bool = True) -> list[tuple[int, bool | None]]:
        done: list[tuple[int, bool | None]] = []
        while self._pending.busy and not done:
            replied = self._pending.collect(wait)
            for (request_id, chat, number), reply in replied:
                verdict = self._read(reply)
                if verdict is None and number < self._tries:
                    self._counts.retried += 1
                    self._ask(request_id, chat, number + 1)
                    continue
                self._counts.undecided += verdict is None
                del self._asked[request_id]
                done.append((request_id, verdict))
            if not (wait and replied):
                break
        return done

    def cancel(self, request_id: int) -> bool:
        asked = self._asked.pop(request_id, None)
        return asked is not None and self._pending.cancel(asked)
