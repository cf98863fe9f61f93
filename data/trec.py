"""Builds streams from the TREC questions (Li & Roth): what kind of thing a question asks for.

Reads the published files, "COARSE:fine question" a line in Latin-1. `trec` teaches the six coarse classes, `trec_fine`
the fine ones.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from finemem_jax.types import StreamSource, StreamSpec

from . import _files, _labels, _tables, _windows

NAME = "trec"
_SUFFIXES = (".label", ".txt", ".label.gz", ".txt.gz")
# By name, since many a text begins with a word and a colon.
_LINE = re.compile(r"\s*(ABBR|DESC|ENTY|HUM|LOC|NUM):(\w+)\s+(\S.*)")
_FORM = "COARSE:fine question (COARSE: ABBR, DESC, ENTY, HUM, LOC or NUM)"
_FORMATS = f"files of TREC questions ({', '.join(_SUFFIXES)}; lines {_FORM})"


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams that teach the coarse classes, see `_labels.source`.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file and line).
    """
    return _load(NAME, spec, fine=False)


def load_fine(spec: StreamSpec) -> StreamSource:
    """Returns streams that teach the fine classes ("COARSE:fine"); raises as `load` does."""
    return _load(f"{NAME}_fine", spec, fine=True)


def _load(name: str, spec: StreamSpec, *, fine: bool) -> StreamSource:
    _windows.check(spec)

    def read(path: pathlib.Path) -> Iterator[_labels.Example]:
        for line in _tables.marked_lines(path, _LINE, "latin-1"):
            if (match := _LINE.fullmatch(line.fields["line"])) is None:
                raise line.error("line", _FORM)
            coarse, kind, text = match.groups()
            yield _labels.Example(text, f"{coarse}:{kind}" if fine else coarse, unit=text)

    examples = _files.read_each(spec.source_dir, _SUFFIXES, read, formats=_FORMATS)
    return _labels.source(name, examples, spec)
