"""Reads JSON records from the original files of a data set, and says where a broken one stands.

Knows nothing of streams or questions, nor of any one format: a builder names the fields that tell its format from
others.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# A longer line is no record of text but a mistake (a whole data set on one line); parsing takes ten times its size.
MAX_LINE_BYTES = 64 * 2**20
_MOVE = "or move the file out of data.source_dir if it is no data"


@dataclasses.dataclass(frozen=True)
class Record:
    """One JSON object.

    Attributes:
        fields: The object.
        where: File and line (or number of the record), for messages.
        path: Where in the record a nested object stands, e.g. "paragraphs[2]."; "" for the record itself.
    """

    fields: dict[str, Any]
    where: str
    path: str = ""

    def text(self, key: str, may_be_empty: bool = False) -> str:
        """Returns a field that must be a text, stripped.

        Raises:
            ValueError: it is missing, no text, or blank (unless `may_be_empty`).
        """
        value = self._get(key, str, "a text")
        if not value.strip() and not may_be_empty:
            raise self.error(key, "a text that is not blank")
        return value.strip()

    def items(self, key: str) -> list[Any]:
        """Returns a field that must be a list; raises ValueError if it is missing or no list."""
        return self._get(key, list, "a list")

    def record(self, key: str) -> Record:
        """Returns a field that must be an object; raises ValueError if it is missing or no object."""
        return Record(self._get(key, dict, "an object"), self.where, f"{self.path}{key}.")

    def records(self, key: str) -> list[Record]:
        """Returns a field that must be a list of objects; raises ValueError if it is missing or anything else."""
        values = self.items(key)
        for i, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.error(f"{key}[{i}]", "an object", value)
        return [Record(value, self.where, f"{self.path}{key}[{i}].") for i, value in enumerate(values)]

    def error(self, key: str, expected: str, value: Any = ...) -> ValueError:
        """Returns the error to raise for field `key`; `value` is what stands there, if it is not a plain field."""
        value = self.fields.get(key, ...) if value is ... else value
        got = "the field is missing" if value is ... else f"got {type(value).__name__} {_short(value)}"
        return ValueError(f"{self.where}, field {self.path}{key}: expected {expected}, {got}. Correct it, {_MOVE}.")

    def _get(self, key: str, kind: type, expected: str) -> Any:
        value = self.fields.get(key, ...)
        if not isinstance(value, kind):
            raise self.error(key, expected)
        return value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# The fields that records of a format have: all those of one of several layouts.
Layouts = Sequence[Collection[str]]


def read(source_dir: str, layouts: Layouts, name: str) -> Iterator[Record]:
    """Yields every record of one format below a folder, file by file in the order of their relative paths.

    A file belongs to the format when its first record has all fields of a layout. The others are left alone: several
    data sets may share a folder. Hidden files and folders are not looked at; linked ones are.

    A file holds one record a line, or one JSON document: a list of records, an object whose "data" lists them, or a
    single record.

    Args:
        source_dir: `StreamSpec.source_dir`.
        layouts: What tells the format from others.
        name: What the format is called, for messages.

    Raises:
        ValueError: there is no such folder or no such file in it; or a file is damaged, with file and line. A file
            that does not parse at all raises as well: to pass over it could lose data without a word.
    """
    fields = "; or ".join(", ".join(layout) for layout in layouts)
    formats = f"files of {name} ({', '.join(SUFFIXES)}; records with the fields {fields})"
    yield from read_each(source_dir, SUFFIXES, lambda path: records(path, layouts), formats=formats)


def read_each(
    source_dir: str, suffixes: Sequence[str], read_file: Callable[[pathlib.Path], Iterator[Item]], *, formats: str
) -> Iterator[Item]:
    """Yields what `read_file` finds in each file below a folder whose name ends in one of `suffixes`.

    Args:
        source_dir: `StreamSpec.source_dir`.
        read_file: Yields the rows of one file, none if it is of another format.
        formats: What is looked for, for messages.

    Raises:
        ValueError: there is no such folder, or no file of the format in it.
    """
    paths = find(source_dir, suffixes, formats)
    any_found = False
    for path in paths:
        for item in read_file(path):
            any_found = True
            yield item
    if not any_found:
        raise none_found(source_dir, formats, len(paths))


def records(path: pathlib.Path, layouts: Layouts) -> Iterator[Record]:
    """Yields the records of a file; none if the first has not all the fields of a layout.

    Raises:
        ValueError: the file is damaged, or a later record is no object; with file and line.
    """
    with contextlib.closing(values(path, frozenset().union(*layouts))) as found:
        for number, (value, where) in enumerate(found):
            is_object = isinstance(value, dict)
            if number == 0 and not (is_object and any(set(layout) <= value.keys() for layout in layouts)):
                return
            if not is_object:
                raise ValueError(f"{where}: expected an object, got {_short(value)}. Correct the line, {_MOVE}.")
            yield Record(value, where)


def find(source_dir: str, suffixes: Sequence[str], formats: str) -> list[pathlib.Path]:
    """Returns the files below a folder whose names end in one of `suffixes`, in the order of their relative paths.

    Hidden files and folders are not looked at; linked ones are.

    Args:
        source_dir: `StreamSpec.source_dir`.
        formats: What is looked for, for messages.

    Raises:
        ValueError: there is no such folder.
    """
    if not source_dir:
        raise ValueError(f"data.source_dir must be the folder that holds {formats}, got ''. Set data.source_dir.")
    root = pathlib.Path(source_dir)
    if not root.exists():
        raise ValueError(f"data.source_dir must exist and hold {formats}; {source_dir!r} does not exist. Correct it.")
    if not root.is_dir():
        raise ValueError(f"data.source_dir must be a folder, got the file {source_dir!r}. Name the folder it is in.")
    found: list[pathlib.Path] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        for file in files:
            if file.lower().endswith(tuple(suffixes)) and not file.startswith("."):
                found.append(pathlib.Path(folder, file))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def none_found(source_dir: str, formats: str, num_files: int) -> ValueError:
    """Returns the error to raise where `num_files` files were looked at and none was of the format."""
    return ValueError(
        f"data.source_dir {source_dir!r} holds no {formats}; {num_files} files with these endings are of other "
        "formats. Put the original files there, or point data.source_dir to the folder that has them."
    )


def lines(path: pathlib.Path, encoding: str = "utf-8") -> Generator[tuple[int, str], None, None]:
    """Yields the number (from 1) and the text of each line that is not blank, without its end; unpacks .gz.

    Raises:
        ValueError: the file is damaged, or in another encoding; with file and line.
    """
    with open_binary(path) as stream:
        for line, offset, raw in raw_lines(stream, path):
            with located(path, line, offset):
                text = raw.decode(encoding)
            yield line, text.rstrip("\r\n")


def values(path: pathlib.Path, keys: Collection[str] = ()) -> Generator[tuple[Any, str], None, None]:
    """Yields the records of one file, of whatever format, and where each stands.

    Args:
        keys: A single record may have these; without any of them, an object with a list "data" is a list of records.
    """
    with open_binary(path) as stream:
        lines = raw_lines(stream, path)
        is_first = True
        for line, offset, raw in lines:
            with located(path, line, offset):
                try:
                    value = parse(raw)
                except json.JSONDecodeError:
                    # A document may run over many lines; in a file of lines the first one is simply broken.
                    if not is_first or path.name.lower().removesuffix(".gz").endswith(".jsonl"):
                        raise
                    value = parse(_document(path, raw, first_line=line, rest=lines))
            is_first = False
            if isinstance(value, dict) and isinstance(value.get("data"), list) and not value.keys() & set(keys):
                value = value["data"]
            if isinstance(value, list):
                for i, item in enumerate(value, start=1):
                    yield item, f"{path}:{line}, record {i}"
            else:
                yield value, f"{path}:{line}"


def open_binary(path: pathlib.Path) -> io.BufferedIOBase:
    """Opens a file for reading bytes; unpacks .gz."""
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def raw_lines(stream: io.BufferedIOBase, path: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields the number (from 1), the offset in bytes and the bytes of each line that is not blank."""
    line, offset = 0, 0
    while True:
        line += 1
        try:
            raw = stream.readline(MAX_LINE_BYTES + 1)
            size = len(raw)
            if size > MAX_LINE_BYTES:
                # The rest of the line is read piece by piece and dropped: only its size goes into the message.
                while not raw.endswith(b"\n") and (raw := stream.readline(MAX_LINE_BYTES)):
                    size += len(raw)
                raise ValueError(_too_long(f"{path}:{line}", size))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}:{line}: the gzip file is truncated or damaged ({error}). Fetch or compress it anew, {_MOVE}."
            ) from error
        if not raw:
            return
        start = offset
        offset += size
        # Windows programs put a byte order mark before UTF-8; it is no part of the text.
        if line == 1 and raw.startswith(codecs.BOM_UTF8):
            raw = raw.removeprefix(codecs.BOM_UTF8)
            start += len(codecs.BOM_UTF8)
        if raw.strip():
            yield line, start, raw


def _document(path: pathlib.Path, first: bytes, *, first_line: int, rest: Iterator[tuple[int, int, bytes]]) -> bytes:
    """Joins a file's first line and the rest; blank lines are kept, so that messages count lines right."""
    parts, size, previous = [first], len(first), first_line
    for line, _, raw in rest:
        size += len(raw)
        if size <= MAX_LINE_BYTES:
            parts.append(b"\n" * (line - previous - 1) + raw)
        previous = line
    if size > MAX_LINE_BYTES:
        raise ValueError(_too_long(f"{path} (one document)", size))
    return b"".join(parts)


def _too_long(where: str, size: int) -> str:
    return (
        f"{where}: {size:,} bytes in one piece, more than the {MAX_LINE_BYTES:,} that are read. "
        f"Write one record a line, {_MOVE}."
    )


def parse(raw: bytes) -> Any:
    """Parses UTF-8 JSON; raises what `located` turns into a message with file and line."""
    text = raw.decode("utf-8").rstrip()  # else the parser finds a torn line torn in the line after
    value = json.loads(text)
    # "\ud83d" without its second half parses, but no tokenizer or file takes it; that should not surface in training.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


@contextlib.contextmanager
def located(path: pathlib.Path, line: int, offset: int) -> Iterator[None]:
    """Turns what parsing raises into a ValueError with file and line (of the parsed text's start) and remedy."""
    try:
        yield
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start}"  # of the unpacked text, for .gz
        raise ValueError(f"{path}:{line}, {place}: not UTF-8. Convert the file to UTF-8, {_MOVE}.") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}:{line}: holds half a surrogate pair ({error}). Correct the text, {_MOVE}.") from error
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: broken JSON ({error.msg}). Correct the file, {_MOVE}.") from error
    except RecursionError as error:
        raise ValueError(f"{path}:{line}: JSON nested too deeply. Correct the file, {_MOVE}.") from error
