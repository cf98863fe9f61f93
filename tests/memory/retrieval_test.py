"""Tests of finemem_jax/memory/retrieval.py: BM25 by hand and against others, indexes that follow a memory."""

import dataclasses
import itertools
import math
import random
import sys

import bm25s
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from finemem_jax.memory import retrieval
from finemem_jax.types import CORE, EPISODIC, SEMANTIC, MemoryItem

few_examples = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)

BM25 = ("lucene", "okapi")
VOCABULARY = [f"w{i}" for i in range(30)]


def items_of(*texts, memory_type=""):
    return [MemoryItem(place + 1, text, place, memory_type=memory_type) for place, text in enumerate(texts)]


def random_text(rng, min_words, max_words):
    # Squaring favours the first words, so that some stand in most items and others in one.
    return " ".join(VOCABULARY[int(30 * rng.random() ** 2)] for _ in range(rng.randint(min_words, max_words)))


def random_cases(num_cases, min_words=1, max_items=40):
    rng = random.Random(0)
    for _ in range(num_cases):
        items = items_of(*(random_text(rng, min_words, 12) for _ in range(rng.randint(1, max_items))))
        yield items, random_text(rng, 1, 8)


def letters(texts):
    """An embedder: how often each letter stands in a text."""
    return np.array([[text.count(chr(97 + i)) for i in range(26)] for text in texts], np.float32).reshape(-1, 26)


def ranker_of(method, items):
    made = {
        "bm25s": retrieval.Bm25s,
        "dense": lambda: retrieval.Dense(letters),
        "hybrid": lambda: retrieval.Hybrid(retrieval.Bm25("lucene"), retrieval.Dense(letters)),
    }
    ranker = made.get(method, lambda: retrieval.Bm25(method))()
    ranker.update(items)
    return ranker


def all_scores(items, query, method):
    return ranker_of(method, items).scores(query)


def ids(found):
    return [item.item_id for item in found]


# --------------------------------------------------------------------------------------
# BM25 by hand
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
# BM25 against others
# --------------------------------------------------------------------------------------


def test_lucene_agrees_with_bm25s():
    for items, query in random_cases(200):
        other = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        other.index([retrieval.words(item.text) for item in items], show_progress=False)
        # bm25s knows no words outside its corpus; they score nothing here.
        query_words = [word for word in retrieval.words(query) if word in other.vocab_dict]
        expected = other.get_scores(query_words) if query_words else np.zeros(len(items))
        np.testing.assert_allclose(all_scores(items, query, "lucene"), expected, atol=1e-5)


def test_lucene_and_the_bm25s_back_end_retrieve_the_same():
    for items, query in random_cases(100, min_words=0):
        for k in (1, 3, 100):
            expected = retrieval.retrieve(query, items, k, "lucene")
            assert retrieval.retrieve(query, items, k, "bm25s") == expected


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


def test_okapi_ranks_as_rank_bm25_does():
    rank_bm25 = pytest.importorskip("rank_bm25", reason="pip install rank-bm25 to compare with it")
    sizes, ties = set(), 0
    # Few items of few words: many ties, and words that stand in every item.
    for items, query in [*random_cases(300), *random_cases(200, min_words=0, max_items=4)]:
        corpus = [retrieval.words(item.text) for item in items]
        if not any(corpus):
            # Its mean length would be 0. Nothing scores, so the oldest come first.
            assert retrieval.retrieve(query, items, 3, "okapi") == tuple(items[:3])
            continue
        expected = rank_bm25.BM25Okapi(corpus).get_scores(retrieval.words(query))
        np.testing.assert_allclose(all_scores(items, query, "okapi"), expected, atol=1e-9)
        ranking = np.argsort(-expected.round(9), kind="stable")
        assert ids(retrieval.retrieve(query, items, len(items), "okapi")) == [items[place].item_id for place in ranking]
        sizes.add(len(items))
        ties += len(set(expected.round(9))) < len(items)
    assert {1, 2, 40} <= sizes
    assert ties > 100
    assert retrieval.retrieve("w1", [], 3, "okapi") == ()  # rank_bm25 refuses to index nothing.


# --------------------------------------------------------------------------------------
# Laws and edges of BM25
# --------------------------------------------------------------------------------------

texts = st.lists(st.sampled_from(["a", "b", "c", "d", ""]), max_size=5).map(" ".join)


@few_examples
@hypothesis.given(st.lists(texts, max_size=8), texts, st.integers(1, 10), st.sampled_from((*BM25, "bm25s")))
def test_result_is_a_sorted_choice_of_items(item_texts, query, k, method):
    items = items_of(*item_texts)
    found = retrieval.retrieve(query, items, k, method)
    assert len(set(found)) == len(found)
    assert set(found) <= set(items)
    scores = all_scores(items, query, method).round(9 if method != "bm25s" else 5)
    keys = [(-scores[item.item_id - 1], item.item_id) for item in found]
    assert keys == sorted(keys)  # Best first; of equals the older first.
    num_eligible = len(items) if method == "okapi" else np.count_nonzero(scores)
    assert len(found) == min(k, num_eligible)
    # A smaller K gives the head of the same list.
    assert retrieval.retrieve(query, items, 1, method) == found[:1]


@few_examples
@hypothesis.given(st.permutations(["a b", "b c c", "c d", "a d d d", "e f g h i"]), st.sampled_from(BM25))
def test_order_of_items_only_breaks_ties(item_texts, method):
    def score_by_text(texts_in_order):
        return dict(zip(texts_in_order, all_scores(items_of(*texts_in_order), "a c c i", method), strict=True))

    assert score_by_text(item_texts) == pytest.approx(score_by_text(sorted(item_texts)))


@pytest.mark.parametrize("method", (*BM25, "bm25s"))
def test_ties_go_to_the_older_item(method):
    items = items_of("red cat", "cat blue", "cat green", "dog big small")
    assert ids(retrieval.retrieve("cat", items, 2, method)) == ids(retrieval.retrieve("cat", items, 4, method))[:2]
    assert ids(retrieval.retrieve("red blue green", items, 3, method)) == [1, 2, 3]
    # Older is what stands first, whatever its id.
    assert ids(retrieval.retrieve("green blue red", items[::-1], 3, method)) == [3, 2, 1]


@pytest.mark.parametrize("method", (*BM25, "bm25s"))
@pytest.mark.parametrize("query", ["cat", "", "?!"])
def test_empty_memories_queries_and_texts(query, method):
    assert retrieval.retrieve(query, [], 2, method) == ()
    wordless = items_of("...", "!?")
    assert ids(retrieval.retrieve(query, wordless, 2, method)) == ([1, 2] if method == "okapi" else [])
    if method != "okapi":  # To which a word in one of two items weighs nothing.
        assert ids(retrieval.retrieve("cat", items_of("...", "cat"), 1, method)) == [2]


@pytest.mark.parametrize("method", BM25)
def test_equal_scores_added_in_another_order_are_a_tie(method):
    lower = 0
    for x, y, z in itertools.product(range(1, 6), repeat=3):
        # Each word stands in both, so that the second has the same gains, in another order.
        items = items_of("x " * x + "y " * y + "z " * z, "x " * z + "y " * x + "z " * y, "u", "v", "w")
        first, second, *_ = all_scores(items, "x y z", method)
        assert first == pytest.approx(second, abs=1e-12)
        lower += first < second
        assert ids(retrieval.retrieve("x y z", items, 2, method)) == [1, 2]
    assert lower > 0


def test_single_item():
    items = items_of("Ana moved to Oslo")
    assert ids(retrieval.retrieve("Where did Ana move?", items, k=2)) == [1]
    # Okapi's idf of a word that every item has is negative, and so is its stand-in; still the item is returned.
    assert all_scores(items, "Ana", "okapi")[0] < 0
    assert ids(retrieval.retrieve("Ana", items, k=2, method="okapi")) == [1]


# --------------------------------------------------------------------------------------
# An index that follows a memory
# --------------------------------------------------------------------------------------


def edited(rng, items, next_id, kinds):
    """The items after a few insertions, rewritings, repetitions (which move φ alone) and deletions."""
    items = list(items)
    for _ in range(rng.randint(0, 4)):
        action = rng.choice(["insert", "insert", "update", "repeat", "delete"])
        place = rng.randrange(len(items)) if items else None
        if action == "insert":
            items.append(MemoryItem(next_id, random_text(rng, 0, 12), 0, memory_type=rng.choice(kinds)))
            next_id += 1
        elif place is None:
            continue
        elif action == "delete":
            del items[place]
        else:
            text = random_text(rng, 0, 12) if action == "update" else items[place].text
            items[place] = dataclasses.replace(items[place], text=text, source_step=items[place].source_step + 1)
    if rng.random() < 0.05:
        items = []
    if rng.random() < 0.05:
        # No memory does this, but whoever loads one may.
        rng.shuffle(items)
    return items, next_id


# BM25 to the last bit; NumPy does not promise the last bits of a row's product wherever the row stands.
@pytest.mark.parametrize(("method", "sequences", "atol"), [("lucene", 500, 0), ("okapi", 500, 0), ("dense", 100, 1e-6)])
def test_a_followed_memory_scores_as_one_indexed_afresh(method, sequences, atol):
    for seed in range(sequences):
        rng = random.Random(seed)
        items, next_id = [], 1
        followed = ranker_of(method, [])
        for _ in range(8):
            items, next_id = edited(rng, items, next_id, kinds=("",))
            followed.update(items)
            fresh = ranker_of(method, items)
            for query in (random_text(rng, 0, 6), random_text(rng, 0, 6)):
                np.testing.assert_allclose(followed.scores(query), fresh.scores(query), rtol=0, atol=atol)
                for k in (1, 2, 50):
                    np.testing.assert_array_equal(followed.rank(query, k), fresh.rank(query, k))


@pytest.mark.parametrize("method", retrieval.METHODS)
@pytest.mark.parametrize("kinds", [("",), (CORE, SEMANTIC, EPISODIC)], ids=["flat", "typed"])
def test_an_index_answers_as_retrieve_does(method, kinds):
    for seed in range(25):
        rng = random.Random(seed)
        items, next_id = [], 1
        index = retrieval.Index(method, letters)
        for _ in range(6):
            items, next_id = edited(rng, items, next_id, kinds)
            index.update(items)
            query = random_text(rng, 0, 6)
            for k in (1, 3, 50):
                # Equal items, so with the φ they have now.
                assert index.retrieve(query, k) == retrieval.retrieve(query, items, k, method, letters)


@pytest.mark.parametrize("method", [*BM25, "dense"])
def test_only_what_changed_is_looked_at(method, monkeypatch):
    read = []
    monkeypatch.setattr(retrieval, "words", lambda text: read.append(text) or text.split())
    index = retrieval.Index(method, lambda texts: read.extend(texts) or letters(texts))
    index.update(items_of("cat", "dog", "fish"))
    assert sorted(read) == ["cat", "dog", "fish"]
    read.clear()
    index.update(items_of("cat", "cow", "fish", "bird"))
    assert sorted(set(read) - {"dog"}) == ["bird", "cow"]  # BM25 also reads what it takes out.
    read.clear()
    index.update(items_of("cat", "cow", "fish", "bird"))
    assert read == []


@pytest.mark.parametrize("method", [*BM25, "dense"])
def test_an_index_grows_with_the_memory_and_not_with_its_history(method):
    ranker = ranker_of(method, [])
    for step in range(200):
        ranker.update([MemoryItem(step + i, f"w{step + i} cat", step) for i in range(5)])
    assert ranker._slots.size <= 10  # Five items, and no more than all of them anew.
    if method != "dense":
        assert len(ranker._occurrences) == 6


def test_two_items_with_one_id_are_refused():
    twice = [MemoryItem(1, "cat", 0), MemoryItem(2, "dog", 0), MemoryItem(2, "fish", 0)]
    with pytest.raises(ValueError, match="two have the id 2"):
        retrieval.retrieve("cat", twice, 1)


# --------------------------------------------------------------------------------------
# Typed memories
# --------------------------------------------------------------------------------------

TYPED = [
    MemoryItem(1, "the trip to Oslo began in May", 0, memory_type=EPISODIC),
    MemoryItem(2, "Oslo is in Norway", 0, memory_type=SEMANTIC),
    MemoryItem(3, "Ana likes trains", 0, memory_type=CORE),
    MemoryItem(4, "Ana lives in Oslo", 1, memory_type=SEMANTIC),
    MemoryItem(5, "Rome is in Italy", 1, memory_type=SEMANTIC),
    MemoryItem(6, "Ana came back in June", 1, memory_type=EPISODIC),
]


def test_core_first_then_the_best_of_each_type():
    assert ids(retrieval.retrieve("Where does Ana live? Oslo?", TYPED, k=2)) == [3, 4, 2, 6, 1]
    assert ids(retrieval.retrieve("Where does Ana live? Oslo?", TYPED, k=1)) == [3, 4, 6]
    # Core is shown to every question; the others only where they have a word of it.
    assert ids(retrieval.retrieve("Rome", TYPED, k=2)) == [3, 5]
    assert ids(retrieval.retrieve("Rome", TYPED[:2], k=2)) == []


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_each_type_is_an_index_of_its_own(method):
    def best(kind, query):
        return retrieval.retrieve(query, [item for item in TYPED if item.memory_type == kind], 2, method, letters)

    for query in ("Oslo trains", "Ana in May", "Italy"):
        found = retrieval.retrieve(query, TYPED, 2, method, letters)
        assert found == (TYPED[2], *best(SEMANTIC, query), *best(EPISODIC, query))
        assert len(found) <= retrieval.max_evidence(2, "typed")


def test_types_may_share_ids():
    items = [MemoryItem(1, "cat", 0, memory_type=SEMANTIC), MemoryItem(1, "cat dog", 0, memory_type=EPISODIC)]
    assert retrieval.retrieve("cat", items, 1) == tuple(items)


def test_max_evidence():
    assert retrieval.max_evidence(20, "flat") == 20
    assert retrieval.max_evidence(20, "typed") == 41
    found = retrieval.retrieve("cat", TYPED, 2, "okapi")
    assert len(found) == retrieval.max_evidence(2, "typed")


# --------------------------------------------------------------------------------------
# Dense and hybrid
# --------------------------------------------------------------------------------------


def test_dense_by_hand():
    # Letters a, b: query (1, 0); items (1, 1), (0, 2), (3, 0), all zero. Cosines 1/√2, 0, 1, and 0 for no letters.
    items = items_of("ab", "bb", "aaa", "...")
    np.testing.assert_allclose(all_scores(items, "a", "dense"), [0.5**0.5, 0, 1, 0], atol=1e-6)
    # Every item is ranked; of equals the older first.
    assert ids(retrieval.retrieve("a", items, 4, "dense", letters)) == [3, 1, 2, 4]
    assert ids(retrieval.retrieve("z", items, 2, "dense", letters)) == [1, 2]
    assert ids(retrieval.retrieve("", items, 2, "dense", letters)) == [1, 2]


def test_dense_ties_go_to_the_older_item():
    # The same direction with other lengths: float32 cosines differ in their last bits.
    items = items_of(*("abbccc" * n for n in (3, 7, 1, 11, 5, 13)))
    assert ids(retrieval.retrieve("abc", items, 6, "dense", letters)) == [1, 2, 3, 4, 5, 6]


def test_hybrid_by_hand():
    # By words, "ab" stands in items 2 and 4, of two words each: the older first. By letters a, b, c, (1, 1, 0) against
    # (2, 0, 0), (1, 1, 2), (1, 1, 0) and (1, 1, 1): cosines 0.71, 0.58, 1, 0.82, so that the order is 3, 4, 1, 2.
    items = items_of("aa", "ab cc", "ba", "ab c")
    by_words = retrieval.retrieve("ab", items, 4)
    by_letters = retrieval.retrieve("ab", items, 4, "dense", letters)
    assert ids(by_words) == [2, 4]
    assert ids(by_letters) == [3, 4, 1, 2]
    expected = [1 / 63, 1 / 61 + 1 / 64, 1 / 61, 1 / 62 + 1 / 62]
    np.testing.assert_allclose(all_scores(items, "ab", "hybrid"), expected, rtol=1e-12)
    # 1/61 + 1/64 = 0.03202, 2/62 = 0.03226, 1/61 = 0.01639, 1/63 = 0.01587.
    assert ids(retrieval.retrieve("ab", items, 4, "hybrid", letters)) == [4, 2, 3, 1]


def test_hybrid_ties_go_to_the_older_item():
    # The first is shorter in words, the second has the larger share of the letter a: 1/61 + 1/62 each.
    items = items_of("a bbb", "a cc d")
    assert ids(retrieval.retrieve("a", items, 2)) == [1, 2]
    assert ids(retrieval.retrieve("a", items, 2, "dense", letters)) == [2, 1]
    assert ids(retrieval.retrieve("a", items, 2, "hybrid", letters)) == [1, 2]
    assert ids(retrieval.retrieve("a", items[::-1], 2, "hybrid", letters)) == [2, 1]


@pytest.mark.parametrize("method", retrieval.DENSE_METHODS)
def test_dense_methods_of_nothing(method):
    assert retrieval.retrieve("cat", [], 2, method, letters) == ()
    index = retrieval.Index(method, letters)
    index.update(items_of("cat", "dog"))
    index.update([])
    assert index.retrieve("cat", 2) == ()
    index.update(items_of("fish", "cat"))
    assert ids(index.retrieve("cat", 1)) == [2]


def test_queries_and_changed_items_are_embedded_in_one_call_each():
    calls = []
    index = retrieval.Index("dense", lambda texts: calls.append(list(texts)) or letters(texts))
    index.update(items_of("cat", "dog"))
    index.retrieve("which cat", 1)
    assert calls == [["cat", "dog"], ["which cat"]]


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


def test_bad_settings(monkeypatch):
    with pytest.raises(ValueError, match=r"memory\.retrieval must be one of lucene, .*, hybrid; got 'bm25'"):
        retrieval.Index("bm25")
    with pytest.raises(ValueError, match=r"memory\.top_k must be at least 1.*got 0"):
        retrieval.retrieve("cat", [], k=0)
    for method in retrieval.DENSE_METHODS:
        with pytest.raises(ValueError, match=rf"'{method}' needs an embedder.*memory\.embedder"):
            retrieval.Index(method)
    # None in sys.modules is what Python finds for a package that is not installed.
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ValueError, match=r"pip install bm25s"):
        retrieval.Index("bm25s")
