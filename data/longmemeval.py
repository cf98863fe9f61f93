"""Builds streams from LongMemEval: a user's dated sessions with an assistant, and questions about what was said.

Reads the official files (a list of {"question_id", "question_type", "question", "answer", "question_date",
"haystack_dates", "haystack_session_ids", "haystack_sessions": [[{"role", "content", "has_answer"}]],
"answer_session_ids"}), and a flat form ({"id", "question_type", "conversation": [{"role", "content", "date"}], and
"question", "answer" or "questions", a list of them}). Either may be one record a line, which big files must be.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Sequence

from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _chats, _files, _windows

NAME = "longmemeval"
_LAYOUTS = [("question_type", "haystack_sessions"), ("question_type", "conversation")]
_DATE = re.compile(r"\d{4}/\d\d/\d\d")  # "2023/05/20 (Sat) 02:21": these sort as texts

_Session = tuple[str, tuple[tuple[str, str], ...]]  # date, and role and text of each turn
_Place = tuple[int, int]  # session, turn
_Read = tuple[str, list[_files.Record], bool]  # date, turns, whether the session has evidence


@dataclasses.dataclass
class _Haystack:
    where: str
    sessions: tuple[_Session, ...]
    asked: dict[str, tuple[Question, frozenset[_Place]]]  # by id; with no evidence if the file does not say


def load(spec: StreamSpec) -> StreamSource:
    """Returns one stream for each haystack, its sessions in the order of their dates.

    Chunks are filled with turns; above the first one of each session, in every chunk, stands a line with its date,
    which counts. Where a haystack needs more than `spec.chunks_per_stream` chunks, the sessions with evidence are kept,
    and as many of those nearest to them as fit. `left_out` counts questions whose evidence does not fit; where the file
    names none, that is the whole haystack.

    In Mem-alpha's style a language model judges the answers ("judge_longmemeval"), as published. In the plain style it
    is "token_f1", which needs no judge, but is no fair measure of long answers. A question's kind is its type, with
    "_abs" behind it where it cannot be answered; it is of one split with the question that it was made from. Sessions
    that only fill haystacks may be in both splits: LongMemEval draws them from one pool.

    Raises:
        ValueError: the spec cannot be served, no evidence fits, or a file is missing or broken (with file and line).
    """
    _windows.check(spec)
    haystacks = _read(spec)
    units = set(_windows.names_of_split(set(map(_unit, haystacks)), spec.split, NAME))
    texts, needs = [], []
    for name in sorted(name for name in haystacks if _unit(name) in units):
        text, too_long = _cut(name, haystacks[name], spec)
        needs += too_long
        if text.questions:
            texts.append(text)
    if not texts:
        raise ValueError(
            f"Source {NAME!r}, split {spec.split!r}: the evidence of none of {len(needs)} questions fits "
            f"data.chunks_per_stream={spec.chunks_per_stream} chunks of data.chunk_words={spec.chunk_words} words. Set "
            f"data.chunks_per_stream to {min(needs)} for the least, {max(needs)} for all; or raise data.chunk_words."
        )
    left_out = {"longer than data.chunks_per_stream": len(needs)} if needs else {}
    random.Random(f"{spec.seed}/order").shuffle(texts)
    return _windows.Made(len(texts), texts.__getitem__, _windows.Origin(NAME, "AR", spec), left_out=left_out)


def _unit(name: str) -> str:
    """Returns what a question is split by: the id of the one that it was made from."""
    return re.sub(r"(_abs)?(/\d+)?$", "", name)


def _cut(name: str, haystack: _Haystack, spec: StreamSpec) -> tuple[_windows.Text, list[int]]:
    """Returns the stream of a haystack, and for each question that it cannot take, how many chunks that would need.

    First the evidence: question by question, as long as the sessions with all evidence so far fit. Then as many of the
    other sessions as fit, the nearest to evidence first.
    """
    sessions = haystack.sessions
    places = [(s, t) for s, (_, turns) in enumerate(sessions) for t in range(len(turns))]
    heading = "[Dialogue at timestamp {}]".format
    turns = ((heading(date or "unknown"), f"<{role}>", text) for date, said in sessions for role, text in said)
    lines = _chats.cut(turns, spec.chunk_words, haystack.where)

    def packed(kept: frozenset[int]) -> list[list[_chats.Line]]:
        return _chats.pack((line for line in lines if places[line.turn][0] in kept), spec.chunk_words)

    every = frozenset(range(len(sessions)))
    needed: frozenset[int] = frozenset()
    taken: list[tuple[Question, frozenset[_Place]]] = []
    too_long: list[int] = []
    for question, evidence in (haystack.asked[asked_id] for asked_id in sorted(haystack.asked)):
        wanted = needed | {session for session, _ in evidence} if evidence else every
        size = len(packed(wanted))
        if size <= spec.chunks_per_stream:
            needed = wanted
            taken.append((question, evidence))
        else:
            too_long.append(size)
    if not taken:
        return _windows.Text(name, (), ()), too_long
    others = sorted(every - needed, key=lambda s: (min(abs(s - n) for n in needed), s))
    # How many of them fit is found by bisection, as packing all that many times would take long.
    nearest = [needed.union(others[:number]) for number in range(len(others) + 1)]
    most = bisect.bisect_right(nearest, spec.chunks_per_stream, key=lambda kept: len(packed(kept))) - 1
    chunks, questions = packed(nearest[most]), []
    for question, evidence in taken:
        steps = [step for step, chunk in enumerate(chunks) if any(places[line.turn] in evidence for line in chunk)]
        questions.append(dataclasses.replace(question, gold_steps=tuple(steps)))
    return _windows.Text(name, tuple(map(_chats.shown, chunks)), tuple(questions)), too_long


def _read(spec: StreamSpec) -> dict[str, _Haystack]:
    """Returns the haystacks by the first of the ids of their questions; questions that come twice are kept once."""
    haystacks: dict[tuple[_Session, ...], _Haystack] = {}
    known: dict[str, _Haystack] = {}
    for record in _files.read(spec.source_dir, _LAYOUTS, "LongMemEval"):
        is_official = "haystack_sessions" in record.fields
        sessions, evidence = _sessions(record, _official(record) if is_official else _flat(record))
        haystack = haystacks.setdefault(sessions, _Haystack(record.where, sessions, {}))
        for asked_id, question in _questions(record, "question_id" if is_official else "id", spec):
            other = known.setdefault(asked_id, haystack)
            if other is not haystack:
                there = (
                    f"asked of other sessions at {other.where}. Leave one of LongMemEval's files in data.source_dir."
                )
                raise ValueError(f"{record.where}: question {asked_id!r} is {there}")
            haystack.asked[asked_id] = question, evidence
    return {min(haystack.asked): haystack for haystack in haystacks.values() if haystack.asked}


def _sessions(record: _files.Record, read: Iterator[_Read]) -> tuple[tuple[_Session, ...], frozenset[_Place]]:
    """Returns the sessions of a record that say anything, by date if all have one, and where its evidence is."""
    # Of each session the date, the role and text of each turn, and the numbers of the turns that are evidence.
    found: list[tuple[str, tuple[tuple[str, str], ...], Sequence[int]]] = []
    for date, turns, is_evidence in read:
        said = [turn for turn in turns if turn.text("content", may_be_empty=True)]
        flagged = [t for t, turn in enumerate(said) if turn.fields.get("has_answer") is True]
        told = tuple((turn.text("role"), turn.text("content")) for turn in said)
        if told:
            found.append((date, told, flagged or (range(len(told)) if is_evidence else ())))
    if not found:
        raise ValueError(f"{record.where}: no turn has a text. Correct the record, or remove it.")
    if all(_DATE.match(date) for date, _, _ in found):
        found.sort(key=lambda session: session[0])  # in the oracle's file they are not
    sessions = tuple((date, told) for date, told, _ in found)
    return sessions, frozenset((s, t) for s, (_, _, marked) in enumerate(found) for t in marked)


def _official(record: _files.Record) -> Iterator[_Read]:
    """Yields the sessions of a record of the official files."""
    sessions = record.items("haystack_sessions")
    keys = ("haystack_dates", "haystack_session_ids", "answer_session_ids")
    dates, ids, answers = (record.items(key) if key in record.fields else [] for key in keys)
    if len(dates) != len(sessions) or not all(isinstance(date, str) for date in dates):
        raise record.error("haystack_dates", f"a text for each of the {len(sessions)} sessions")
    for i, (date, session) in enumerate(zip(dates, sessions, strict=True)):
        key = f"haystack_sessions[{i}]"
        turns = dataclasses.replace(record, fields={key: session}).records(key)
        yield date.strip(), turns, ids[i : i + 1] != [] and ids[i] in answers


def _flat(record: _files.Record) -> Iterator[_Read]:
    """Yields the sessions of a flat record: turns of one date that follow each other."""
    turns = record.records("conversation")
    for date, said in itertools.groupby(turns, lambda turn: turn.text("date") if turn.fields.get("date") else ""):
        yield date, list(said), False


def _questions(record: _files.Record, id_key: str, spec: StreamSpec) -> Iterator[tuple[str, Question]]:
    """Yields the questions of a record, each with its id."""
    metric = "judge_longmemeval" if spec.style == "memalpha" else "token_f1"
    asked = record.records("questions") if "questions" in record.fields else [record]
    for number, item in enumerate(asked):
        answer = item.fields.get("answer")
        if not isinstance(answer, str | int | float) or not str(answer).strip():
            raise item.error("answer", "a text or a number")
        asked_id, kind = record.text(id_key), record.text("question_type")
        if asked_id.endswith("_abs") and kind != "abstention":
            kind += "_abs"
        date = next((r.text("question_date") for r in (item, record) if r.fields.get("question_date")), "")
        text = f"(asked on {date}) {item.text('question')}" if date else item.text("question")
        name = asked_id if len(asked) == 1 else f"{asked_id}/{number}"
        yield name, Question(text, (str(answer).strip(),), metric, kind=kind)
