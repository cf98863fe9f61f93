"""Compares retrieval from a memory that changes at every step, by an index that follows it, with building it again.

    python benchmarks/retrieval.py [--repeats=7] [--items=10,100,3000]

A step changes three items (one inserted, one rewritten, one deleted) and asks five questions, K = 2; this is what a
chunk does to a memory in training. Compared are the index that follows the memory, the same index built afresh, and
bm25s (which cannot but be built afresh), over the same steps. Needs bm25s; about a minute.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import _common as common
import numpy as np

from finemem_jax.memory import retrieval
from finemem_jax.types import MemoryItem

STEPS = 10
QUERIES_PER_STEP = 5
K = 2
EMBED_DIM = 256
ITEM_WORDS, QUERY_WORDS = 25, 10
VOCABULARY = [f"word{i}" for i in range(20_000)]
# Zipf's law: a few words stand in most items, most words in a few.
FREQUENCIES = list(itertools.accumulate(1 / (i + 1) for i in range(len(VOCABULARY))))


Steps = list[tuple[list[MemoryItem], list[str]]]  # The items after each step, and the queries asked then.


def text(rng: random.Random, num_words: int) -> str:
    """Draws words."""
    return " ".join(rng.choices(VOCABULARY, cum_weights=FREQUENCIES, k=num_words))


def walk(rng: random.Random, num_items: int) -> tuple[list[MemoryItem], Steps]:
    """Draws a memory, and the steps from there."""
    items = [MemoryItem(i, text(rng, ITEM_WORDS), 0) for i in range(num_items)]
    start = items
    steps: Steps = []
    for step in range(STEPS):
        items = [*items, MemoryItem(num_items + step, text(rng, ITEM_WORDS), step)]
        rewritten = rng.randrange(len(items))
        items[rewritten] = dataclasses.replace(items[rewritten], text=text(rng, ITEM_WORDS), source_step=step)
        del items[rng.randrange(len(items))]
        steps.append((items, [text(rng, QUERY_WORDS) for _ in range(QUERIES_PER_STEP)]))
    return start, steps


def follow(index: retrieval.Index, steps: Steps) -> None:
    """Has an index follow the memory, and answer the queries."""
    for items, queries in steps:
        index.update(items)
        for query in queries:
            index.retrieve(query, K)


def rebuild(method: str, steps: Steps) -> None:
    """Builds an index at every step, and has it answer the queries."""
    for items, queries in steps:
        follow(retrieval.Index(method), [(items, queries)])


@functools.cache
def vector(one: str) -> np.ndarray:
    """Makes up the vector of a text."""
    return np.random.default_rng(list(one.encode())).standard_normal(EMBED_DIM, np.float32)


def embed(texts: Sequence[str]) -> np.ndarray:
    """Makes up vectors: what is timed is finding the nearest, not embedding, which any embedder does once a text."""
    return np.stack([vector(one) for one in texts])


def built(method: str, items: list[MemoryItem]) -> retrieval.Index:
    """Builds an index."""
    index = retrieval.Index(method, embed)
    index.update(items)
    return index


Walks = list[tuple[list[MemoryItem], Steps]]


def updates(walks: Walks) -> list[dict[str, Any]]:
    """Compares an index that follows the memory with one that is built at every step."""
    rebuild("bm25s", walks[0][1][:1])  # What is done at a first call only is nobody's speed.
    ratios: dict[str, list[float]] = {method: [] for method in ("lucene", "okapi", "bm25s")}
    for start, steps in walks:
        for method in ratios:
            # A new one each time: an index that has seen the steps would have nothing left to do.
            index = built("okapi" if method == "okapi" else "lucene", start)
            own, peer = functools.partial(follow, index, steps), functools.partial(rebuild, method, steps)
            ratios[method].append(common.ratio(own, peer))
    what, size = f"update and {QUERIES_PER_STEP} queries", f"{len(walks[0][0])} items"
    return [
        common.claim(f"{what} vs rebuilding, lucene, {size}", ratios["lucene"], "x", target=1.0),
        common.claim(f"{what} vs rebuilding, okapi, {size}", ratios["okapi"], "x", target=1.0),
        common.claim(f"{what}, lucene, vs bm25s rebuilt, {size}", ratios["bm25s"], "x", target=1.0),
    ]


def single_queries(walks: Walks) -> list[dict[str, Any]]:
    """Times a query, with each method."""
    claims = []
    for method in ("lucene", "okapi", "dense", "hybrid"):
        runs = []
        for start, steps in walks:
            index, queries = built(method, start), [query for _, asked in steps for query in asked]
            embed(queries)
            took = common.seconds(lambda i=index, q=queries: [i.retrieve(one, K) for one in q])
            runs.append(1e3 * took / len(queries))
        name = f"a query, {method}, {len(walks[0][0])} items"
        claims.append(common.claim(name, runs, "ms", target=5.0, lower_is_better=True))
    return claims


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=7)
    parser.add_argument("--items", default="10,100,3000", help="sizes of the memory; queries are timed in the last")
    arguments = parser.parse_args()
    common.peer("bm25s", "pip install bm25s")
    sizes = map(int, arguments.items.split(","))
    every = [[walk(random.Random(seed), size) for seed in range(arguments.repeats)] for size in sizes]
    claims = [claim for walks in every for claim in updates(walks)]
    common.report("retrieval", [*claims, *single_queries(every[-1])], ["bm25s"])


if __name__ == "__main__":
    main()
