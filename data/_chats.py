"""Reads the chats that programs export, and cuts chats into chunks between turns. Knows nothing of streams."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import _files, _text

# The fields that hold them, in the exports of several programs; of several, the first that is there.
_MESSAGES = ("chat_messages", "messages", "conversations")
_SPEAKERS = ("speaker", "name", "user", "role", "sender", "from")
_CONTENTS = ("text", "content", "value")
_DATES = ("date", "timestamp", "created_at", "create_time", "ts")
_TURN_SPEAKERS, _TURN_CONTENTS = {"role", "name", "speaker", "user"}, {"content", "text"}  # of one turn a line

# "31/12/2023, 10:00 - …", "[31/12/2023, 10:00:00] …", "12/31/23, 9:05 PM - …", "[31.12.2023 klo 10.00.00] …"
_STAMP = re.compile(
    r"\[?(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),?\s(?:[a-z]+\s)?\d{1,2}[:.]\d\d(?:[:.]\d\d)?"
    r"(?:\s?[AaPp]\.?\s?[Mm]\.?)?(?:\]| [-–])\s(?P<rest>.*)"
)
_MARKS = str.maketrans("", "", "\u200e\u200f\u202a\u202c")  # of the writing direction; WhatsApp strews them


class Turn(NamedTuple):
    """What one speaker of a chat said at a time."""

    date: str  # the day; "" if not known
    speaker: str  # "" for a notice
    text: str


class Line(NamedTuple):
    """A turn, or a part of one, as a chunk shows it: below its heading."""

    turn: int  # its number
    heading: str
    text: str
    words: int


def conversation(record: _files.Record) -> tuple[str, list[Turn]] | None:
    """Reads a record that is a conversation: ChatGPT's or Claude's export, OpenAI's "messages", ShareGPT.

    Returns:
        Its name ("" if it has none) and its turns with a text; None for a record that is no conversation.

    Raises:
        ValueError: it is a broken one; with file, line and field.
    """
    key = next((key for key in _MESSAGES if isinstance(record.fields.get(key), list)), "")
    if isinstance(record.fields.get("mapping"), dict):
        turns = _shown_branch(record)
    elif key:
        turns = [turn(message) for message in record.records(key)]
    else:
        return None
    day = _day(record)
    names = (record.fields.get(key) for key in ("title", "name", "id"))
    name = next((str(name) for name in names if isinstance(name, str | int) and str(name).strip()), "")
    return _text.one_line(name), [said._replace(date=said.date or day) for said in turns if said.text]


def is_turn(record: _files.Record) -> bool:
    """Says whether a record is one turn of a chat: it says who speaks, and what, and has no field of a whole text."""
    speaks = any(isinstance(record.fields.get(key), str) for key in _TURN_SPEAKERS)
    keys = record.fields.keys()
    return speaks and bool(keys & _TURN_CONTENTS) and not keys & {"title", "questions"}


def turn(record: _files.Record) -> Turn:
    """Reads one turn; its text is "" where there is none, e.g. where a tool is called. Raises as `conversation`."""
    if not record.fields.keys() & {*_CONTENTS, "tool_calls", "function_call"}:
        raise record.error("content", "a text")
    text = next(filter(None, (_joined(record, key) for key in _CONTENTS)), "")
    speaker = next((key for key in _SPEAKERS if record.fields.get(key) is not None), "role")
    return Turn(_day(record), _text.one_line(record.text(speaker)) if text else "", text)


def _joined(record: _files.Record, key: str) -> str:
    """Returns a field that is a text, or a list of parts; those that are no text (pictures, calls) do not count."""
    value = record.fields.get(key)
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        value = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(value, str | None):
        raise record.error(key, "a text, or a list of parts")
    return (value or "").strip()


def _shown_branch(record: _files.Record) -> list[Turn]:
    """Reads a ChatGPT conversation, a tree: what leads to the current node, or else the longest branch."""
    mapping = record.record("mapping")
    nodes = {key: mapping.record(key) for key in mapping.fields}
    parents = {key: node.text("parent") if node.fields.get("parent") else "" for key, node in nodes.items()}

    def branch(key: str) -> list[_files.Record]:
        """Follows the parents of a node up to the root; returns them from there on."""
        found: dict[str, _files.Record] = {}  # A dict keeps the order, and ends a loop.
        while key in nodes and key not in found:
            found[key] = nodes[key]
            key = parents[key]
        return list(found.values())[::-1]

    # Where a reply was asked for again, or a question edited, the tree has branches; the export says which is shown.
    leaf = record.fields.get("current_node")
    if not isinstance(leaf, str) or leaf not in nodes:
        leaf = max(nodes.keys() - set(parents.values()), key=lambda key: (len(branch(key)), key), default="")
    turns = []
    for node in branch(leaf):
        if node.fields.get("message") is None:
            continue
        message = node.record("message")
        role = message.record("author").text("role")
        if role in ("user", "assistant"):  # not what tools reply, nor the hidden instructions
            turns.append(Turn(_day(message), role, _joined(message.record("content"), "parts")))
    return turns


def _day(record: _files.Record) -> str:
    """Returns the day that a record names, e.g. "2024-01-31"; as it is written where that is in another way."""
    key = next((key for key in _DATES if record.fields.get(key) is not None), "")
    value = record.fields.get(key, "")
    if isinstance(value, str):
        if not re.fullmatch(r"\d{9,}(\.\d+)?", value):
            iso = re.match(r"\d{4}-\d\d-\d\d(?=[T ]|$)", value.strip())
            return iso[0] if iso else _text.one_line(value)
        value = float(value)
    if isinstance(value, int | float):
        try:  # seconds since 1970, or thousandths of them
            return str(datetime.datetime.fromtimestamp(value / (1000 if value > 1e11 else 1), datetime.UTC).date())
        except (OverflowError, OSError, ValueError):
            pass
    raise record.error(key, "a date as a text, or in seconds since 1970")


def whatsapp(text: str) -> list[Turn] | None:
    """Reads a chat that WhatsApp exported as text; None for any other text. Dates stay as they are written there."""
    if not _STAMP.match(text[:500].translate(_MARKS).lstrip()):
        return None
    lines = text.translate(_MARKS).strip().split("\n")
    turns: list[tuple[str, str, list[str]]] = []
    for line in lines:
        if stamp := _STAMP.match(line):
            speaker, colon, said = stamp["rest"].partition(": ")
            turns.append((stamp["date"], speaker, [said]) if colon else (stamp["date"], "", [stamp["rest"]]))
        else:
            turns[-1][2].append(line)
    found = [Turn(date, _text.one_line(speaker), "\n".join(said).strip()) for date, speaker, said in turns]
    return [said for said in found if said.text] if any(said.speaker for said in found) else None


def cut(turns: Iterable[tuple[str, str, str]], max_words: int, where: str, *, reserved: int = 0) -> list[Line]:
    """Makes lines of turns (heading, speaker and text as they are to be shown), several of one too long for a chunk.

    Args:
        turns: They are numbered from 0.
        max_words: Of a chunk.
        where: They stand, for messages.
        reserved: How many words of a chunk are wanted for something else.

    Raises:
        ValueError: `max_words` leave no room for a word below a heading and after a speaker.
    """
    lines = []
    for number, (heading, speaker, text) in enumerate(turns):
        room = max_words - reserved - _text.num_words(heading) - _text.num_words(speaker)
        if room < 1:
            raise ValueError(
                f"data.chunk_words must be at least {max_words - room + 1} to hold {heading!r}, the speaker "
                f"{speaker!r} and a word of turn {number + 1} ({where}), got {max_words}; raise it."
            )
        spans = [(0, len(text))] if _text.num_words(text) <= room else _text.pieces(text, room)
        for start, end in spans:
            line = f"{speaker} {text[start:end]}".strip()
            lines.append(Line(number, heading, line, _text.num_words(line)))
    return lines


def pack(lines: Iterable[Line], max_words: int) -> list[list[Line]]:
    """Fills chunks of at most `max_words` words, headings included, with lines in order."""
    chunks: list[list[Line]] = []
    left = 0
    for line in lines:
        heading = _text.num_words(line.heading)
        goes_on = bool(chunks) and chunks[-1][-1].heading == line.heading
        words = line.words if goes_on else line.words + heading
        if not chunks or words > left:
            chunks.append([])
            left, words = max_words, line.words + heading
        chunks[-1].append(line)
        left -= words
    return chunks


def shown(chunk: Sequence[Line]) -> str:
    """Returns the text of a chunk: each line, and the heading before the first and wherever it changes."""
    before = ["", *(line.heading for line in chunk)]
    pairs = zip(chunk, before, strict=False)
    return "\n".join(
        line.text if line.heading in ("", last) else f"{line.heading}\n{line.text}" for line, last in pairs
    )
