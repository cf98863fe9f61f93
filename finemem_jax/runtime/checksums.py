"""Computes checksums of arrays on the devices that hold them, the same however the arrays are sharded.

    sum(x) = Σ_i bits(x_i) · Π_a w_a(i_a)   mod 2³²,   w_a(i) = 1 + 2 c_a i

over all elements i and axes a. Every weight is odd, hence invertible modulo 2³²: the sum changes with every bit. As
the weights differ from place to place, it also changes with nearly every exchange of elements. A sum may be taken in
any order, so XLA computes it from shards without moving them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax.runtime import compilation

_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32"}


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns a tree's leaves in their order, by path: {"params.layers.0.query": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@jax.jit
def _sums(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _sum(leaf, jax.lax.bitcast_convert_type, jnp), tree)


def prepare(tree: Any) -> None:
    """Compiles what `checksums` needs for trees like this one."""
    compilation.prepare(_sums, tree)


def checksums(tree: Any) -> dict[str, str]:
    """{path: dtype and checksum, e.g. "float32 1234"} of every array of a tree, of elements of 1, 2 or 4 bytes."""
    totals = leaves_by_path(compilation.call(_sums, tree))
    return {name: f"{leaf.dtype.name} {int(totals[name])}" for name, leaf in leaves_by_path(tree).items()}


def sum_of(array: np.ndarray) -> str:
    """The same of one array in the host's memory, slice by slice along its first axis to save memory."""
    total = 0
    for i, part in enumerate(array if array.ndim > 1 else [array]):
        first = (i,) if array.ndim > 1 else ()
        total += int(_sum(np.ascontiguousarray(part), lambda x, dtype: x.view(dtype), np, first=first))
    return f"{array.dtype.name} {total % 2**32}"


def _sum(leaf: Any, as_bits: Callable[[Any, str], Any], xp: Any, *, first: tuple[int, ...] = ()) -> Any:
    """The checksum of one array, as a uint32.

    Args:
        as_bits: Reads an array's bytes as another dtype.
        xp: NumPy or jax.numpy.
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


def _weight(index: Any, axis: int, xp: Any) -> Any:
    """w_a(i) of indices along an axis: odd, and with another multiplier c_a along every axis.

    The multipliers come from 2³²/φ, as in Fibonacci hashing, whose multiples spread evenly modulo 2³².
    """
    return index * xp.asarray(2 * (0x9E3779B1 * (axis + 1) % 2**30), "uint32") + xp.ones((), "uint32")
