"""HotpotQA streams: miniature files of our own text in all three formats, and laws on the real ones."""

import dataclasses
import gzip
import json

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

hotpotqa = input_pipeline.builder("hotpotqa")

SPEC = StreamSpec(
    "train", seed=3, num_streams=0, chunks_per_stream=2, chunk_words=40, questions_per_chunk=9, questions_per_stream=99
)


def _article(title):
    return {"title": title, "text": f"{title} is a mill by the river. It was built by {title}son. It has red doors."}


def _record(number, titles, **changes):
    """One question in the joined format; an article has 18 words, 'Title:' and title included."""
    return {
        "id": f"q{number}",
        "question": f"Who built number {number}?",
        "answer": f"{titles[0]}son",
        "type": ("bridge", "comparison")[number % 2],
        "level": "hard",
        "gold_titles": list(titles),
        "context": [_article(title) for title in (*titles, "Distractor")],
    } | changes


RECORDS = [_record(n, (f"Mill{n}a", f"Mill{n}b")) for n in range(20)]


def _official(record):
    sentences = {a["title"]: [f"{part.rstrip('.')}." for part in a["text"].split(". ")] for a in record["context"]}
    rest = {key: record[key] for key in ("question", "answer", "type", "level")}
    facts = [[title, n] for title in record["gold_titles"] for n in (0, 2)]
    return {"_id": record["id"], "supporting_facts": facts, "context": list(map(list, sentences.items()))} | rest


def _columns(record):
    official = _official(record)
    titles, sentences = zip(*official["context"], strict=True)
    context = {"title": list(titles), "sentences": list(sentences)}
    facts = {"title": [fact[0] for fact in official["supporting_facts"]]}
    return official | {"id": official.pop("_id"), "supporting_facts": facts, "context": context}


def _write(folder, records, name="any.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def _load(folder, **changes):
    return hotpotqa.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


def _titles(stream):
    return [line[7:] for c in stream.chunks for line in c.text.split("\n") if line.startswith("Title: ")]


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, RECORDS)
    return tmp_path


def test_a_stream_holds_the_articles_that_its_questions_need(folder):
    streams = list(_load(folder))
    # 20 questions, 4 of them test. A chunk has room for two articles, a stream for the four of two questions.
    assert [len(s.chunks) for s in streams] == [2] * 8
    of_question = {record["question"]: record for record in RECORDS}
    for stream in streams:
        assert (stream.source, stream.competency) == ("hotpotqa", "AR")
        assert all(len(chunk.text.split()) == 36 for chunk in stream.chunks)
        needed = [title for q in stream.questions for title in of_question[q.text]["gold_titles"]]
        assert sorted(_titles(stream)) == sorted(needed)
        for question in stream.questions:
            record = of_question[question.text]
            assert (question.metric, question.kind) == ("substring", record["type"])
            (step,) = question.gold_steps  # both articles fill one chunk, which is then asked
            assert question in stream.chunks[step].questions
            assert all(f"Title: {title}\n{title} is" in stream.chunks[step].text for title in record["gold_titles"])
    # All questions are used, each once.
    assert sorted(q.text for s in (*streams, *_load(folder, split="test")) for q in s.questions) == sorted(of_question)


def test_all_formats_give_the_same_streams(folder):
    before = list(_load(folder))
    (folder / "any.jsonl").unlink()
    (folder / "other.jsonl").write_text('{"question": "of another format"}\n')
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, RECORDS)).encode()))
    assert list(_load(folder)) == before
    _write(folder, map(_columns, RECORDS), "b.jsonl")
    assert list(_load(folder)) == before  # and copies count once
    (folder / "a.jsonl.gz").unlink()
    assert list(_load(folder)) == before
    (folder / "b.jsonl").rename(folder / "b.json").write_text(json.dumps(list(map(_official, RECORDS)), indent=1))
    assert list(_load(folder)) == before


def test_shared_articles_stand_once_and_never_in_two_splits(tmp_path):
    # A chain: 0 and 1 share an article, 1 and 2 another, and so on; and two questions of their own.
    chain = [_record(n, (f"Link{n}", f"Link{n + 1}")) for n in range(6)]
    _write(tmp_path, [*chain, *(_record(n, (f"Own{n}", f"Other{n}")) for n in (6, 7))])
    splits = [list(_load(tmp_path, split=split, chunks_per_stream=9)) for split in ("train", "test")]
    titles = [[title for s in streams for title in _titles(s)] for streams in splits]
    assert sum(any(name.startswith("Link") for name in names) for names in titles) == 1
    assert sum(map(len, titles)) == 7 + 4
    assert hotpotqa._windows.groups_of({"a": "x", "b": "yz", "c": "w", "d": "zx"}) == {
        "a": "a",
        "b": "a",
        "c": "c",
        "d": "a",
    }


def test_long_articles_are_cut_and_needed_whole(tmp_path):
    long = {"title": "Long", "text": " ".join(f"Fact {n} is here." for n in range(20))}  # 82 words with its title
    _write(tmp_path, [_record(n, ("Long", f"Mill{n}"), context=[long, _article(f"Mill{n}")]) for n in range(3)])
    (stream,) = _load(tmp_path, split="test", chunks_per_stream=4)
    assert [len(chunk.text.split()) for chunk in stream.chunks] == [38, 40, 4 + 18 + 18, 18]
    assert sorted(q.gold_steps for q in stream.questions) == [(0, 1, 2), (0, 1, 2), (0, 1, 2, 3)]
    with pytest.raises(ValueError, match=r"no stream has a question, left out: {'articles longer than a stream': 3}"):
        _load(tmp_path, split="test", chunks_per_stream=2)


def test_memalpha_style_and_what_is_left_out(tmp_path):
    torn = _record(20, ("Mill1a", "Nowhere"), context=[_article("Mill1a")])
    _write(tmp_path, [*RECORDS[:-1], RECORDS[-1] | {"answer": "a mill of five words"}, torn])
    sizes, counts, left_out = {"style": "memalpha", "chunk_words": 120, "chunks_per_stream": 4}, set(), {}
    for split in ("train", "test"):
        assert "long answer" not in _load(tmp_path, split=split).left_out
        source = _load(tmp_path, split=split, **sizes)
        left_out |= source.left_out
        for stream in source:
            for step, chunk in enumerate(stream.chunks):
                assert chunk.text.startswith(f"[Dialogue between User and Assistant on 2024-01-0{step + 1} 00:00]\n<U")
                counts.add(chunk.text.count("Title: "))
    assert left_out == {"long answer": 1, "supporting article missing": 1}
    assert len(counts) > 2 and max(counts) <= 120 // 18  # filled up to random lengths


def test_seed_and_random_access(folder):
    first, again, other = (_load(folder, seed=seed, questions_per_stream=1) for seed in (3, 3, 4))
    assert list(first) == list(again) != list(other)
    assert list(_load(folder, num_streams=3, questions_per_stream=1)) == [first[0], first[1], first[2]]


@pytest.mark.parametrize(
    "change, field",
    [
        *(({key: 7}, f"{key}: expected a text, got int 7") for key in ("id", "question", "answer", "type")),
        ({"gold_titles": []}, "gold_titles: expected at least one supporting article"),
        ({"gold_titles": ["Mill", 3]}, r"gold_titles\[1\]: expected a title that is not blank, got int 3"),
        ({"context": 5}, "context: expected a list, got int 5"),
        ({"context": [{"text": "x"}]}, r"context\[0\]: expected a title that is not blank, got NoneType"),
        ({"context": [["Mill", ["x", 1]]]}, r"context\[0\]: expected a title with a text or a list of sentences"),
        ({"context": {"title": ["Mill"]}}, r"context.sentences: expected a list, the field is missing"),
        ({"context": {"title": ["a", "b"], "sentences": [["c"]]}}, r"context\[1\]: expected a title with a text"),
        *(({key: ...}, f"{key}: expected .*, the field is missing") for key in ("id", "answer", "type", "context")),
        ({"gold_titles": ...}, "supporting_facts: expected a list, the field is missing"),
    ],
)
def test_wrong_fields_name_file_line_and_field(tmp_path, change, field):
    broken = {key: value for key, value in (RECORDS[1] | change).items() if value is not ...}
    _write(tmp_path, [RECORDS[0], broken])
    with pytest.raises(ValueError, match=rf"any.jsonl:2, field {field}.*Correct it, or move the file"):
        _load(tmp_path)


def test_broken_folders_and_files(tmp_path):
    def raises(message, folder=tmp_path):
        with pytest.raises(ValueError, match=message):
            _load(folder)

    raises("data.source_dir must be the folder that holds files of HotpotQA", "")
    raises("does not exist", tmp_path / "none")
    raises("holds no files of HotpotQA")
    _write(tmp_path, RECORDS[:1])
    raises("Split 'train' of source 'hotpotqa' is empty")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode())[:-9])
    raises("b.json.gz:1: the gzip file is truncated or damaged")
    (tmp_path / "a.jsonl").write_bytes('{"question": "Où?"}'.encode("latin-1"))
    raises("a.jsonl:1, byte 15: not UTF-8")


@pytest.mark.parametrize("style", ["plain", "memalpha"])
def test_real_questions(source_dir, style):
    try:
        source = _load(source_dir, style=style, chunk_words=120, chunks_per_stream=4)
    except ValueError as error:
        if "holds no files" not in str(error):
            raise
        pytest.skip(f"no HotpotQA at {source_dir}")
    for stream in source:
        assert len(set(_titles(stream))) == len(_titles(stream))
        assert all(q.gold_steps and q.kind in ("bridge", "comparison") for q in stream.questions)
        for chunk in stream.chunks:
            content = chunk.text.split("\n", 2)[-1].rsplit("\n<Assistant>")[0] if style == "memalpha" else chunk.text
            assert len(content.split()) <= 120
