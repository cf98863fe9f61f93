"""Attention over trees of token rows and over cached keys. Knows nothing of layers or caches.

Rows of a memory rollout share long prefixes (instructions, worked examples, the chunk), whose keys stand once and serve
many rows. Where products are plain matrix products ("xla") nothing is ever copied to the rows: a query attends to
several segments, and a segment serves many rows at once, in a few large products instead of many small ones. The
kernels of accelerators ("splash" on TPUs, "cudnn" on GPUs) want all keys of a row in one piece; there the keys and
values of prefixes are repeated, and nothing else is.

Sizes: N rows of queries, M rows of keys (M divides N), L queries, P keys, H query heads, K key heads,
R = N / M rows per key row, E = H / K query heads per key head, C = head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from finemem_jax.models import axes
from finemem_jax.models.axes import Array

# Lengths that the TPU kernel works on are multiples of this.
_LANES = 128
# Finite, so that a query whose segment is masked whole yields weight 0 in the merge, not NaN.
_MASKED = -1e30


class Level(NamedTuple):
    """Rows of one level of a tree; N divides the next level's N. Padding is on the right."""

    queries: Float[Array, "N L H C"]
    keys: Float[Array, "N L K C"]
    values: Float[Array, "N L K C"]
    lengths: Int[Array, " N"]


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


def choose(wanted: str, device: jax.Device, dtype: jnp.dtype) -> tuple[str, str]:
    """Picks an implementation that works on a device, by trying it on a few tokens.

    Args:
        wanted: "xla", "cudnn", "splash", or "auto" for the platform's own kernel, else "xla".

    Returns:
        The implementation, and why "auto" is not the platform's own kernel ("" where it is, or where there is none).

    Raises:
        ValueError: one that was asked for by name does not work; the message says why and what to set instead.
    """
    own = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform, "xla")
    implementation = own if wanted == "auto" else wanted
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(implementation)
    if needs and needs != device.platform:
        problem = f"it needs a {needs.upper()}, and this is a {device.platform.upper()}"
    elif implementation == "cudnn" and dtype not in (jnp.bfloat16, jnp.float16):
        problem = f"it needs model.compute_dtype=bfloat16, not {dtype}"
    else:
        problem = _probe(implementation, device, dtype)
    if not problem:
        return implementation, ""
    if wanted == "auto":
        return "xla", f"attention: {implementation} is not used ({problem}); xla is, which needs more memory and time"
    raise ValueError(f"model.attention={wanted!r} does not work here: {problem}; set model.attention='auto' or 'xla'.")


def _probe(implementation, device, dtype):
    """Why an implementation fails on a device; "" if it works."""
    if implementation == "xla":
        return ""
    x = jax.device_put(jnp.ones((1, _LANES, 2, 64), dtype), device)
    level = Level(x, x[:, :, :1], x[:, :, :1], jax.device_put(jnp.array([_LANES - 3]), device))

    def loss(level):
        return attend_tree([level, level], implementation)[-1].astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(loss, allow_int=True))(level))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def attend_tree(
    levels: Sequence[Level], implementation: str = "xla", mesh: Mesh | None = None
) -> list[Float[Array, "N L H C"]]:
    """Causal softmax attention, scaled by 1/sqrt(C), of every token to its row so far and to its row's ancestors.

    Args:
        levels: From the root to the leaves.
        implementation: "xla" (anywhere), "cudnn" (NVIDIA GPUs, bfloat16 or float16), "splash" (TPUs; elsewhere it is
            interpreted, which is exact and very slow).
        mesh: Devices that share out rows and heads; kernels must be told.

    Returns:
        One array per level. At padding it is finite and meaningless.
    """
    if implementation == "xla":
        return _tree_of_segments(levels)
    if implementation == "splash":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        row_attention = functools.partial(_splash_rows, interpret=platform != "tpu")
    else:
        row_attention = _cudnn_rows
    return [_repeat_prefixes(levels[: i + 1], row_attention, mesh) for i in range(len(levels))]


def _tree_of_segments(levels):
    heads_first = [(level.keys.transpose(0, 2, 1, 3), level.values.transpose(0, 2, 1, 3)) for level in levels]
    mixed = []
    for i, (queries, *_) in enumerate(levels):
        length = queries.shape[1]
        segments = [Segment(*heads_first[i], jnp.tril(jnp.ones((1, length, length), bool)))]
        for level, keys_and_values in zip(levels[:i], heads_first, strict=False):
            visible = jnp.arange(level.keys.shape[1])[None, None, :] < level.lengths[:, None, None]
            visible = jnp.repeat(visible, len(queries) // len(visible), axis=0)
            segments.append(Segment(*keys_and_values, visible))
        mixed.append(attend(queries, segments))
    return mixed


def _repeat_prefixes(path, row_attention, mesh):
    """Attention of the last level of `path`, its rows' keys put together from all levels."""
    queries, rows = path[-1].queries, len(path[-1].queries)

    def joined(arrays):
        return jnp.concatenate([jnp.repeat(x, rows // len(x), axis=0) for x in arrays], axis=1)

    prefixes = [jnp.arange(level.keys.shape[1])[None] < level.lengths[:, None] for level in path[:-1]]
    valid = joined([*prefixes, jnp.arange(queries.shape[1])[None] < path[-1].lengths[:, None]])
    args = (queries, joined([level.keys for level in path]), joined([level.values for level in path]), valid)
    if mesh is None or mesh.size == 1:
        return row_attention(*args)
    # A kernel is opaque to the partitioner; rows and heads are independent, so each device runs it on its own.
    split_rows = axes.ROWS if rows % axes.size(mesh, axes.ROWS) == 0 else None
    tensor = axes.COMPUTED["kv_heads"]
    split_heads = tensor if args[1].shape[2] % axes.size(mesh, tensor) == 0 else None
    spec = P(split_rows, None, split_heads, None)
    mapped = jax.shard_map(
        row_attention, mesh=mesh, in_specs=(spec, spec, spec, P(split_rows, None)), out_specs=spec, check_vma=False
    )
    return mapped(*args)


def _splash_rows(queries, keys, values, valid, interpret):
    n, length, heads, width = queries.shape
    # Keys are padded in front, where no query may look anyway, so that the causal diagonal stays at their end.
    front, back = -keys.shape[1] % _LANES, -length % _LANES
    keys, values = (jnp.pad(x, ((0, 0), (front, 0), (0, 0), (0, 0))) for x in (keys, values))
    # Causality hides a row's own padding from its tokens, and padding itself must see something.
    visible = valid.at[:, -length:].set(True)
    kv_ids = jnp.pad(visible, ((0, 0), (front, 0))).astype(jnp.int32)
    queries = jnp.pad(queries, ((0, 0), (0, back), (0, 0), (0, 0)))
    kernel = _splash_kernel(heads, length + back, keys.shape[1], keys.shape[1] - length, interpret)
    segment_ids = splash.SegmentIds(q=jnp.ones((n, length + back), jnp.int32), kv=kv_ids)
    scaled = (queries * width**-0.5).astype(queries.dtype)
    heads_first = [x.transpose(0, 2, 1, 3) for x in (scaled, keys, values)]
    out = jnp.asarray(jax.vmap(kernel)(*heads_first, segment_ids))
    return out.transpose(0, 2, 1, 3)[:, :length]


def _splash_kernel(heads, num_queries, num_keys, offset, interpret):
    mask = splash_masks.MultiHeadMask([splash_masks.CausalMask((num_queries, num_keys), offset)] * heads)
    q, kv = _block(num_queries), _block(num_keys)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _block(length):
    """The largest block of at most 512 positions that divides a length."""
    return next(size for size in (512, 384, 256, 128) if length % size == 0)


def _cudnn_rows(queries, keys, values, valid):
    kernel = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    length, num_keys = queries.shape[1], keys.shape[1]
    if length == num_keys:
        lengths = valid.sum(1, dtype=jnp.int32)
        out = kernel(queries, keys, values, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
        # What the kernel leaves at padding is not promised to be finite.
        return jnp.where(valid[:, :, None, None], out, 0)
    causal = jnp.arange(num_keys)[None] <= jnp.arange(length)[:, None] + (num_keys - length)
    visible = causal[None] & valid.at[:, -length:].set(True)[:, None]
    return kernel(queries, keys, values, mask=visible[:, None])


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
