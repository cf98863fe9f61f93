"""Reads tables (CSV, TSV) and marked lines file by file, and says where a broken one stands.

For formats that `_files.read` cannot tell by their fields. Knows nothing of labels or streams.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator

from . import _files

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def rows(path: pathlib.Path, layouts: _files.Layouts) -> Iterator[_files.Record]:
    """Yields the rows of a table in UTF-8 by the names in its header; none if no layout's names are there.

    Commas, semicolons or tabs divide the columns, as the header does. A row is a line: no cell holds a line break.

    Raises:
        ValueError: a row has more or fewer columns than the header, or is not UTF-8.
    """
    header = _first_line(path)
    delimiter = next((mark for mark in ",;\t" if _fits(layouts, _cells(header, mark))), None)
    if delimiter is None:
        return
    names = _cells(header, delimiter)
    for line, text in itertools.islice(_files.lines(path), 1, None):
        cells = _cells(text, delimiter)
        if len(cells) != len(names):
            row = _files.Record({"row": text}, f"{path}:{line}")
            raise row.error("row", f"{len(names)} columns ({', '.join(names)}), not {len(cells)}")
        yield _files.Record(dict(zip(names, cells, strict=True)), f"{path}:{line}")


def marked_lines(path: pathlib.Path, first: re.Pattern[str], encoding: str) -> Iterator[_files.Record]:
    """Yields the lines that are not blank as the field "line" of records; none if the first is no match of `first`."""
    if first.fullmatch(_first_line(path)):
        for line, text in _files.lines(path, encoding):
            yield _files.Record({"line": text}, f"{path}:{line}")


def _fits(layouts: _files.Layouts, names: Iterable[str]) -> bool:
    """Says whether a table with columns `names` has all those of a layout."""
    return any({*layout} <= {*names} for layout in layouts)


def _first_line(path: pathlib.Path) -> str:
    """Returns the first line that is not blank, or "". As Latin-1: files of other kinds may be in any encoding."""
    with contextlib.closing(_files.lines(path, "latin-1")) as lines:
        return next(lines, (0, ""))[1]


def _cells(line: str, delimiter: str) -> list[str]:
    """Returns the cells of a row, none if it is no row."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:
        return []
