"""Says along which axes of the mesh parameters and activations are split, by one table of logical axes.

The mesh has the axes "data", "fsdp" and "tensor". Rows of a batch are split over the first two. A parameter is split
over "fsdp" only where it is stored: a layer that computes with it has all of that axis, and its part along "tensor".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Either kind: JAX's under `jit`, NumPy's where the host fills in values. Functions of JAX take both.
Array = jax.Array | np.ndarray

MESH = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Logical axis → mesh axis where it is stored; None means whole on every device.
STORED = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
    "rank": None,
}
# … and where it is computed with; activations have these axes too. Between the products of a layer, where nothing looks
# at other tokens, devices along "tensor" hold a part of the tokens each ("apart").
COMPUTED = {**STORED, "embed": None, "rows": ROWS, "tokens": None, "apart": "tensor", "channels": None}


def size(mesh: Mesh, axis: str | Sequence[str] | None) -> int:
    """Number of parts that a mesh axis, or several together, split something into."""
    if axis is None:
        return 1
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


def constrain(mesh: Mesh | None, x: Array, names: Sequence[str]) -> Array:
    """Tells the compiler where an array of a computation lives. An axis that cannot be split evenly stays whole.

    Args:
        mesh: None, or a mesh of one device: nothing to tell.
        names: Logical axis of each dimension; keys of COMPUTED.
    """
    return _constrain(mesh, x, names, table=COMPUTED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gather(mesh: Mesh | None, names: tuple[str, ...], x: jax.Array) -> jax.Array:
    """Gathers a stored parameter for a computation; its gradient goes straight back to where the parameter is stored.

    The gradient is so scattered while it is summed over devices; gathered first, it would travel twice as far.
    """
    return _constrain(mesh, x, names, table=COMPUTED)


gather.defvjp(
    lambda mesh, names, x: (gather(mesh, names, x), None),
    lambda mesh, names, _, slope: (_constrain(mesh, slope, names, table=STORED),),
)


def place(
    mesh: Mesh, shape: Sequence[int], names: Sequence[str], *, table: Mapping[str, Any] = COMPUTED
) -> NamedSharding:
    """Where an array with these logical axes lives. An axis that cannot be split evenly stays whole."""
    axes = [table[name] for name in names]
    fitting = [axis if length % size(mesh, axis) == 0 else None for axis, length in zip(axes, shape, strict=True)]
    while fitting and fitting[-1] is None:  # As JAX names the places of what it computes: names are compared.
        fitting.pop()
    return NamedSharding(mesh, P(*fitting))


def _constrain(mesh: Mesh | None, x: Any, names: Sequence[str], *, table: Mapping[str, Any]) -> Any:
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, place(mesh, x.shape, names, table=table))
