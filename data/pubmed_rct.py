"""Builds streams from abstracts whose sentences are labeled by their rhetorical role: PubMed RCT, CSAbstruct.

Reads PubMed RCT's text files ("###id", then "LABEL<tab>sentence" a line), JSON records of an abstract
({"sentences", "labels"}), and JSON records of a sentence ({"abstract_id", "text", "label"}, or "labels").
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from finemem_jax.types import StreamSource, StreamSpec

from . import _files, _labels, _tables, _windows

NAME = "pubmed_rct"
_SUFFIXES = (*_files.SUFFIXES, ".txt", ".txt.gz")
_ID = re.compile(r"###\s*(\d+)\s*")
_LAYOUTS = ({"sentences", "labels"}, {"abstract_id", "text", "label"}, {"abstract_id", "text", "labels"})
_FORMATS = (
    f"files of PubMed RCT ({', '.join(_SUFFIXES)}; a line '###id', then lines 'LABEL<tab>sentence'; or records with "
    "the fields sentences, labels or abstract_id, text, label)"
)


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams that teach the roles ("METHODS" and "methods" are one), see `_labels.source`.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, line and field).
    """
    _windows.check(spec)
    examples = _files.read_each(spec.source_dir, _SUFFIXES, _read, formats=_FORMATS)
    return _labels.source(NAME, examples, spec, nouns=("Sample", "Labels"), in_units=True)


def _read(path: pathlib.Path) -> Iterator[_labels.Example]:
    is_text = path.name.lower().endswith((".txt", ".txt.gz"))
    for place, (text, label, unit) in enumerate(_read_lines(path) if is_text else _read_records(path)):
        yield _labels.Example(text, label.casefold(), unit, place)


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    unit = ""
    for line in _tables.marked_lines(path, _ID, "utf-8"):
        if match := _ID.fullmatch(line.fields["line"]):
            unit = match[1]
            continue
        label, _, text = line.fields["line"].partition("\t")
        if not (label.strip() and text.strip()):
            raise line.error("line", "LABEL<tab>sentence, or ###id")
        yield text, label, unit


def _read_records(path: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    for record in _files.records(path, _LAYOUTS):
        if "sentences" in record.fields:
            sentences, labels = record.items("sentences"), record.items("labels")
            if len(labels) != len(sentences):
                raise record.error("labels", f"{len(sentences)} labels, one for each sentence, not {len(labels)}")
            unit = "\n".join(map(str, sentences))  # CSAbstruct's abstract_id is always 0.
            for i, (sentence, label) in enumerate(zip(sentences, labels, strict=True)):
                fields = {f"sentences[{i}]": sentence, f"labels[{i}]": label}
                pair = _files.Record(fields, record.where, record.path)
                yield pair.text(f"sentences[{i}]"), pair.text(f"labels[{i}]"), unit
        else:
            label = record.text("label" if "label" in record.fields else "labels")
            yield record.text("text"), label, record.text("abstract_id")
