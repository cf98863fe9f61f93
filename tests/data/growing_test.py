"""Tests of chunks of a file that is still being written: the same whenever it came, from wherever one goes on."""

import random

import pytest

from finemem_jax import input_pipeline

texts = input_pipeline.builder("texts")
CHUNKINGS = ("fixed", "sentence", "adaptive")


def text(words=900):
    rng = random.Random(1)
    some = ["café", "the", "Straße", "went", "日本", "to", "sea", "again", "and"]
    found = []
    for _ in range(words):
        found.append(rng.choice(some) + rng.choice(["", "", "", ".", ".\n", "\n\n"]))
    return " ".join(found) + "."


def chunks(path, chunking, offset=0, **waiting):
    waiting = texts.Waiting(**waiting)
    return list(texts.follow(path, offset, chunk_words=30, chunking=chunking, waiting=waiting))


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_no_word_is_lost_and_offsets_are_places_to_go_on_from(tmp_path, chunking):
    path = tmp_path / "a.txt"
    path.write_text(text(), encoding="utf-8")
    whole = chunks(path, chunking)
    assert " ".join(chunk for chunk, _ in whole).split() == text().split()
    assert len(whole) > 20 and all(len(chunk.split()) <= 45 for chunk, _ in whole)
    assert whole[-1][1] == path.stat().st_size
    for n in range(0, len(whole), 5):
        assert chunks(path, chunking, offset=whole[n][1]) == whole[n + 1 :]


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_chunks_do_not_depend_on_when_the_text_came(tmp_path, chunking):
    path = tmp_path / "a.txt"
    path.write_bytes(text().encode())
    whole = chunks(path, chunking)
    raw, rng = text().encode(), random.Random(2)
    path.write_bytes(b"")

    def grow(_):
        """Some bytes more, in the middle of words and characters."""
        nonlocal raw
        size = rng.randint(1, 700)
        with path.open("ab") as file:
            file.write(raw[:size])
        raw = raw[size:]

    assert chunks(path, chunking, idle_seconds=3, poll_seconds=1, sleep=grow) == whole
    assert not raw


def test_nothing_is_cut_before_it_is_certain(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One two three. Four")
    seen = []

    def wait(_):
        seen.append(len(found))

    found = []
    waiting = texts.Waiting(idle_seconds=2, poll_seconds=1, sleep=wait)
    for chunk in texts.follow(path, chunk_words=30, chunking="sentence", waiting=waiting):
        found.append(chunk)
    assert seen == [0, 0] and found == [("One two three. Four", 19)]


def test_an_empty_file_and_blank_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("")
    assert chunks(path, "sentence") == []
    path.write_text("\n  word \n\n")
    assert chunks(path, "sentence") == [("word", 7)]
    assert chunks(path, "sentence", offset=7) == []


def test_bad_files(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(ValueError, match="is no file"):
        chunks(path, "fixed")
    path.write_bytes(b"good words\xff more")
    with pytest.raises(ValueError, match="byte 10: not UTF-8"):
        chunks(path, "fixed")
    path.write_bytes("café".encode()[:-1])
    with pytest.raises(ValueError, match="ends within a character"):
        chunks(path, "fixed")
    path.write_text("short")
    with pytest.raises(ValueError, match="has become shorter than the 100 bytes"):
        chunks(path, "fixed", offset=100)
