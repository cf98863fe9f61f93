"""Parses the manager's text into operations, and renders operations as text, in the dialect that the manager writes.

A dialect is the layout of the memory and a tool-call format. The layout says which calls there are:

    flat    memory_insert(content), memory_update(id, content), memory_delete(id), skip()
    typed   new_memory_insert(memory_type, content), memory_update(memory_type, new_content, memory_id),
            memory_delete(memory_type, memory_id)      (Mem-alpha's; the core memory has no id and no insert)

The tool-call format says how a call stands in the text:

    json_lines   {"name": "memory_delete", "arguments": {"id": 3}} on a line of its own
    hermes       the same object between <tool_call> and </tool_call>, as Qwen writes it
    qwen_agent   a FUNCTION marker and the name, an ARGS marker and the arguments, as Mem-alpha writes it

Knows the format, not the memory: whether an id exists is for `transition.apply` to say.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import json_repair

from finemem_jax.types import CORE, EPISODIC, MEMORY_TYPES, SEMANTIC, Action, Malformed, Operation

MAX_CONTENT_CHARS = 8192  # One memory item; about 2,000 tokens of English, as long as a chunk.
MAX_ID_DIGITS = 18  # Any such id fits in an int64.
MAX_REPAIR_CHARS = 4096  # Longer calls are not repaired: repair is not linear in their length.
MAX_REPAIR_BRACKETS = 16  # Nor calls with more opening brackets, for the same reason; a call has two.
MAX_MALFORMED_CHARS = 200  # What a Malformed shows of its call.

LAYOUTS = ("flat", "typed")
TOOL_CALL_FORMATS = ("json_lines", "hermes", "qwen_agent")

# What a manager of a typed memory answers when it writes nothing; there is no skip to call.
NOTHING_WRITTEN = ("Done", "Done.")

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FLOWER = "\u273f"
_FUNCTION, _ARGS, _RESULT = (f"{_FLOWER}{word}{_FLOWER}" for word in ("FUNCTION", "ARGS", "RESULT"))


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a manager writes: the layout of its memory, one of `LAYOUTS`, in one of `TOOL_CALL_FORMATS`."""

    layout: str = "flat"
    tool_call_format: str = "json_lines"

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"memory.layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}.")
        if self.tool_call_format not in TOOL_CALL_FORMATS:
            raise ValueError(
                f"manager.tool_call_format must be one of {', '.join(TOOL_CALL_FORMATS)}; "
                f"got {self.tool_call_format!r}."
            )


DEFAULT = Dialect()


# --------------------------------------------------------------------------------------
# The calls
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tool:
    """One call: what it must hold, no less and no more, but for the id that the core memory does without."""

    action: Action
    name: str
    arguments: tuple[str, ...]
    description: str
    memory_types: tuple[str, ...] = ()


_FLAT = (
    _Tool(Action.INSERT, Action.INSERT.value, ("content",), "Store one new memory item."),
    _Tool(
        Action.UPDATE,
        Action.UPDATE.value,
        ("id", "content"),
        "Replace the text of a memory item. Write all that it should say from now on.",
    ),
    _Tool(Action.DELETE, Action.DELETE.value, ("id",), "Remove a memory item that is wrong or no longer needed."),
    _Tool(Action.SKIP, Action.SKIP.value, (), "Leave the memory as it is. Only ever written alone."),
)

# Names and arguments are Mem-alpha's, so that its models can be evaluated.
_TYPED = (
    _Tool(
        Action.INSERT,
        "new_memory_insert",
        ("memory_type", "content"),
        "Store one new item in the semantic or the episodic memory.",
        (SEMANTIC, EPISODIC),
    ),
    _Tool(
        Action.UPDATE,
        "memory_update",
        ("memory_type", "new_content", "memory_id"),
        "Replace the core memory, or the text of an item. Write all that it should say from now on.",
        MEMORY_TYPES,
    ),
    _Tool(
        Action.DELETE,
        "memory_delete",
        ("memory_type", "memory_id"),
        "Empty the core memory, or remove an item that is wrong or no longer needed.",
        MEMORY_TYPES,
    ),
)

_CALLS: Mapping[str, Mapping[str, _Tool]] = {
    layout: {tool.name: tool for tool in tools} for layout, tools in zip(LAYOUTS, (_FLAT, _TYPED), strict=True)
}

# The field of an Operation that an argument sets.
_FIELDS = {
    "content": "content",
    "new_content": "content",
    "id": "item_id",
    "memory_id": "item_id",
    "memory_type": "memory_type",
}

_TYPE_NAMES: Mapping[str, str] = {f"{memory_type}_memory": memory_type for memory_type in MEMORY_TYPES}

_CONTENT = {
    "type": "string",
    "description": "A short text that can be understood without its source.",
    "minLength": 1,
    "maxLength": MAX_CONTENT_CHARS,
}

_SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "content": _CONTENT,
    "new_content": {**_CONTENT, "description": "The whole new text, which can be understood without its source."},
    "id": {"type": "integer", "description": "Number of an existing memory item.", "minimum": 0},
    "memory_id": {
        "type": "integer",
        "description": "Number of an existing item of that memory; left out for core_memory, which is one text.",
        "minimum": 0,
    },
}


def _specification(tool: _Tool) -> dict[str, Any]:
    schemas = dict(_SCHEMAS)
    schemas["memory_type"] = {
        "type": "string",
        "description": "The part of the memory.",
        "enum": [name for name, memory_type in _TYPE_NAMES.items() if memory_type in tool.memory_types],
    }
    parameters = {
        "type": "object",
        "properties": {name: dict(schemas[name]) for name in tool.arguments},
        "required": [name for name in tool.arguments if name != "memory_id"],
        "additionalProperties": False,
    }
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


# The calls as function specifications in the OpenAI form, for prompts and exports.
TOOLS: tuple[dict[str, Any], ...] = tuple(map(_specification, _FLAT))
TYPED_TOOLS: tuple[dict[str, Any], ...] = tuple(map(_specification, _TYPED))


def tools(layout: str) -> tuple[dict[str, Any], ...]:
    """The calls of a layout as function specifications in the OpenAI form."""
    return {"flat": TOOLS, "typed": TYPED_TOOLS}[layout]


# --------------------------------------------------------------------------------------
# Text to operations
# --------------------------------------------------------------------------------------


def parse(text: str, repair: bool = False, dialect: Dialect = DEFAULT) -> tuple[Operation | Malformed, ...]:
    """Reads what the manager wrote: one entry for each of its `spans`, in order.

    Never raises, whatever the text, and takes time linear in its length.

    Args:
        text: The manager's response, decoded.
        repair: Whether a call that is no JSON is mended (quotes, commas, missing brackets) and judged again, within
            MAX_REPAIR_CHARS and MAX_REPAIR_BRACKETS. Mending also completes a call that was cut off in its content,
            but no tag that was never closed.
        dialect: Layout and tool-call format.

    Returns:
        Operations, their content stripped of outer whitespace; a Malformed for each span that is none. Its reason is
        one of a small fixed set, so reports can count reasons; its text is at most MAX_MALFORMED_CHARS long.
    """
    return tuple(_parse_call(text[start:end], repair, dialect) for start, end in spans(text, dialect))


def spans(text: str, dialect: Dialect = DEFAULT) -> tuple[tuple[int, int], ...]:
    """Where each written call stands in the text: (start, end) in characters, end exclusive; ordered, disjoint.

    - json_lines: each line that is not blank, without the whitespace around it. Only "\\n" ends a line. In the typed
      layout a line of `NOTHING_WRITTEN` is no call.
    - hermes: from each opening tag through its closing tag. A tag that is never closed lasts to the next one, or to
      the end. Text outside of tags is no call.
    - qwen_agent: from each FUNCTION marker through the last "}" of its arguments, or, where there is none, to the next
      marker. What follows the first RESULT marker was not the model's to write, and is no call.
    """
    found = {"json_lines": _line_spans, "hermes": _tag_spans, "qwen_agent": _marker_spans}[dialect.tool_call_format](
        text
    )
    if dialect == Dialect("typed", "json_lines"):
        return tuple((start, end) for start, end in found if text[start:end] not in NOTHING_WRITTEN)
    return tuple(found)


def _line_spans(text: str) -> Iterator[tuple[int, int]]:
    offset = 0
    for line in text.split("\n"):
        stripped = line.strip()
        if stripped:
            start = offset + len(line) - len(line.lstrip())
            yield start, start + len(stripped)
        offset += len(line) + 1


_TAGS = re.compile(f"{_OPEN}|{_CLOSE}")


def _tag_spans(text: str) -> Iterator[tuple[int, int]]:
    start = None
    for tag in _TAGS.finditer(text):
        closes = tag.group() == _CLOSE
        if start is not None:
            yield start, tag.end() if closes else _end_of_text(text, start, tag.start())
        start = None if closes else tag.start()
    if start is not None:
        yield start, _end_of_text(text, start, len(text))


_MARKERS = re.compile(f"{_FLOWER}(?:FUNCTION|RESULT|RETURN){_FLOWER}")


def _marker_spans(text: str) -> Iterator[tuple[int, int]]:
    start = None
    for marker in _MARKERS.finditer(text):
        if start is not None:
            yield start, _end_of_arguments(text, start, marker.start())
        if marker.group() == _RESULT:
            return
        start = marker.start() if marker.group() == _FUNCTION else None
    if start is not None:
        yield start, _end_of_arguments(text, start, len(text))


def _end_of_arguments(text: str, start: int, end: int) -> int:
    # Models add remarks behind the arguments; Mem-alpha's parser cuts them at the last brace, too.
    arguments = text.find(_ARGS, start, end)
    brace = text.rfind("}", arguments, end) if arguments >= 0 else -1
    return brace + 1 if brace >= 0 else _end_of_text(text, start, end)


def _end_of_text(text: str, start: int, end: int) -> int:
    return start + len(text[start:end].rstrip())


class _Refused(Exception):
    """Why a call is no operation; never leaves this module."""


def _parse_call(written: str, repair: bool, dialect: Dialect) -> Operation | Malformed:
    try:
        return _operation(_unwrapped(written, repair, dialect.tool_call_format), dialect.layout)
    except _Refused as refused:
        return Malformed(_excerpt(written), str(refused))


def _unwrapped(written: str, repair: bool, tool_call_format: str) -> Any:
    """The value {"name": …, "arguments": …} that a span holds, if it is well-formed."""
    if tool_call_format == "hermes":
        if not written.endswith(_CLOSE):
            raise _Refused("unclosed tag")
        return _load(written.removeprefix(_OPEN).removesuffix(_CLOSE).strip(), repair)
    if tool_call_format == "qwen_agent":
        name, marker, arguments = written.removeprefix(_FUNCTION).partition(_ARGS)
        if not marker:
            raise _Refused("missing 'arguments'")
        name, arguments = (part.strip().removeprefix(":").strip() for part in (name, arguments))
        return {"name": name, "arguments": _load(arguments, repair)}
    return _load(written, repair)


def _load(text: str, repair: bool) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _Refused("nested too deep") from None
    except ValueError:  # Also an integer of thousands of digits, which Python declines to convert.
        repaired = _repaired(text) if repair else None
        if repaired is None:
            raise _Refused("not JSON") from None
        return repaired


def _refuse_constant(name: str) -> NoReturn:
    # json.loads would take NaN and Infinity, which no JSON has.
    raise ValueError(name)


def _repaired(text: str) -> dict[str, Any] | None:
    # Repair rescans the rest of the text at each open bracket. Within these bounds the worst line found took 0.25 s
    # (60 µs a character, against 2 µs for a line worth repairing); with 64 brackets it took 1.1 s.
    num_brackets = sum(text.count(bracket) for bracket in "{[(")
    if len(text) > MAX_REPAIR_CHARS or num_brackets > MAX_REPAIR_BRACKETS:
        return None
    try:
        call = json_repair.loads(text, skip_json_loads=True)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # Fuzzing met ValueError (its own recursion limit) and AssertionError; the others are what a parser of
        # arbitrary text can run into, and none of them is worth a rollout.
        return None
    return call if isinstance(call, dict) else None


def _operation(call: Any, layout: str) -> Operation:
    if not isinstance(call, dict):
        raise _Refused("not an object")
    for key in ("name", "arguments"):
        if key not in call:
            raise _Refused(f"missing {key!r}")
    if len(call) > 2:
        raise _Refused("unexpected key")
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or name not in _CALLS[layout]:
        raise _Refused("unknown name")
    if not isinstance(arguments, dict):
        raise _Refused("arguments are not an object")
    tool = _CALLS[layout][name]
    memory_type = _memory_type(arguments, tool)
    for argument in tool.arguments:
        if argument not in arguments and not (argument == "memory_id" and memory_type == CORE):
            raise _Refused(f"missing argument {argument!r}")
    if any(argument not in tool.arguments for argument in arguments):
        raise _Refused("unexpected argument")
    given = {_FIELDS[argument]: value for argument, value in arguments.items()}
    return Operation(
        tool.action,
        content=_content(given["content"]) if "content" in given else "",
        # There is one core memory; Mem-alpha ignores an id given with it.
        item_id=_item_id(given["item_id"]) if "item_id" in given and memory_type != CORE else None,
        memory_type=memory_type,
    )


def _memory_type(arguments: Mapping[str, Any], tool: _Tool) -> str:
    if not tool.memory_types or "memory_type" not in arguments:
        return ""
    value = arguments["memory_type"]
    if not isinstance(value, str) or value not in _TYPE_NAMES:
        raise _Refused("unknown memory_type")
    if _TYPE_NAMES[value] not in tool.memory_types:
        raise _Refused("core_memory takes no insert")
    return _TYPE_NAMES[value]


def _content(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused("content is not a string")
    content = value.strip()
    if not content:
        raise _Refused("empty content")
    if len(content) > MAX_CONTENT_CHARS:
        raise _Refused("content is too long")
    if _has_lone_surrogate(content):
        raise _Refused("content is not valid Unicode")
    return content


def _item_id(value: Any) -> int:
    # bool is an int to Python, not to a reader of JSON.
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise _Refused("id is negative")
        if value >= 10**MAX_ID_DIGITS:
            raise _Refused("id is too long")
        return value
    # isdecimal alone would take the digits of every script.
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        if len(value) > MAX_ID_DIGITS:
            raise _Refused("id is too long")
        return int(value)
    raise _Refused("id is not an integer")


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _excerpt(written: str) -> str:
    if len(written) > MAX_MALFORMED_CHARS:
        written = written[: MAX_MALFORMED_CHARS - 1] + "…"
    # Malformed calls go into logs, which are UTF-8: lone surrogates become "?".
    return written.encode(errors="replace").decode()


# --------------------------------------------------------------------------------------
# Operations to text
# --------------------------------------------------------------------------------------


def render(operation: Operation, dialect: Dialect = DEFAULT) -> str:
    """Writes an operation as the call that `parse` reads back: parse(render(op)) == (op,). Join several with "\\n".

    Holds for operations as `parse` makes them: content neither blank nor padded, and no longer than allowed.

    Raises:
        ValueError: a SKIP in the typed layout, which has no such call.
    """
    tool = next((tool for tool in _CALLS[dialect.layout].values() if tool.action is operation.action), None)
    if tool is None:
        raise ValueError(f"The {dialect.layout} layout has no call for {operation.action}; write nothing, or 'Done'.")
    values = {
        "content": operation.content,
        "item_id": operation.item_id,
        "memory_type": f"{operation.memory_type}_memory",
    }
    names = [name for name in tool.arguments if not (name == "memory_id" and operation.memory_type == CORE)]
    arguments = {name: values[_FIELDS[name]] for name in names}
    if dialect.tool_call_format == "qwen_agent":
        # A marker in the content must not pass for one: JSON can spell the character out.
        written = json.dumps(arguments, ensure_ascii=False).replace(_FLOWER, "\\u273f")
        return f"{_FUNCTION}: {tool.name}\n{_ARGS}: {written}"
    written = json.dumps({"name": tool.name, "arguments": arguments}, ensure_ascii=False)
    if dialect.tool_call_format == "hermes":
        for tag in (_OPEN, _CLOSE):
            written = written.replace(tag, tag.replace("<", "\\u003c"))
        return f"{_OPEN}\n{written}\n{_CLOSE}"
    return written
