"""Reads streams that have been written out: {split}.jsonl or {split}.jsonl.gz, as --mode=questions makes them.

A line is a `types.Stream` as JSON. The fields of the dataclasses are its keys; those with defaults may be left out.
"""

from __future__ import annotations

import dataclasses
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

from finemem_jax.reading import scoring
from finemem_jax.types import Chunk, Question, Stream, StreamSource, StreamSpec

from . import _files, _windows


def load(spec: StreamSpec) -> StreamSource:
    """Returns the streams of `spec.split`, in the order of the file; with `num_streams`, the first so many of them.

    Longer streams than `chunks_per_stream` lose their later chunks, and the questions that need one of those; questions
    that name no chunk stay. Of too many questions, the first are kept. Chunks stay as they were cut: `chunk_words` and
    `seed` change nothing.

    Raises:
        ValueError: the spec cannot be served, there is no such file, or it is broken (with file, line and field).
    """
    _windows.check(spec)
    return WrittenStreams(_path(spec), spec)


def _path(spec: StreamSpec) -> pathlib.Path:
    """Finds the file of a split."""
    files = f"{spec.split}.jsonl or {spec.split}.jsonl.gz"
    if not spec.source_dir:
        raise ValueError(f"data.source_dir must be the folder that holds {files}, got ''. Set data.source_dir.")
    folder = pathlib.Path(spec.source_dir)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"data.source_dir must be a folder that holds {files}; {spec.source_dir!r} {what}. Correct it."
        )
    found = [path for suffix in (".jsonl", ".jsonl.gz") if (path := folder / f"{spec.split}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(
            f"data.source_dir {spec.source_dir!r} holds both {files.replace(' or ', ' and ')}; move one of them away."
        )
    if not found:
        there = sorted(path.name for path in folder.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))
        raise ValueError(
            f"data.source_dir {spec.source_dir!r} holds no {files}; of such files it has {', '.join(there) or 'none'}. "
            "Make the split with --mode=questions, or name the folder that has it."
        )
    return found[0]


class WrittenStreams:
    """Gives random access to the lines of one file.

    All that are wanted are checked when it is opened. Of a .jsonl only the places of its lines are kept in memory, of a
    .jsonl.gz, in which one cannot jump to a place, the lines.
    """

    def __init__(self, path: pathlib.Path, spec: StreamSpec):
        """Reads the file once; raises ValueError with file, line and field if it is broken."""
        self._path, self._spec = path, spec
        self._state = _state(path)
        self._is_packed = path.name.endswith(".gz")
        # Where each line stands: its number, and offset and size in bytes, or all of it.
        self._places: list[tuple[int, int, int]] = []
        self._lines: list[bytes] = []
        self._index()

    def _index(self) -> None:
        """Checks the lines, and notes where they stand."""
        lines_of: dict[str, int] = {}
        with _files.open_binary(self._path) as file:
            for line, offset, raw in _files.raw_lines(file, self._path):
                stream = self._read(line, offset, raw)
                first = lines_of.setdefault(stream.stream_id, line)
                if first != line:
                    raise ValueError(
                        f"{self._path}:{line}, field stream_id: {stream.stream_id!r} stands in line {first} already. "
                        "Remove one of the two, or give it another id."
                    )
                self._places.append((line, offset, len(raw)))
                if self._is_packed:
                    self._lines.append(raw)
                if len(self._places) == self._spec.num_streams:
                    break
        if not self._places:
            raise ValueError(f"{self._path} holds no stream. Make it anew with --mode=questions, or remove it.")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Stream:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"stream {index} of {len(self)}")
        line, offset, size = self._places[index]
        if self._is_packed:
            return self._read(line, offset, self._lines[index])
        if _state(self._path) != self._state:
            raise ValueError(f"{self._path} has changed since it was opened; start again, and leave it as it is then.")
        with self._path.open("rb") as file:
            file.seek(offset)
            return self._read(line, offset, file.read(size))

    def _read(self, line: int, offset: int, raw: bytes) -> Stream:
        with _files.located(self._path, line, offset):
            value = _files.parse(raw)
        where = f"{self._path}:{line}"
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a stream as a JSON object, got {type(value).__name__}. Correct it.")
        return _cut(_stream(_files.Record(value, where)), self._spec)


def _state(path: pathlib.Path) -> tuple[int, int, int]:
    """Returns what changes when a file is written again: size, time and inode."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


# --------------------------------------------------------------------------------------
# From JSON to streams
# --------------------------------------------------------------------------------------


def _stream(record: _files.Record) -> Stream:
    fields = _fields(record, Stream)
    values: dict[str, Any] = {
        name: _text(record, name) for name in ("stream_id", "source", "competency") if name in fields
    }
    chunks = record.records("chunks")
    if not chunks:
        raise record.error("chunks", "at least one chunk")
    values["chunks"] = tuple(_chunk(chunk, len(chunks)) for chunk in chunks)
    return Stream(**values, questions=_questions(record, len(chunks)))


def _chunk(record: _files.Record, num_chunks: int) -> Chunk:
    _fields(record, Chunk)
    return Chunk(_text(record, "text"), _questions(record, num_chunks))


def _questions(record: _files.Record, num_chunks: int) -> tuple[Question, ...]:
    if "questions" not in record.fields:
        return ()
    return tuple(_question(question, num_chunks) for question in record.records("questions"))


def _question(record: _files.Record, num_chunks: int) -> Question:
    fields = _fields(record, Question)
    texts = ("text", "metric", "kind", "instruction")
    values: dict[str, Any] = {name: _text(record, name) for name in texts if name in fields}
    known = (*scoring.METRICS, *scoring.JUDGED)
    if values.get("metric", known[0]) not in known:
        raise record.error("metric", f"one of {', '.join(known)}")
    answers = _texts(record, "answers")
    if not answers:
        raise record.error("answers", "at least one answer")
    if "choices" in fields:
        values["choices"] = _texts(record, "choices")
    steps = record.items("gold_steps") if "gold_steps" in fields else []
    for i, step in enumerate(steps):
        # In Python, true is a number.
        if type(step) is not int or not 0 <= step < num_chunks:
            raise record.error(f"gold_steps[{i}]", f"the number of a chunk, 0 to {num_chunks - 1}", step)
    return Question(**values, answers=answers, gold_steps=tuple(steps))


def _texts(record: _files.Record, name: str) -> tuple[str, ...]:
    values = record.items(name)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise record.error(f"{name}[{i}]", "a text", value)
    return tuple(values)


def _fields(record: _files.Record, kind: type) -> dict[str, Any]:
    """Returns a record's fields, once it has been found to have those of a dataclass and no others."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in record.fields:
            raise record.error(name, f"a field of each {kind.__name__.lower()}")
    for name in record.fields:
        if name not in known:
            raise record.error(name, f"one of the fields {', '.join(known)}")
    return record.fields


def _text(record: _files.Record, name: str) -> str:
    # Not `Record.text`, which strips: what was written is what is read.
    value = record.fields[name]
    if not isinstance(value, str):
        raise record.error(name, "a text")
    return value


# --------------------------------------------------------------------------------------
# What of them is wanted
# --------------------------------------------------------------------------------------


def _cut(stream: Stream, spec: StreamSpec) -> Stream:
    """Keeps the first chunks, and of the questions that these can answer the first ones."""
    length = spec.chunks_per_stream

    def first(questions: Sequence[Question], limit: int) -> tuple[Question, ...]:
        return tuple(q for q in questions if all(step < length for step in q.gold_steps))[:limit]

    chunks = tuple(
        dataclasses.replace(chunk, questions=first(chunk.questions, spec.questions_per_chunk))
        for chunk in stream.chunks[:length]
    )
    return dataclasses.replace(stream, chunks=chunks, questions=first(stream.questions, spec.questions_per_stream))
