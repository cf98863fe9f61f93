"""Reads rows of parquet files as records, and says in which row a broken one stands. Knows nothing of streams."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from . import _files

SUFFIXES = (".parquet",)
_REMEDY = "Fetch the file anew"
_ROWS_AT_A_TIME = 8  # A row of MemoryAgentBench holds megabytes.


def columns(path: pathlib.Path) -> frozenset[str]:
    """Returns the names of a file's columns.

    Raises:
        ValueError: it is no parquet file, or a truncated one.
    """
    try:
        return frozenset(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: no whole parquet file ({_first_line(error)}). {_REMEDY}.") from error


def read(path: pathlib.Path, names: Sequence[str]) -> Iterator[_files.Record]:
    """Yields the rows of a file, some columns of them, counted from 0.

    Raises:
        ValueError: the file is damaged.
    """
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=list(names)):
                for fields in batch.to_pylist():
                    yield _files.Record(fields, f"{path}, row {row}")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}, from row {row} on: damaged ({_first_line(error)}). {_REMEDY}.") from error


def cell(record: _files.Record, name: str) -> Any:
    """Parses the JSON that a cell holds.

    Raises:
        ValueError: it holds none.
    """
    text = record.text(name)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{record.where}, column {name}: broken JSON ({error.msg} at character {error.pos} of {len(text)}). "
            f"{_REMEDY}."
        ) from error


def checksum(path: pathlib.Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
