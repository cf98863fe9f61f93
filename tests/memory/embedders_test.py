"""Tests of finemem_jax/memory/embedders.py: the cache, word vectors, mean hidden states of a tiny model."""

import dataclasses
import importlib.util
import logging
import socket
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.memory import embedders, retrieval
from finemem_jax.models import decoder, presets
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.types import MemoryItem

TINY = presets.preset("tiny")


def counting(calls):
    """An embedder that notes what it is asked, and gives (length, number of the letter a)."""

    def embed(texts):
        calls.append(list(texts))
        return np.array([[len(text), text.count("a")] for text in texts], np.float32).reshape(-1, 2)

    return embed


# --------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------


def test_each_text_is_embedded_once():
    calls = []
    embed = embedders.cached(counting(calls))
    np.testing.assert_array_equal(embed(["a", "bb", "a"]), [[1, 1], [2, 0], [1, 1]])
    np.testing.assert_array_equal(embed(["ccc", "a"]), [[3, 0], [1, 1]])
    np.testing.assert_array_equal(embed(["bb"]), [[2, 0]])
    assert calls == [["a", "bb"], ["ccc"]]


def test_those_not_asked_for_longest_are_forgotten():
    calls = []
    embed = embedders.cached(counting(calls), max_texts=2)
    for text in "aba":
        embed([text])
    embed(["c"])  # Forgets b.
    for text in "ac":
        embed([text])
    assert calls == [["a"], ["b"], ["c"]]
    embed(["b"])
    assert calls[-1] == ["b"]


def test_a_call_may_be_larger_than_the_cache():
    embed = embedders.cached(counting([]), max_texts=2)
    texts = ["a" * n for n in range(5)]
    for _ in range(2):
        np.testing.assert_array_equal(embed(texts)[:, 0], range(5))


def test_the_cache_of_nothing():
    calls = []
    assert embedders.cached(counting(calls))([]).shape == (0, 2)


def test_what_is_remembered_cannot_be_changed_from_outside():
    embed = embedders.cached(counting([]))
    embed(["a"])[:] = 7
    np.testing.assert_array_equal(embed(["a"]), [[1, 1]])


# --------------------------------------------------------------------------------------
# Word vectors
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def word_vectors():
    if importlib.util.find_spec("wordllama") is None:
        pytest.skip("wordllama is not installed: pip install wordllama==0.4.0.post1")
    return embedders.wordllama()


def test_wordllama_needs_no_network_and_leaves_logging_alone(word_vectors, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert embedders.wordllama()(["cat"]).shape == (1, 256)
    assert "wordllama" not in sys.modules


def test_wordllama_embeds_as_the_package_itself_does(word_vectors, monkeypatch):
    # Importing it would make all loggers of this process say more.
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    wordllama = pytest.importorskip("wordllama")
    folder = importlib.util.find_spec("wordllama").submodule_search_locations[0]
    # With its own folder as its cache, it finds the tokenizer that came with it.
    package = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    texts = ["The cat sat on the mat.", "Søren's 2nd trip: 漢字 ☃", "x", "a  b\nc " * 50]
    np.testing.assert_allclose(word_vectors(texts), package.embed(texts), atol=1e-5)


def test_wordllama_texts_at_the_edge(word_vectors):
    vectors = word_vectors(["", "\ud800", "cat"])
    assert np.isfinite(vectors).all()
    np.testing.assert_array_equal(vectors[2], word_vectors(["cat"])[0])
    assert word_vectors([]).shape == (0, 256)


def test_wordllama_finds_what_shares_no_word(word_vectors):
    texts = ["The concert starts at nine.", "She bought a puppy in June.", "Interest rates went up again."]
    items = [MemoryItem(i, text, 0) for i, text in enumerate(texts)]
    query = "When did Ana get her dog?"
    assert retrieval.retrieve(query, items, 1) == ()
    for method in retrieval.DENSE_METHODS:
        (found,) = retrieval.retrieve(query, items, 1, method, word_vectors)
        assert found.text == texts[1]


def test_wordllama_that_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install wordllama==0.*memory\.embedder='model'"):
        embedders.wordllama()


# --------------------------------------------------------------------------------------
# A language model
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return decoder.init(TINY, 0)


def test_language_model_gives_mean_hidden_states(params):
    embed = embedders.language_model(TINY, params, ByteTokenizer(), rows=2, length_multiple=16)
    texts = ["a cat", "b" * 30, "", "a dog", "é ok"]
    vectors = embed(texts)
    assert vectors.shape == (5, TINY.embed_dim)
    assert vectors.dtype == np.float32
    for text, vector in zip(texts, vectors, strict=True):
        ids = list(text.encode())
        if ids:
            (hidden,) = decoder.hidden_states(TINY, params, [jnp.array([ids])], lengths=[jnp.array([len(ids)])])
            np.testing.assert_allclose(vector, hidden[0].mean(0), atol=2e-5)
        else:
            np.testing.assert_array_equal(vector, 0)


def test_a_text_is_embedded_alike_in_any_company(params):
    embed = embedders.language_model(TINY, params, ByteTokenizer(), rows=4, length_multiple=16)
    texts = ["a cat", "some dog", "fish", "bird", "a mouse", "c" * 20]
    together = embed(texts)
    np.testing.assert_array_equal(together, np.concatenate([embed([text]) for text in texts]))
    np.testing.assert_array_equal(embed(texts[::-1]), together[::-1])
    assert embed([]).shape == (0, TINY.embed_dim)


def test_a_text_longer_than_the_model_is_cut_off(params):
    short = dataclasses.replace(TINY, max_length=8)
    embed = embedders.language_model(short, params, ByteTokenizer(), rows=1, length_multiple=8)
    np.testing.assert_array_equal(embed(["abcdefgh"]), embed(["abcdefghijkl"]))
