"""Builds streams from LoCoMo conversations: chunks of turns with their date, questions placed by their evidence turns.

Reads the official locomo10.json (a list) and one conversation a line.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Collection

from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _chats, _chunking, _files, _text, _windows

NAME = "locomo"
_KEYS = ("conversation", "qa")
_KINDS = {1: "multi_hop", 2: "temporal", 3: "open_domain", 4: "single_hop", 5: "adversarial"}
_SESSION = re.compile(r"session_(\d+)")
# Most ids read "D8:6". The published file also has "D8:6; D9:17" in one text, "D:11:26", "D30:05" and a lone "D".
_TURN_ID = re.compile(r"D\s*:?\s*(\d+)\s*:\s*(\d+)")

TurnId = tuple[int, int]  # session, turn


@dataclasses.dataclass(frozen=True)
class _Turn:
    turn_id: TurnId
    speaker: str
    text: str  # the photo's caption included


@dataclasses.dataclass(frozen=True)
class _Session:
    date: str
    turns: tuple[_Turn, ...]


@dataclasses.dataclass(frozen=True)
class _Qa:
    question: str
    answer: str  # "" if there is none
    category: int
    evidence: tuple[TurnId, ...]


@dataclasses.dataclass(frozen=True)
class _Conversation:
    where: str
    sessions: tuple[_Session, ...]
    qas: tuple[_Qa, ...]


def load(spec: StreamSpec) -> StreamSource:
    """Returns windows of consecutive chunks of one conversation.

    Turns fill chunks of at most `spec.chunk_words` words in order, never across sessions; each chunk starts with
    its session's date, which temporal questions need. A question is a chunk's when all its evidence lies in that
    chunk, and a stream's when all its evidence lies in the window; global questions prefer those over several chunks.

    Adversarial questions (category 5) are left out: they ask for what was never said and carry no answer. So are
    those without an answer and those whose evidence is missing or names a turn that does not exist.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, line and field).
    """
    _windows.check(spec)
    conversations = _read(spec.source_dir)
    names = _windows.names_of_split(conversations, spec.split, NAME)
    texts = [_cut(name, conversations[name], spec) for name in names]
    return _windows.Windows(texts, _windows.Origin(NAME, "AR", spec))


def _read(source_dir: str) -> dict[str, _Conversation]:
    """Returns the conversations by their sample_id; one that comes twice is kept once."""
    conversations: dict[str, _Conversation] = {}
    for record in _files.read(source_dir, [_KEYS], "LoCoMo"):
        name = record.text("sample_id")
        read = _Conversation(
            where=record.where,
            sessions=_read_sessions(record.record("conversation")),
            qas=tuple(_read_qa(qa) for qa in record.records("qa")),
        )
        known = conversations.setdefault(name, read)
        if dataclasses.replace(read, where=known.where) != known:
            raise ValueError(
                f"{record.where}, field sample_id: {name!r} is another conversation at {known.where}. "
                "Give one of them another sample_id, or move the outdated file out of data.source_dir."
            )
    return conversations


def _read_sessions(conversation: _files.Record) -> tuple[_Session, ...]:
    numbers = sorted(int(match[1]) for key in conversation.fields if (match := _SESSION.fullmatch(key)))
    if not numbers:
        raise conversation.error("session_1", "a list of turns")
    sessions = []
    for number in numbers:
        date = conversation.text(f"session_{number}_date_time")
        turns = tuple(_read_turn(turn) for turn in conversation.records(f"session_{number}"))
        sessions.append(_Session(_text.one_line(date), turns))
    return tuple(sessions)


def _read_turn(turn: _files.Record) -> _Turn:
    match = _TURN_ID.fullmatch(turn.text("dia_id"))
    if match is None:
        raise turn.error("dia_id", "an id such as 'D1:3'")
    text = turn.text("text", may_be_empty=True)
    if turn.fields.get("blip_caption"):
        text += f" [shares a photo: {turn.text('blip_caption')}]"
    return _Turn((int(match[1]), int(match[2])), _text.one_line(turn.text("speaker")), _text.one_line(text))


def _read_qa(qa: _files.Record) -> _Qa:
    category = qa.fields.get("category")
    if not isinstance(category, int) or category not in _KINDS:
        raise qa.error("category", "a whole number from 1 to 5")
    answer = qa.fields.get("answer")
    if not isinstance(answer, str | int | float | None):
        raise qa.error("answer", "a text or a number")
    answer = "" if answer is None else str(answer)
    if category == 3:
        answer = answer.partition(";")[0]  # as LoCoMo's own evaluation: what follows is the reason, not the answer
    evidence = qa.fields.get("evidence") or []
    if not isinstance(evidence, list) or not all(isinstance(item, str) for item in evidence):
        raise qa.error("evidence", "a list of texts such as 'D1:3'")
    turn_ids = (match.groups() for item in evidence for match in _TURN_ID.finditer(item))
    return _Qa(
        question=qa.text("question"),
        answer=answer.strip(),
        category=category,
        evidence=tuple(dict.fromkeys((int(session), int(turn)) for session, turn in turn_ids)),
    )


def _cut(name: str, conversation: _Conversation, spec: StreamSpec) -> _windows.Text:
    """Packs the turns into chunks and places the questions."""
    chunks = _chunks(conversation, spec)
    steps_of: dict[TurnId, set[int]] = collections.defaultdict(set)
    for step, chunk in enumerate(chunks):
        for turn_id, _ in chunk:
            steps_of[turn_id].add(step)

    questions, left_out = [], collections.Counter()
    for qa in conversation.qas:
        reason = _reason_to_leave_out(qa, steps_of.keys())
        if reason or qa.answer is None:
            left_out[reason] += 1
            continue
        steps = sorted(set().union(*(steps_of[turn_id] for turn_id in qa.evidence)))
        questions.append(Question(qa.question, (qa.answer,), "token_f1", tuple(steps), _KINDS[qa.category]))
    texts = tuple(_chats.shown([line for _, line in chunk]) for chunk in chunks)
    return _windows.Text(name, texts, tuple(questions), left_out)


_Lines = list[tuple[TurnId, _chats.Line]]


def _chunks(conversation: _Conversation, spec: StreamSpec) -> list[_Lines]:
    """Groups the turns into chunks, each of which leaves room for the date above its first turn.

    At sentence ends, a session starts a new chunk. Otherwise chunks may hold several, and the date of the next one
    counts as words of its first turn.
    """
    by_session = spec.chunking == "sentence"
    sessions: list[tuple[int, _Lines]] = []  # With the words that a chunk has besides a session's date.
    for session in conversation.sessions:
        date = f"Date: {session.date}"
        date_words = _text.num_words(date)
        lines = _chats.cut(
            ((date, f"{turn.speaker}:", turn.text) for turn in session.turns), spec.chunk_words, conversation.where,
            reserved=0 if by_session else date_words,
        )  # fmt: skip
        sessions.append((spec.chunk_words - date_words, [(session.turns[line.turn].turn_id, line) for line in lines]))
    if by_session:
        return [
            lines[first:end]
            for room, lines in sessions
            for first, end in _chunking.group([line.text for _, line in lines], room, spec.chunking)
        ]
    starts = set(itertools.accumulate((len(lines) for _, lines in sessions), initial=0))
    every = [pair for _, lines in sessions for pair in lines]
    units = [f"{line.heading}\n{line.text}" if i in starts else line.text for i, (_, line) in enumerate(every)]
    room = min(room for room, _ in sessions)
    groups = _chunking.group(units, room, spec.chunking, borders=starts - {0})
    return [every[first:end] for first, end in groups]


def _reason_to_leave_out(qa: _Qa, known: Collection[TurnId]) -> str:
    """Says why a question cannot be asked, "" if it can."""
    if _KINDS[qa.category] == "adversarial":
        return "adversarial"
    if not qa.answer:
        return "no answer"
    if not qa.evidence:
        return "no evidence"
    if not all(turn_id in known for turn_id in qa.evidence):
        return "evidence names no turn"
    return ""
