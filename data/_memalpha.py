"""Mem-alpha's streams as they were published: rows with formatted chunks, questions and answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from finemem_jax.types import Chunk, Question, Stream, StreamSource, StreamSpec

from . import _files, _parquet, _published, _tfds, _windows


class Rows(_tfds.FromParquet, skip_registration=True):
    """A row for each stream. `answer` is JSON: a text, or a list of texts."""

    COLUMNS = ("instance_id", "prompt", "chunks", "questions_and_answers", "data_source", "metadata")

    def features(self) -> tfds.features.FeaturesDict:
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


def load(rows: Sequence[Sequence[Mapping[str, Any]]], spec: StreamSpec) -> StreamSource:
    """Returns the streams of some splits, whole: of `spec`, only the limits on streams and questions count.

    Global questions are the published ones; of too many the first are kept. Chunks have none of their own
    (`--mode=questions` makes some).
    """
    _windows.check(spec)
    return _Streams(rows, spec)


class _Streams:
    def __init__(self, splits: Sequence[Sequence[Mapping[str, Any]]], spec: StreamSpec):
        self._spec = spec
        self._places = [(split, i) for split in splits for i in range(len(split))][: spec.num_streams or None]
        logging.getLogger(__name__).info("%d streams of Mem-alpha, split %s.", len(self._places), spec.split)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Stream:
        split, place = self._places[index]
        row = split[place]
        source = row["data_source"].decode()
        pairs = row["questions_and_answers"]
        return Stream(
            stream_id=f"{source}/{int(row['instance_id']):06d}",
            source=source,
            chunks=tuple(Chunk(chunk.decode()) for chunk in row["chunks"]),
            questions=tuple(
                self._question(text.decode(), answer, source)
                for text, answer in zip(pairs["question"], pairs["answer"], strict=True)
            )[: self._spec.questions_per_stream],
            competency=_published.competency(source),
        )

    def _question(self, text: str, answer: bytes, source: str) -> Question:
        return _published.question(text, tuple(json.loads(answer)), source, self._spec, _published.MEMALPHA)
