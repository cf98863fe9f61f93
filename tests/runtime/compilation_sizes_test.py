"""Tests of finemem_jax/buckets.py: few sizes occur, and little is wasted."""

import pytest

from finemem_jax.runtime import compilation


@pytest.mark.parametrize(
    ("size", "rounded"), [(0, 1), (1, 1), (7, 7), (8, 8), (9, 10), (11, 12), (15, 16), (16, 16), (17, 20), (33, 40)]
)
def test_by_hand(size, rounded):
    assert compilation.bucket(size) == rounded
    assert compilation.bucket(10 * size, 10) == 10 * rounded


def test_few_sizes_occur_and_little_is_wasted():
    # 1 to 8 as they are, then four to an octave up to 1024: 8 + 7 · 4.
    rounded = [compilation.bucket(n) for n in range(1, 1025)]
    assert len(set(rounded)) == 36
    assert all(n <= size <= 1.25 * n for n, size in enumerate(rounded, start=1))


@pytest.mark.parametrize("unit", [1, 16, 100])
def test_all_up_to_a_size(unit):
    for size in (1, 5, 99, 1000):
        assert compilation.buckets_up_to(size, unit) == sorted(
            {compilation.bucket(n, unit) for n in range(1, size + 1)}
        )
