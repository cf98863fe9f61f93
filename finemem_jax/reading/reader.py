"""The frozen reader: questions with evidence in, answers out. Knows nothing of memories or rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from finemem_jax.memory import prompts
from finemem_jax.models import tokenizer
from finemem_jax.models.tokenizer import EncodedChat, Tokenizer
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import Chat, Completion, Likelihood, Question, Refusal, Request, random_key


@dataclasses.dataclass(frozen=True)
class Query:
    """A question and the texts it may be answered from, best first."""

    question: str
    evidence: tuple[str, ...]


# Answers every query, in order. Raises when a machine failed; a bad answer is still an answer.
AnswerFn = Callable[[Sequence[Query]], list[str]]
# The same, query by query.
Reader = Worker[Query, str]
# A language model: a sampler of our own (`in_process`), or servers (`endpoint.Endpoint`).
LanguageModel = Worker[Chat, str]


@dataclasses.dataclass(frozen=True)
class Claim:
    """That a question, asked with some evidence, has these answers.

    Attributes:
        golds: Any of them is right.
        choices: All answers that are possible, the right ones included or not; () for an open question.
    """

    query: Query
    golds: tuple[str, ...]
    choices: tuple[str, ...] = ()


LikelihoodReader = Worker[Claim, Likelihood]


def claim(question: Question, evidence: Sequence[str]) -> Claim:
    """What is claimed of a question."""
    query = Query(question.prompt, tuple(evidence))
    # Where the question asks for a box, the reader is not asked for a bare label.
    boxed = prompts.BOXED in question.prompt
    golds, choices = (tuple(map(_in_box, x)) if boxed else x for x in (question.answers, question.choices))
    return Claim(query, golds, choices)


def _in_box(text):
    return f"\\boxed{{{text}}}"


@dataclasses.dataclass(frozen=True)
class ReaderOptions:
    """How a language model is asked questions; see `config.default()`.

    Attributes:
        cite: Have it name the notes it answers from (`prompts.split_citations` reads that).
        system: Replaces its system message if not empty.
    """

    max_new_tokens: int
    temperature: float
    num_examples: int
    cite: bool = False
    system: str = ""


def language_model(model: LanguageModel, options: ReaderOptions) -> Reader:
    """A reader that is a language model. Equal queries are put to it once.

    Rollouts of a group often hold the same facts, and early on hold nothing at all.
    """
    return workers.Once(workers.Mapped(model, lambda query: chat(query, options), _answer))


def chat(query: Query, options: ReaderOptions) -> Chat:
    """What a language model is asked."""
    system = options.system or prompts.READER_SYSTEM
    messages = prompts.reader(query.evidence, query.question, options.num_examples, system, options.cite)
    return Chat(tuple(messages), options.max_new_tokens, options.temperature)


def in_process(sampler: Worker[Request, Completion | Refusal], tokens: Tokenizer, seed: int) -> LanguageModel:
    """The language model that a sampler has, text in and text out.

    Raises:
        ValueError: (on collecting) the sampler refuses a prompt; the message names the remedy.
    """

    def request(chat: Chat) -> Request:
        prompt = encode(tokens, chat)
        # The key is the prompt itself: the same question with the same evidence is answered alike, whoever asks.
        key = random_key(seed, "reader", chat.seed, *prompt.ids)
        return Request(prompt.ids, prompt.cuts, chat.max_new_tokens, chat.temperature, key)

    def text(result: Completion | Refusal) -> str:
        if isinstance(result, Refusal):
            raise ValueError(f"The reader's prompt was refused: {result.reason} Or lower memory.top_k.")
        return tokens.decode(tokenizer.strip_end(tokens, result.ids)).strip()

    return workers.Mapped(sampler, request, text)


def encode(tokens: Tokenizer, chat: Chat) -> EncodedChat:
    """A chat as token ids."""
    return tokenizer.encode_chat(tokens, chat.messages)


def evidence(cite: bool = False) -> AnswerFn:
    """A reader without a model: its answer is what was retrieved, word for word, best item first.

    So a score says whether the gold answer stands in the evidence: for quick work, and for tests.

    Args:
        cite: Answer with the best item alone, and name it.
    """

    def answer(queries: Sequence[Query]) -> list[str]:
        if cite:
            return [f"{query.evidence[0]} [1]" if query.evidence else "" for query in queries]
        return ["\n".join(query.evidence) for query in queries]

    return answer


def _answer(reply):
    # Thinking that never came to an end is no answer.
    return (prompts.after_thinking(reply) or "").strip()
