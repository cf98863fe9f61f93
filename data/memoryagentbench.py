"""Reads MemoryAgentBench as its authors published it: long contexts, each with all its questions.

Contexts are cut here, into chunks of `chunk_words` words; the authors take 4,096 tokens.
"""

from __future__ import annotations

import ast
import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from finemem_jax.types import Chunk, Stream, StreamSource, StreamSpec

from . import _chunking, _files, _published, _tfds, _windows

# What each split of it tests.
_COMPETENCIES = {
    "Accurate_Retrieval": "AR",
    "Test_Time_Learning": "TTL",
    "Long_Range_Understanding": "LRU",
    "Conflict_Resolution": "CR",
}
# Its metric, the recall of five recommended films, needs the list of all films, which is not in the data set.
_WITHOUT_METRIC = "recsys_"
_METADATA = ("qa_pair_ids", "question_ids", "question_types", "question_dates", "previous_events", "keypoints")


class MemoryAgentBench(_tfds.FromParquet, skip_registration=True):
    """TFDS dataset of ai-hyz/MemoryAgentBench. `answers` holds a JSON list for each question, `metadata` is JSON."""

    REPO = "ai-hyz/MemoryAgentBench"
    SPLITS = tuple(_COMPETENCIES)
    COLUMNS = ("context", "questions", "answers", "metadata")

    def features(self) -> tfds.features.FeaturesDict:
        """Returns the schema of an example."""
        text = tfds.features.Text()
        return tfds.features.FeaturesDict(
            {
                "context": text,
                "questions": tfds.features.Sequence(text),
                "answers": tfds.features.Sequence(text),
                "source": text,
                "metadata": text,
            }
        )

    def example(self, row: _files.Record) -> dict[str, Any]:
        """Checks a row, and turns lists and metadata into JSON."""
        metadata = row.record("metadata")
        questions, answers = row.items("questions"), row.items("answers")
        if len(questions) != len(answers):
            raise row.error("answers", f"an answer for each of the {len(questions)} questions", answers)
        for i, (question, golds) in enumerate(zip(questions, answers, strict=True)):
            if not isinstance(question, str) or not question.strip():
                raise row.error(f"questions[{i}]", "a text", question)
            if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
                raise row.error(f"answers[{i}]", "a list of texts, at least one", golds)
        return {
            "context": row.text("context"),
            "questions": questions,
            "answers": [json.dumps(golds, ensure_ascii=False) for golds in answers],
            "source": metadata.text("source"),
            # Not the haystacks of LongMemEval: the context holds them.
            "metadata": json.dumps(
                {name: metadata.fields[name] for name in _METADATA if metadata.fields.get(name)}, ensure_ascii=False
            ),
        }

    def identity(self, example: Mapping[str, Any]) -> str:
        """Names a row by its source and a hash of its context and questions."""
        # Rows have no names of their own, and those of a source may share a context.
        asked = json.dumps([example["context"], example["questions"]]).encode()
        return f"the row of {example['source']} with these questions ({hashlib.sha256(asked).hexdigest()[:12]})"


def load(spec: StreamSpec) -> StreamSource:
    """Returns a stream for each row, whole: `chunks_per_stream` changes nothing.

    There are no training streams; "test" and "all" mean all four splits.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, row and column).
    """
    _windows.check(spec)
    if spec.split == "train":
        raise ValueError(
            "MemoryAgentBench has no training streams. Train on another data.name and evaluate on this one "
            "(data.test_name, evaluate.sources)."
        )
    rows = _tfds.rows(MemoryAgentBench, spec.source_dir, MemoryAgentBench.SPLITS)
    return _Streams(dict(zip(MemoryAgentBench.SPLITS, rows, strict=True)), spec)


class _Streams:
    """Random access to the rows of all splits, as streams, but for those without a metric."""

    def __init__(self, rows: Mapping[str, Sequence[Mapping[str, Any]]], spec: StreamSpec):
        """Puts the rows of the splits one after the other."""
        self._spec = spec
        self._asker = _published.Asker(spec.rules, _published.MEMORYAGENTBENCH)
        self.left_out: collections.Counter[str] = collections.Counter()
        self._places: list[tuple[str, int, Sequence[Mapping[str, Any]]]] = []
        for split, examples in rows.items():
            for number, example in enumerate(examples):
                if example["source"].decode().startswith(_WITHOUT_METRIC):
                    self.left_out["recall of recommended films is not computed"] += len(example["questions"])
                else:
                    self._places.append((split, number, examples))
        self._places = self._places[: spec.num_streams or None]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Stream:
        split, number, examples = self._places[index]
        row = examples[number]  # TFDS gives texts as bytes.
        source, context = row["source"].decode(), row["context"].decode()
        metadata = json.loads(row["metadata"])
        types = metadata.get("question_types") or [""] * len(row["questions"])
        questions = [
            self._asker.question(source, text.decode(), tuple(json.loads(golds)), kind=kind or "")
            for text, golds, kind in zip(row["questions"], row["answers"], types, strict=True)
        ]
        text = _conversations(context) if source.startswith("longmemeval") else context
        spans = _chunking.cut(text, self._spec.chunk_words, self._spec.chunking)
        return Stream(
            stream_id=f"{split}/{number:03d}",
            source=source,
            chunks=tuple(Chunk(text[start:end]) for start, end in spans),
            questions=tuple(questions[: self._spec.questions_per_stream]),
            competency=_COMPETENCIES[split],
        )


def _conversations(context: str) -> str:
    """Returns LongMemEval's context, a list of dates and conversations written as Python has it, in plain words.

    What is not of this form stays as it is.
    """
    try:
        parts = ast.literal_eval(context)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return context
    if not isinstance(parts, list):
        return context
    paragraphs = []
    for part in parts:
        if isinstance(part, list):
            turns = (turn for turn in part if isinstance(turn, dict))
            part = "\n".join(f"<{turn.get('role', 'user')}> {turn.get('content', '')}" for turn in turns)
            paragraphs[-1:] = [f"{paragraphs[-1]}\n{part}" if paragraphs else part]
        else:
            paragraphs.append(f"[Dialogue at timestamp {part}]")
    return "\n\n".join(paragraphs)
