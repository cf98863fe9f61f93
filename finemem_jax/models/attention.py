"""Computes attention over trees of token rows and over cached keys. Knows nothing of layers or caches.

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from finemem_jax.models import logical_axes
from finemem_jax.models.logical_axes import Array

# Name of what a rematerialization policy should keep of "blocked" attention.
KEPT = "attention"
# Queries in a block of "blocked" attention: their logits should fit into a cache, and the blocks, which are unrolled,
# must not be many.
_QUERY_BLOCK, _MOST_BLOCKS = 64, 8
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
        keys: Row m serves the query rows m R … (m + 1) R - 1. Positions come last: with few queries a row, CPUs take
            half as long for products with keys that lie so.
        values: Of the same rows.
        mask: True where a query may look; [1 | N, 1 | L, P].
    """

    keys: Float[Array, "M K C P"]
    values: Float[Array, "M K P C"]
    mask: Bool[Array, "*_"]


class _Rows(NamedTuple):
    """Rows of queries with all keys that they may see, their own last; `valid` is False at padding."""

    queries: Float[jax.Array, "N L H C"]
    keys: Float[jax.Array, "N P K C"]
    values: Float[jax.Array, "N P K C"]
    valid: Bool[jax.Array, "N P"]


def choose(wanted: str, device: jax.Device, dtype: jnp.dtype, *, num_devices: int = 1) -> tuple[str, str]:
    """Picks an implementation that works on a device, by trying it on a few tokens.

    Args:
        wanted: A name that `attend_tree` knows, or "auto" for the platform's own, else "xla".

    Returns:
        The implementation, and why "auto" is not the platform's own kernel ("" where it is, or where there is none).

    Raises:
        ValueError: one that was asked for by name does not work; the message says why and what to set instead.
    """
    # Several CPU devices only stand in for others; the partitioner does better with plain products.
    alone = "blocked" if num_devices == 1 else "xla"
    own = {"tpu": "splash", "gpu": "cudnn", "cpu": alone}.get(device.platform, "xla")
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


def _probe(implementation: str, device: jax.Device, dtype: jnp.dtype) -> str:
    """Why an implementation fails on a device; "" if it works."""
    if implementation in ("xla", "blocked"):
        return ""
    x = jax.device_put(jnp.ones((1, _LANES, 2, 64), dtype), device)
    level = Level(x, x[:, :, :1], x[:, :, :1], jax.device_put(jnp.array([_LANES - 3]), device))

    def loss(level: Level) -> Array:
        return attend_tree([level, level], implementation)[-1].astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(loss, allow_int=True))(level))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def attend_tree(
    levels: Sequence[Level], implementation: str = "xla", mesh: Mesh | None = None
) -> list[Float[Array, "N L H C"]]:
    """Computes causal attention of every token to its row so far and to its row's ancestors, scaled by 1/sqrt(C).

    Args:
        levels: From the root to the leaves.
        implementation: "xla" (anywhere), "blocked" (CPUs), "cudnn" (NVIDIA GPUs, bfloat16 or float16), "splash" (TPUs;
            elsewhere it is interpreted, which is exact and very slow).
        mesh: Devices that split rows and heads; kernels must be told.

    Returns:
        One array per level. At padding it is finite and meaningless.
    """
    if implementation == "xla":
        return _tree_of_segments(levels)
    if implementation == "blocked":
        return [
            _blocked(level.queries, *([x[j] for x in levels[: i + 1]] for j in (1, 2, 3)))
            for i, level in enumerate(levels)
        ]
    if implementation == "splash":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        row_attention = functools.partial(_splash_rows, interpret=platform != "tpu")
    else:
        row_attention = _cudnn_rows
    return [_repeat_prefixes(levels[: i + 1], row_attention, mesh) for i in range(len(levels))]


def _tree_of_segments(levels: Sequence[Level]) -> list[Array]:
    """Attends level by level: to a row's own tokens, and to each ancestor's as a segment that serves many rows."""
    heads_first = [(level.keys.transpose(0, 2, 3, 1), level.values.transpose(0, 2, 1, 3)) for level in levels]
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


# --------------------------------------------------------------------------------------
# On a CPU: one head at a time, so that what is computed stays in its caches
# --------------------------------------------------------------------------------------


@jax.custom_vjp
def _blocked(queries: Array, keys: list[Array], values: list[Array], lengths: list[Array]) -> Array:
    """Attention of one level's rows to its ancestors' keys and, causally, to its own, which stand last.

    A batch of small products is slow on a CPU, and so is reading and writing all logits several times. Here each key
    head of each row of keys has a few plain matrix products, causal ones are cut into blocks of queries that leave out
    later keys, and the backward pass recomputes weights from log-sum-exps instead of keeping them:

        p = exp(s - ℓ)    dv = pᵀ g    ds = p (g vᵀ - Σ_c g out)    dq = ds k    dk = dsᵀ q
    """
    return _blocked_forward(queries, keys, values, lengths)[0]


def _blocked_forward(
    queries: Array, keys: list[Array], values: list[Array], lengths: list[Array]
) -> tuple[Array, tuple[Any, ...]]:
    parts = [
        jax.lax.map(
            functools.partial(_attend_one_head, causal=i == len(keys) - 1),
            (_by_head(queries, k), _keys_by_head(k), _keys_by_head(v), jnp.repeat(length, k.shape[2])),
        )
        for i, (k, v, length) in enumerate(zip(keys, values, lengths, strict=True))
    ]
    outputs = [_from_heads(out, queries.shape) for out, _ in parts]
    sums = [_from_heads(lse[..., None], (*queries.shape[:3], 1)) for _, lse in parts]
    total = functools.reduce(jnp.logaddexp, sums)
    out = sum(jnp.exp(lse - total) * out.astype(jnp.float32) for lse, out in zip(sums, outputs, strict=True))
    # The policy of "attention" in `decoder.Compute` keeps these two, so that no product is computed twice.
    out = checkpoint_name(jnp.asarray(out).astype(queries.dtype), KEPT)
    return out, (queries, keys, values, lengths, out, checkpoint_name(total, KEPT))


def _blocked_backward(kept: tuple[Any, ...], slope: Array) -> tuple[Any, ...]:
    queries, keys, values, lengths, out, total = kept
    through = (slope.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    dq, dk, dv = jnp.zeros(queries.shape, jnp.float32), [], []
    for i, (k, v, length) in enumerate(zip(keys, values, lengths, strict=True)):
        one_head = functools.partial(_slopes_of_one_head, causal=i == len(keys) - 1)
        by_head = [_by_head(x, k) for x in (queries, slope, total, through)]
        arrays = (*by_head, _keys_by_head(k), _keys_by_head(v), jnp.repeat(length, k.shape[2]))
        dq_of_heads, *others = jax.lax.map(one_head, arrays)
        dq = dq + _from_heads(dq_of_heads, queries.shape)
        for found, one in zip((dk, dv), others, strict=True):
            found.append(one.reshape(len(k), k.shape[2], *one.shape[1:]).transpose(0, 2, 1, 3).astype(k.dtype))
    no_slope = [np.zeros(length.shape, jax.dtypes.float0) for length in lengths]
    return dq.astype(queries.dtype), dk, dv, no_slope


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _attend_one_head(arrays: tuple[Array, ...], causal: bool) -> tuple[Array, Array]:
    """Output [R L, E, C] and log-sum-exp [R L, E] of the queries that one row of keys serves, for one key head."""
    queries, keys, values, length = arrays
    outputs, sums = [], []
    for block in _query_blocks(len(queries), len(keys), causal):
        logits = _block_logits(queries, keys, length, block=block)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out = (weights.astype(values.dtype) @ values[: block.visible]) / total.astype(values.dtype)
        outputs.append(out.reshape(block.end - block.start, *queries.shape[1:]))
        sums.append((top + jnp.log(total)).reshape(block.end - block.start, -1))
    return jnp.concatenate(outputs), jnp.concatenate(sums)


def _slopes_of_one_head(arrays: tuple[Array, ...], causal: bool) -> tuple[Array, Array, Array]:
    """Gradients of `_attend_one_head`'s queries, keys and values, from the slope of the merged output."""
    queries, slope, total, through, keys, values, length = arrays
    scale = queries.shape[-1] ** -0.5
    dq, dk, dv = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for block in _query_blocks(len(queries), len(keys), causal):
        start, end, visible, _ = block
        logits = _block_logits(queries, keys, length, block=block)
        q, g, lse, sent = (_flat(x[start:end]) for x in (queries, slope, total, through))
        weights = jnp.exp(logits - lse)
        dlogits = weights * (jnp.dot(g, values[:visible].T, preferred_element_type=jnp.float32) - sent)
        weights, dlogits = weights.astype(keys.dtype), dlogits.astype(keys.dtype)
        dq.append(scale * (dlogits @ keys[:visible]).reshape(end - start, *queries.shape[1:]).astype(jnp.float32))
        dk = dk.at[:visible].add(scale * jnp.dot(dlogits.T, q, preferred_element_type=jnp.float32))
        dv = dv.at[:visible].add(jnp.dot(weights.T, g, preferred_element_type=jnp.float32))
    return jnp.concatenate(dq), dk, dv


class _QueryBlock(NamedTuple):
    """Queries from `start` to `end`, the number of keys that any of them may see, and whether a row's own are seen."""

    start: int
    end: int
    visible: int
    causal: bool


def _query_blocks(num_queries: int, num_keys: int, causal: bool) -> Iterator[_QueryBlock]:
    """Cuts queries into blocks; a row's own keys are as many as its queries."""
    size = _QUERY_BLOCK * -(-num_queries // (_QUERY_BLOCK * _MOST_BLOCKS))
    for start in range(0, num_queries, size):
        end = min(start + size, num_queries)
        yield _QueryBlock(start, end, end if causal else num_keys, causal)


def _block_logits(queries: Array, keys: Array, length: Array, *, block: _QueryBlock) -> Array:
    """Logits of a block's queries, in float32; masked beyond the ancestor's length, or causally among a row's own."""
    start, end, visible, causal = block
    scaled = _flat(queries[start:end]) * jnp.asarray(queries.shape[-1] ** -0.5, queries.dtype)
    logits = jnp.dot(scaled, keys[:visible].T, preferred_element_type=jnp.float32)
    position = jnp.arange(visible)[None]
    limit = start + 1 + jnp.arange(end - start)[:, None] if causal else length[None, None]
    seen = jnp.broadcast_to(position < limit, (end - start, visible))
    return jnp.where(jnp.repeat(seen, queries.shape[1], axis=0), logits, _MASKED)


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _by_head(x: Array, keys: Array) -> Array:
    """[N L H C] to [M K, R L, E, C]: for each key head of each row of keys the queries that it serves."""
    (m, _, kv_heads, _), (n, length, heads, width) = keys.shape, x.shape
    grouped = x.reshape(m, n // m * length, kv_heads, heads // kv_heads, width)
    return grouped.transpose(0, 2, 1, 3, 4).reshape(m * kv_heads, n // m * length, heads // kv_heads, width)


def _from_heads(x: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_by_head`."""
    heads, per_head, width = shape[2], x.shape[2], shape[3]
    grouped = x.reshape(-1, heads // per_head, x.shape[1], per_head, width)
    return grouped.transpose(0, 2, 1, 3, 4).reshape(shape)


def _keys_by_head(x: Array) -> Array:
    """[M P K C] to [M K, P, C]."""
    m, num_keys, kv_heads, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(m * kv_heads, num_keys, width)


# --------------------------------------------------------------------------------------
# On accelerators: their own kernels
# --------------------------------------------------------------------------------------


def _repeat_prefixes(path: Sequence[Level], row_attention: Callable[[_Rows], Array], mesh: Mesh | None) -> Array:
    """Attends from the last level of `path`, its rows' keys put together from all levels."""
    queries, count = path[-1].queries, len(path[-1].queries)

    def joined(arrays: list[Array]) -> jax.Array:
        return jnp.concatenate([jnp.repeat(x, count // len(x), axis=0) for x in arrays], axis=1)

    prefixes = [jnp.arange(level.keys.shape[1])[None] < level.lengths[:, None] for level in path[:-1]]
    valid = joined([*prefixes, jnp.arange(queries.shape[1])[None] < path[-1].lengths[:, None]])
    rows = _Rows(
        jnp.asarray(queries), joined([level.keys for level in path]), joined([level.values for level in path]), valid
    )
    if mesh is None or mesh.size == 1:
        return row_attention(rows)
    # A kernel is opaque to the partitioner; rows and heads are independent, so each device runs it on its own.
    split_rows = logical_axes.ROWS if count % logical_axes.size(mesh, logical_axes.ROWS) == 0 else None
    tensor = logical_axes.COMPUTED["kv_heads"]
    split_heads = tensor if rows.keys.shape[2] % logical_axes.size(mesh, tensor) == 0 else None
    spec = P(split_rows, None, split_heads, None)
    specs = _Rows._make((spec, spec, spec, P(split_rows, None)))
    return jax.shard_map(row_attention, mesh=mesh, in_specs=(specs,), out_specs=spec, check_vma=False)(rows)


def _splash_rows(rows: _Rows, interpret: bool) -> Array:
    """Runs the TPU's splash kernel: causal, with padding masked by segment ids."""
    queries, keys, values, valid = rows
    n, length, heads, width = queries.shape
    # Keys are padded in front, where no query may look anyway, so that the causal diagonal stays at their end.
    front, back = -keys.shape[1] % _LANES, -length % _LANES
    keys, values = (jnp.pad(x, ((0, 0), (front, 0), (0, 0), (0, 0))) for x in (keys, values))
    # Causality hides a row's own padding from its tokens, and padding itself must see something.
    visible = valid.at[:, -length:].set(True)
    kv_ids = jnp.pad(visible, ((0, 0), (front, 0))).astype(jnp.int32)
    queries = jnp.pad(queries, ((0, 0), (0, back), (0, 0), (0, 0)))
    kernel = _splash_kernel(heads, length + back, keys.shape[1], offset=keys.shape[1] - length, interpret=interpret)
    segment_ids = splash.SegmentIds(q=jnp.ones((n, length + back), jnp.int32), kv=kv_ids)
    scaled = (queries * width**-0.5).astype(queries.dtype)
    heads_first = [x.transpose(0, 2, 1, 3) for x in (scaled, keys, values)]
    out = jnp.asarray(jax.vmap(kernel)(*heads_first, segment_ids))
    return out.transpose(0, 2, 1, 3)[:, :length]


def _splash_kernel(heads: int, num_queries: int, num_keys: int, *, offset: int, interpret: bool) -> Callable[..., Any]:
    mask = splash_masks.MultiHeadMask([splash_masks.CausalMask((num_queries, num_keys), offset)] * heads)
    q, kv = _block(num_queries), _block(num_keys)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _block(length: int) -> int:
    """The largest block of at most 512 positions that divides a length."""
    return next(size for size in (512, 384, 256, 128) if length % size == 0)


def _cudnn_rows(rows: _Rows) -> Array:
    """Runs cuDNN's flash attention: by lengths where rows have no prefix, else with a mask."""
    queries, keys, values, valid = rows
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
    """Computes softmax attention over the keys of all segments together, scaled by 1/sqrt(C).

        out = Σ_s exp(m_s - m) o_s / Σ_s exp(m_s - m) z_s,   m = max_s m_s

    where segment s gives its unnormalized output o_s, its largest logit m_s and the sum z_s of its weights.
    Every query must see at least one key in some segment.
    """
    outputs, maxima, totals = zip(*(_attend_segment(queries, segment) for segment in segments), strict=True)
    top = jnp.stack(maxima).max(0)
    scales = [jnp.exp(maximum - top) for maximum in maxima]
    total = functools.reduce(jnp.add, [scale * z for scale, z in zip(scales, totals, strict=True)])
    mixed = functools.reduce(jnp.add, [scale[..., None] * out for scale, out in zip(scales, outputs, strict=True)])
    return (mixed / total[..., None]).reshape(queries.shape).astype(queries.dtype)


def _attend_segment(queries: Array, segment: Segment) -> tuple[Array, Array, Array]:
    """Unnormalized output, largest logit and sum of weights of each query, over one segment."""
    n, length, heads, width = queries.shape
    m, kv_heads, num_keys, _ = segment.values.shape
    shared = (m, n // m, length, kv_heads, heads // kv_heads)
    grouped = queries.reshape(*shared, width) * width**-0.5
    logits = jnp.einsum("mrlkec,mkcp->mkrlep", grouped, segment.keys, preferred_element_type=jnp.float32)
    mask = segment.mask.reshape(-1, 1, n // m if segment.mask.shape[0] == n else 1, segment.mask.shape[1], 1, num_keys)
    logits = jnp.where(mask, logits, _MASKED)
    # Subtracting any constant leaves the result unchanged, so no gradient needs to flow through the maximum.
    maximum = jax.lax.stop_gradient(logits.max(-1))
    weights = jnp.exp(logits - maximum[..., None])
    # In the product's own order of axes; asked for another, XLA on CPUs takes loops ten times as slow.
    out = jnp.einsum("mkrlep,mkpc->mkrlec", weights.astype(segment.values.dtype), segment.values)
    out = out.transpose(0, 2, 3, 1, 4, 5)

    def per_query(x: Array) -> Array:
        return x.transpose(0, 2, 3, 1, 4).reshape(n, length, kv_heads, heads // kv_heads)

    return out.reshape(n, length, kv_heads, heads // kv_heads, width), per_query(maximum), per_query(weights.sum(-1))
