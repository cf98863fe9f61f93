"""Reads Mem-alpha's streams as they were published: rows with formatted chunks, questions and answers.

Three data sets of one schema: `memalpha` is the balanced training set with its test set, `memalpha_full` the training
set before sources were capped at 100 streams, `memalpha_mab` MemoryAgentBench as Mem-alpha processed it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from finemem_jax.types import Chunk, Stream, StreamSource, StreamSpec

from . import _files, _parquet, _published, _tfds, _windows


class _Rows(_tfds.FromParquet, skip_registration=True):
    """TFDS dataset with a row for each stream. `answer` is a JSON list of texts."""

    COLUMNS = ("instance_id", "prompt", "chunks", "questions_and_answers", "data_source", "metadata")

    def features(self) -> tfds.features.FeaturesDict:
        """Returns the schema of an example."""
        text = tfds.features.Text()
        return tfds.features.FeaturesDict(
            {
                "instance_id": tfds.features.Scalar(np.int64),
                "prompt": text,
                "chunks": tfds.features.Sequence(text),
                "questions_and_answers": tfds.features.Sequence({"question": text, "answer": text}),
                "data_source": text,
                "metadata": text,
                "num_chunks": tfds.features.Scalar(np.int64),
                "num_questions": tfds.features.Scalar(np.int64),
            }
        )

    def example(self, row: _files.Record) -> dict[str, Any]:
        """Checks a row and parses the cells that hold JSON."""
        chunks = _parquet.cell(row, "chunks")
        if not isinstance(chunks, list) or not chunks or not all(isinstance(chunk, str) for chunk in chunks):
            raise row.error("chunks", "a JSON list of texts, at least one", chunks)
        asked = _parquet.cell(row, "questions_and_answers")
        if not isinstance(asked, list):
            raise row.error("questions_and_answers", "a JSON list", asked)
        number = row.fields["instance_id"]
        if type(number) is not int:
            raise row.error("instance_id", "a whole number")
        questions = [_question(row, i, one) for i, one in enumerate(asked)]
        return {
            "instance_id": number,
            "prompt": row.text("prompt", may_be_empty=True),
            "chunks": chunks,
            "questions_and_answers": questions,
            "data_source": row.text("data_source"),
            "metadata": row.text("metadata", may_be_empty=True) if row.fields["metadata"] is not None else "",
            "num_chunks": len(chunks),
            "num_questions": len(questions),
        }

    def identity(self, example: Mapping[str, Any]) -> str:
        """Names a row by its number within its data source."""
        return f"instance_id {example['instance_id']} of {example['data_source']}"


def _question(row: _files.Record, index: int, one: Any) -> dict[str, str]:
    name = f"questions_and_answers[{index}]"
    if not isinstance(one, dict):
        raise row.error(name, "an object with question and answer", one)
    text, answer = one.get("question"), one.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise row.error(f"{name}.question", "a text", text)
    answers = answer if isinstance(answer, list) else [answer]
    # Labels may be numbers; in Python, true is one as well.
    if not answers or not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in answers):
        raise row.error(f"{name}.answer", "a text or a list of texts", answer)
    return {"question": text, "answer": json.dumps([str(one) for one in answers], ensure_ascii=False)}


class Memalpha(_Rows, skip_registration=True):
    """TFDS dataset of YuWangX/Memalpha."""

    REPO = "YuWangX/Memalpha"
    SPLITS = ("train", "test")


class MemalphaFull(_Rows, skip_registration=True):
    """TFDS dataset of YuWangX/Memalpha-full."""

    REPO = "YuWangX/Memalpha-full"
    SPLITS = ("train",)


class MemalphaMab(_Rows, skip_registration=True):
    """TFDS dataset of YuWangX/Memalpha-Memoryagentbench."""

    REPO = "YuWangX/Memalpha-Memoryagentbench"
    SPLITS = ("test",)


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams of YuWangX/Memalpha, whole: of `spec`, only the limits on streams and questions count.

    Global questions are the published ones; of too many the first are kept. Chunks have none of their own
    (`--mode=questions` makes some).

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, row and column).
    """
    return _load(Memalpha, spec)


def load_full(spec: StreamSpec) -> StreamSource:
    """Returns streams of YuWangX/Memalpha-full, as `load` does."""
    return _load(MemalphaFull, spec)


def load_mab(spec: StreamSpec) -> StreamSource:
    """Returns streams of YuWangX/Memalpha-Memoryagentbench, as `load` does."""
    return _load(MemalphaMab, spec)


def _load(builder: type[_Rows], spec: StreamSpec) -> StreamSource:
    rows = _tfds.rows(builder, spec.source_dir, _tfds.splits(builder, spec.split))
    _windows.check(spec)
    return _Streams(rows, spec)


class _Streams:
    """Random access to the rows of some splits, as streams."""

    def __init__(self, splits: Sequence[Sequence[Mapping[str, Any]]], spec: StreamSpec):
        """Puts the rows of the splits one after the other."""
        self._asker = _published.Asker(spec.rules, _published.MEMALPHA)
        self._most_questions = spec.questions_per_stream
        self._places = [(split, i) for split in splits for i in range(len(split))][: spec.num_streams or None]
        logging.getLogger(__name__).info("%d streams of Mem-alpha, split %s.", len(self._places), spec.split)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Stream:
        split, place = self._places[index]
        row = split[place]  # TFDS gives texts as bytes.
        source = row["data_source"].decode()
        pairs = row["questions_and_answers"]
        return Stream(
            stream_id=f"{source}/{int(row['instance_id']):06d}",
            source=source,
            chunks=tuple(Chunk(chunk.decode()) for chunk in row["chunks"]),
            questions=tuple(
                self._asker.question(source, text.decode(), tuple(json.loads(answer)))
                for text, answer in zip(pairs["question"], pairs["answer"], strict=True)
            )[: self._most_questions],
            competency=_published.competency(source),
        )
