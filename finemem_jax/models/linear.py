"""Multiplies with weights as training on CPUs and meshes needs it: projections, and look-ups in a split embedding.

Sizes: T tokens, in any number of leading axes; I channels in, O channels out; N rows of L tokens, V vocabulary, D
embed_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from finemem_jax.models import logical_axes
from finemem_jax.models.logical_axes import Array

_VOCAB, _EMBED = logical_axes.STORED["vocab"], logical_axes.STORED["embed"]


@jax.custom_vjp
def project(states: Float[Array, "*T I"], weight: Float[Array, "I O"]) -> Float[Array, "*T O"]:
    """Multiplies states @ weight, with a gradient that transposes little. Only reverse mode is defined.

        d states = d out · weightᵀ        d weight = statesᵀ · d out

    On a CPU one operand of the weight's gradient is copied transposed, and whatever is element-wise before it is
    computed again in that slow order: JAX's own rule always has that happen to `d out`, which behind a gate is the
    widest array of a layer. Here it is whichever has fewer channels; a layer of SmolLM2 takes a quarter less time.
    A TPU's compiled update needs the same memory and sends the same bytes either way.
    """
    return states @ weight


def _project_forward(states: Any, weight: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    # Kept is only what the wanted gradients need: with adapters, weights are frozen.
    kept = states.value if weight.perturbed else None, weight.value if states.perturbed else None
    return states.value @ weight.value, kept


def _project_backward(kept: tuple[Array | None, Array | None], slope: Array) -> tuple[Array | None, Array | None]:
    states, weight = kept
    return None if weight is None else slope @ weight.T, None if states is None else _weight_slope(states, slope)


def _weight_slope(states: Array, slope: Array) -> Array:
    tokens = tuple(range(states.ndim - 1))

    def over_tokens(a: Array, b: Array) -> Array:
        return lax.dot_general(a, b, ((tokens, tokens), ((), ())))

    narrow = states.shape[-1] <= slope.shape[-1]
    return over_tokens(states, slope) if narrow else over_tokens(slope, states).T


project.defvjp(_project_forward, _project_backward, symbolic_zeros=True)


def embed(
    table: Float[Array, "V D"], ids: Int[Array, "N L"], *, dtype: jnp.dtype, mesh: Mesh | None = None
) -> Float[Array, "N L D"]:
    """Looks up table[ids], without any device ever holding more of the table than its shard.

    Each device looks the tokens of all its fsdp neighbors up in its own columns, and they swap: what travels are the
    tokens' embeddings and not the table, which is larger, and the gradient comes back the same way.

    Args:
        dtype: Of the result.
        mesh: Devices that the table is split over by `logical_axes.STORED`, and rows by
            `logical_axes.ROWS`; None for one.
    """
    if mesh is None or mesh.size == 1 or len(ids) % logical_axes.size(mesh, logical_axes.ROWS):
        return table[ids].astype(dtype)

    def local(columns: Array, own_ids: Array) -> Array:
        every_id = lax.all_gather(own_ids, _EMBED, axis=0, tiled=True)
        inside = every_id - lax.axis_index(_VOCAB) * len(columns)
        is_here = (inside >= 0) & (inside < len(columns))
        found = jnp.where(is_here[..., None], columns[jnp.where(is_here, inside, 0)], 0).astype(dtype)
        return lax.all_to_all(lax.psum(found, _VOCAB), _EMBED, split_axis=0, concat_axis=2, tiled=True)

    rows = P(logical_axes.ROWS, None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(_VOCAB, _EMBED), rows), out_specs=P(logical_axes.ROWS, None, None)
    )(table, ids)
