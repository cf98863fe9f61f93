"""Runs the decoder with a cache of keys and values, as generation needs it. Knows nothing of sampling or requests.

Sizes: N rows, L tokens per row, S cache positions per row, P positions of the shared prefix, D embed_dim, K key heads,
C head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from finemem_jax.models import attention, decoder, linear, logical_axes, sharding
from finemem_jax.models.attention import Segment
from finemem_jax.models.decoder import Params
from finemem_jax.models.logical_axes import Array
from finemem_jax.models.presets import DecoderConfig

# All parameters but the layers', and one tree per layer, whose kernels lie (out, in) or are `Int8`; or the layers
# stacked, as they are trained.
Weights = tuple[Params, list[Params] | Params]
# Keys [N K C P] and values [N K P C] of one layer; see `attention.Segment` for why.
LayerCache = tuple[Array, Array]
# Tokens of a row whose attention over a cache is computed together.
_QUERY_BLOCK = 256
# Logical axes of hidden states, one a row; of a layer's keys; and of its values.
STATES = ("rows", "embed")
_KEYS, _VALUES = ("rows", "kv_heads", "channels", "tokens"), ("rows", "kv_heads", "tokens", "channels")


class Int8(NamedTuple):
    """A kernel in a quarter of float32's memory: values [O I] and scale [O], kernel[o, i] ≈ values[o, i] scale[o].

    Or where the two live.
    """

    values: Array | NamedSharding
    scale: Array | NamedSharding


def in_place(params: Params) -> Weights:
    """Returns the parameters themselves, as decoding takes them; nothing is copied."""
    return {name: leaf for name, leaf in params.items() if name != "layers"}, params["layers"]


def layout(
    config: DecoderConfig, params: Params, dtype: str | jnp.dtype, *, int8: bool = False
) -> tuple[Params, list[Params]]:
    """Copies all parameters into the layout that decoding reads.

    A tree per layer, since slicing the stacked layers inside a decoding step would copy the whole model at every call.
    Kernels lie (out, in), which CPUs multiply few rows with a fifth faster; accelerators do not mind.

    Args:
        int8: Round the layers' kernels to 8 bits, with a scale for each channel out: what is drawn then is not quite
            what the parameters would draw.
    """

    def one(leaf: Array) -> Array | Int8:
        if leaf.ndim < 2:
            return jnp.array(leaf, dtype)
        return _rounded(leaf.T, dtype) if int8 else jnp.array(leaf.T, dtype)

    rest = {name: jnp.array(leaf, dtype) for name, leaf in params.items() if name != "layers"}
    columns = params["layers"].items()
    return rest, [{name: one(column[i]) for name, column in columns} for i in range(config.num_layers)]


def _rounded(kernel: Array, dtype: str | jnp.dtype) -> Int8:
    """Rounds a kernel to 8 bits, symmetrically, with one scale per output channel."""
    scale = jnp.maximum(jnp.abs(kernel).max(1), 1e-30) / 127
    return Int8(jnp.round(kernel / scale[:, None]).astype(jnp.int8), scale.astype(dtype))


def _kernel(leaf: Array | Int8, dtype: jnp.dtype) -> Array:
    """Turns a parameter of a laid-out layer into what the layer multiplies with."""
    if isinstance(leaf, Int8):
        return jnp.asarray(leaf.values).T.astype(dtype) * jnp.asarray(leaf.scale)[None]
    return leaf.T if leaf.ndim == 2 else leaf


def shardings(config: DecoderConfig, mesh: Mesh, *, whole: bool, int8: bool = False) -> tuple[Params, list[Params]]:
    """Where the leaves of `layout` live: split along "tensor", and unless `whole` along "fsdp" as they are stored.

    Split along "fsdp", devices that split the rows must sum partial products for every single token; whole, they send
    next to nothing, and each stores `fsdp` times as much.
    """
    stored = sharding.param_shardings(config, mesh)

    def one(place: NamedSharding, stacked: bool) -> NamedSharding | Int8:
        spec = [None if whole and axis == logical_axes.STORED["embed"] else axis for axis in place.spec]
        if not stacked:
            return NamedSharding(mesh, P(*spec))
        out, *rest = spec[:0:-1]
        kernel = NamedSharding(mesh, P(out, *rest))
        return Int8(kernel, NamedSharding(mesh, P(out))) if int8 and rest else kernel

    rest = {name: one(place, False) for name, place in stored.items() if name != "layers"}
    layer = {name: one(place, True) for name, place in stored["layers"].items()}
    return rest, [layer] * config.num_layers


def empty(config: DecoderConfig, rows: int, positions: int, *, dtype: str = "float32") -> list[LayerCache]:
    """Zeros for keys and values, one pair per layer (two arrays each, since donation forbids sharing)."""
    heads, width = config.num_kv_heads, config.head_dim
    return [
        (jnp.zeros((rows, heads, width, positions), dtype), jnp.zeros((rows, heads, positions, width), dtype))
        for _ in range(config.num_layers)
    ]


def data_shards(mesh: Mesh | None, rows: int) -> int:
    """In how many parts devices split the rows of a cache; 1 where they cannot do so evenly."""
    count = 1 if mesh is None else logical_axes.size(mesh, logical_axes.ROWS)
    return count if rows % count == 0 else 1


def cache_shardings(mesh: Mesh, cache: Sequence[LayerCache]) -> list[tuple[NamedSharding, NamedSharding]]:
    """Where a cache lives on a mesh: rows over data and fsdp, heads over tensor, if they can be split evenly."""
    return [(logical_axes.place(mesh, k.shape, _KEYS), logical_axes.place(mesh, v.shape, _VALUES)) for k, v in cache]


def constrain(mesh: Mesh | None, cache: Sequence[LayerCache]) -> list[LayerCache]:
    """Tells the compiler that rows are split along data and fsdp, heads along tensor."""
    return [(logical_axes.constrain(mesh, k, _KEYS), logical_axes.constrain(mesh, v, _VALUES)) for k, v in cache]


class Packed(NamedTuple):
    """Rows that pack several continuations of one text: each token sees the text and its own continuation.

    Attributes:
        ids: The text, then the continuations, then padding.
        segment_ids: Which continuation each token belongs to, from 1 on; 0 for the text, which comes first; -1 for
            padding.
        positions: How many tokens of the text and of its own continuation come before each token.
    """

    ids: Int[Array, "N L"]
    segment_ids: Int[Array, "N L"]
    positions: Int[Array, "N L"]


class NewTokens(NamedTuple):
    """Tokens to append to the rows of a cache.

    Attributes:
        ids: Padded on the right.
        starts: Filled positions of each row; starts + L <= S, else the write is shifted.
        lengths: How many of a row's tokens are no padding; None where nobody asks.
        packed: The same tokens, where a row packs several continuations; `starts` must then be 0.
    """

    ids: Int[Array, "N L"]
    starts: Int[Array, " N"]
    lengths: Int[Array, " N"] | None = None
    packed: Packed | None = None


class Context(NamedTuple):
    """What all rows read.

    Attributes:
        weights: As `layout` or `in_place` returns them.
        prefix: Keys and values of the shared prefix, one cache row per layer; P may be 0.
        prefix_length: How many of the P positions are valid.
    """

    weights: Weights
    prefix: Sequence[LayerCache]
    prefix_length: Int[Array, ""] | np.int32


def extend(
    config: DecoderConfig,
    context: Context,
    cache: Sequence[LayerCache],
    *,
    new: NewTokens,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "N L D"], list[LayerCache]]:
    """Appends tokens to cached rows and returns their final hidden states.

    Row n's tokens stand at positions prefix_length + starts[n] … and see the shared prefix, row n's cache below
    starts[n], and their own predecessors. Tokens past a row's true length may be garbage: a later call with
    `starts` at the true length overwrites them before anything can see them.

    Args:
        cache: Keys and values per row. Donate it.
        mesh: Devices that split the rows, and gather each layer's weights, which are less than the states of many
            tokens. None leaves it to the compiler, which adds up partial products instead.

    Returns:
        Hidden states, and the new cache.
    """
    outer, layers = context.weights
    if mesh is not None and len(new.ids) % logical_axes.size(mesh, logical_axes.ROWS):
        mesh = None

    def constrain(array: Array, names: tuple[str, ...]) -> Array:
        return logical_axes.constrain(mesh, array, names)

    positions, mask = _positions_and_mask(new, cache[0][1].shape[2])
    rotation = decoder.rotary(config, context.prefix_length + positions)
    prefix_size = context.prefix[0][1].shape[2]
    prefix_mask = (jnp.arange(prefix_size) < context.prefix_length)[None, None, :]
    x = linear.embed(outer["embedding"], new.ids, dtype=outer["embedding"].dtype, mesh=mesh)
    new_cache = []
    for i, (prefix, row) in enumerate(zip(context.prefix, cache, strict=True)):

        def attend(
            queries: Array, keys: Array, values: Array, *, prefix: LayerCache = prefix, row: LayerCache = row
        ) -> tuple[Array, LayerCache]:
            keys = _write(row[0], keys.transpose(0, 2, 3, 1), new.starts, axis=2)
            values = _write(row[1], values.transpose(0, 2, 1, 3), new.starts, axis=1)

            def attend_block(queries: Array, mask: Array) -> Array:
                segments = [Segment(keys, values, mask)]
                if prefix_size:
                    segments.append(Segment(*prefix, prefix_mask))
                return attention.attend(queries, segments)

            return _in_blocks(attend_block, queries, mask), (keys, values)

        if isinstance(layers, list):
            params = {name: _kernel(leaf, x.dtype) for name, leaf in layers[i].items()}
        else:
            params = {name: leaf[i] for name, leaf in layers.items()}
        layer = decoder.bind(decoder.Layer, config, decoder.gathered(config, params, mesh))
        x, written = layer(constrain(x, ("rows", "apart", "embed")), rotation, attend=attend, constrain=constrain)
        new_cache.append(written)
    x = constrain(x, ("rows", "tokens", "embed"))
    return decoder.rms_norm(x, outer["final_norm"], config.norm_epsilon), new_cache


def _positions_and_mask(new: NewTokens, size: int) -> tuple[Int[Array, "N L"], Bool[Array, "N L S"]]:
    """Each new token's position after the shared prefix, and which of its row's S cache positions it sees."""
    positions = new.starts[:, None] + jnp.arange(new.ids.shape[1])[None]
    mask = jnp.arange(size)[None, None] <= positions[:, :, None]
    if new.packed is None:
        return positions, mask
    # Causal, and of other continuations nothing: the common text (segment 0) and the token's own segment.
    segment_ids = new.packed.segment_ids
    mask &= (segment_ids[:, None] == 0) | (segment_ids[:, None] == segment_ids[:, :, None])
    return new.packed.positions, mask


def logits(config: DecoderConfig, weights: Weights, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
    """Multiplies final hidden states with the output head, in float32."""
    head = weights[0]["embedding" if config.tie_embeddings else "head"]
    return jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)


def _in_blocks(function: Callable[..., Array], *arrays: Array) -> Array:
    """Computes function(*arrays), [N, L, ...] each, block of tokens by block where they are many and divide evenly.

    Logits of 2,048 tokens over 8,192 positions take 64 MB a head and row; so only a block's ever exist.
    """
    n, length = arrays[0].shape[:2]
    if length <= _QUERY_BLOCK or length % _QUERY_BLOCK:
        return function(*arrays)
    blocks = [x.reshape(n, -1, _QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1) for x in arrays]
    out = jax.lax.map(lambda block: function(*block), blocks)
    return out.swapaxes(0, 1).reshape(n, length, *out.shape[3:])


def _write(cache: Array, new: Array, starts: Int[Array, " N"], *, axis: int) -> Array:
    """Writes each row of `new` into its row of the cache, from `starts` on along an axis of the row."""

    def one(row: Array, part: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, part, start, axis)

    return jax.vmap(one)(cache, new.astype(cache.dtype), starts)
