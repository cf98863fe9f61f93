"""Streams that were written out come back as they were, and what is wrong with a file is said with its line."""

import dataclasses
import gzip
import json
import os
import pickle
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from finemem_jax import input_pipeline
from finemem_jax.questions.options import QuestionOptions
from finemem_jax.questions.pipeline import Models, Pipeline
from finemem_jax.reading import scoring
from finemem_jax.runtime import workers
from finemem_jax.types import Chunk, Question, Stream, StreamSpec, to_json

ALL = StreamSpec("train", 0, 0, 99, 1, 99, 99)


def load(folder, **changes) -> Any:
    return input_pipeline.load("streams", dataclasses.replace(ALL, source_dir=str(folder), **changes))


def read(folder, **changes):
    source = load(folder, **changes)
    return [source[i] for i in range(len(source))]


def write(folder, values, name="train.jsonl"):
    """Writes streams, or whatever else, a line each."""
    rows = "".join(json.dumps(to_json(value), ensure_ascii=False) + "\n" for value in values)
    data = rows.encode("utf-8")
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def question(text="Who?", *gold_steps, answers=("Ana",), **fields):
    return Question(text, answers, gold_steps=gold_steps, **fields)


STREAMS = [
    Stream(
        f"s{i}",
        "made up",
        tuple(Chunk(f"Chunk {t}\nof “{i}”.", tuple(question(f"q{n}", t) for n in range(3))) for t in range(4)),
        (question("first", 0), question("late", 0, 3), question("second", 1), question("somewhere")),
        "AR",
    )
    for i in range(5)
]


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_what_was_written_is_read(tmp_path, name):
    write(tmp_path, STREAMS, name)
    assert read(tmp_path) == STREAMS
    source = load(tmp_path)
    assert source[3] == source[3] == STREAMS[3] == pickle.loads(pickle.dumps(source))[3]
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"stream {index} of 5"):
            source[index]


# --------------------------------------------------------------------------------------
# Any stream comes back
# --------------------------------------------------------------------------------------

texts = st.text(max_size=20) | st.sampled_from(("\u2028\x85\x0b", "a\r\nb", "\\ud83d", "\ufeff", "\x00", "😀", " a "))


@st.composite
def streams(draw, name):
    num_chunks = draw(st.integers(1, 4))
    steps = st.lists(st.integers(0, num_chunks - 1), max_size=3).map(tuple)
    asked = st.lists(
        st.builds(
            Question,
            text=texts,
            answers=st.lists(texts, min_size=1, max_size=3).map(tuple),
            metric=st.sampled_from([*scoring.METRICS, *scoring.JUDGED]),
            gold_steps=steps,
            kind=texts,
        ),
        max_size=3,
    ).map(tuple)
    chunks = tuple(draw(st.builds(Chunk, text=texts, questions=asked)) for _ in range(num_chunks))
    return Stream(f"{name}{draw(texts)}", draw(texts), chunks, draw(asked), draw(texts))


few_examples = hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip


@few_examples
@hypothesis.given(st.data(), st.sampled_from(("train.jsonl", "train.jsonl.gz")))
def test_any_stream_comes_back(tmp_path, data, name):
    written = [data.draw(streams(i)) for i in range(data.draw(st.integers(1, 3)))]
    for path in tmp_path.iterdir():
        path.unlink()
    write(tmp_path, written, name)
    assert read(tmp_path) == written


@few_examples
@hypothesis.given(st.data())
def test_any_stream_comes_back_from_the_pipeline(tmp_path, data):
    """With the questions it had: a generator without ideas, and all that is there stays."""
    written = [data.draw(streams(i)) for i in range(data.draw(st.integers(1, 3)))]
    silent = workers.Batched(lambda chats: [""] * len(chats))
    options = QuestionOptions(keep_existing=True, rounds=1)
    Pipeline(written, options, Models(silent, silent, len)).write(tmp_path, "train")
    assert read(tmp_path) == written


# --------------------------------------------------------------------------------------
# Only what is wanted
# --------------------------------------------------------------------------------------


def test_so_many_streams(tmp_path):
    write(tmp_path, STREAMS)
    assert read(tmp_path, num_streams=2) == STREAMS[:2]
    assert read(tmp_path, num_streams=99) == STREAMS


def test_so_many_questions(tmp_path):
    write(tmp_path, STREAMS[:1])
    (stream,) = read(tmp_path, questions_per_chunk=2, questions_per_stream=1)
    assert [[q.text for q in chunk.questions] for chunk in stream.chunks] == [["q0", "q1"]] * 4
    assert [q.text for q in stream.questions] == ["first"]
    (stream,) = read(tmp_path, questions_per_chunk=0, questions_per_stream=0)
    assert not stream.questions and not any(chunk.questions for chunk in stream.chunks)


@pytest.mark.parametrize("length, left", [(1, ["first", "somewhere"]), (3, ["first", "second", "somewhere"])])
def test_so_many_chunks(tmp_path, length, left):
    write(tmp_path, STREAMS[:1])
    (stream,) = read(tmp_path, chunks_per_stream=length)
    assert stream.stream_id == "s0" and stream.chunks == STREAMS[0].chunks[:length]
    assert [q.text for q in stream.questions] == left
    # Places are for questions that can be asked.
    (stream,) = read(tmp_path, chunks_per_stream=length, questions_per_stream=2)
    assert [q.text for q in stream.questions] == left[:2]


def test_defaults_may_be_left_out(tmp_path):
    row = {"stream_id": "a", "source": "b", "chunks": [{"text": "c"}, {"text": "d", "questions": []}]}
    row["questions"] = [{"text": "e", "answers": ["f"]}]
    write(tmp_path, [row])
    assert read(tmp_path) == [Stream("a", "b", (Chunk("c"), Chunk("d")), (Question("e", ("f",)),))]


def test_blank_lines_and_splits(tmp_path):
    write(tmp_path, STREAMS[:1])
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf\n" + (tmp_path / "train.jsonl").read_bytes() + b"\n \n")
    assert read(tmp_path, split="test") == STREAMS[:1]


def test_lines_are_not_kept(tmp_path):
    write(tmp_path, STREAMS)
    source = load(tmp_path)
    assert source._lines == []
    stat = (tmp_path / "train.jsonl").stat()
    os.utime(tmp_path / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="train.jsonl has changed since it was opened; start again"):
        source[0]


# --------------------------------------------------------------------------------------
# Errors: where, what, and the remedy
# --------------------------------------------------------------------------------------


def fails(folder, *parts, **changes):
    with pytest.raises(ValueError) as caught:
        load(folder, **changes)
    for part in parts:
        assert part in str(caught.value)


def test_no_file(tmp_path):
    fails("", "data.source_dir must be the folder that holds train.jsonl or train.jsonl.gz, got ''. Set")
    fails(tmp_path / "none", "must be a folder that holds train.jsonl", "does not exist. Correct it.")
    fails(tmp_path, "holds no train.jsonl or train.jsonl.gz; of such files it has none. Make the split")
    write(tmp_path, STREAMS, "test.jsonl")
    write(tmp_path, STREAMS, "dev.jsonl.gz")
    fails(tmp_path / "test.jsonl", "test.jsonl' is a file. Correct it.")
    fails(tmp_path, "of such files it has dev.jsonl.gz, test.jsonl. Make the split with --mode=questions, or name")
    write(tmp_path, STREAMS, "test.jsonl.gz")
    fails(tmp_path, "holds both test.jsonl and test.jsonl.gz; move one of them away", split="test")
    fails(tmp_path, "split must be 'train', 'test' or 'all', got 'dev'", split="dev")
    fails(tmp_path, "data.chunks_per_stream must be at least 1", chunks_per_stream=0)


@pytest.mark.parametrize(
    "rows, parts",
    [
        (b"", ["train.jsonl holds no stream. Make it anew"]),
        (b"\n \n", ["train.jsonl holds no stream"]),
        (b'\n{"stream_id": 1,}\n', ["train.jsonl:2, column", "broken JSON", "Correct the file, or move"]),
        (b"[1]\n", ["train.jsonl:1: expected a stream as a JSON object, got list. Correct it."]),
        (b'"\xff"\n', ["train.jsonl:1, byte 1: not UTF-8"]),
        (b'{"stream_id": "\\ud83d"}\n', ["train.jsonl:1: holds half a surrogate pair"]),
        (b"[" * 100_000, ["train.jsonl:1: JSON nested too deeply"]),
    ],
)
def test_broken_files(tmp_path, rows, parts):
    (tmp_path / "train.jsonl").write_bytes(rows)
    fails(tmp_path, *parts)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(rows))
    fails(tmp_path, *(part.replace("train.jsonl", "train.jsonl.gz") for part in parts))


def test_damaged_gzip(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(to_json(STREAMS[0])).encode())[:-9])
    fails(tmp_path, "train.jsonl.gz:1: the gzip file is truncated or damaged")


def changed(change):
    row = to_json(STREAMS[0])
    change(row)
    return row


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("stream_id"), "field stream_id: expected a field of each stream, the field is missing."),
        (lambda r: r.pop("source"), "field source: expected a field of each stream, the field is missing."),
        (lambda r: r.pop("chunks"), "field chunks: expected a field of each stream, the field is missing."),
        (lambda r: r.update(chunk=1), "field chunk: expected one of the fields stream_id, source, chunks, questions, "),
        (lambda r: r.update(stream_id=7), "field stream_id: expected a text, got int 7."),
        (lambda r: r.update(competency=None), "field competency: expected a text, got NoneType None."),
        (lambda r: r.update(chunks=[]), "field chunks: expected at least one chunk, got list []."),
        (lambda r: r.update(chunks=["a"]), "field chunks[0]: expected an object, got str 'a'."),
        (lambda r: r.update(questions={}), "field questions: expected a list, got dict {}."),
        (lambda r: r["chunks"][1].pop("text"), "field chunks[1].text: expected a field of each chunk, the field is"),
        (lambda r: r["chunks"][1].update(text=[]), "field chunks[1].text: expected a text, got list []."),
        (lambda r: r["questions"][1].pop("answers"), "questions[1].answers: expected a field of each question, the"),
        (lambda r: r["questions"][1].update(answers=[]), "questions[1].answers: expected at least one answer, got"),
        (lambda r: r["questions"][1].update(answers="Ana"), "questions[1].answers: expected a list, got str 'Ana'."),
        (lambda r: r["questions"][1].update(answers=["a", 5]), "questions[1].answers[1]: expected a text, got int 5."),
        (lambda r: r["questions"][0].update(anwsers=[]), "questions[0].anwsers: expected one of the fields text, "),
        (lambda r: r["questions"][0].update(metric="bleu"), "questions[0].metric: expected one of substring, "),
        (
            lambda r: r["chunks"][3]["questions"][2].update(gold_steps=[0, 4]),
            "field chunks[3].questions[2].gold_steps[1]: expected the number of a chunk, 0 to 3, got int 4.",
        ),
        (lambda r: r["questions"][0].update(gold_steps=[-1]), "gold_steps[0]: expected the number of a chunk, 0 to 3"),
        (lambda r: r["questions"][0].update(gold_steps=[True]), "gold_steps[0]: expected the number of a chunk, 0 to"),
        (lambda r: r["questions"][0].update(gold_steps=[1.0]), "gold_steps[0]: expected the number of a chunk, 0 to"),
        (lambda r: r["questions"][0].update(gold_steps=1), "questions[0].gold_steps: expected a list, got int 1."),
    ],
)
def test_wrong_fields(tmp_path, change, message):
    write(tmp_path, [STREAMS[1], changed(change)])
    fails(tmp_path, "train.jsonl:2, field ", message, "Correct it, or move the file out of data.source_dir")
    # Lines that are not wanted are not read.
    assert read(tmp_path, num_streams=1) == STREAMS[1:2]


def test_the_same_id_twice(tmp_path):
    write(tmp_path, [STREAMS[0], STREAMS[1], changed(lambda row: row.update(source="another"))])
    fails(tmp_path, "train.jsonl:3, field stream_id: 's0' stands in line 1 already. Remove one of the two")
