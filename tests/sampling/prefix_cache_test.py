"""Tests of finemem_jax/sampling/prefix_cache.py: the longest match, against looking at every row token by token."""

import itertools
import random

import pytest

from finemem_jax.sampling.prefix_cache import PrefixCache


def test_by_hand():
    rows = PrefixCache(3, 8)
    assert rows.match([1, 2]) == (0, 0)
    rows.insert(2, [1, 2, 3])
    rows.insert(1, [1, 5])
    assert rows.match([1, 2, 4]) == (2, 2)
    assert rows.match([1, 5, 9, 9]) == (1, 2)
    assert rows.match([1, 2, 3, 4, 5]) == (2, 3)
    assert rows.match([7]) == (0, 0)
    assert rows.match([]) == (0, 0)
    # The response goes behind the prompt; a shorter prompt takes what stood behind it away.
    rows.insert(2, [8, 9], start=3)
    assert rows.match([1, 2, 3, 8, 9, 10]) == (2, 5)
    rows.insert(2, [1, 2])
    assert rows.match([1, 2, 3]) == (2, 2)


def test_whom_to_overwrite():
    rows = PrefixCache(3, 4)
    assert rows.oldest() == 0
    rows.insert(0, [1])
    rows.insert(1, [2])
    assert rows.oldest() == 2  # Empty.
    rows.insert(2, [3])
    assert rows.oldest() == 0
    rows.match([1, 2])  # Of use again.
    assert rows.oldest() == 1
    assert rows.oldest([0, 2]) == 2
    rows.clear()
    assert rows.match([1]) == (0, 0)
    assert rows.oldest() == 1


def test_equals_go_to_the_row_used_last():
    rows = PrefixCache(2, 4)
    rows.insert(0, [1, 2])
    rows.insert(1, [1, 2])
    assert rows.match([1, 2, 3]) == (1, 2)


def test_prompts_longer_than_the_rows():
    rows = PrefixCache(1, 3)
    rows.insert(0, [1, 2, 3])
    assert rows.match([1, 2, 3, 4]) == (0, 3)
    rows.lengthen(5)
    rows.insert(0, [4, 5], start=3)
    assert rows.match([1, 2, 3, 4, 5]) == (0, 5)


def test_no_rows_at_all():
    assert PrefixCache(0, 4).match([1, 2]) == (0, 0)


def shared(a, b):
    """How many ids two rows have in common at their beginning."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


@pytest.mark.parametrize("seed", range(50))
def test_against_looking_at_every_token(seed):
    rng = random.Random(seed)
    count, positions = rng.randint(1, 6), rng.randint(1, 9)
    rows, slow = PrefixCache(count, positions), [[] for _ in range(count)]
    for _ in range(60):
        ids = [rng.randrange(2) for _ in range(rng.randint(0, positions + 2))]
        if rng.random() < 0.4:
            row = rng.randrange(count)
            start = rng.randint(0, len(slow[row]))
            piece = ids[: positions - start]
            rows.insert(row, piece, start)
            slow[row] = slow[row][:start] + piece
        else:
            lengths = [shared(held, ids[:positions]) for held in slow]
            row, length = rows.match(ids)
            assert length == max(lengths)
            assert not length or lengths[row] == length
