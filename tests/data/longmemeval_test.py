"""LongMemEval streams: miniature haystacks of our own, and laws on real ones where the folder has them."""

import copy
import dataclasses
import json
import re

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

longmemeval = input_pipeline.builder("longmemeval")

# Of one haystack, the split "test" has it. A session of `_session` fills a chunk of 20 words.
SPEC = StreamSpec("test", 1, 0, chunks_per_stream=9, chunk_words=20, questions_per_chunk=5, questions_per_stream=5)


def _date(day):
    return f"2023/05/{day:02d} (Mon) 09:30"


def _session(day, answer=None):
    said = {"role": "user", "content": answer or f"On day {day} nothing was new."}
    if answer:
        said["has_answer"] = True
    return [said, {"role": "assistant", "content": f"That was your day number {day}."}]


def _record(name="lamp", days=(1, 2, 3, 4, 5, 6, 7), evidence=(4,), **fields):
    return {
        "question_id": name,
        "question_type": "single-session-user",
        "question": "What did I buy?",
        "answer": "a lamp",
        "question_date": "2023/06/01 (Thu) 10:00",
        "haystack_session_ids": [f"s{day}" for day in days],
        "haystack_dates": [_date(day) for day in days],
        "haystack_sessions": [_session(day, f"I bought a lamp, {name} {day}." * (day in evidence)) for day in days],
        "answer_session_ids": [f"s{day}" for day in evidence],
    } | fields


FLAT = {
    "id": "flat-1",
    "question_type": "knowledge-update",
    "conversation": [turn | {"date": _date(day)} for day in (3, 1) for turn in _session(day)],
    "questions": [{"id": "q1", "question": "How many lamps?", "answer": 3}],
}


def _write(folder, *records, name="any.json"):
    (folder / name).write_text(json.dumps(records, indent=1))


def _load(folder, **changes):
    return longmemeval.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


def _days(stream):
    return [int(day) for chunk in stream.chunks for day in re.findall(r"2023/05/(\d\d)", chunk.text)]


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, _record(days=(2, 1, 3), evidence=(1,)))
    return tmp_path


def test_sessions_come_in_order_under_their_dates(folder):
    (stream,) = _load(folder)
    assert (stream.stream_id, stream.source, stream.competency) == ("lamp", "longmemeval", "AR")
    said = ["I bought a lamp, lamp 1.", "On day 2 nothing was new.", "On day 3 nothing was new."]
    assert [chunk.text for chunk in stream.chunks] == [
        f"[Dialogue at timestamp {_date(day)}]\n<user> {said[day - 1]}\n<assistant> That was your day number {day}."
        for day in (1, 2, 3)
    ]
    assert _load(folder, chunk_words=60)[0].chunks[0].text == "\n".join(chunk.text for chunk in stream.chunks)


def test_a_session_over_several_chunks_repeats_its_heading(folder):
    (stream,) = _load(folder, chunk_words=12)
    assert all(len(chunk.text.split()) <= 12 for chunk in stream.chunks)
    texts = [chunk.text.split("\n") for chunk in stream.chunks]
    assert texts[0] == [f"[Dialogue at timestamp {_date(1)}]", "<user> I bought a lamp, lamp"]
    assert texts[1] == [f"[Dialogue at timestamp {_date(1)}]", "<user> 1."]
    assert stream.questions[0].gold_steps == (0, 1)
    with pytest.raises(ValueError, match=r"data.chunk_words must be at least 8 to hold .*<user>.*any.json:1, record 1"):
        _load(folder, chunk_words=7)
    assert _load(folder, chunk_words=8, chunks_per_stream=99)


def test_questions_have_their_date_type_and_place(folder):
    (stream,) = _load(folder)
    (question,) = stream.chunks[0].questions
    assert stream.questions == (question,)
    assert question.text == "(asked on 2023/06/01 (Thu) 10:00) What did I buy?"
    assert (question.answers, question.metric) == (("a lamp",), "token_f1")
    assert (question.kind, question.gold_steps) == ("single-session-user", (0,))
    (framed,) = _load(folder, style="memalpha")
    assert {q.metric for q in framed.questions} == {"judge_longmemeval"}


def test_evidence_is_the_whole_session_where_no_turn_is_marked(folder):
    record = _record(evidence=(2, 3), question_date=None)
    for session in record["haystack_sessions"]:
        session[0].pop("has_answer", None)
    _write(folder, record)
    (question,) = _load(folder, chunk_words=13)[0].questions  # each turn is a chunk
    assert (question.gold_steps, question.text) == ((2, 3, 4, 5), "What did I buy?")
    del record["answer_session_ids"], record["haystack_session_ids"]
    _write(folder, record)
    assert _load(folder)[0].questions[0].gold_steps == ()


@pytest.mark.parametrize(
    "evidence, chunks, days",
    [((4,), 1, [4]), ((4,), 2, [3, 4]), ((4,), 4, [2, 3, 4, 5]), ((1, 6), 4, [1, 2, 5, 6]), ((7,), 3, [5, 6, 7])],
)
def test_what_does_not_fit_is_far_from_the_evidence(tmp_path, evidence, chunks, days):
    _write(tmp_path, _record(evidence=evidence))
    (stream,) = _load(tmp_path, chunks_per_stream=chunks)
    assert _days(stream) == days
    assert stream.questions[0].gold_steps == tuple(days.index(day) for day in evidence)


def test_evidence_that_does_not_fit(tmp_path):
    _write(tmp_path, _record(evidence=(1, 4, 6)), _record("other", evidence=(2,)), _record("far", evidence=(1, 2)))
    sources = [_load(tmp_path, split=split, chunks_per_stream=2) for split in ("train", "test")]
    assert sorted(stream.stream_id for source in sources for stream in source) == ["far", "other"]
    assert sum(source.left_out["longer than data.chunks_per_stream"] for source in sources) == 1
    _write(tmp_path, _record(evidence=(1, 4, 6)))
    with pytest.raises(ValueError, match=r"none of 1 questions fits .* Set data.chunks_per_stream to 3 for the least"):
        _load(tmp_path, chunks_per_stream=2)
    _write(tmp_path, FLAT)  # it names no evidence, so all of it is needed
    with pytest.raises(ValueError, match=r"to 2 for the least, 2 for all; or raise data.chunk_words"):
        _load(tmp_path, chunks_per_stream=1)


def test_one_haystack_with_several_questions_is_one_stream(tmp_path):
    first = _record(evidence=(1,))
    second = copy.deepcopy(first) | {"question_id": "more", "question": "What else?", "answer_session_ids": ["s6"]}
    second["haystack_sessions"][0][0].pop("has_answer")
    third = copy.deepcopy(second) | {"question_id": "none", "answer_session_ids": ["s3", "s4"]}
    _write(tmp_path, second, first, third)
    (stream,) = source = _load(tmp_path, chunks_per_stream=3)
    assert stream.stream_id == "lamp" and _days(stream) == [1, 2, 6]
    assert [(q.text[-10:], q.gold_steps) for q in stream.questions] == [("did I buy?", (0,)), ("What else?", (2,))]
    assert source.left_out == {"longer than data.chunks_per_stream": 1}


def test_what_cannot_be_answered_says_so_and_stays_with_its_twin(tmp_path):
    names = [f"n{i}" for i in range(10)]
    _write(tmp_path, *(_record(name + end) for name in names for end in ("", "_abs")))
    of_split = [{stream.stream_id: stream for stream in _load(tmp_path, split=split)} for split in ("train", "test")]
    assert [len(streams) for streams in of_split] == [16, 4]
    for streams in of_split:
        for name, stream in streams.items():
            assert name.removesuffix("_abs") in streams
            assert stream.questions[0].kind == "single-session-user" + "_abs" * name.endswith("_abs")


def test_the_flat_form(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"source": "somewhere", "data": [FLAT]}))
    (stream,) = _load(tmp_path)
    assert stream.stream_id == "flat-1" and _days(stream) == [1, 3]
    (question,) = stream.questions
    assert (question.text, question.answers) == ("How many lamps?", ("3",))
    assert (question.kind, question.gold_steps) == ("knowledge-update", ())
    undated = {"id": "a", "question_type": "abstention", "conversation": _session(8), "question": "W?", "answer": "No."}
    _write(tmp_path, undated, name="x.json")
    stream = _load(tmp_path)[0]
    assert stream.chunks[0].text.startswith("[Dialogue at timestamp unknown]\n<user> On day 8")
    assert (stream.questions[0].text, stream.questions[0].kind) == ("W?", "abstention")


def test_files(folder, tmp_path):
    before = list(_load(folder))
    _write(folder, _record(days=(2, 1, 3), evidence=(1,)), name="copy.json")
    _write(folder, {"question_type": "of another set"}, name="another.json")
    assert list(_load(folder)) == before
    _write(folder, _record(), name="long.json")
    with pytest.raises(ValueError, match=r"long.json:1, record 1: question 'lamp' is asked of other sessions at .*any"):
        _load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files of LongMemEval"):
        _load(tmp_path / "empty")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(answer=["a"]), "answer: expected a text or a number, got list"),
        (lambda r: r.update(haystack_sessions=[3] * 7), r"haystack_sessions\[0\]: expected a list, got int 3"),
        (lambda r: r["haystack_sessions"][1][0].pop("role"), r"haystack_sessions\[1\]\[0\].role: expected a text"),
        (lambda r: r["haystack_dates"].pop(), "haystack_dates: expected a text for each of the 7 sessions"),
        (lambda r: r.update(haystack_sessions=[[]] * 7), "no turn has a text"),
        (lambda r: r.pop("question_type"), "field question_type: expected a text, the field is missing"),
    ],
)
def test_wrong_fields(tmp_path, change, message):
    broken = _record("b")
    change(broken)
    (tmp_path / "any.jsonl").write_text(json.dumps(_record()) + "\n" + json.dumps(broken))
    with pytest.raises(ValueError, match=rf"any.jsonl:2.*{message}"):
        _load(tmp_path)


def test_real_haystacks(source_dir):
    try:
        source = _load(source_dir, split="train", chunk_words=512, chunks_per_stream=20)
    except ValueError as error:
        if "holds no files" in str(error) or "is empty:" in str(error):
            pytest.skip(str(error))
        raise
    for stream in source:
        assert len(stream.chunks) <= 20 and stream.questions
        assert all(len(c.text.split()) <= 512 and c.text.startswith("[Dialogue at ") for c in stream.chunks)
        dates = [date for c in stream.chunks for date in re.findall(r"^\[Dialogue at timestamp (.*)\]$", c.text, re.M)]
        assert dates == sorted(dates)
