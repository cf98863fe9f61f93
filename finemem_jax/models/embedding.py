"""Looking tokens up in an embedding table that is split over devices. Knows nothing of layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from finemem_jax.models import logical_axes
from finemem_jax.models.attention import Array

_VOCAB, _EMBED = logical_axes.STORED["vocab"], logical_axes.STORED["embed"]


def embed(
    table: Float[Array, "V D"], ids: Int[Array, "N L"], dtype: jnp.dtype, mesh: Mesh | None = None
) -> Float[Array, "N L D"]:
    """table[ids], without any device ever holding more of the table than its share.

    Each device looks the tokens of all its fsdp neighbours up in its own columns, and they swap: what travels are the
    tokens' embeddings and not the table, which is larger, and the gradient comes back the same way.

    Args:
        dtype: Of the result.
        mesh: Devices that the table is split over by `logical_axes.STORED`, and rows by
            `logical_axes.ROWS`; None for one.
    """
    if mesh is None or mesh.size == 1 or len(ids) % logical_axes.size(mesh, logical_axes.ROWS):
        return table[ids].astype(dtype)

    def local(columns, own_ids):
        every_id = lax.all_gather(own_ids, _EMBED, axis=0, tiled=True)
        inside = every_id - lax.axis_index(_VOCAB) * len(columns)
        held = (inside >= 0) & (inside < len(columns))
        found = jnp.where(held[..., None], columns[jnp.where(held, inside, 0)], 0).astype(dtype)
        return lax.all_to_all(lax.psum(found, _VOCAB), _EMBED, split_axis=0, concat_axis=2, tiled=True)

    rows = P(logical_axes.ROWS, None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(_VOCAB, _EMBED), rows), out_specs=P(logical_axes.ROWS, None, None)
    )(table, ids)
