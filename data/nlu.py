"""Builds streams from the NLU evaluation data (Liu et al.): utterances to a home assistant, labeled by intent.

Reads tables with the columns text and intent, and the published corpus, in which a scenario belongs to the intent.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from finemem_jax.types import StreamSource, StreamSpec

from . import _files, _labels, _tables, _windows

NAME = "nlu"
_TEXTS = ("text", "answer", "answer_from_anno")  # of plain tables, the whole corpus, its files for cross-validation
_FORMATS = f"tables of NLU ({', '.join(_tables.SUFFIXES)}; a column intent and one of {', '.join(_TEXTS)})"


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams that teach the intents, see `_labels.source`.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, line and field).
    """
    _windows.check(spec)
    examples = _files.read_each(spec.source_dir, _tables.SUFFIXES, _read, formats=_FORMATS)
    return _labels.source(NAME, examples, spec)


def _read(path: pathlib.Path) -> Iterator[_labels.Example]:
    for row in _tables.rows(path, [{"intent", column} for column in _TEXTS]):
        column = next(column for column in _TEXTS if column in row.fields)
        in_corpus = column != "text"
        text, label = row.text(column, may_be_empty=in_corpus), row.text("intent")
        if in_corpus and "scenario" in row.fields:
            label = f"{row.text('scenario')}_{label}"
        if not in_corpus or text not in ("", "null"):  # The corpus has rows in which nothing is said.
            yield _labels.Example(text, label, unit=text)
