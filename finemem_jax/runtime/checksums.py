"""Checksums of arrays that do not depend on how they are spread over devices: computed where the arrays are.

A sum modulo 2³² over all elements' bits, each weighted by an odd number of its place: it changes with every bit, and
with nearly every exchange of elements.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax.runtime import compilation

_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32"}


@jax.jit
def _sums(tree):
    return jax.tree.map(lambda leaf: _sum(leaf, jax.lax.bitcast_convert_type, jnp), tree)


def prepare(tree: Any) -> None:
    """Compiles what `sums` needs for trees like this one."""
    compilation.prepare(_sums, tree)


def checksums(tree: Any) -> dict[str, str]:
    """{path: dtype and checksum, e.g. "float32 1234"} of every array of a tree, of elements of 1, 2 or 4 bytes."""
    leaves = jax.tree.leaves(tree)
    totals = jax.tree_util.tree_leaves_with_path(compilation.call(_sums, tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype.name} {int(total)}"
        for leaf, (path, total) in zip(leaves, totals, strict=True)
    }


def sum_of(array: np.ndarray) -> str:
    """The same of one array in the host's memory, a slice of its first axis after the other."""
    total = 0
    for i, part in enumerate(array if array.ndim > 1 else [array]):
        first = (i,) if array.ndim > 1 else ()
        total += int(_sum(np.ascontiguousarray(part), lambda x, dtype: x.view(dtype), np, first))
    return f"{array.dtype.name} {total % 2**32}"


def _sum(leaf, as_bits, xp, first=()):
    """Args:
    as_bits: Reads an array's bytes as another dtype.
    first: Indices of leading axes that the array is a slice at.
    """
    bits = leaf if leaf.dtype == bool else as_bits(leaf, _UNSIGNED[leaf.dtype.itemsize])
    weights = xp.ones((), "uint32")
    for axis, index in enumerate(first):
        weights = weights * _weight(xp.full((), index, "uint32"), axis, xp)
    for axis, size in enumerate(leaf.shape):
        own = _weight(xp.arange(size, dtype="uint32"), axis + len(first), xp)
        weights = weights * own.reshape([size if other == axis else 1 for other in range(leaf.ndim)])
    return (bits.astype("uint32") * weights).sum(dtype="uint32")


def _weight(index, axis, xp):
    """Of an index along an axis: odd, and other ones along every axis."""
    return index * xp.asarray(2 * (0x9E3779B1 * (axis + 1) % 2**30), "uint32") + xp.ones((), "uint32")
