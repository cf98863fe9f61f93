"""Turns text into token ids and back, with the chat format around it. Knows nothing of prompts or memory.

Two kinds of text never mix: *template* text, which we write and where "<|im_end|>" is a token, and *content*,
which comes from streams, memories and models, and where the same characters are only characters.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jinja2
import tokenizers

# transformers warns that it found no PyTorch; we use its chat templates only.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
import transformers

from finemem_jax.runtime import files
from finemem_jax.types import Message


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
        """Encodes template text: special tokens are recognized."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8; `decode` joins these."""
        ...

    def frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """Template text around the contents of messages with these roles: a part before each, one after all."""
        ...

    def save(self, folder: pathlib.Path, opening: Sequence[Message] = (), seam: tuple[str, str] = ("", "")) -> None:
        """Writes the files by which transformers knows this tokenizer, its chat template and its end tokens.

        Args:
            opening: What the saved template puts before a chat that brings no system message; the first one has to.
            seam: Where parts of a message meet: what ends one, and what begins the next. Here parts are encoded apart;
                transformers sees one text, and is to cut it there.
        """
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


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja, and whether the assistant may think before it answers, for those that ask (Qwen3's)."""

    text: str
    thinking: bool = False


class BpeTokenizer:
    """A byte-level BPE tokenizer with a chat template, held by the `tokenizers` library."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: ChatTemplate,
        end_tokens: Sequence[str],
        *,
        named_tokens: Mapping[str, str] | None = None,
        source: pathlib.Path | None = None,
    ):
        """Takes over a tokenizer of the library.

        Args:
            end_tokens: Tokens that end the assistant's turn.
            named_tokens: What templates and transformers call some tokens: {"bos_token": "<|begin_of_text|>", …}.
            source: The Hugging Face folder it was read from, whose files `save` copies.
        """
        self._template_backend = backend
        self._content_backend = tokenizers.Tokenizer.from_str(backend.to_str())
        # In content, "<|im_end|>" must stay characters, or a chunk could end the user's turn.
        self._content_backend.encode_special_tokens = True
        self._named_tokens = dict(named_tokens or {})
        self._chat = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template.text, **self._named_tokens
        )
        self._template = template
        self._source = source
        self._end_ids = tuple(_id_of(backend, token) for token in end_tokens)
        self._special_ids = frozenset(backend.get_added_tokens_decoder())
        # Ids may have gaps; what counts is how many rows of an embedding they reach into.
        self._vocab_size = max(backend.get_vocab().values()) + 1
        self._frame = functools.lru_cache(maxsize=64)(self._render_frame)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

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
            # Embeddings are padded beyond the vocabulary, and a model may sample such a row: it adds no text.
            return b""
        # Special tokens stand for themselves; all others are written in the byte alphabet.
        if token_id in self._special_ids or any(character not in _BYTE_OF for character in token):
            return token.encode()
        return bytes(_BYTE_OF[character] for character in token)

    def frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        return self._frame(roles)

    def _render_frame(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        # The template is rendered around marks, and cut at them: any template that keeps contents whole works.
        marks = [f"\u2402content{i}\u2403" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            rest = self._chat.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self._template.thinking,
                # Llama 3's templates name a date: today's, if they are not told one, and prompts would change at night.
                date_string=DATE,
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The chat template refuses messages with roles {roles} ({error}); use another template."
            ) from error
        assert isinstance(rest, str), "apply_chat_template gives text where it is not asked for tokens"
        parts = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise ValueError(
                    f"The chat template drops or reorders messages with roles {roles}; use another template."
                )
            parts.append(before)
        return (*parts, rest)

    def save(self, folder: pathlib.Path, opening: Sequence[Message] = (), seam: tuple[str, str] = ("", "")) -> None:
        if self._source is None:
            self._save_new(folder)
        else:
            for name in _TOKENIZER_FILES:
                if (self._source / name).is_file():
                    shutil.copyfile(self._source / name, folder / name)
        changed: dict[str, Any] = {}
        if opening:
            template = opened(self._template.text, opening, self._template.thinking)
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            # Where programs of before 2025 look for it.
            changed["chat_template"] = template
        before, after = seam
        if self.encode(before) + self.encode(after) != self.encode(before + after):
            fields = files.read_json(folder / "tokenizer.json", "fetch it again")
            files.write_json(folder / "tokenizer.json", fields | {"pre_tokenizer": _cut(fields["pre_tokenizer"], seam)})
            # A model's own class may take no notice of how the file splits text.
            changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        if changed:
            path = folder / "tokenizer_config.json"
            files.write_json(path, files.read_json(path, "fetch it again") | changed)

    def _save_new(self, folder: pathlib.Path) -> None:
        """Writes the files of a tokenizer that did not come from a Hugging Face folder."""
        self._template_backend.save(str(folder / "tokenizer.json"))
        named = {"eos_token": self._template_backend.id_to_token(self._end_ids[0]) or ""} | self._named_tokens
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": self._template.text,
            "clean_up_tokenization_spaces": False,
            **named,
        }
        generation: dict[str, Any] = {"eos_token_id": list(self._end_ids)}
        for name in ("bos_token", "pad_token"):
            if name in named:
                generation[f"{name}_id"] = _id_of(self._template_backend, named[name])
        files.write_json(folder / "tokenizer_config.json", config)
        files.write_json(folder / "special_tokens_map.json", named)
        files.write_json(folder / "generation_config.json", generation)


DATE = "26 Jul 2024"
# All by which Hugging Face folders describe a tokenizer and how its model generates.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def opened(template: str, opening: Sequence[Message], thinking: bool = False) -> str:
    """Makes a chat template that puts messages before a chat without a system message, and else changes nothing.

    What a program does not set is as it was in training: whether the model may think first, and the date.

    Args:
        template: The model's own, or one that was opened before.
        opening: A system message first.
    """
    assert opening[0].role == "system", "a chat that has been opened must not be opened again"
    own = template.rpartition(_OWN)[2]
    shown = [{"role": message.role, "content": "".join(message.parts)} for message in opening]
    # JSON's strings are Jinja's, except that Jinja knows no pairs of surrogates.
    listed = ",\n  ".join(json.dumps(message, ensure_ascii=False) for message in shown)
    lines = [
        "{%- if not messages or messages[0]['role'] != 'system' -%}",
        f"{{%- set messages = [\n  {listed}\n] + messages -%}}",
        "{%- endif -%}",
    ]
    for name, value in (("enable_thinking", str(thinking).lower()), ("date_string", json.dumps(DATE))):
        if name in own:
            lines.append(f"{{%- if {name} is not defined -%}}{{%- set {name} = {value} -%}}{{%- endif -%}}")
    return "\n".join(lines) + "\n" + _OWN + own


# With a newline after it, which is part of the comment to transformers: the template begins as at the start of a file.
_OWN = "{#- Here begins the model's own template. #}\n"


def _cut(pre_tokenizer: Any, seam: tuple[str, str]) -> dict[str, Any]:
    """Makes a pre-tokenizer, as tokenizer.json has it, that first sets apart the white space before a seam."""
    before, after = map(re.escape, seam)
    cut = {"type": "Split", "pattern": {"Regex": rf"\s*{before}(?={after})"}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, pre_tokenizer]}


def uncut(folder: pathlib.Path, seam: tuple[str, str]) -> None:
    """Takes a seam that `save` wrote, now or before, out of a folder's tokenizer.json again, if it is there."""
    fields = files.read_json(folder / "tokenizer.json", "fetch it again")
    own = (fields["pre_tokenizer"] or {}).get("pretokenizers", [None])[-1]
    if fields["pre_tokenizer"] == _cut(own, seam):
        files.write_json(folder / "tokenizer.json", fields | {"pre_tokenizer": own})


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


class ByteTokenizer:
    """UTF-8 bytes and two control tokens: a complete tokenizer for tests, with nothing to download."""

    _START, _END = "<|start|>", "<|end|>"

    def __init__(self, phrases: Sequence[str] = ()):
        """Takes 256 bytes, two control tokens and `phrases`.

        Args:
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

    def save(self, folder: pathlib.Path, opening: Sequence[Message] = (), seam: tuple[str, str] = ("", "")) -> None:
        raise ValueError(
            f"{folder}: the tests' tokenizer of bytes has no Hugging Face form; export a model with a tokenizer of its "
            "own (model.tokenizer='weights')."
        )
