"""The decoder of Llama, Qwen2 and Qwen3 as Flax NNX modules: over trees of shared prefixes, and with a KV cache.

Sizes: V vocabulary, D embed_dim, F mlp_dim, H query heads, K key heads, C head_dim, N rows, L tokens per row.
Knows nothing of tokens' meaning, sampling or losses.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from finemem_jax.models import attention
from finemem_jax.models.attention import Array, Segment
from finemem_jax.models.presets import DecoderConfig

# A Decoder's parameters as nested dicts of arrays: the one pytree that everything downstream passes around.
Params = dict[str, Any]
# Keys and values of one layer, [N K P C] each.
LayerCache = tuple[Array, Array]
# Maps queries, keys and values of all tokens (flat) to attention outputs, and whatever the caller wants kept.
AttendFn = Callable[[Array, Array, Array], tuple[Array, Any]]


class Layer(nnx.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)), over tokens in one flat row."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, f, c = config.embed_dim, config.mlp_dim, config.head_dim
        self.config = config

        def kernel(shape, names):
            return _param(jax.random.normal(rngs.params(), shape) * shape[0] ** -0.5, names)

        self.query = kernel((d, config.num_heads * c), ("embed", "heads"))
        self.key = kernel((d, config.num_kv_heads * c), ("embed", "kv_heads"))
        self.value = kernel((d, config.num_kv_heads * c), ("embed", "kv_heads"))
        self.out = kernel((config.num_heads * c, d), ("heads", "embed"))
        self.gate = kernel((d, f), ("embed", "mlp"))
        self.up = kernel((d, f), ("embed", "mlp"))
        self.down = kernel((f, d), ("mlp", "embed"))
        self.attention_norm = _param(jnp.ones(d), ("norm",))
        self.mlp_norm = _param(jnp.ones(d), ("norm",))
        if config.qkv_bias:
            self.query_bias = _param(jnp.zeros(config.num_heads * c), ("heads",))
            self.key_bias = _param(jnp.zeros(config.num_kv_heads * c), ("kv_heads",))
            self.value_bias = _param(jnp.zeros(config.num_kv_heads * c), ("kv_heads",))
        if config.qk_norm:
            self.query_norm = _param(jnp.ones(c), ("norm",))
            self.key_norm = _param(jnp.ones(c), ("norm",))

    def __call__(
        self, x: Float[Array, "N D"], rotation: tuple[Array, Array], attend: AttendFn
    ) -> tuple[Float[Array, "N D"], Any]:
        config = self.config
        h = rms_norm(x, self.attention_norm[...], config.norm_epsilon)
        queries, keys, values = h @ self.query[...], h @ self.key[...], h @ self.value[...]
        if config.qkv_bias:
            queries, keys = queries + self.query_bias[...][None], keys + self.key_bias[...][None]
            values = values + self.value_bias[...][None]
        queries = queries.reshape(-1, config.num_heads, config.head_dim)
        keys = keys.reshape(-1, config.num_kv_heads, config.head_dim)
        values = values.reshape(-1, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            queries = rms_norm(queries, self.query_norm[...], config.norm_epsilon)
            keys = rms_norm(keys, self.key_norm[...], config.norm_epsilon)
        mixed, kept = attend(rotate(queries, rotation), rotate(keys, rotation), values)
        x = x + mixed.reshape(len(x), -1) @ self.out[...]
        h = rms_norm(x, self.mlp_norm[...], config.norm_epsilon)
        return x + (jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...], kept


class Decoder(nnx.Module):
    """Embedding, stacked layers (leading axis: layer), final norm and output head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = _param(jax.random.normal(rngs.params(), shape) * 0.02, ("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs):
            return Layer(config, rngs)

        self.layers = stack(rngs)
        self.final_norm = _param(jnp.ones(config.embed_dim), ("norm",))
        if not config.tie_embeddings:
            self.head = _param(jax.random.normal(rngs.params(), shape) * 0.02, ("vocab", "embed"))

    @property
    def output_head(self) -> Float[Array, "V D"]:
        """Rows that turn a hidden state into logits."""
        return (self.embedding if self.config.tie_embeddings else self.head)[...]


def _param(value: Array, names: tuple[str, ...]) -> nnx.Param:
    # The names are logical axes; `sharding` maps them to mesh axes. Eager sharding would demand a mesh right here.
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def init(config: DecoderConfig, seed: int) -> Params:
    """Returns random parameters of a decoder of this shape."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(seed)), nnx.Param))


def output_head(config: DecoderConfig, params: Params) -> Float[Array, "V D"]:
    """Rows that turn a hidden state into logits."""
    return _bind(Decoder, config, params).output_head


_Module = TypeVar("_Module", Layer, Decoder)


@functools.cache
def abstract(module: type[_Module], config: DecoderConfig) -> _Module:
    """The module with shapes for parameters: what is known of it before any weights are."""
    return nnx.eval_shape(lambda: module(config, nnx.Rngs(0)))


def _bind(module: type[_Module], config: DecoderConfig, params: Params) -> _Module:
    """Puts parameters into a module of this shape; free, also under `jit`."""
    graphdef, state = nnx.split(abstract(module, config), nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


# --------------------------------------------------------------------------------------
# Trees of shared prefixes (training, and scoring given tokens)
# --------------------------------------------------------------------------------------


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens: Sequence[Int[Array, "n l"]],
    lengths: Sequence[Int[Array, " n"]],
    remat: str = "attention",
) -> list[Float[Array, "n l D"]]:
    """Final hidden states of a tree of token rows, each prefix computed once.

    Level i holds n_i rows; n_i divides n_(i+1), and row r of level i + 1 continues row r // (n_(i+1) / n_i) of
    level i. Padding is on the right. Plain rows are a tree of one level.

    Args:
        tokens: One array per level, from the root to the leaves.
        lengths: True length of each row, per level.
        remat: What the backward pass recomputes: "none", "attention" (attention and all that is element-wise:
            large to keep and cheap to redo), or "full" (all but each layer's input).

    Returns:
        One array per level. States at padding are finite and meaningless.
    """
    model = _bind(Decoder, config, params)
    starts = _starts(lengths)
    positions = [start[:, None] + jnp.arange(level.shape[1])[None] for start, level in zip(starts, tokens, strict=True)]
    rotation = rotary(config, jnp.concatenate([p.reshape(-1) for p in positions]))
    shapes = [level.shape for level in tokens]
    own_masks = [jnp.tril(jnp.ones((1, length, length), bool)) for _, length in shapes]
    prefix_masks = [jnp.arange(s[1])[None, None, :] < n[:, None, None] for s, n in zip(shapes, lengths, strict=True)]

    def attend(queries, keys, values):
        q, k, v = (_split(x, shapes) for x in (queries, keys, values))
        heads_first = [(ki.transpose(0, 2, 1, 3), vi.transpose(0, 2, 1, 3)) for ki, vi in zip(k, v, strict=True)]
        mixed = []
        for i, (rows, _) in enumerate(shapes):
            segments = [Segment(*heads_first[i], own_masks[i])]
            for j in range(i):
                mask = jnp.repeat(prefix_masks[j], rows // shapes[j][0], axis=0)
                segments.append(Segment(*heads_first[j], mask))
            mixed.append(attention.attend(q[i], segments).reshape(-1, *queries.shape[1:]))
        return jnp.concatenate(mixed), None

    def body(x, layer_params):
        return _bind(Layer, config, layer_params)(x, rotation, attend)[0], None

    if remat != "none":
        # Projections have no batch dimensions, attention's products have: "attention" keeps the former.
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "attention" else None
        body = jax.checkpoint(body, policy=keep)
    x = model.embedding[...][jnp.concatenate([level.reshape(-1) for level in tokens])]
    x, _ = jax.lax.scan(body, x, params["layers"])
    return _split(rms_norm(x, model.final_norm[...], config.norm_epsilon), shapes)


def _starts(lengths):
    """Position of each row's first token: the total length of its ancestors."""
    starts = [jnp.zeros_like(lengths[0])]
    for parent, child in itertools.pairwise(lengths):
        starts.append(jnp.repeat(starts[-1] + parent, len(child) // len(parent)))
    return starts


def _split(flat, shapes):
    out, offset = [], 0
    for rows, length in shapes:
        out.append(flat[offset : offset + rows * length].reshape(rows, length, *flat.shape[1:]))
        offset += rows * length
    return out


# --------------------------------------------------------------------------------------
# With a cache (generation)
# --------------------------------------------------------------------------------------


def unstack(config: DecoderConfig, params: Params) -> tuple[Params, list[Params]]:
    """Returns the parameters in the layout for decoding: (all but the layers, one tree per layer).

    Slicing the stacked layers inside a decoding step would copy the whole model at every call.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    columns = {name: list(leaf) for name, leaf in params["layers"].items()}
    return rest, [{name: column[i] for name, column in columns.items()} for i in range(config.num_layers)]


def extend(
    config: DecoderConfig,
    unstacked: tuple[Params, list[Params]],
    trunk: Sequence[LayerCache],
    cache: Sequence[LayerCache],
    tokens: Int[Array, "N L"],
    trunk_length: Int[Array, ""],
    starts: Int[Array, " N"],
) -> tuple[Float[Array, "N L D"], list[LayerCache]]:
    """Appends tokens to cached rows and returns their final hidden states.

    Row n's tokens stand at positions trunk_length + starts[n] … and see the trunk, row n's cache below
    starts[n], and their own predecessors. Tokens past a row's true length may be garbage: a later call with
    `starts` at the true length overwrites them before anything can see them.

    Args:
        trunk: Keys and values shared by all rows, [1 K P C] per layer; P may be 0.
        cache: Keys and values per row, [N K S C] per layer. Donate it.
        trunk_length: Valid positions of the trunk.
        starts: Filled positions of each row's cache; starts + L <= S, else the write is shifted.

    Returns:
        Hidden states, and the new cache.
    """
    rest, layers = unstacked
    n, length = tokens.shape
    slots = cache[0][0].shape[2]
    trunk_slots = trunk[0][0].shape[2]
    offsets = starts[:, None] + jnp.arange(length)[None]
    rotation = rotary(config, (trunk_length + offsets).reshape(-1))
    own_mask: Bool[Array, "N L S"] = jnp.arange(slots)[None, None] <= offsets[:, :, None]
    trunk_mask = (jnp.arange(trunk_slots) < trunk_length)[None, None, :]
    x = rest["embedding"][tokens.reshape(-1)]
    new_cache = []
    for layer_params, (trunk_keys, trunk_values), (old_keys, old_values) in zip(layers, trunk, cache, strict=True):

        def attend(queries, keys, values, tk=trunk_keys, tv=trunk_values, ok=old_keys, ov=old_values):
            keys, values = (_write(old, new.reshape(n, length, *new.shape[1:]), starts) for old, new in
                            ((ok, keys), (ov, values)))  # fmt: skip
            segments = [Segment(keys, values, own_mask)]
            if trunk_slots:
                segments.append(Segment(tk, tv, trunk_mask))
            queries = queries.reshape(n, length, *queries.shape[1:])
            return attention.attend(queries, segments).reshape(n * length, *queries.shape[2:]), (keys, values)

        x, kept = _bind(Layer, config, layer_params)(x, rotation, attend)
        new_cache.append(kept)
    x = rms_norm(x, rest["final_norm"], config.norm_epsilon)
    return x.reshape(n, length, -1), new_cache


def _write(cache: Float[Array, "N K S C"], new: Float[Array, "N L K C"], starts: Int[Array, " N"]):
    update = jax.vmap(lambda row, piece, start: jax.lax.dynamic_update_slice(row, piece, (0, start, 0)))
    return update(cache, new.transpose(0, 2, 1, 3).astype(cache.dtype), starts)


# --------------------------------------------------------------------------------------
# Shared by both
# --------------------------------------------------------------------------------------


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x²) + ε) · scale, computed in float32."""
    wide = x.astype(jnp.float32)
    normed = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)).astype(x.dtype)
    return normed * jnp.expand_dims(scale, range(x.ndim - 1))


def rotary(config: DecoderConfig, positions: Int[Array, " N"]) -> tuple[Float[Array, "N c"], Float[Array, "N c"]]:
    """Cosines and sines of the rotary embedding, one per pair of channels: angle = position · frequency."""
    frequencies = jnp.asarray(rotary_frequencies(config), jnp.float32)
    angles = positions[:, None].astype(jnp.float32) * frequencies[None]
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(config: DecoderConfig) -> Float[np.ndarray, " c"]:
    """Radians per position of each pair of channels: f_i = θ^(-2i/C), the slow ones scaled if the model asks for it.

    Scaled, f_i becomes f_i (s_i + (1 - s_i) / factor), where s_i grows from 0 to 1 as the number of turns within the
    original length, original_max_length · f_i / 2π, grows from low_freq_factor to high_freq_factor.
    """
    # On the host, in float64: an error in the frequency's last bit is multiplied by the position.
    half = config.head_dim // 2
    frequencies = np.float64(config.rope_theta) ** (-np.arange(half) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_length * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Float[Array, "N H C"], rotation: tuple[Array, Array]) -> Float[Array, "N H C"]:
    """Rotates channel pairs (i, i + C/2), the "half" convention of Hugging Face checkpoints."""
    cos, sin = (r[:, None, :] for r in rotation)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
