"""The decoder with a cache of keys and values: how tokens are generated. Knows nothing of sampling or requests.

Sizes: N rows, L tokens per row, S cache positions per row, P positions of the shared prefix, D embed_dim, K key heads,
C head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from finemem_jax.models import attention, decoder, embedding, logical_axes, sharding
from finemem_jax.models.attention import Array, Segment
from finemem_jax.models.decoder import Params
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
    """The parameters themselves, as decoding takes them; nothing is copied."""
    return {name: leaf for name, leaf in params.items() if name != "layers"}, params["layers"]


def layout(config: DecoderConfig, params: Params, dtype: str | jnp.dtype, int8: bool = False) -> Weights:
    """The parameters as decoding reads them; copies of all of them.

    A tree per layer, since slicing the stacked layers inside a decoding step would copy the whole model at every call.
    Kernels lie (out, in), which CPUs multiply few rows with a fifth faster; accelerators do not mind.

    Args:
        int8: Round the layers' kernels to 8 bits, with a scale for each channel out: what is drawn then is not quite
            what the parameters would draw.
    """

    def one(leaf):
        if leaf.ndim < 2:
            return jnp.array(leaf, dtype)
        return _rounded(leaf.T, dtype) if int8 else jnp.array(leaf.T, dtype)

    rest = {name: jnp.array(leaf, dtype) for name, leaf in params.items() if name != "layers"}
    columns = params["layers"].items()
    return rest, [{name: one(column[i]) for name, column in columns} for i in range(config.num_layers)]


def _rounded(kernel, dtype):
    scale = jnp.maximum(jnp.abs(kernel).max(1), 1e-30) / 127
    return Int8(jnp.round(kernel / scale[:, None]).astype(jnp.int8), scale.astype(dtype))


def _kernel(leaf, dtype):
    """A leaf of a layer as the layer multiplies with it."""
    if isinstance(leaf, Int8):
        return jnp.asarray(leaf.values).T.astype(dtype) * jnp.asarray(leaf.scale)[None]
    return leaf.T if leaf.ndim == 2 else leaf


def shardings(config: DecoderConfig, mesh: Mesh, whole: bool, int8: bool = False) -> tuple[Params, list[Params]]:
    """Where the leaves of `layout` live: split along "tensor", and unless `whole` along "fsdp" as they are stored.

    Split along "fsdp", devices that share out rows must sum partial products for every single token; whole, they send
    next to nothing, and each holds `fsdp` times as much.
    """
    stored = sharding.param_shardings(config, mesh)

    def one(place, stacked):
        spec = [None if whole and axis == logical_axes.STORED["embed"] else axis for axis in place.spec]
        if not stacked:
            return NamedSharding(mesh, P(*spec))
        out, *rest = spec[:0:-1]
        kernel = NamedSharding(mesh, P(out, *rest))
        return Int8(kernel, NamedSharding(mesh, P(out))) if int8 and rest else kernel

    rest = {name: one(place, False) for name, place in stored.items() if name != "layers"}
    layer = {name: one(place, True) for name, place in stored["layers"].items()}
    return rest, [layer] * config.num_layers


def empty(config: DecoderConfig, rows: int, positions: int, dtype: str = "float32") -> list[LayerCache]:
    """Zeros for keys and values, one pair per layer (two arrays each, since donation forbids sharing)."""
    heads, width = config.num_kv_heads, config.head_dim
    return [
        (jnp.zeros((rows, heads, width, positions), dtype), jnp.zeros((rows, heads, positions, width), dtype))
        for _ in range(config.num_layers)
    ]


def shares(mesh: Mesh | None, rows: int) -> int:
    """In how many parts devices share out the rows of a cache; 1 where they cannot do so evenly."""
    count = 1 if mesh is None else logical_axes.size(mesh, logical_axes.ROWS)
    return count if rows % count == 0 else 1


def cache_shardings(mesh: Mesh, cache: Sequence[LayerCache]) -> list[tuple[NamedSharding, NamedSharding]]:
    """Where a cache lives on a mesh: rows over data and fsdp, heads over tensor, if they can be shared out evenly."""
    return [(logical_axes.place(mesh, k.shape, _KEYS), logical_axes.place(mesh, v.shape, _VALUES)) for k, v in cache]


def constrain(mesh: Mesh | None, cache: Sequence[LayerCache]) -> list[LayerCache]:
    """Tells the compiler that rows are shared out along data and fsdp, heads along tensor."""
    return [(logical_axes.constrain(mesh, k, _KEYS), logical_axes.constrain(mesh, v, _VALUES)) for k, v in cache]


class Tree(NamedTuple):
    """Rows whose tokens are no sequences: a stem, and branches that each go on from its end.

    Attributes:
        branches: Which branch each token belongs to, from 1 on; 0 for the stem, which comes first.
        depths: Positions: how many of its own branch and of the stem come before each token.
    """

    branches: Int[Array, "N L"]
    depths: Int[Array, "N L"]


def extend(
    config: DecoderConfig,
    weights: Weights,
    shared_prefix: Sequence[LayerCache],
    cache: Sequence[LayerCache],
    tokens: Int[Array, "N L"],
    shared_prefix_length: Int[Array, ""],
    starts: Int[Array, " N"],
    mesh: Mesh | None = None,
    tree: Tree | None = None,
) -> tuple[Float[Array, "N L D"], list[LayerCache]]:
    """Appends tokens to cached rows and returns their final hidden states.

    Row n's tokens stand at positions shared_prefix_length + starts[n] … and see the shared prefix, row n's cache below
    starts[n], and their own predecessors. Tokens past a row's true length may be garbage: a later call with
    `starts` at the true length overwrites them before anything can see them.

    Args:
        shared_prefix: Keys and values shared by all rows, one cache row per layer; P may be 0.
        cache: Keys and values per row. Donate it.
        shared_prefix_length: Valid positions of the shared prefix.
        starts: Filled positions of each row's cache; starts + L <= S, else the write is shifted.
        mesh: Devices that share out the rows, and gather each layer's weights, which are less than the states of many
            tokens. None leaves it to the compiler, which adds up partial products instead.
        tree: Where a row's tokens are no sequence, but a stem with branches; rows must then be empty (`starts` 0).

    Returns:
        Hidden states, and the new cache.
    """
    rest, layers = weights
    if mesh is not None and len(tokens) % logical_axes.size(mesh, logical_axes.ROWS):
        mesh = None

    def constrain(array, names):
        return logical_axes.constrain(mesh, array, names)

    length = tokens.shape[1]
    slots, prefix_slots = cache[0][1].shape[2], shared_prefix[0][1].shape[2]
    offsets = starts[:, None] + jnp.arange(length)[None]
    own_mask: Bool[Array, "N L S"] = jnp.arange(slots)[None, None] <= offsets[:, :, None]
    if tree is not None:
        offsets = tree.depths
        own_mask &= (tree.branches[:, None] == 0) | (tree.branches[:, None] == tree.branches[:, :, None])
    rotation = decoder.rotary(config, shared_prefix_length + offsets)
    prefix_mask = (jnp.arange(prefix_slots) < shared_prefix_length)[None, None, :]
    x = embedding.embed(rest["embedding"], tokens, rest["embedding"].dtype, mesh)
    new_cache = []
    for i, ((prefix_keys, prefix_values), (old_keys, old_values)) in enumerate(zip(shared_prefix, cache, strict=True)):

        def attend(queries, keys, values, tk=prefix_keys, tv=prefix_values, ok=old_keys, ov=old_values):
            keys = _write(ok, keys.transpose(0, 2, 3, 1), starts, axis=2)
            values = _write(ov, values.transpose(0, 2, 1, 3), starts, axis=1)

            def some(queries, own_mask):
                segments = [Segment(keys, values, own_mask)]
                if prefix_slots:
                    segments.append(Segment(tk, tv, prefix_mask))
                return attention.attend(queries, segments)

            return _in_blocks(some, queries, own_mask), (keys, values)

        if isinstance(layers, list):
            params = {name: _kernel(leaf, x.dtype) for name, leaf in layers[i].items()}
        else:
            params = {name: leaf[i] for name, leaf in layers.items()}
        layer = decoder.bind(decoder.Layer, config, decoder.gathered(config, params, mesh))
        x, kept = layer(constrain(x, ("rows", "apart", "embed")), rotation, attend, constrain)
        new_cache.append(kept)
    x = constrain(x, ("rows", "tokens", "embed"))
    return decoder.rms_norm(x, rest["final_norm"], config.norm_epsilon), new_cache


def logits(config: DecoderConfig, weights: Weights, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
    """What the output head makes of final hidden states, in float32."""
    head = weights[0]["embedding" if config.tie_embeddings else "head"]
    return jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)


def _in_blocks(function, *arrays):
    """function(*arrays), [N, L, ...] each, for a block of tokens after the other where they are many and divide evenly.

    Logits of 2,048 tokens over 8,192 positions take 64 MB a head and row; so only a block's ever exist.
    """
    n, length = arrays[0].shape[:2]
    if length <= _QUERY_BLOCK or length % _QUERY_BLOCK:
        return function(*arrays)
    blocks = [x.reshape(n, -1, _QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1) for x in arrays]
    out = jax.lax.map(lambda block: function(*block), blocks)
    return out.swapaxes(0, 1).reshape(n, length, *out.shape[3:])


def _write(cache, new, starts, axis):
    """Each row of `new` into its row of the cache, at its place along an axis of the row."""

    def one(row, piece, start):
        return jax.lax.dynamic_update_slice_in_dim(row, piece, start, axis)

    return jax.vmap(one)(cache, new.astype(cache.dtype), starts)
