"""Tests of where texts are cut into chunks."""

import random

import pytest

from finemem_jax import input_pipeline

input_pipeline.builder("squad")
from finemem_data import _chunking as chunking  # noqa: E402  # pyright: ignore[reportMissingImports]

TOPICS = {
    "sea": ["ship", "captain", "harbour", "storm", "sailor", "anchor", "island", "wave"],
    "kitchen": ["kettle", "flour", "butter", "oven", "spoon", "recipe", "garlic", "onion"],
    "court": ["judge", "lawyer", "witness", "verdict", "appeal", "hearing", "statute", "oath"],
}


def paragraph(topic, sentences, seed):
    rng = random.Random(f"{topic}{seed}")
    lines = [" ".join(rng.choice(TOPICS[topic]) for _ in range(9)).capitalize() + "." for _ in range(sentences)]
    return " ".join(lines)


@pytest.mark.parametrize("mode", chunking.CHUNKINGS)
@pytest.mark.parametrize("words", [1, 7, 40, 1000])
def test_no_word_is_lost_or_cut(mode, words):
    rng = random.Random(words)
    text = "\n\n".join(paragraph(rng.choice(list(TOPICS)), rng.randint(1, 5), i) for i in range(12)) + "  \n "
    spans = chunking.cut(text, words, mode)
    assert [word for a, b in spans for word in text[a:b].split()] == text.split()
    most = words if mode != "adaptive" else max(1, round(chunking.LONGEST * words))
    assert all(0 < len(text[a:b].split()) <= most for a, b in spans)
    assert chunking.cut("", words, mode) == chunking.cut(" \n", words, mode) == []


def test_fixed_chunks_are_full():
    text = " ".join(str(i) for i in range(25))
    assert [len(text[a:b].split()) for a, b in chunking.cut(text, 10, "fixed")] == [10, 10, 5]


def test_sentence_ends_and_lines():
    text = "One two three. Four five six seven.\nEight nine\nTen eleven twelve."
    found = [text[a:b] for a, b in chunking.cut(text, 8, "sentence")]
    assert found == ["One two three. Four five six seven.", "Eight nine\nTen eleven twelve."]


def test_examples_stay_with_their_labels():
    """Lines without punctuation, a label below each, a blank line between: chunks end at blank lines."""
    text = "\n\n".join(f"play some music number {i}\nlabel: {i % 7}" for i in range(50))
    for a, b in chunking.cut(text, 30, "sentence"):
        assert text[a:b].startswith("play") and text[a:b].split("\n")[-1].startswith("label")


def test_adaptive_chunks_end_where_the_text_turns():
    lengths = {"sea": 9, "kitchen": 12, "court": 10}
    parts = [paragraph(topic, count, 0) for topic, count in lengths.items()]
    text = " ".join(parts)
    spans = chunking.cut(text, 93, "adaptive")
    borders = [len(parts[0]), len(parts[0]) + 1 + len(parts[1])]
    assert [b for _, b in spans[:-1]] == borders
    assert [b for _, b in chunking.cut(text, 93, "fixed")[:-1]] != borders


def test_adaptive_chunks_are_as_many_and_shorter_where_more_is_said():
    rng = random.Random(0)
    dense = " ".join(f"{name} owes {rng.randint(100, 99999)} to {other}." for name, other in
                     ((f"Q{rng.random()}", f"Z{rng.random()}") for _ in range(120)))  # fmt: skip
    thin = " ".join(["He walked on and on and on."] * 100)
    for text in (f"{dense} {thin}", f"{thin} {dense}"):
        spans = chunking.cut(text, 100, "adaptive")
        fixed = chunking.cut(text, 100, "fixed")
        assert abs(len(spans) - len(fixed)) <= 2
        lengths = {"dense": [], "thin": []}
        for a, b in spans:
            inside = {"dense": text[a:b].count("owes"), "thin": text[a:b].count("walked")}
            if min(inside.values()) == 0:
                lengths[max(inside, key=lambda name: inside[name])].append(len(text[a:b].split()))
        assert sum(lengths["dense"]) / len(lengths["dense"]) < 0.9 * sum(lengths["thin"]) / len(lengths["thin"])


def test_what_was_cut_does_not_depend_on_what_comes_much_later():
    """So a text that is still growing can be cut."""
    text = " ".join(paragraph(topic, 8, i) for i in range(6) for topic in TOPICS)
    first = chunking.cut(text[: len(text) // 2], 60, "adaptive")
    assert chunking.cut(text, 60, "adaptive")[: len(first) - 3] == first[:-3]


def test_known_borders_attract():
    units = [f"word{i} " * 5 for i in range(20)]
    assert chunking.group(units, 50, "sentence", borders={9}) == [(0, 9), (9, 19), (19, 20)]
    assert chunking.group(units, 50, "sentence", borders={3}) == [(0, 10), (10, 20)]
    assert (0, 8) in chunking.group(units, 50, "adaptive", borders={8})
    assert chunking.group([], 50, "adaptive") == chunking.group([], 50, "sentence") == []
