"""Between the manager's text and operations: one JSON function call per line.

    {"name": "memory_insert", "arguments": {"content": "Ana moved to Oslo in May."}}
    {"name": "memory_update", "arguments": {"id": 3, "content": "Ana lives in Oslo."}}
    {"name": "memory_delete", "arguments": {"id": 3}}
    {"name": "skip", "arguments": {}}

Knows the format, not the memory: whether an id exists is for `memory.apply` to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import json_repair

from finemem_jax.episode import Action, Malformed, Operation

MAX_CONTENT_CHARS = 8192  # One memory item; about 2,000 tokens of English, as long as a chunk.
MAX_ID_DIGITS = 18  # Any such id fits in an int64.
MAX_REPAIR_CHARS = 4096  # Longer lines are not repaired: repair is not linear in their length.
MAX_REPAIR_BRACKETS = 16  # Nor lines with more opening brackets, for the same reason; a call has two.
MAX_MALFORMED_CHARS = 200  # What a Malformed shows of its line.

_ACTIONS: Mapping[str, Action] = {action.value: action for action in Action}

# What each call must hold, no less and no more.
_ARGUMENTS: Mapping[Action, tuple[str, ...]] = {
    Action.INSERT: ("content",),
    Action.UPDATE: ("id", "content"),
    Action.DELETE: ("id",),
    Action.SKIP: (),
}

_DESCRIPTIONS: Mapping[Action, str] = {
    Action.INSERT: "Store one new memory item.",
    Action.UPDATE: "Replace the text of a memory item. Write all that it should say from now on.",
    Action.DELETE: "Remove a memory item that is wrong or no longer needed.",
    Action.SKIP: "Leave the memory as it is. Only ever written alone.",
}

_SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "content": {
        "type": "string",
        "description": "A short text that can be understood without its source.",
        "minLength": 1,
        "maxLength": MAX_CONTENT_CHARS,
    },
    "id": {"type": "integer", "description": "Number of an existing memory item.", "minimum": 0},
}


def parse(text: str, repair: bool = False) -> tuple[Operation | Malformed, ...]:
    """Reads what the manager wrote: one entry for each line that is not blank, in order.

    Never raises, whatever the text, and takes time linear in its length. Only "\\n" ends a line.

    Args:
        text: The manager's response, decoded.
        repair: Whether a line that is no JSON is mended (quotes, commas, missing brackets) and judged again, within
            MAX_REPAIR_CHARS and MAX_REPAIR_BRACKETS. Mending also completes a call that was cut off in its content.

    Returns:
        Operations, their content stripped of outer whitespace; a Malformed for each line that is none. Its reason is
        one of a small fixed set, so reports can count reasons; its text is at most MAX_MALFORMED_CHARS long.
    """
    return tuple(_parse_line(line.strip(), repair) for line in text.split("\n") if line.strip())


def render(operation: Operation) -> str:
    """Writes an operation as the line that `parse` reads back: parse(render(op)) == (op,).

    Holds for operations as `parse` makes them: content neither blank nor padded, and no longer than allowed.
    """
    values = {"id": operation.item_id, "content": operation.content}
    arguments = {name: values[name] for name in _ARGUMENTS[operation.action]}
    return json.dumps({"name": operation.action.value, "arguments": arguments}, ensure_ascii=False)


def _tool(action: Action) -> dict[str, Any]:
    names = _ARGUMENTS[action]
    parameters = {
        "type": "object",
        "properties": {name: dict(_SCHEMAS[name]) for name in names},
        "required": list(names),
        "additionalProperties": False,
    }
    function = {"name": action.value, "description": _DESCRIPTIONS[action], "parameters": parameters}
    return {"type": "function", "function": function}


# The four calls as function specifications in the OpenAI form, for prompts and exports.
TOOLS: tuple[dict[str, Any], ...] = tuple(_tool(action) for action in Action)


class _Refused(Exception):
    """Why a line is no operation; never leaves this module."""


def _parse_line(line: str, repair: bool) -> Operation | Malformed:
    try:
        return _operation(_load(line, repair))
    except _Refused as refused:
        return Malformed(_excerpt(line), str(refused))


def _load(line: str, repair: bool) -> Any:
    try:
        return json.loads(line, parse_constant=_refuse_constant)
    except RecursionError:
        raise _Refused("nested too deep") from None
    except ValueError:  # Also an integer of thousands of digits, which Python declines to convert.
        repaired = _repaired(line) if repair else None
        if repaired is None:
            raise _Refused("not JSON") from None
        return repaired


def _refuse_constant(name: str) -> NoReturn:
    # json.loads would take NaN and Infinity, which no JSON has.
    raise ValueError(name)


def _repaired(line: str) -> dict[str, Any] | None:
    # Repair rescans the rest of the line at each open bracket. Within these bounds the worst line found took 0.25 s
    # (60 µs a character, against 2 µs for a line worth repairing); with 64 brackets it took 1.1 s.
    num_brackets = sum(line.count(bracket) for bracket in "{[(")
    if len(line) > MAX_REPAIR_CHARS or num_brackets > MAX_REPAIR_BRACKETS:
        return None
    try:
        call = json_repair.loads(line, skip_json_loads=True)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # Fuzzing met ValueError (its own recursion limit) and AssertionError; the others are what a parser of
        # arbitrary text can run into, and none of them is worth a rollout.
        return None
    return call if isinstance(call, dict) else None


def _operation(call: Any) -> Operation:
    if not isinstance(call, dict):
        raise _Refused("not an object")
    for key in ("name", "arguments"):
        if key not in call:
            raise _Refused(f"missing {key!r}")
    if len(call) > 2:
        raise _Refused("unexpected key")
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or name not in _ACTIONS:
        raise _Refused("unknown name")
    if not isinstance(arguments, dict):
        raise _Refused("arguments are not an object")
    action = _ACTIONS[name]
    for argument in _ARGUMENTS[action]:
        if argument not in arguments:
            raise _Refused(f"missing argument {argument!r}")
    if len(arguments) > len(_ARGUMENTS[action]):
        raise _Refused("unexpected argument")
    return Operation(
        action,
        content=_content(arguments["content"]) if "content" in arguments else "",
        item_id=_item_id(arguments["id"]) if "id" in arguments else None,
    )


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


def _excerpt(line: str) -> str:
    if len(line) > MAX_MALFORMED_CHARS:
        line = line[: MAX_MALFORMED_CHARS - 1] + "…"
    # Malformed lines go into logs, which are UTF-8: lone surrogates become "?".
    return line.encode(errors="replace").decode()
