"""Tests of finemem_jax/retrieval.py: BM25 by hand, against bm25s, and against a slow loop."""

import math
import random

import bm25s
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from finemem_jax import retrieval
from finemem_jax.episode import MemoryItem

few_examples = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)

VOCABULARY = [f"w{i}" for i in range(30)]


def items_of(*texts):
    return [MemoryItem(place + 1, text, source_step=place) for place, text in enumerate(texts)]


def random_text(rng, max_words):
    # Squaring favours the first words, so that some stand in most items and others in one.
    return " ".join(VOCABULARY[int(30 * rng.random() ** 2)] for _ in range(rng.randint(1, max_words)))


def random_cases(num_cases):
    rng = random.Random(0)
    for _ in range(num_cases):
        items = items_of(*(random_text(rng, 12) for _ in range(rng.randint(1, 40))))
        yield items, random_text(rng, 8)


def all_scores(items, query, method):
    scores = retrieval.Index(items, method).scores(query)
    return np.array([scores.get(place, 0.0) for place in range(len(items))])


def ids(found):
    return [item.item_id for item in found]


# --------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------


def test_lucene_by_hand():
    # N=2, lengths 2 and 4, mean 3. Saturation of the first: 1.5 (0.25 + 0.75 * 2/3) = 1.125; of the second:
    # 1.5 (0.25 + 0.75 * 4/3) = 1.875. "cat" is in both: idf = ln(1 + 0.5/2.5) = ln 1.2;
    # "red" in one: ln(1 + 1.5/1.5) = ln 2.
    # First: ln 1.2 * 1/2.125. Second: ln 1.2 * 2/3.875 + ln 2 * 1/2.875.
    items = items_of("cat sat", "cat cat red mat")
    expected = [math.log(1.2) / 2.125, math.log(1.2) * 2 / 3.875 + math.log(2) / 2.875]
    np.testing.assert_allclose(all_scores(items, "Red cat?", "lucene"), expected, rtol=1e-12)
    assert ids(retrieval.retrieve("Red cat?", items, k=2)) == [2, 1]


def test_okapi_by_hand():
    # N=3, all of length 2, so saturation = 1.5 and one occurrence gains 2.5/2.5 = 1. n("cat") = 2: ln 1.5 - ln 2.5,
    # negative. Four more words with n = 1: ln 2.5 - ln 1.5 each. With x = ln(5/3), the mean is (4x - x)/5 = 0.6 x,
    # and a quarter of it, 0.15 x, is what "cat" weighs.
    items = items_of("cat sat", "cat red", "big mat")
    x = math.log(5 / 3)
    np.testing.assert_allclose(all_scores(items, "red cat cat", "okapi"), [0.3 * x, 1.3 * x, 0], rtol=1e-12)


def test_no_common_word_is_no_evidence_for_lucene_but_fills_up_okapi():
    items = items_of("cat", "dog", "fish", "red dog")
    assert retrieval.retrieve("bird", items, k=3) == ()
    assert ids(retrieval.retrieve("dog", items, k=3)) == [2, 4]
    assert ids(retrieval.retrieve("bird", items, k=3, method="okapi")) == [1, 2, 3]
    assert ids(retrieval.retrieve("fish", items, k=3, method="okapi")) == [3, 1, 2]


def test_repeated_query_words_count_again():
    items = items_of("cat one", "dog two")
    assert ids(retrieval.retrieve("cat dog", items, k=2)) == [1, 2]
    assert ids(retrieval.retrieve("cat dog dog", items, k=2)) == [2, 1]


def test_words():
    assert retrieval.words("Ana's 2nd CAT, naïve_漢字 -- a-b") == ["ana", "s", "2nd", "cat", "naïve_漢字", "a", "b"]


# --------------------------------------------------------------------------------------
# Against others
# --------------------------------------------------------------------------------------


def test_lucene_agrees_with_bm25s():
    for items, query in random_cases(200):
        other = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        other.index([retrieval.words(item.text) for item in items], show_progress=False)
        # bm25s knows no words outside its corpus; they score nothing here.
        query_words = [word for word in retrieval.words(query) if word in other.vocab_dict]
        expected = other.get_scores(query_words) if query_words else np.zeros(len(items))
        np.testing.assert_allclose(all_scores(items, query, "lucene"), expected, atol=1e-5)


def slow_okapi(items, query):
    """rank_bm25's rule, read off its description, without any index."""
    texts = [retrieval.words(item.text) for item in items]
    mean_length = sum(map(len, texts)) / len(texts)
    idf = {}
    for word in {word for text in texts for word in text}:
        n = sum(word in text for text in texts)
        idf[word] = math.log(len(texts) - n + 0.5) - math.log(n + 0.5)
    floor = 0.25 * sum(idf.values()) / len(idf)
    scores = []
    for text in texts:
        score = 0.0
        for word in retrieval.words(query):
            count = text.count(word)
            weight = idf.get(word, 0.0)
            weight = floor if weight < 0 else weight
            score += weight * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(text) / mean_length))
        scores.append(score)
    return scores


def test_okapi_agrees_with_a_slow_loop():
    for items, query in random_cases(100):
        np.testing.assert_allclose(all_scores(items, query, "okapi"), slow_okapi(items, query), atol=1e-12)


def test_okapi_agrees_with_rank_bm25():
    rank_bm25 = pytest.importorskip("rank_bm25")
    for items, query in random_cases(50):
        other = rank_bm25.BM25Okapi([retrieval.words(item.text) for item in items])
        np.testing.assert_allclose(
            all_scores(items, query, "okapi"), other.get_scores(retrieval.words(query)), atol=1e-9
        )


# --------------------------------------------------------------------------------------
# Laws and edges
# --------------------------------------------------------------------------------------

texts = st.lists(st.sampled_from(["a", "b", "c", "d", ""]), max_size=5).map(" ".join)


@few_examples
@hypothesis.given(st.lists(texts, max_size=8), texts, st.integers(1, 10), st.sampled_from(retrieval.METHODS))
def test_result_is_a_sorted_choice_of_items(item_texts, query, k, method):
    items = items_of(*item_texts)
    found = retrieval.retrieve(query, items, k, method)
    assert len(set(found)) == len(found)
    assert set(found) <= set(items)
    scores = all_scores(items, query, method)
    keys = [(-round(scores[item.item_id - 1], 9), item.item_id) for item in found]
    assert keys == sorted(keys)  # Best first; of equals the older first.
    num_eligible = len(items) if method == "okapi" else np.count_nonzero(scores)
    assert len(found) == min(k, num_eligible)
    # A smaller K gives the head of the same list.
    assert retrieval.retrieve(query, items, 1, method) == found[:1]


@few_examples
@hypothesis.given(st.permutations(["a b", "b c c", "c d", "a d d d", "e f g h i"]), st.sampled_from(retrieval.METHODS))
def test_order_of_items_only_breaks_ties(item_texts, method):
    def score_by_text(texts_in_order):
        return dict(zip(texts_in_order, all_scores(items_of(*texts_in_order), "a c c i", method), strict=True))

    assert score_by_text(item_texts) == pytest.approx(score_by_text(sorted(item_texts)))


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_ties_go_to_the_older_item(method):
    items = items_of("red cat", "cat blue", "cat green", "dog big small")
    assert ids(retrieval.retrieve("cat", items, 2, method)) == ids(retrieval.retrieve("cat", items, 4, method))[:2]
    assert ids(retrieval.retrieve("red blue green", items, 3, method)) == [1, 2, 3]
    assert ids(retrieval.retrieve("green blue red", items[::-1], 3, method)) == [3, 2, 1]


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_index_answers_as_retrieve_does(method):
    for items, query in random_cases(20):
        index = retrieval.Index(items, method)
        for k in (1, 3, 100):
            assert index.retrieve(query, k) == retrieval.retrieve(query, items, k, method)


@pytest.mark.parametrize("method", retrieval.METHODS)
@pytest.mark.parametrize("query", ["cat", "", "?!"])
def test_empty_memories_queries_and_texts(query, method):
    assert retrieval.retrieve(query, [], 2, method) == ()
    wordless = items_of("...", "!?")
    assert ids(retrieval.retrieve(query, wordless, 2, method)) == ([1, 2] if method == "okapi" else [])
    assert ids(retrieval.retrieve("cat", items_of("...", "cat"), 1, "lucene")) == [2]


def test_single_item():
    items = items_of("Ana moved to Oslo")
    assert ids(retrieval.retrieve("Where did Ana move?", items, k=2)) == [1]
    # Okapi's idf of a word that every item has is negative, and so is its stand-in; still the item is returned.
    assert all_scores(items, "Ana", "okapi")[0] < 0
    assert ids(retrieval.retrieve("Ana", items, k=2, method="okapi")) == [1]


def test_bad_settings():
    with pytest.raises(ValueError, match=r"memory\.retrieval must be one of lucene, okapi; got 'bm25'"):
        retrieval.Index([], "bm25")
    with pytest.raises(ValueError, match=r"memory\.top_k must be at least 1.*got 0"):
        retrieval.retrieve("cat", [], k=0)
