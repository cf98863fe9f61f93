"""Retrieves the memory items that are evidence for a question: BM25, dense retrieval, and both.

Knows nothing of readers, scores or models: whatever turns text into vectors is passed in. Deterministic throughout.

Sizes: N items, n of them with a given word, K retrieved, E embedding dimensions.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Float64, Int64

from finemem_jax.types import CORE, MEMORY_TYPES, MemoryItem

METHODS = ("lucene", "okapi", "bm25s", "dense", "hybrid")
DENSE_METHODS = ("dense", "hybrid")  # Those that need an embedder.

# Texts to vectors, float32 [N E], one row a text, in order. Need not be of length 1.
EmbedFn = Callable[[Sequence[str]], np.ndarray]

# The types that K items are retrieved from, in the order shown; "" is the flat memory's. Core is shown whole.
_RANKED_TYPES = ("", *(kind for kind in MEMORY_TYPES if kind != CORE))

_K1 = 1.5  # How soon further occurrences of a word stop counting.
_B = 0.75  # How much a long item is held back; 0 = not at all.
_EPSILON = 0.25  # Okapi: share of the mean idf that stands in for a negative one.
_RANK_OFFSET = 60  # Rank fusion: how little the first few ranks differ.
_WORD = re.compile(r"\b\w+\b")


def retrieve(
    query: str, items: Sequence[MemoryItem], k: int, method: str = "lucene", embed: EmbedFn | None = None
) -> tuple[MemoryItem, ...]:
    """Returns the evidence for one query; an `Index` is the same for many queries, and for a memory that changes."""
    index = Index(method, embed)
    index.update(items)
    return index.retrieve(query, k)


def max_evidence(k: int, layout: str) -> int:
    """Returns the most items that one query can retrieve.

    Args:
        layout: Of the memory: "flat" (K items), or "typed" (the core item, and K of each other type).
    """
    return 1 + (len(MEMORY_TYPES) - 1) * k if layout == "typed" else k


def words(text: str) -> list[str]:
    """Splits into lowercase words, in order, repeats kept. No stemming, no stop words (as Mem-alpha does)."""
    return _WORD.findall(text.lower())


class Index:
    """Follows one memory as it changes, and answers queries to it.

    The core item of a typed memory answers every query. Its semantic and its episodic items are two indexes apart,
    as in Mem-alpha: how rare a word is, or how long a text, is measured within the type.

    Methods:
        "lucene", "okapi": BM25 (see `Bm25`); an update costs what the changed items cost.
        "bm25s": the same as "lucene" from the bm25s library, in float32 and built afresh after every change.
        "dense": cosine similarity of embeddings (see `Dense`).
        "hybrid": ranks of "lucene" and "dense", fused (see `Hybrid`).

    An item that shares no word with the query is no evidence to "lucene" and "bm25s": they retrieve fewer than K
    items, or none, rather than such. The others rank every item, and retrieve K whatever these score, so long as
    there are K: "okapi" as Mem-alpha does, and the dense ones because no similarity is plainly too small.
    """

    def __init__(self, method: str = "lucene", embed: EmbedFn | None = None):
        """Starts with the empty memory.

        Args:
            embed: What "dense" and "hybrid" embed items and queries with, one call for each update and each query;
                so it should remember what it has embedded (`embedders.cached`).

        Raises:
            ValueError: the method is unknown, or what it needs is missing.
        """
        self._items: dict[str, list[MemoryItem]] = {kind: [] for kind in (CORE, *_RANKED_TYPES)}
        self._rankers = {kind: _ranker(method, embed) for kind in _RANKED_TYPES}

    def update(self, items: Sequence[MemoryItem]) -> None:
        """Makes this the index of another memory: a look at every item, and work only for those that changed.

        Args:
            items: Oldest first; ids are unique within a type.
        """
        groups: dict[str, list[MemoryItem]] = {kind: [] for kind in self._items}
        for item in items:
            groups[item.memory_type].append(item)
        for kind, ranker in self._rankers.items():
            if groups[kind] != self._items[kind]:
                ranker.update(groups[kind])
        self._items = groups

    def retrieve(self, query: str, k: int) -> tuple[MemoryItem, ...]:
        """Gives the core item, if there is one, and the K best items of each other type, best first.

        The semantic ones stand before the episodic ones. Of equals the older comes first. At most
        `max_evidence(k, layout)` items.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"memory.top_k must be at least 1, to retrieve any evidence at all; got {k}.")
        found = list(self._items[CORE])
        for kind, ranker in self._rankers.items():
            if self._items[kind]:
                found += [self._items[kind][place] for place in ranker.rank(query, k)]
        return tuple(found)


class Ranker(Protocol):
    """Ranks the items of one type. `Bm25`, `Bm25s`, `Dense` and `Hybrid` are such."""

    def update(self, items: Sequence[MemoryItem]) -> None:
        """Takes the items that are ranked from now on, oldest first."""
        ...

    def rank(self, query: str, k: int) -> Int64[np.ndarray, " k"]:
        """Gives the places, among the items, of the K best (or fewer); best first, of equals the older first."""
        ...


def _ranker(method: str, embed: EmbedFn | None) -> Ranker:
    if method not in METHODS:
        raise ValueError(f"memory.retrieval must be one of {', '.join(METHODS)}; got {method!r}.")
    if method == "bm25s":
        return Bm25s()
    if method not in DENSE_METHODS:
        return Bm25(method)
    if embed is None:
        raise ValueError(f"memory.retrieval={method!r} needs an embedder, but there is none; set memory.embedder.")
    return Dense(embed) if method == "dense" else Hybrid(Bm25("lucene"), Dense(embed))


# --------------------------------------------------------------------------------------
# By words
# --------------------------------------------------------------------------------------


class Bm25:
    """BM25, with word counts that follow the items.

        score(q, m) = Σ_{w in q} idf(w) gain(w, m),      c = occurrences of w in m
        saturation  = k1 (1 - b + b |m| / mean |m|),     k1 = 1.5, b = 0.75

        "lucene":  idf = ln(1 + (N - n + 0.5) / (n + 0.5)),    gain = c / (c + saturation)
        "okapi":   idf = ln(N - n + 0.5) - ln(n + 0.5),        gain = c (k1 + 1) / (c + saturation)

    A word that stands twice in the query counts twice. Okapi's idf is negative for words in more than half of the
    items; such a one is replaced by 0.25 times the mean idf of all words (before replacement), as rank_bm25 does.
    That mean can be negative too, in small memories: then okapi ranks items with common words last.

    Only counts are kept, and all else is computed from them when a query needs it: so the scores do not depend on
    how the memory came to be, to the last bit.
    """

    def __init__(self, method: str):
        """Starts with no items.

        Args:
            method: "lucene" or "okapi".
        """
        self._okapi = method == "okapi"
        self._slots = _Slots()
        self._lengths = np.zeros(0)  # Words of the item in each slot.
        self._occurrences: dict[str, dict[int, int]] = {}  # word: {slot: c}
        # The occurrences of the words asked for, as arrays of slots and counts, until they change.
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._floor: float | None = None  # Stands in for negative idfs, until anything changes.

    def update(self, items: Sequence[MemoryItem]) -> None:
        """Takes the new items; counts the words of those that changed."""
        removed, added = self._slots.follow(items)
        self._lengths = _with_rows(self._lengths, self._slots.size)
        self._floor = None
        for slot, text in removed:
            self._lengths[slot] = 0
            for word in set(words(text)):
                del self._occurrences[word][slot]
                if not self._occurrences[word]:
                    del self._occurrences[word]
                self._arrays.pop(word, None)
        for slot, text in added:
            item_words = words(text)
            self._lengths[slot] = len(item_words)
            for word, count in collections.Counter(item_words).items():
                self._occurrences.setdefault(word, {})[slot] = count
                self._arrays.pop(word, None)

    def scores(self, query: str) -> Float64[np.ndarray, " N"]:
        """Scores of the items, oldest first; 0 for those that share no word with the query."""
        order = self._slots.order
        # Repeats are gathered first: a query of a thousand equal words costs what one word costs.
        repeats = collections.Counter(word for word in words(query) if word in self._occurrences)
        if not repeats:
            return np.zeros(len(order))
        found = [self._array(word) for word in repeats]
        scale = _K1 + 1 if self._okapi else 1.0
        idfs = self._idfs([len(slots) for slots, _ in found])
        weights = [number * scale * idf for number, idf in zip(repeats.values(), idfs, strict=True)]
        slots = np.concatenate([slots for slots, _ in found])
        counts = np.concatenate([counts for _, counts in found])
        weights = np.repeat(weights, [len(slots) for slots, _ in found])
        mean_length = self._lengths.sum() / len(order)
        saturation = _K1 * (1 - _B + _B * self._lengths[slots] / mean_length)
        gains = weights * counts / (counts + saturation)
        # Adds up in the order of the query's words, whichever slots the items have.
        return np.bincount(slots, gains, self._slots.size)[order]

    def rank(self, query: str, k: int) -> Int64[np.ndarray, " k"]:
        scores = self.scores(query)
        # Rounded, so that equal scores summed in another order are still equal, and the older item wins.
        return _best(scores.round(9), k, None if self._okapi else scores > 0)

    def _array(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        if word not in self._arrays:
            counts = self._occurrences[word]
            slots = np.fromiter(counts.keys(), np.int64, len(counts))
            self._arrays[word] = slots, np.fromiter(counts.values(), np.float64, len(counts))
        return self._arrays[word]

    def _idfs(self, numbers_of_items: Sequence[int]) -> list[float]:
        total = len(self._slots.order)
        if not self._okapi:
            return [math.log(1 + (total - n + 0.5) / (n + 0.5)) for n in numbers_of_items]
        idfs = [_okapi_idf(n, total - n) for n in numbers_of_items]
        return [idf if idf >= 0 else self._okapi_floor() for idf in idfs]

    def _okapi_floor(self) -> float:
        if self._floor is None:
            total = len(self._slots.order)
            # Gathered by number of items: few terms, and added in the same order whichever word came first.
            num_words = collections.Counter(map(len, self._occurrences.values()))
            idfs = (count * _okapi_idf(n, total - n) for n, count in sorted(num_words.items()))
            self._floor = _EPSILON * sum(idfs) / len(self._occurrences)
        return self._floor


def _okapi_idf(num_with: int, num_without: int) -> float:
    return math.log(num_without + 0.5) - math.log(num_with + 0.5)


class Bm25s:
    """Lucene's BM25 by the bm25s library, built afresh at the first query after a change. Scores are float32.

    Of use to check `Bm25`, and for memories that are large and seldom change.
    """

    def __init__(self):
        """Starts with no items.

        Raises:
            ValueError: bm25s is not installed.
        """
        try:
            import bm25s
        except ImportError:
            raise ValueError(
                "memory.retrieval='bm25s' needs the bm25s package; run `pip install bm25s`, "
                "or set memory.retrieval='lucene', which gives the same scores."
            ) from None
        self._make = lambda: bm25s.BM25(method="lucene", k1=_K1, b=_B)
        self._built: Any = None
        self._stale = False
        self._texts: list[str] = []

    def update(self, items: Sequence[MemoryItem]) -> None:
        self._texts = [item.text for item in items]
        self._stale = True

    def scores(self, query: str) -> Float32[np.ndarray, " N"]:
        """Scores of the items, oldest first; 0 for those that share no word with the query."""
        if self._stale:
            self._built, self._stale = self._build(), False
        known = [word for word in words(query) if word in self._built.vocab_dict] if self._built else []
        return self._built.get_scores(known) if known else np.zeros(len(self._texts), np.float32)

    def _build(self) -> Any:
        item_words = [words(text) for text in self._texts]
        if not any(item_words):
            # The library cannot index a memory without any words.
            return None
        built = self._make()
        built.index(item_words, show_progress=False)
        return built

    def rank(self, query: str, k: int) -> Int64[np.ndarray, " k"]:
        scores = self.scores(query)
        return _best(scores.astype(np.float64).round(5), k, scores > 0)


# --------------------------------------------------------------------------------------
# By meaning
# --------------------------------------------------------------------------------------


class Dense:
    """Cosine similarity of embeddings. Every item is ranked, however little it resembles the query.

    score(q, m) = e(q) · e(m) / (|e(q)| |e(m)|);      0 for a text whose embedding is 0
    """

    def __init__(self, embed: EmbedFn):
        self._embed = embed
        self._slots = _Slots()
        self._matrix = np.zeros((0, 0), np.float32)  # Unit vectors, [slots E].

    def update(self, items: Sequence[MemoryItem]) -> None:
        """Takes the new items; embeds those that changed, in one call."""
        _, added = self._slots.follow(items)
        if not added:
            return
        vectors = _unit(self._embed([text for _, text in added]))
        if not self._matrix.size:
            self._matrix = np.zeros((0, vectors.shape[1]), np.float32)
        self._matrix = _with_rows(self._matrix, self._slots.size)
        self._matrix[[slot for slot, _ in added]] = vectors

    def scores(self, query: str) -> Float32[np.ndarray, " N"]:
        """Cosines in [-1, 1], oldest item first."""
        if not len(self._slots.order):
            return np.zeros(0, np.float32)
        (vector,) = _unit(self._embed([query]))
        # Not by a BLAS product: waking its threads takes longer than 3,000 items take one thread, milliseconds where
        # the machine is busy.
        return np.einsum("ne,e->n", self._matrix[: self._slots.size], vector)[self._slots.order]

    def rank(self, query: str, k: int) -> Int64[np.ndarray, " k"]:
        # Rounded to what float32 can tell apart.
        return _best(self.scores(query).astype(np.float64).round(6), k)


class Hybrid:
    """Reciprocal rank fusion of a ranker by words and one by meaning.

        score(q, m) = Σ_{rankers} 1 / (60 + rank(q, m)),      the best item has rank 1

    (Cormack, Clarke and Büttcher, SIGIR 2009.) An item that a ranker leaves out gets nothing from it.
    """

    def __init__(self, *rankers: Ranker):
        self._rankers = rankers
        self._num_items = 0

    def update(self, items: Sequence[MemoryItem]) -> None:
        self._num_items = len(items)
        for ranker in self._rankers:
            ranker.update(items)

    def scores(self, query: str) -> Float64[np.ndarray, " N"]:
        """Fused scores, oldest item first."""
        scores = np.zeros(self._num_items)
        for ranker in self._rankers:
            places = ranker.rank(query, self._num_items)
            scores[places] += 1 / (_RANK_OFFSET + 1 + np.arange(len(places)))
        return scores

    def rank(self, query: str, k: int) -> Int64[np.ndarray, " k"]:
        return _best(self.scores(query), k)


# --------------------------------------------------------------------------------------
# Shared by both
# --------------------------------------------------------------------------------------


class _Slots:
    """Gives every item a slot, a row in some array, that it keeps as long as its text stays the same.

    Attributes:
        order: The slots of the items, oldest item first.
        size: All slots are below this; those of no item are given out again.
    """

    def __init__(self):
        self.order: Int64[np.ndarray, " N"] = np.zeros(0, np.int64)
        self.size = 0
        self._held: dict[int, tuple[int, str]] = {}  # item id: (slot, text)
        self._free: list[int] = []

    def follow(self, items: Sequence[MemoryItem]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """Takes the new items, and gives what changed as (slot, text): what is no longer there, and what is new.

        A rewritten item is among both. What is no longer there must be taken out first: its slot may be given again.
        """
        texts = {item.item_id: item.text for item in items}
        if len(texts) < len(items):
            twice, _ = collections.Counter(item.item_id for item in items).most_common(1)[0]
            raise ValueError(f"memory items must have ids of their own, but two have the id {twice}.")
        gone = [item_id for item_id, (_, text) in self._held.items() if texts.get(item_id) != text]
        removed = [self._held.pop(item_id) for item_id in gone]
        self._free += [slot for slot, _ in removed]
        added = []
        for item_id, text in texts.items():
            if item_id not in self._held:
                if not self._free:
                    self._free, self.size = [self.size], self.size + 1
                self._held[item_id] = self._free.pop(), text
                added.append(self._held[item_id])
        self.order = np.fromiter((self._held[item_id][0] for item_id in texts), np.int64, len(texts))
        return removed, added


def _with_rows(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a copy with zeros at the end: at least `size` rows, and twice as many whenever they run out."""
    if len(array) >= size:
        return array
    new = np.zeros((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    new[: len(array)] = array
    return new


def _unit(vectors: np.ndarray) -> Float32[np.ndarray, "N E"]:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _best(scores: np.ndarray, k: int, eligible: np.ndarray | None = None) -> Int64[np.ndarray, " k"]:
    """Places of the K highest scores, highest first; of equals the first in `scores` first."""
    places = np.arange(len(scores)) if eligible is None else np.flatnonzero(eligible)
    scores = scores[places]
    if k < len(places):
        # All that can be among the K best, ties at the threshold included: less to sort.
        high = scores >= np.partition(scores, -k)[-k]
        places, scores = places[high], scores[high]
    return places[np.argsort(-scores, kind="stable")[:k]]
