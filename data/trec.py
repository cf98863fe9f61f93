"""Streams from the TREC questions (Li & Roth): what kind of thing a question asks for, in six coarse classes.

Reads the published files, "COARSE:fine question" a line in Latin-1. `trec_fine` has the fine classes.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from finemem_jax.types import StreamSource, StreamSpec

from . import _labels, _tables, _windows

NAME = "trec"
_SUFFIXES = (".label", ".txt", ".label.gz", ".txt.gz")
# By name, since many a text begins with a word and a colon.
_LINE = re.compile(r"\s*(ABBR|DESC|ENTY|HUM|LOC|NUM):(\w+)\s+(\S.*)")
_FORM = "COARSE:fine question (COARSE: ABBR, DESC, ENTY, HUM, LOC or NUM)"


def load(spec: StreamSpec, name: str = NAME, fine: bool = False) -> StreamSource:
    """Returns streams that teach the coarse classes, or the `fine` ones, see `_labels.source`.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file and line).
    """
    _windows.check(spec)

    def read(path: pathlib.Path) -> Iterator[_labels.Example]:
        for line in _tables.marked_lines(path, _LINE, "latin-1"):
            if (match := _LINE.fullmatch(line.fields["line"])) is None:
                raise line.error("line", _FORM)
            coarse, kind, text = match.groups()
            yield _labels.Example(text, f"{coarse}:{kind}" if fine else coarse, unit=text)

    formats = f"files of TREC questions ({', '.join(_SUFFIXES)}; lines {_FORM})"
    return _labels.source(name, _tables.read(spec.source_dir, _SUFFIXES, read, formats), spec)
