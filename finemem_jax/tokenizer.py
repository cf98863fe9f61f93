"""Text to token ids and back, and the chat format around it. Knows nothing of prompts or memory.

Two kinds of text never mix: *template* text, which we write and where "<|im_end|>" is a token, and *content*,
which comes from streams, memories and models, and where the same characters are only characters.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from typing import Protocol

import gguf
import tokenizers

# transformers warns that it found no PyTorch; we use its chat templates only.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
import transformers
from tokenizers import decoders, models, pre_tokenizers

from finemem_jax.episode import Message


@dataclasses.dataclass(frozen=True)
class EncodedChat:
    """Token ids of a chat that asks for the assistant's next turn.

    Attributes:
        ids: The prompt.
        cuts: Ends (exclusive) of what precedes the last message's content, of each of its parts but the last,
            and of the whole prompt. Increasing; the last one is len(ids).
    """

    ids: tuple[int, ...]
    cuts: tuple[int, ...]


class Tokenizer(Protocol):
    """What the rest of the framework needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encodes content: no character sequence in it becomes a special token."""
        ...

    def encode_template(self, text: str) -> list[int]:
        """Encodes template text: special tokens are recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8; `decode` joins these."""
        ...

    def frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """Template text around the contents of messages with these roles: one piece before each, one after all."""
        ...


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedChat:
    """Encodes a chat and the header of the assistant's reply.

    Args:
        messages: At least one; the last is the one whose parts set the cuts.
    """
    frame = tokenizer.frame(tuple(message.role for message in messages))
    ids: list[int] = []
    cuts: list[int] = []
    for before, message in zip(frame, messages, strict=False):
        ids += tokenizer.encode_template(before)
        cuts = [len(ids)]
        for part in message.parts:
            ids += tokenizer.encode(part)
            cuts.append(len(ids))
    ids += tokenizer.encode_template(frame[-1])
    cuts[-1] = len(ids)
    return EncodedChat(tuple(ids), tuple(cuts))


def character_starts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where in decode(ids) each token's text starts, in characters.

    A token that only continues a character begun by the one before it starts where that character does.
    """
    # Tokens end inside characters, so that decoding them one by one would give other text.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    starts, length = [], 0
    for token_id in ids:
        starts.append(length)
        length += len(decoder.decode(tokenizer.token_bytes(token_id)))
    return starts


def strip_end(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Drops the end-of-turn token that closes a completion, if it is there."""
    return list(ids[:-1]) if ids and ids[-1] in tokenizer.end_ids else list(ids)


class BpeTokenizer:
    """A byte-level BPE tokenizer with a chat template, held by the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: str, end_tokens: Sequence[str]):
        self._template_backend = backend
        self._content_backend = tokenizers.Tokenizer.from_str(backend.to_str())
        # In content, "<|im_end|>" must stay characters, or a chunk could end the user's turn.
        self._content_backend.encode_special_tokens = True
        self._chat = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template)
        self._end_ids = tuple(_id_of(backend, token) for token in end_tokens)
        self._special_ids = frozenset(backend.get_added_tokens_decoder())
        self._frame = functools.lru_cache(maxsize=64)(self._render_frame)

    @property
    def vocab_size(self) -> int:
        return self._template_backend.get_vocab_size()

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self._end_ids

    def encode(self, text: str) -> list[int]:
        return self._content_backend.encode(_well_formed(text), add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        return self._template_backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._template_backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._template_backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"A token id must be below the vocabulary's size of {self.vocab_size}, got {token_id}.")
        # Special tokens stand for themselves; all others are written in the byte alphabet.
        if token_id in self._special_ids or any(character not in _BYTE_OF for character in token):
            return token.encode()
        return bytes(_BYTE_OF[character] for character in token)

    def frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        return self._frame(roles)

    def _render_frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        # The template is rendered around marks, and cut at them: any template that leaves contents whole works.
        marks = [f"\u2402content{i}\u2403" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        rest = self._chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(rest, str), "apply_chat_template gives text where it is not asked for tokens"
        pieces = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise ValueError(
                    f"The chat template drops or reorders messages with roles {roles}; use another template."
                )
            pieces.append(before)
        return (*pieces, rest)


def _id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ValueError(f"The end token {token!r} is not in the tokenizer's vocabulary; name one that is.")
    return token_id


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own bytes, the others are counted up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_SURROGATE = re.compile("[\ud800-\udfff]")


def _well_formed(text: str) -> str:
    """Replaces lone surrogates, which have no UTF-8 form, by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def from_gguf(reader: gguf.GGUFReader) -> BpeTokenizer:
    """Builds the tokenizer that an open GGUF file carries.

    Only the pre-tokenizers that we can check are accepted: "smollm" (digits one by one, then GPT-2's).

    Raises:
        ValueError: the file carries another kind of tokenizer.
    """
    fields = reader.fields
    kind = tuple(
        fields[name].contents() if name in fields else None for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"model.weights: its tokenizer kind {kind} is not supported; use a GGUF with a gpt2/smollm one "
            "(SmolLM2's have it)."
        )
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    control = gguf.TokenType.CONTROL
    kinds = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, token_kind in zip(tokens, kinds, strict=True) if token_kind == control]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    end = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
    return BpeTokenizer(backend, fields["tokenizer.chat_template"].contents(), [end])


class ByteTokenizer:
    """UTF-8 bytes and two control tokens: a complete tokenizer for tests, with nothing to download."""

    _START, _END = "<|start|>", "<|end|>"

    def __init__(self, phrases: Sequence[str] = ()):
        """Args:
        phrases: Texts that one more token each stands for when a model writes it; encoding only makes bytes.
        """
        self._names = [bytes([i]) for i in range(256)]
        self._names += [text.encode() for text in (self._START, self._END, *phrases)]

    @property
    def vocab_size(self) -> int:
        return len(self._names)

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (257,)

    def encode(self, text: str) -> list[int]:
        return list(_well_formed(text).encode("utf-8"))

    def encode_template(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            if text.startswith(self._START):
                ids, text = [*ids, 256], text[len(self._START) :]
            elif text.startswith(self._END):
                ids, text = [*ids, 257], text[len(self._END) :]
            else:
                ids, text = ids + self.encode(text[0]), text[1:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._names[i] for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._names[token_id]

    def frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        heads = [f"{self._START}{role[0]}:" for role in roles]
        return (heads[0], *(self._END + head for head in heads[1:]), f"{self._END}{self._START}a:")
