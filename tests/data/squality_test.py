"""Streams of stories and their summaries: miniature ones of our own, and laws on the real ones where they are."""

import dataclasses
import gzip
import json
import re

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

squality = input_pipeline.builder("squality")

SPEC = StreamSpec("train", 1, 0, chunks_per_stream=5, chunk_words=12, questions_per_chunk=2, questions_per_stream=9)


def _story(number, sentences=6):
    """A story of 6 words a sentence, broken into lines as Gutenberg does, a paragraph for each two sentences."""
    told = [f"Keeper {number} lit lamp\nnumber {n}." for n in range(sentences)]
    paragraphs = [" ".join(told[n : n + 2]) for n in range(0, sentences, 2)]
    return {
        "metadata": {"passage_id": str(number), "license": "ours"},
        "document": "\n\n" + "\n \n  ".join(paragraphs) + "\n",
        "questions": [
            {
                "question_text": f"Who lit the lamps of {number}?",
                "question_number": 2,
                "responses": [{"response_text": f"Keeper {number}."}, {"response_text": f"\tKeeper {number}."}],
            },
            {
                "question_text": "What is the plot?",
                "question_number": 1,
                "responses": [{"response_text": f"Lamps are lit, {number}."}, {"response_text": "A keeper works."}],
            },
        ],
    }


def _chapter(book, chapter, summary="It is told."):
    text = f"Chapter {chapter} of book {book} begins. It ends here too."
    return {"bid": book, "book_id": f"B{book}.chapter {chapter}", "chapter": text, "summary_text": summary}


def _write(folder, *records, name="any.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def _load(folder, **changes):
    return squality.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


def _all(folder, **changes):
    """The streams of both splits by the name of their book."""
    streams = [stream for split in ("train", "test") for stream in _load(folder, split=split, **changes)]
    return {stream.stream_id.split("/")[0]: stream for stream in streams}


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, *(_story(number) for number in range(6)))
    return tmp_path


def test_a_stream_is_a_whole_story_cut_at_sentence_ends(folder):
    stream = _all(folder)["3"]
    assert (stream.source, stream.competency) == ("squality", "LRU")
    assert [chunk.text for chunk in stream.chunks] == [
        f"Keeper 3 lit lamp number {n}. Keeper 3 lit lamp number {n + 1}." for n in (0, 2, 4)
    ]
    # Of two paragraphs, each keeps its line.
    assert _all(folder, chunk_words=24)["3"].chunks[0].text.count("\n") == 1
    assert [len(chunk.text.split()) for chunk in _all(folder, chunk_words=17)["3"].chunks] == [12, 12, 12]


def test_questions_are_about_all_of_it(folder):
    stream = _all(folder)["3"]
    assert not any(chunk.questions for chunk in stream.chunks)
    assert {(q.text, q.answers, q.kind) for q in stream.questions} == {
        ("What is the plot?", ("Lamps are lit, 3.", "A keeper works."), "plot"),
        ("Who lit the lamps of 3?", ("Keeper 3.",), "detail"),
    }
    assert {(q.metric, q.gold_steps) for q in stream.questions} == {("rouge_l", ())}


def test_mem_alpha_reads_day_by_day(folder):
    plain, framed = _all(folder)["2"], _all(folder, style="memalpha")["2"]
    for chunk, told in zip(framed.chunks, plain.chunks, strict=True):
        assert re.match(r"\[Event on 2024-01-\d\d\] ", chunk.text)
        assert chunk.text.endswith(f":\n{told.text}")
    dates = [re.search(r"2024-\d\d-\d\d", chunk.text)[0] for chunk in framed.chunks]
    assert dates == sorted(set(dates)) and dates[0] == "2024-01-01"
    plot, detail = sorted(framed.questions, key=lambda question: question.kind, reverse=True)
    assert f"from {dates[0]} to {dates[-1]}" in plot.text and plot.answers == ("Lamps are lit, 2.", "A keeper works.")
    assert detail.text == "Who lit the lamps of 2?"


def test_long_stories_are_left_out_and_counted(folder):
    _write(folder, *(_story(number, 11) for number in (10, 11, 12, 13)), name="long.jsonl")
    source, everything = _load(folder), _load(folder, chunks_per_stream=6)
    assert (len(everything), everything.left_out) == (8, {})
    assert 4 <= len(source) < 8 and all(len(stream.chunks) == 3 for stream in source)
    assert source.left_out == {"longer than data.chunks_per_stream": 2 * (8 - len(source))}


def test_where_all_are_too_long_the_error_says_what_would_do(folder):
    _write(folder, _story(7, 8), name="long.jsonl")
    with pytest.raises(ValueError, match=r"split 'train': none of the 5 texts .*_per_stream=2 chunks of") as caught:
        _load(folder, chunks_per_stream=2)
    shortest, longest = map(int, re.search(r"to (\d+) for the shortest, to (\d+) for all", str(caught.value)).groups())
    assert (shortest, longest) in ((3, 3), (3, 4))
    assert 0 < len(_load(folder, chunks_per_stream=shortest)) <= len(_load(folder, chunks_per_stream=longest)) == 5


def test_books_have_a_record_for_each_summary(tmp_path):
    summaries = [{"source": "a", "text": "One. "}, {"source": "b", "text": None}, {"text": "Two."}]
    _write(
        tmp_path,
        _chapter(1, 1, "First summary."),
        _chapter(1, 1, "Second summary.") | {"summary": "{'not': 'this'}"},
        _chapter(1, 2, None),
        {"bid": 2, "book_title": "Two", "text": "A text of five words.", "summary": summaries},
        {"title": "Three", "text": "Another text.", "summary": "A summary."},
        {"text": "A text without a name.", "summary": ["Short.", "Short."]},
    )
    sources = [_load(tmp_path, split=split) for split in ("train", "test")]
    streams = [stream for source in sources for stream in source]
    answers = {stream.chunks[0].text: stream.questions[0].answers for stream in streams}
    assert answers == {
        "Chapter 1 of book 1 begins. It ends here too.": ("First summary.", "Second summary."),
        "A text of five words.": ("One.", "Two."),
        "Another text.": ("A summary.",),
        "A text without a name.": ("Short.",),
    }
    assert {question.kind for stream in streams for question in stream.questions} == {"plot"}
    assert sum(source.left_out["no answer"] for source in sources) == 1


def test_a_book_is_of_one_split(tmp_path):
    _write(tmp_path, *(_chapter(book, chapter) for chapter in range(3) for book in range(5)))
    books = [[s.stream_id.split("/")[0] for s in _load(tmp_path, split=split)] for split in ("train", "test")]
    assert [len(names) for names in books] == [12, 3]
    assert not set(books[0]) & set(books[1])


def test_the_split_does_not_depend_on_files_and_copies_count_once(folder, tmp_path_factory):
    before = {split: list(_load(folder, split=split)) for split in ("train", "test")}
    other = tmp_path_factory.mktemp("other")
    _write(other, {"title": "x", "paragraphs": []}, name="another format.json")
    _write(other, *(_story(number) for number in (5, 2, 1)), name="z.jsonl")
    (other / "a.json").write_text(json.dumps([_story(number) for number in (0, 1, 3)], indent=1))
    (other / "m.jsonl.gz").write_bytes(gzip.compress(json.dumps(_story(4)).encode()))
    assert {split: list(_load(other, split=split)) for split in ("train", "test")} == before


def test_seeds_and_counts(folder):
    orders = {tuple(stream.stream_id for stream in _load(folder, seed=seed)) for seed in range(6)}
    assert len(orders) > 1 and len({frozenset(order) for order in orders}) == 1
    assert list(_load(folder, num_streams=2)) == list(_load(folder))[:2]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(document=" "), r"any.jsonl:2, field document: expected a text that is not blank"),
        (
            lambda s: s.pop("document"),
            r"any.jsonl:2, field text: expected a text, the field is missing",
        ),
        (lambda s: s.update(questions=3), r"any.jsonl:2, field questions: expected a list, got int 3"),
        (lambda s: s.update(metadata=[]), r"field metadata: expected an object"),
        (lambda s: s["metadata"].update(passage_id=[1]), r"field metadata.passage_id: expected a text or a number"),
        (
            lambda s: s["questions"][0].pop("question_text"),
            r"questions\[0\].question_text: expected a text, the field is",
        ),
        (lambda s: s["questions"][0].update(question_number="x"), r"questions\[0\].question_number: expected a whole"),
        (lambda s: s["questions"][1].update(responses=["x"]), r"questions\[1\].responses\[0\]: expected an object"),
        (lambda s: s["questions"][1]["responses"][0].clear(), r"responses\[0\].response_text: expected a text"),
    ],
)
def test_wrong_fields_name_file_line_and_field(tmp_path, change, message):
    broken = _story(8)
    change(broken)
    _write(tmp_path, _story(1), broken)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path)


def test_wrong_summaries(tmp_path):
    _write(tmp_path, _chapter(1, 1), {"bid": 2, "text": "A text.", "summary": ["Good.", 5]})
    with pytest.raises(ValueError, match=r"any.jsonl:2, field summary\[1\]: expected a text, or a list .*got int 5"):
        _load(tmp_path)


def test_no_such_files(tmp_path):
    with pytest.raises(ValueError, match="holds no files of SQuALITY or BookSum .* 0 files"):
        _load(tmp_path)
    _write(tmp_path, _story(1) | {"questions": []}, _story(2) | {"questions": []})
    with pytest.raises(ValueError, match="has a question with an answer .* Add texts with answered questions"):
        _load(tmp_path)


def test_real_stories(source_dir):
    try:
        source = _load(source_dir, chunk_words=512, chunks_per_stream=20)
    except ValueError as error:
        if "holds no files" in str(error) or "is empty:" in str(error):
            pytest.skip(str(error))
        raise
    for stream in source:
        assert all(0 < len(chunk.text.split()) <= 512 for chunk in stream.chunks)
        # No chunk but the last is small, no line is one of the printed book's.
        assert all(len(chunk.text.split()) > 300 for chunk in stream.chunks[:-1])
        assert sum(question.kind == "plot" for question in stream.questions) == 1
        assert all(question.answers and question.gold_steps == () for question in stream.questions)
