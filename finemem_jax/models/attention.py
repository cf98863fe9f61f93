"""Attention over keys that come in segments, some of them shared by many rows. Knows nothing of layers or caches.

Rows of a memory rollout share long prefixes (instructions, worked examples, the chunk). Instead of copying the
keys of a prefix to every row, a query attends to several segments, and a segment may serve many rows at once:
its products are then a few large ones instead of many small ones, which is what CPUs, GPUs and TPUs like.

Sizes: N rows of queries, M rows of keys (M divides N), L queries, P keys, H query heads, K key heads,
R = N / M rows per key row, E = H / K query heads per key head, C = head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

# Either kind: JAX's under `jit`, NumPy's where the host fills in values. Functions of JAX take both.
Array = jax.Array | np.ndarray

# Finite, so that a query whose segment is masked whole yields weight 0 in the merge, not NaN.
_MASKED = -1e30


class Segment(NamedTuple):
    """Keys and values of one segment.

    Attributes:
        keys: Row m serves the query rows m R … (m + 1) R - 1.
        values: Like keys.
        mask: True where a query may look; [1 | N, 1 | L, P].
    """

    keys: Float[Array, "M K P C"]
    values: Float[Array, "M K P C"]
    mask: Bool[Array, "*_"]


def attend(queries: Float[Array, "N L H C"], segments: Sequence[Segment]) -> Float[Array, "N L H C"]:
    """Softmax attention over the keys of all segments together, scaled by 1/sqrt(C).

        out = Σ_s exp(m_s - m) o_s / Σ_s exp(m_s - m) z_s,   m = max_s m_s

    where segment s gives its unnormalised output o_s, its largest logit m_s and the sum z_s of its weights.
    Every query must see at least one key in some segment.
    """
    outputs, maxima, totals = zip(*(_attend_segment(queries, segment) for segment in segments), strict=True)
    top = jnp.stack(maxima).max(0)
    scales = [jnp.exp(maximum - top) for maximum in maxima]
    total = functools.reduce(jnp.add, [scale * z for scale, z in zip(scales, totals, strict=True)])
    mixed = functools.reduce(jnp.add, [scale[..., None] * out for scale, out in zip(scales, outputs, strict=True)])
    return (mixed / total[..., None]).reshape(queries.shape).astype(queries.dtype)


def _attend_segment(queries, segment):
    n, length, heads, width = queries.shape
    m, kv_heads, num_keys, _ = segment.keys.shape
    shared = (m, n // m, length, kv_heads, heads // kv_heads)
    grouped = queries.reshape(*shared, width) * width**-0.5
    logits = jnp.einsum("mrlkec,mkpc->mkrlep", grouped, segment.keys, preferred_element_type=jnp.float32)
    mask = segment.mask.reshape(-1, 1, n // m if segment.mask.shape[0] == n else 1, segment.mask.shape[1], 1, num_keys)
    logits = jnp.where(mask, logits, _MASKED)
    # Subtracting any constant leaves the result unchanged, so no gradient needs to flow through the maximum.
    maximum = jax.lax.stop_gradient(logits.max(-1))
    weights = jnp.exp(logits - maximum[..., None])
    out = jnp.einsum("mkrlep,mkpc->mrlkec", weights.astype(segment.values.dtype), segment.values)

    def per_query(x):
        return x.transpose(0, 2, 3, 1, 4).reshape(n, length, kv_heads, heads // kv_heads)

    return out.reshape(n, length, kv_heads, heads // kv_heads, width), per_query(maximum), per_query(weights.sum(-1))
