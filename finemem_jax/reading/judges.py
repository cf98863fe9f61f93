"""Language models as judges: of what was written, and of answers that no rule can score.

A judge may come to no verdict. It is then asked again, and in the end that is what is returned, never a low score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

from finemem_jax.reading import prompts
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import Chat, Operation, Question

Item = TypeVar("Item")

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


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """How a judge is asked; see `config.default()`. `system` replaces its system message if not empty."""

    max_new_tokens: int
    temperature: float
    tries: int
    system: str = ""


def content_judge(model: Worker[Chat, str], options: JudgeOptions) -> Judge[Operation]:
    """Mem-alpha's judge of contents (2509.25911)."""
    system = options.system or prompts.JUDGE_SYSTEM

    def asked(operation: Operation) -> Chat:
        return _chat(prompts.content_judge(operation, system), options)

    return Judge(model, asked, prompts.verdict, options.tries)


def answer_judge(model: Worker[Chat, str], options: JudgeOptions) -> Judge[JudgedAnswer]:
    """A judge of answers, by the metric and kind of their questions: LongMemEval's, and a general one."""
    system = options.system or prompts.ANSWER_JUDGE_SYSTEM

    def asked(item: JudgedAnswer) -> Chat:
        question = item.question
        messages = prompts.answer_judge(question.text, question.answers, item.answer, rule_of(question), system)
        return _chat(messages, options)

    return Judge(model, asked, prompts.yes_or_no, options.tries)


def rule_of(question: Question) -> str:
    """Which of `prompts.ANSWER_RULES` a question is judged by."""
    if question.metric == "judge_preference":
        return "single-session-preference"
    if question.metric == "judge_longmemeval":
        # Its questions without an answer have types of their own, which end so.
        return "abstention" if question.kind.endswith("_abs") else question.kind
    return ""


def _chat(messages, options):
    return Chat(tuple(messages), options.max_new_tokens, options.temperature)


class Judge(Generic[Item]):
    """A worker that asks a language model about items, and reads yes or no from what it says; equal items once.

    Attributes:
        retried: How often the model was asked again.
        undecided: How many items it came to no verdict about in the end.
    """

    def __init__(
        self,
        model: Worker[Chat, str],
        ask: Callable[[Item], Chat],
        read: Callable[[str], bool | None],
        tries: int,
    ):
        """Args:
        ask: The chat that asks about an item; is asked again with other seeds.
        read: What a reply says; None for nothing, or for both.
        tries: How often to ask in all; at least 1.
        """
        self.retried = self.undecided = 0
        self._worker = workers.Memoized(
            workers.Transformed(_Retry(self, model, read, tries), ask, lambda verdict: verdict)
        )
        self.submit, self.collect, self.cancel = self._worker.submit, self._worker.collect, self._worker.cancel


class _Retry:
    """Asks for a verdict until there is one, or patience ends."""

    def __init__(self, counts, model, read, tries):
        self._counts, self._model, self._read, self._tries = counts, model, read, tries
        self._last_id = 0
        # What the model has been given, by its request ids: our own, the chat, tries so far; and back.
        self._asked: dict[int, tuple[int, Chat, int]] = {}
        self._asked_as: dict[int, int] = {}

    def submit(self, chat: Chat) -> int:
        self._last_id += 1
        self._ask(self._last_id, chat, 1)
        return self._last_id

    def _ask(self, request_id, chat, number):
        again = max(chat.temperature, _LEAST_TEMPERATURE)
        put = chat if number == 1 else dataclasses.replace(chat, seed=chat.seed + number - 1, temperature=again)
        self._asked_as[request_id] = asked = self._model.submit(put)
        self._asked[asked] = request_id, chat, number

    def collect(self, wait: bool = True) -> list[tuple[int, bool | None]]:
        done: list[tuple[int, bool | None]] = []
        while self._asked and not done:
            replies = self._model.collect(wait)
            for asked, reply in replies:
                request_id, chat, number = self._asked.pop(asked)
                verdict = self._read(reply)
                if verdict is None and number < self._tries:
                    self._counts.retried += 1
                    self._ask(request_id, chat, number + 1)
                    continue
                self._counts.undecided += verdict is None
                del self._asked_as[request_id]
                done.append((request_id, verdict))
            if not (wait and replies):
                break
        return done

    def cancel(self, request_id: int) -> bool:
        asked = self._asked_as.pop(request_id, None)
        if asked is None:
            return False
        del self._asked[asked]
        return self._model.cancel(asked)
