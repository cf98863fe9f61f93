"""Retrieval from a memory that changes at every step: following it, against building the index again.

    python benchmarks/retrieval.py

A step changes three items (one inserted, one rewritten, one deleted) and asks five questions, K = 2; this is what a
chunk does to a memory in training. Compared are the index that follows the memory, the same index built afresh, and
bm25s (which cannot but be built afresh), over the same steps. Needs bm25s; about a minute.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import random
import sys

# So that it runs from a checkout that is not installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import _common as common
import numpy as np

from finemem_jax.memory import retrieval
from finemem_jax.types import MemoryItem

NUM_ITEMS = (10, 100, 3_000)
REPEATS = 7
STEPS = 10
QUERIES_PER_STEP = 5
K = 2
EMBED_DIM = 256
ITEM_WORDS, QUERY_WORDS = 25, 10
VOCABULARY = [f"word{i}" for i in range(20_000)]
# Zipf's law: a few words stand in most items, most words in a few.
FREQUENCIES = list(itertools.accumulate(1 / (i + 1) for i in range(len(VOCABULARY))))


def text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(VOCABULARY, cum_weights=FREQUENCIES, k=num_words))


def walk(rng: random.Random, num_items: int) -> tuple[list[MemoryItem], list[tuple[list[MemoryItem], list[str]]]]:
    """A memory, and the steps from there: the items after each, and the queries asked then."""
    items = [MemoryItem(i, text(rng, ITEM_WORDS), 0) for i in range(num_items)]
    start, steps = items, []
    for step in range(STEPS):
        items = [*items, MemoryItem(num_items + step, text(rng, ITEM_WORDS), step)]
        rewritten = rng.randrange(len(items))
        items[rewritten] = dataclasses.replace(items[rewritten], text=text(rng, ITEM_WORDS), source_step=step)
        del items[rng.randrange(len(items))]
        steps.append((items, [text(rng, QUERY_WORDS) for _ in range(QUERIES_PER_STEP)]))
    return start, steps


def follow(index, steps):
    for items, queries in steps:
        index.update(items)
        for query in queries:
            index.retrieve(query, K)


def rebuild(method, steps):
    for items, queries in steps:
        follow(retrieval.Index(method), [(items, queries)])


@functools.cache
def vector(one: str) -> np.ndarray:
    return np.random.default_rng(list(one.encode())).standard_normal(EMBED_DIM, np.float32)


def embed(texts):
    """Made-up vectors: what is timed is finding the nearest, not embedding, which any embedder does once a text."""
    return np.stack([vector(one) for one in texts])


def built(method, items):
    index = retrieval.Index(method, embed)
    index.update(items)
    return index


def main() -> None:
    common.peer("bm25s", "pip install bm25s")
    claims = []
    what = f"update and {QUERIES_PER_STEP} queries"
    for num_items in NUM_ITEMS:
        walks = [walk(random.Random(seed), num_items) for seed in range(REPEATS)]
        rebuild("bm25s", walks[0][1][:1])  # What is done at a first call only is nobody's speed.
        ratios = {method: [] for method in ("lucene", "okapi", "bm25s")}
        for start, steps in walks:
            for method in ratios:
                # A new one each time: an index that has seen the steps would have nothing left to do.
                index = built("okapi" if method == "okapi" else "lucene", start)
                ratios[method].append(
                    common.ratio(lambda i=index, s=steps: follow(i, s), lambda m=method, s=steps: rebuild(m, s))
                )
        claims += [
            common.claim(f"{what} vs rebuilding, lucene, {num_items} items", ratios["lucene"], "x", 1.0),
            common.claim(f"{what} vs rebuilding, okapi, {num_items} items", ratios["okapi"], "x", 1.0),
            common.claim(f"{what}, lucene, vs bm25s rebuilt, {num_items} items", ratios["bm25s"], "x", 1.0),
        ]
    for method in ("lucene", "okapi", "dense", "hybrid"):
        runs = []
        for start, steps in walks:
            index = built(method, start)
            queries = [query for _, asked in steps for query in asked]
            embed(queries)
            runs.append(
                1e3 * common.seconds(lambda i=index, q=queries: [i.retrieve(one, K) for one in q]) / len(queries)
            )
        claims.append(common.claim(f"a query, {method}, {num_items} items", runs, "ms", 5.0, lower_is_better=True))
    common.report("retrieval", claims, ["bm25s"])


if __name__ == "__main__":
    main()
