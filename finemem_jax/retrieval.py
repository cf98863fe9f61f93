"""BM25 over memory items: which of them are evidence for a question.

Knows nothing of readers or scores. Every function here is deterministic.

Sizes: N items, n of them with a given word, K retrieved.
"""

from __future__ import annotations

import collections
import heapq
import math
import re
from collections.abc import Sequence

from finemem_jax.episode import MemoryItem

METHODS = ("lucene", "okapi")

_K1 = 1.5  # How soon further occurrences of a word stop counting.
_B = 0.75  # How much a long item is held back; 0 = not at all.
_EPSILON = 0.25  # Okapi: share of the mean idf that stands in for a negative one.
_WORD = re.compile(r"\b\w+\b")


def retrieve(query: str, items: Sequence[MemoryItem], k: int, method: str = "lucene") -> tuple[MemoryItem, ...]:
    """Gives the evidence for one query; `Index` is the same for many queries to one memory."""
    return Index(items, method).retrieve(query, k)


def words(text: str) -> list[str]:
    """Splits into lowercase words, in order, repeats kept. No stemming, no stop words (as Mem-alpha does)."""
    return _WORD.findall(text.lower())


class Index:
    """Word counts of one memory, to be asked many questions.

        score(q, m) = Σ_{w in q} idf(w) gain(w, m),      c = occurrences of w in m
        saturation  = k1 (1 - b + b |m| / mean |m|),     k1 = 1.5, b = 0.75

        "lucene":  idf = ln(1 + (N - n + 0.5) / (n + 0.5)),    gain = c / (c + saturation)
        "okapi":   idf = ln(N - n + 0.5) - ln(n + 0.5),        gain = c (k1 + 1) / (c + saturation)

    A word that stands twice in the query counts twice. Okapi's idf is negative for words in more than half of the
    items; such a one is replaced by 0.25 times the mean idf of all words (before replacement), as rank_bm25 does.
    That mean can be negative too, in small memories: then okapi ranks items with common words last.

    The counts are kept per word and per item, so that single items can be added and taken out should building
    the index ever cost more than the rest of a step.
    """

    def __init__(self, items: Sequence[MemoryItem], method: str = "lucene"):
        """Counts the words of `items`.

        Args:
            items: Oldest first.
            method: One of METHODS.

        Raises:
            ValueError: the method is unknown.
        """
        if method not in METHODS:
            raise ValueError(f"memory.retrieval must be one of {', '.join(METHODS)}; got {method!r}.")
        self.items = tuple(items)
        self.method = method
        self._occurrences: dict[str, list[tuple[int, int]]] = {}  # word: (place of item, c), oldest item first
        lengths = []
        for place, item in enumerate(self.items):
            item_words = words(item.text)
            lengths.append(len(item_words))
            for word, count in collections.Counter(item_words).items():
                self._occurrences.setdefault(word, []).append((place, count))
        mean_length = sum(lengths) / max(len(lengths), 1)
        # Without any words there is no mean to divide by, and nothing to score either.
        self._saturation = [_K1 * (1 - _B + _B * length / mean_length) if length else 0.0 for length in lengths]
        self._idf_in_place_of_negative = self._okapi_floor() if method == "okapi" else 0.0

    def scores(self, query: str) -> dict[int, float]:
        """Gives the score of each item that shares a word with the query, by its place in `items`."""
        scale = _K1 + 1 if self.method == "okapi" else 1.0
        scores: dict[int, float] = {}
        # Repeats are gathered first: a query of a thousand equal words costs what one word costs.
        for word, repeats in collections.Counter(words(query)).items():
            occurrences = self._occurrences.get(word, ())
            weight = repeats * scale * self._idf(len(occurrences))
            for place, count in occurrences:
                gain = weight * count / (count + self._saturation[place])
                scores[place] = scores.get(place, 0.0) + gain
        return scores

    def retrieve(self, query: str, k: int) -> tuple[MemoryItem, ...]:
        """Gives the K items with the highest scores, best first; of equals the older first.

        An item that shares no word with the query is no evidence: "lucene" returns fewer than K items, or none,
        rather than such. "okapi" returns K whatever they score (as Mem-alpha does), so long as there are K items.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"memory.top_k must be at least 1, to retrieve any evidence at all; got {k}.")
        scores = self.scores(query)
        places = range(len(self.items)) if self.method == "okapi" else scores
        # Rounded, so that equal scores summed in another order are still equal, and the older item wins.
        best = heapq.nsmallest(k, places, key=lambda place: (-round(scores.get(place, 0.0), 9), place))
        return tuple(self.items[place] for place in best)

    def _idf(self, num_items_with_word: int) -> float:
        n, others = num_items_with_word, len(self.items) - num_items_with_word
        if self.method == "lucene":
            return math.log(1 + (others + 0.5) / (n + 0.5))
        idf = _okapi_idf(n, others)
        return idf if idf >= 0 else self._idf_in_place_of_negative

    def _okapi_floor(self) -> float:
        idfs = [_okapi_idf(len(found), len(self.items) - len(found)) for found in self._occurrences.values()]
        return _EPSILON * sum(idfs) / max(len(idfs), 1)


def _okapi_idf(num_with: int, num_without: int) -> float:
    return math.log(num_without + 0.5) - math.log(num_with + 0.5)
