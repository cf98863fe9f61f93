"""Defines the one interface to language models, chats in and replies out, and puts the model of this process behind it.

Servers behind the same interface are in `endpoint`.
"""

from __future__ import annotations

from finemem_jax.models import tokenizer
from finemem_jax.models.tokenizer import EncodedChat, Tokenizer
from finemem_jax.runtime import workers
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import Chat, Completion, Refusal, Request, random_key


def after_thinking(text: str) -> str | None:
    """Returns what a reply says after its <think></think>; None where the thinking never ends."""
    reply = text.rpartition("</think>")[2]
    return None if "<think>" in reply else reply


# A language model: a sampler of our own (`in_process`), or servers (`endpoint.Endpoint`).
LanguageModel = Worker[Chat, str]


def in_process(sampler: Worker[Request, Completion | Refusal], tokens: Tokenizer, seed: int) -> LanguageModel:
    """Makes a language model of a sampler, which knows token ids alone.

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

    return workers.Transformed(sampler, request, text)


def encode(tokens: Tokenizer, chat: Chat) -> EncodedChat:
    """Turns a chat into token ids."""
    return tokenizer.encode_chat(tokens, chat.messages)
