"""Masks the tokens that may come next, so that what the manager writes is well-formed: the grammar of operations.

Needs llguidance (`pip install 'finemem_jax[constrained]'`), which does the parsing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt32

from finemem_jax.memory import operations
from finemem_jax.memory.operations import Dialect
from finemem_jax.types import CORE, Action, Matcher

# A text as `operations.parse` keeps it: it does not begin with a space.
_TEXT = r"^\S[\s\S]*$"


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Grammar:
    """A grammar over one tokenizer's tokens; every completion goes through it on its own (`start`)."""

    def __init__(self, tokens: Vocabulary, lark: str, vocab_size: int | None = None):
        """Compiles a grammar.

        Args:
            lark: The grammar, in Lark's syntax as llguidance extends it; it says nothing of end tokens, which may
                follow whatever is complete.
            vocab_size: The model's, where it is larger than the tokenizer's.

        Raises:
            ValueError: llguidance is missing, or finds fault with the grammar.
        """
        try:
            import llguidance
        except ImportError as error:
            raise ValueError(
                "Constrained decoding needs llguidance: pip install 'finemem_jax[constrained]'."
            ) from error
        self._vocab_size = vocab_size or tokens.vocab_size
        self._end_ids = tokens.end_ids
        wrapped = llguidance.TokenizerWrapper(_Tokens(tokens))
        self._tokenizer = llguidance.LLTokenizer(wrapped, n_vocab=self._vocab_size, eos_token=list(tokens.end_ids))
        self._lark, self._matcher = lark, llguidance.LLMatcher
        fault = self._matcher.validate_grammar(self._matcher.grammar_from_lark(lark), self._tokenizer)
        if fault:
            raise ValueError(f"llguidance does not take the grammar: {fault[:500]}")

    def start(self) -> Matcher:
        """Begins a completion."""
        matcher = self._matcher(self._tokenizer, self._matcher.grammar_from_lark(self._lark))
        return _Matcher(matcher, self._vocab_size, self._end_ids)


class _Tokens:
    """A tokenizer in the form that llguidance reads."""

    def __init__(self, tokens: Vocabulary):
        self.bos_token_id, self.eos_token_id = None, tokens.end_ids[0]
        # What adds nothing to a text is a control token, which no text may contain.
        written = [tokens.token_bytes(i) for i in range(tokens.vocab_size)]
        self.special_token_ids = [i for i, text in enumerate(written) if not text or i in tokens.end_ids]
        self.tokens = [text or f"<control {i}>".encode() for i, text in enumerate(written)]
        self._encode = tokens.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class _Matcher:
    """Follows one completion; see `types.Matcher`."""

    def __init__(self, matcher: Any, vocab_size: int, end_ids: tuple[int, ...]):
        self._matcher, self._end_ids = matcher, end_ids
        self._words = -(-vocab_size // 32)

    def mask(self) -> UInt32[np.ndarray, " W"]:
        mask = np.zeros(self._words, np.uint32)
        if self._matcher.is_stopped() or self._matcher.is_error():
            for end in self._end_ids:
                mask[end // 32] |= np.uint32(1 << end % 32)
            return mask
        bits = self._matcher.compute_bitmask()
        mask.view(np.uint8)[: len(bits)] = np.frombuffer(bits, np.uint8)[: mask.nbytes]
        return mask

    def advance(self, token: int) -> None:
        if token not in self._end_ids:
            self._matcher.consume_token(token)


def of_operations(dialect: Dialect) -> str:
    """Writes the grammar of a whole response: calls line by line, each with the arguments it needs, or one SKIP.

    In the form in which `operations.render` writes them. The numbers of items are any; only the memory knows which
    there are.

    Raises:
        ValueError: there is no grammar for the dialect's tool-call format.
    """
    if dialect.tool_call_format != "json_lines":
        raise ValueError(
            f"There is no grammar for manager.tool_call_format={dialect.tool_call_format!r}; set "
            "manager.constrained=False, or manager.tool_call_format='json_lines'."
        )
    functions = [tool["function"] for tool in operations.tools(dialect.layout)]
    alone = [function for function in functions if function["name"] == Action.SKIP.value]
    together = [function for function in functions if function not in alone]
    either = "(call (NEWLINE call)* | skip)" if alone else "call (NEWLINE call)*"
    rules = [f"start: {either} NEWLINE?", 'NEWLINE: "\\n"', f"call: %json {_schema(together)}"]
    return "\n".join([*rules, *([f"skip: %json {_schema(alone)}"] if alone else []), ""])


def _schema(functions: Sequence[Mapping[str, Any]]) -> str:
    """Writes calls of some functions as JSON schema."""
    calls = [_call(function["name"], arguments) for function in functions for arguments in _arguments(function)]
    layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({"anyOf": calls, "x-guidance": layout}, ensure_ascii=False)


def _call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return _object({"name": {"const": name}, "arguments": _object(arguments)})


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


def _arguments(function: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists the sets of arguments that a function may be given, as schemas."""
    # What `parse` takes for content and for a number.
    largest = 10**operations.MAX_ID_DIGITS - 1
    schemas: Mapping[str, Mapping[str, Any]] = {
        "string": {"type": "string", "pattern": _TEXT},
        "integer": {"type": "integer", "minimum": 0, "maximum": largest},
    }
    properties = function["parameters"]["properties"]
    plain = {name: schemas[schema["type"]] for name, schema in properties.items() if "enum" not in schema}
    kinds = [kind for schema in properties.values() for kind in schema.get("enum", ())]
    if not kinds:
        return [plain]
    found = []
    for kind in kinds:
        # The core memory is one text: it goes without a number.
        own = {name: schema for name, schema in plain.items() if kind != f"{CORE}_memory" or name != "memory_id"}
        own["memory_type"] = {"const": kind}
        found.append({name: own[name] for name in properties if name in own})
    return found
