"""Needles in speeches: miniature speeches of our own, and laws on the real ones."""

import dataclasses
import itertools
import re
import zipfile

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

needle = input_pipeline.builder("needle")
SPEC = StreamSpec(
    "train", seed=3, num_streams=0, chunks_per_stream=3, chunk_words=50, questions_per_chunk=9, questions_per_stream=99
)
SPEECHES = {
    f"{year}.txt": "\n\n".join(f"In {year} the mayor said {n} words. “Now,” we cried, “for ale!” " for n in range(40))
    for year in range(1700, 1710)
}


def _load(folder, **changes):
    return needle.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


def _write(folder, speeches=SPEECHES):
    folder.mkdir(exist_ok=True)
    for name, text in speeches.items():
        (folder / name).write_text(text)


def _zip(path, contents):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def _sentences(text):
    return re.split(r"(?<=\.)\s+|(?<=!”)\s+", text.strip())


def _words(split):
    stems, endings, shades, colours = (words.split() for words in needle._WORDS[split])
    return {"".join(pair) for pair in itertools.product(stems, endings)} | {*shades, *colours}


def _used(stream, split):
    """Which words of a split's lists stand in a stream."""
    return _words(split) & {word for chunk in stream.chunks for word in re.findall(r"\w+", chunk.text)}


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("split, other", [("train", "test"), ("test", "train")])
@pytest.mark.parametrize("chunk_words", [30, 50, 200])
def test_needles_stand_between_sentences(folder, split, other, chunk_words):
    streams = list(_load(folder, split=split, chunk_words=chunk_words))
    text = " ".join(chunk.text for stream in streams for chunk in stream.chunks)
    speeches = [speech for name, speech in SPEECHES.items() if f"In {name[:4]} the" in text]
    of_speech = {sentence for speech in speeches for sentence in _sentences(speech)}
    for stream in streams:
        assert (stream.source, stream.competency) == ("needle", "AR") and 1 <= len(stream.chunks) <= 3
        assert stream.questions and len({q.text for q in stream.questions}) == len(stream.questions)
        answers = [answer for q in stream.questions for answer in q.answers]
        assert len(set(answers)) == len(answers) and not _used(stream, other)
        for step, chunk in enumerate(stream.chunks):
            assert len(chunk.text.split()) <= chunk_words
            asked = [q for q in stream.questions if q.gold_steps == (step,)]
            assert set(asked) == set(chunk.questions)
            sentences = _sentences(chunk.text)
            added = [sentence for sentence in sentences if sentence not in of_speech]
            assert len(added) == len(asked)
            assert " ".join(s for s in sentences if s in of_speech) in " ".join(" ".join(speeches).split())
            for question in asked:
                assert (question.metric, question.kind) == ("substring", "needle")
                (sentence,) = [sentence for sentence in added if question.answers[0] in sentence]
                (name,) = _words(split) & set(re.findall(r"\w+", question.text))
                assert name in sentence and sum(name in c.text.split() for c in stream.chunks) == 1


def test_answers_have_all_forms(folder):
    asked = [q for stream in _load(folder, chunks_per_stream=1) for q in stream.questions]
    (dates,) = {len(q.answers) for q in asked if q.text.startswith("On what date")}
    assert dates == 2 and len({q.text.split()[0] for q in asked}) >= 4
    day, month, year = next(q.answers[0] for q in asked if len(q.answers) == 2).split()
    assert f"{month} {day}, {year}" in {answer for q in asked for answer in q.answers}


def test_there_is_about_one_needle_in_a_chunk_anywhere(folder):
    streams = list(_load(folder, chunk_words=100))
    counts = [len(chunk.questions) for stream in streams for chunk in stream.chunks]
    assert set(counts) == {0, 1, 2} and 0.8 < sum(counts) / len(counts) < 1.4
    depths = set()
    for chunk in (chunk for stream in streams for chunk in stream.chunks if len(chunk.questions) == 1):
        depths.add(round(4 * chunk.text.index(chunk.questions[0].answers[0]) / len(chunk.text)))
    assert len(depths) >= 4


def test_short_chunks_and_long_streams(folder):
    for words in (needle._LONGEST_NEEDLE + 1, 20):
        for stream in _load(folder, chunk_words=words, chunks_per_stream=400):
            assert all(len(chunk.text.split()) <= words for chunk in stream.chunks)
            names = [text for q in stream.questions for text in _words("train") & set(re.findall(r"\w+", q.text))]
            assert len(set(names)) == len(names) > 90  # until they run out
    with pytest.raises(ValueError, match=f"data.chunk_words must be at least {words - 7}"):
        _load(folder, chunk_words=needle._LONGEST_NEEDLE)


def test_names_that_stand_in_a_speech_are_not_used(tmp_path):
    taken = sorted(name for name in _words("train") if not name.startswith("Nolt"))
    _write(tmp_path, {f"{n}.txt": f"Speech {n}: {', '.join(taken)} are here. Yes." for n in range(2)})
    for stream in _load(tmp_path, chunk_words=200):
        assert all("Nolt" in q.text for q in stream.questions)


def test_memalpha_style(folder):
    streams = list(_load(folder, style="memalpha", chunk_words=200))
    sizes = [len(chunk.text.split("\n", 2)[2].rsplit("\n<", 1)[0].split()) for s in streams for chunk in s.chunks]
    assert max(sizes) <= 200 and min(sizes) < 70
    assert all(chunk.text.startswith("[Dialogue between User") for s in streams for chunk in s.chunks)


def test_seed_and_random_access(folder):
    first = list(_load(folder))
    assert list(_load(folder, num_streams=3)) == first[:3] and _load(folder)[5] == first[5]
    other = list(_load(folder, seed=4))
    assert other != first and {s.stream_id for s in other} == {s.stream_id for s in first}


def test_archives_copies_and_encodings_make_no_difference(tmp_path):
    speeches = {name: text.replace("ale", "café") for name, text in SPEECHES.items()}
    folders = {name: tmp_path / name for name in ("loose", "zip", "mixed")}
    _write(folders["loose"], speeches)
    folders["zip"].mkdir()
    others = {
        "b/README": "Of the corpus.",
        "__MACOSX/b/1700.txt": "x",
        "b/.hidden.txt": "x",
        "qc/train.txt": "DESC:manner How ?\n",
        "pubmed/dev.txt": "###123\nRESULTS\tA text.\n",
    }
    _zip(folders["zip"] / "a.zip", {f"b/{name}": text.encode("cp1252") for name, text in speeches.items()} | others)
    _write(folders["mixed"], speeches)
    (folders["mixed"] / "1700.txt").write_text(speeches["1700.txt"], encoding="utf-8-sig", newline="\n")
    _zip(folders["mixed"] / "copy.zip", speeches)
    loose, packed, mixed = (list(_load(folder)) for folder in folders.values())
    assert loose == packed == mixed


def test_the_split_does_not_depend_on_names(folder):
    def years(split):
        return {y for s in _load(folder, split=split) for c in s.chunks for y in re.findall(r"In (\d+) the", c.text)}

    train, test = years("train"), years("test")
    assert not train & test and (len(train), len(test)) == (8, 2)
    for name in SPEECHES:
        (folder / name).rename(folder / f"{name[3::-1]}.txt")
    assert (years("train"), years("test")) == (train, test)


def test_broken_folders_and_files(tmp_path):
    def raises(message, folder=tmp_path):
        with pytest.raises(ValueError, match=message):
            _load(folder)

    raises("data.source_dir must be the folder that holds speeches", "")
    raises("does not exist", tmp_path / "none")
    (tmp_path / "labels.txt").write_text("ENTY:animal Which ?\n")
    raises("holds no speeches .*; 1 files with these endings")
    _write(tmp_path, {"one.txt": SPEECHES["1700.txt"]})
    raises("Split 'train' of source 'needle' is empty")
    (tmp_path / "b.txt").write_bytes("Dear all".encode("utf-16"))
    raises("b.txt: neither UTF-8 nor cp1252. Convert the file to UTF-8, or move it out")
    (tmp_path / "b.txt").write_bytes(b"Dear \x81 all")
    raises("b.txt: neither UTF-8 nor cp1252")
    _zip(tmp_path / "a.zip", SPEECHES)
    packed = (tmp_path / "a.zip").read_bytes()
    for torn in (packed[:-30], packed[:99], packed[:60] + b"????" + packed[64:]):
        (tmp_path / "a.zip").write_bytes(torn)
        raises("a.zip: the zip file is truncated, damaged or encrypted .*Fetch or pack it anew")


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_speeches(source_dir, split):
    try:
        source = _load(source_dir, split=split, num_streams=40, chunk_words=120, chunks_per_stream=4)
    except ValueError as error:
        if "holds no speeches" not in str(error):
            raise
        pytest.skip(f"no speeches at {source_dir}")
    for stream in source:
        assert all(len(chunk.text.split()) <= 120 for chunk in stream.chunks) and stream.questions
        for question in stream.questions:
            texts = [chunk.text for chunk in stream.chunks if question.answers[0] in chunk.text]
            assert texts == [stream.chunks[question.gold_steps[0]].text]
