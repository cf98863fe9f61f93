"""SQuAD streams: miniature files of our own text, and laws on the real ones where the folder is there."""

import dataclasses
import itertools
import json
import os
import pathlib

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

squad = input_pipeline.builder("squad")
_windows, _text = squad._windows, squad._text

SPEC = StreamSpec(
    split="train",
    seed=3,
    num_streams=0,
    chunks_per_stream=2,
    chunk_words=40,
    questions_per_chunk=2,
    questions_per_stream=3,
)


def _qa(number, answer, question=None):
    return {"id": f"q{number}", "question": question or f"Which one is number {number}?", "answers": [answer]}


def _article(title, num_paragraphs=5, num_questions=4):
    paragraphs = []
    for p in range(num_paragraphs):
        words = [f"{title}{p}w{n}" for n in range(num_questions)]
        qas = [_qa(f"{title}-{p}-{n}", word) for n, word in enumerate(words)]
        paragraphs.append({"context": f"The keepers of {title} list {', '.join(words)}.", "qas": qas})
    return {"title": title, "paragraphs": paragraphs}


def _write(folder, articles, name="any.jsonl"):
    (folder / name).write_text("".join(json.dumps(article) + "\n" for article in articles))


def _load(folder, **changes):
    return squad.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


def _streams(source):
    return [source[i] for i in range(len(source))]


def _title(stream):
    return stream.stream_id.rsplit("/", 1)[0]


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, [_article(f"lighthouse{i}") for i in range(6)])
    return tmp_path


def test_streams_are_windows_of_paragraphs(folder):
    streams = _streams(_load(folder))
    # 6 articles, ceil(6/5) = 2 of them test; 5 paragraphs make windows of 2, 2 and 1.
    assert sorted(len(s.chunks) for s in streams) == [1] * 4 + [2] * 8
    assert len({s.stream_id for s in streams}) == 12
    assert {(s.source, s.competency) for s in streams} == {("squad", "AR")}
    for stream in streams:
        first = int(stream.stream_id.rsplit("/", 1)[1])
        expected = _article(_title(stream))["paragraphs"][first : first + 2]
        assert [chunk.text for chunk in stream.chunks] == [p["context"] for p in expected]


def test_questions_are_limited_placed_and_answered(folder):
    for stream in _streams(_load(folder)):
        for step, chunk in enumerate(stream.chunks):
            assert len(chunk.questions) == 2
            for question in chunk.questions:
                assert (question.metric, question.kind, question.gold_steps) == ("substring", "paragraph", (step,))
                assert question.answers[0] in chunk.text
        assert len(stream.questions) == 3
        for question in stream.questions:
            assert question.answers[0] in stream.chunks[question.gold_steps[0]].text


def test_global_questions_prefer_those_that_no_chunk_asks(folder):
    # 8 questions in a window of two: 4 asked after the chunks, so 4 fresh ones; 6 wanted take 2 of the asked too.
    for wanted, repeated in ((3, 0), (4, 0), (6, 2), (99, 4)):
        for stream in _streams(_load(folder, questions_per_stream=wanted)):
            if len(stream.chunks) == 2:
                asked = {q.text for c in stream.chunks for q in c.questions}
                assert len(stream.questions) == min(wanted, 8) == len({q.text for q in stream.questions})
                assert len(asked & {q.text for q in stream.questions}) == repeated


def test_no_questions_wanted(folder):
    streams = _streams(_load(folder, questions_per_chunk=0, questions_per_stream=0))
    assert not any(s.questions or any(c.questions for c in s.chunks) for s in streams)


def test_same_seed_same_streams_other_seed_other_draw(folder):
    again, first, other = (_streams(_load(folder, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert [s.stream_id for s in first] != [s.stream_id for s in other]
    assert {s.stream_id for s in first} == {s.stream_id for s in other}
    by_id = {s.stream_id: s for s in other}
    assert any(s != by_id[s.stream_id] for s in first)


def test_random_access(folder):
    source = _load(folder)
    assert source[5] == source[5] == list(source)[5]
    with pytest.raises(IndexError):
        source[len(source)]


def test_few_streams_cover_many_articles(folder):
    everything = _streams(_load(folder))
    few = _streams(_load(folder, num_streams=4))
    assert few == everything[:4]
    assert len({_title(s) for s in few}) == 4
    assert len(_load(folder, num_streams=1000)) == 12


def test_splits_share_no_article_and_lose_none(folder):
    train, test = ({_title(s) for s in _load(folder, split=split)} for split in ("train", "test"))
    assert not train & test
    assert (len(train), len(test)) == (4, 2)


@pytest.mark.parametrize("num_texts, num_test", [(2, 1), (5, 1), (6, 2), (10, 2), (32, 7)])
def test_split_sizes(num_texts, num_test):
    names = [f"n{i}" for i in range(num_texts)]
    test = _windows.names_of_split(names, "test", "toy")
    train = _windows.names_of_split(reversed(names), "train", "toy")
    assert len(test) == num_test
    assert sorted(train + test) == sorted(names)


def test_split_does_not_change_between_versions():
    # Made by this function; a change would mix the splits of runs that are under way, so do not update it lightly.
    assert _windows.names_of_split(["a", "b", "c", "d", "e", "f"], "test", "toy") == ["d", "f"]


def test_empty_split_names_the_remedy(tmp_path):
    _write(tmp_path, [_article("only")])
    assert len(_load(tmp_path, split="test")) == 3
    with pytest.raises(ValueError, match=r"Split 'train' of source 'squad' is empty.*Add texts.*or use split 'test'"):
        _load(tmp_path)


def test_windows_without_questions_are_skipped(tmp_path):
    articles = [_article("a"), _article("b")]
    for article in articles:
        for paragraph in article["paragraphs"][:2]:
            paragraph["qas"] = []
    _write(tmp_path, articles)
    assert sorted(s.stream_id.split("/")[1] for s in _load(tmp_path)) == ["0002", "0004"]


def test_no_question_at_all_names_the_remedy(tmp_path):
    _write(tmp_path, [_article("a", num_questions=0), _article("b", num_questions=0)])
    with pytest.raises(ValueError, match=r"no stream has a question. Add texts with answered questions"):
        _load(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        *(("num_streams", -1), ("chunks_per_stream", 0), ("chunk_words", 0)),
        *(("questions_per_chunk", -1), ("questions_per_stream", -2)),
    ],
)
def test_impossible_specs(folder, field, value):
    with pytest.raises(ValueError, match=rf"data.{field} must be at least \d, got {value}; raise it"):
        _load(folder, **{field: value})
    with pytest.raises(ValueError, match="split must be 'train', 'test' or 'all', got 'dev'; use one of these"):
        _load(folder, split="dev")


# ---- long paragraphs ---------------------------------------------------------------------------------------------

SENTENCES = ["Mara built a red boat in 1904.", "Her son sold it to Mr. Okafor of Bergen.", "It sank twice in 1911!"]


def _cut(text, max_words):
    return [text[slice(*span)] for span in _text.pieces(text, max_words)]


def test_cuts_by_hand():
    text = "  ".join(SENTENCES)  # 7, 9 and 5 words
    assert _cut(text, 21) == [text]
    assert _cut(text, 20) == ["  ".join(SENTENCES[:2]), SENTENCES[2]]
    assert _cut(text, 14) == [SENTENCES[0], "  ".join(SENTENCES[1:])]
    assert _cut(text, 9) == SENTENCES
    # Two words too long, the second sentence is cut; its rest is joined with what follows.
    assert _cut(text, 7) == [SENTENCES[0], "Her son sold it to Mr. Okafor", "of Bergen.  It sank twice in 1911!"]
    assert _cut("", 5) == []


def test_abbreviations_end_no_sentence():
    assert _cut("We saw T. Lindqvist and No. 9 there. Then we left.", 8) == [
        "We saw T. Lindqvist and No. 9 there.",
        "Then we left.",
    ]


@pytest.mark.parametrize("max_words", [1, 2, 3, 5, 8, 13])
def test_no_word_is_lost(max_words):
    text = "\n".join(SENTENCES) + " and\tno end"
    pieces = _cut(text, max_words)
    assert " ".join(pieces).split() == text.split()
    assert all(0 < len(piece.split()) <= max_words for piece in pieces)


def _place(qas, chunk_words, context):
    """Returns the chunk of each question by its text, for one article with one paragraph."""
    text = squad._cut("t", [squad._Paragraph(context, {str(i): qa for i, qa in enumerate(qas)})], chunk_words)
    return {q.text: q.gold_steps for q in text.questions}, text.left_out


def test_questions_go_to_the_piece_with_their_answer():
    placed, left_out = _place(
        [
            squad._Qa("Where did he live?", ("bergen", "in Bergen"), None),
            squad._Qa("When did it sink?", ("1911",), None),
            squad._Qa("Whose was it?", ("Okafor of Bergen. It",), None),
            squad._Qa("Why?", (), None),
        ],
        9,
        " ".join(SENTENCES),
    )
    assert placed == {"Where did he live?": (1,), "When did it sink?": (2,)}
    assert left_out == {"answer in no single chunk": 1, "no answer": 1}


def test_ambiguous_answers_stand_where_the_question_does():
    context = "In 2010 a mill had saws. The other mill had 10 hammers. A third mill had 10 wheels. The end is near."
    questions = {"How many wheels?": (2,), "How many hammers?": (1,), "How many?": (1,)}
    placed, _ = _place([squad._Qa(text, ("10",), None) for text in questions], 6, context)
    assert placed == questions


def test_official_layout_places_by_offset(tmp_path):
    context = " The inn has 3 rooms. The barn has 3 rooms too."
    starts = {"Inn?": context.index("3"), "Barn?": context.rindex("3"), "Wrong offset of the barn?": 1}
    qas = [
        {
            "id": text,
            "question": text,
            "answers": [{"text": "3", "answer_start": at}, {"text": "3", "answer_start": at}],
        }
        for text, at in starts.items()
    ]
    qas.append({"id": "x", "question": "Impossible?", "answers": [], "is_impossible": True})
    split = {"title": "a", "paragraphs": [{"context": context, "qas": qas}]}
    document = {"version": "1.1", "data": [split, {**_article("b"), "title": "b"}]}
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(document))
    sources = [_load(tmp_path, split=s, chunk_words=6, questions_per_chunk=9) for s in ("train", "test")]
    (stream,) = [s for s in itertools.chain(*sources) if _title(s) == "a"]
    assert [chunk.text for chunk in stream.chunks] == ["The inn has 3 rooms.", "The barn has 3 rooms too."]
    asked = [[q.text for q in chunk.questions] for chunk in stream.chunks]
    assert asked == [["Inn?"], ["Barn?", "Wrong offset of the barn?"]]
    assert stream.chunks[0].questions[0].answers == ("3",)
    assert sum(source.left_out["no answer"] for source in sources) == 1


# ---- files -------------------------------------------------------------------------------------------------------


def test_the_same_records_twice_change_nothing(folder):
    before = _streams(_load(folder))
    _write(folder, [_article(f"lighthouse{i}") for i in range(3)], "copy.json")
    assert _streams(_load(folder)) == before


def test_an_article_in_two_files_is_one(tmp_path):
    whole = _article("a", 4)
    _write(tmp_path, [{**whole, "paragraphs": whole["paragraphs"][:2]}, _article("b")], "1.jsonl")
    _write(tmp_path, [{**whole, "paragraphs": whole["paragraphs"][2:]}], "2.jsonl")
    articles = squad._read(str(tmp_path))
    assert [p.context for p in articles["a"]] == [p["context"] for p in whole["paragraphs"]]


def test_one_paragraph_in_two_articles_stays_in_the_first(tmp_path):
    first, second = _article("a"), _article("b")
    copy = {"context": first["paragraphs"][0]["context"], "qas": [_qa("new", "a0w0")]}
    second["paragraphs"].append(copy)
    _write(tmp_path, [first, second])
    articles = squad._read(str(tmp_path))
    assert [len(articles[title]) for title in "ab"] == [5, 5]
    assert [len(p.qas) for p in articles["a"]] == [5, 4, 4, 4, 4]  # its question is not lost


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda a: a.update(title=7), "title: expected a text, got int 7"),
        (lambda a: a.update(paragraphs={}), "paragraphs: expected a list"),
        (
            lambda a: a["paragraphs"][1].pop("context"),
            r"paragraphs\[1\].context: expected a text, the field",
        ),
        (
            lambda a: a["paragraphs"][1].update(context=" "),
            r"\[1\].context: expected a text that is not blank",
        ),
        (lambda a: a["paragraphs"][0].pop("qas"), r"paragraphs\[0\].qas: expected a list, the field is missing"),
        (lambda a: a["paragraphs"][0]["qas"][2].pop("question"), r"paragraphs\[0\].qas\[2\].question: expected a text"),
        (lambda a: a["paragraphs"][0]["qas"][2].pop("answers"), r"qas\[2\].answers: expected a list"),
        (lambda a: a["paragraphs"][0]["qas"][2].update(answers=[1]), r"answers\[0\]: expected a text .* got int 1"),
        (lambda a: a["paragraphs"][0]["qas"][2].update(answers=[{}]), r"answers\[0\].text: expected a text"),
    ],
)
def test_wrong_fields_name_file_line_and_field(tmp_path, change, field):
    broken = _article("b")
    change(broken)
    _write(tmp_path, [_article("a"), broken])
    with pytest.raises(ValueError, match=rf"any.jsonl:2, field .*{field}.*Correct it, or move the file"):
        _load(tmp_path)


def test_missing_folder_names_the_format():
    with pytest.raises(ValueError, match="data.source_dir must be the folder that holds files of SQuAD"):
        _load("")


# ---- the real files ----------------------------------------------------------------------------------------------


def _load_real(**changes):
    """Returns the streams of the real files and their folder; skips the test where there are none to read."""
    default = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = os.environ.get("FINEMEM_SOURCE_DIR", str(default))
    try:
        return _load(folder, **changes), folder
    except ValueError as error:
        # A broken file must still fail the test.
        if any(words in str(error) for words in ("does not exist", "holds no files", "is empty:")):
            pytest.skip(f"{error} (The folder comes from FINEMEM_SOURCE_DIR.)")
        raise


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_articles(split):
    source, _ = _load_real(split=split, chunks_per_stream=4, chunk_words=120, questions_per_chunk=5)
    for stream in source:
        for step, chunk in enumerate(stream.chunks):
            assert len(chunk.text.split()) <= 120
            assert all(q.answers[0].lower() in chunk.text.lower() for q in chunk.questions)
            assert all(q.gold_steps == (step,) for q in chunk.questions)
        assert 0 < len(stream.questions) <= 3
        assert all(q.answers[0].lower() in stream.chunks[q.gold_steps[0]].text.lower() for q in stream.questions)


def test_in_the_way_of_mem_alpha(tmp_path):
    articles = [_article(name, num_questions=3) for name in ("a", "b", "c")]
    _write(tmp_path, articles)
    plain, framed = (_load(tmp_path, split="all", chunk_words=200, style=style) for style in ("plain", "memalpha"))
    assert sum(len(s.chunks) for s in framed) < sum(len(s.chunks) for s in plain)
    for stream in framed:
        for t, chunk in enumerate(stream.chunks):
            assert chunk.text.startswith(f"[Dialogue between User and Assistant on 2024-01-{t + 1:02d} 00:00]\n<User> ")
            for question in chunk.questions:
                assert question.answers[0] in chunk.text and question.gold_steps == (t,)
    again = _load(tmp_path, split="all", chunk_words=200, style="memalpha")
    assert [again[i] for i in range(len(again))] == [framed[i] for i in range(len(framed))]


def test_mem_alpha_asks_for_short_answers_only(tmp_path):
    article = _article("a", num_questions=2)
    article["paragraphs"][0]["context"] += " It was the first of many long winters."
    article["paragraphs"][0]["qas"].append({"id": "long", "question": "What?", "answers": ["the first of many long"]})
    _write(tmp_path, [article])
    source = _load(tmp_path, split="all", style="memalpha", questions_per_stream=99, questions_per_chunk=99)
    assert source.left_out["long answer"] == 1
    assert all(q.answers != ("the first of many long",) for s in source for q in s.questions)
