"""Defines the decoder of Llama, Qwen2 and Qwen3 as Flax NNX modules, and computes states over trees of prefixes.

Sizes: V vocabulary, D embed_dim, F mlp_dim, H query heads, K key heads, C head_dim, N rows, L tokens per row.
Knows nothing of tokens' meaning, sampling or losses.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from finemem_jax.models import attention, linear, logical_axes
from finemem_jax.models.attention import Level
from finemem_jax.models.logical_axes import Array
from finemem_jax.models.presets import DecoderConfig

# A Decoder's parameters as nested dicts of arrays: the one pytree that everything downstream passes around.
Params = dict[str, Any]
# Maps queries, keys and values of all tokens to attention outputs, and whatever the caller wants kept.
AttendFn = Callable[[Array, Array, Array], tuple[Array, Any]]
# Tells the compiler where an array with these logical axes lives.
ConstrainFn = Callable[[Array, tuple[str, ...]], Array]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How hidden states are computed; beyond rounding none of it changes them. Part of the compilation key.

    Attributes:
        remat: What the backward pass recomputes: "none", "attention" (attention and all that is element-wise: large to
            keep and cheap to redo), "full" (all but each layer's input), or "offload" (like "attention", but what is
            kept waits in the host's memory; accelerators only).
        dtype: What products are computed in, whatever the parameters are stored in: "float32" or "bfloat16".
        attention: An implementation of `attention.attend_tree`.
        mesh: What devices there are; None for one.
    """

    remat: str = "attention"
    dtype: str = "float32"
    attention: str = "xla"
    mesh: Mesh | None = None


class Layer(nnx.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, f, c = config.embed_dim, config.mlp_dim, config.head_dim
        self.config = config

        def kernel(shape: tuple[int, int], names: tuple[str, str]) -> nnx.Param:
            return _param(jax.random.normal(rngs.params(), shape) * shape[0] ** -0.5, names)

        heads, kv_heads = config.num_heads * c, config.num_kv_heads * c
        shapes = {
            "query": ((d, heads), ("embed", "heads")),
            "key": ((d, kv_heads), ("embed", "kv_heads")),
            "value": ((d, kv_heads), ("embed", "kv_heads")),
            "out": ((heads, d), ("heads", "embed")),
            "gate": ((d, f), ("embed", "mlp")),
            "up": ((d, f), ("embed", "mlp")),
            "down": ((f, d), ("mlp", "embed")),
        }
        for name, (shape, names) in shapes.items():
            setattr(self, name, kernel(shape, names))
            if config.lora and name in config.lora.targets:
                # The product starts at 0: an adapted model begins as the model.
                setattr(self, f"{name}_lora_a", kernel((shape[0], config.lora.rank), (names[0], "rank")))
                setattr(self, f"{name}_lora_b", _param(jnp.zeros((config.lora.rank, shape[1])), ("rank", names[1])))
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
        self, x: Float[Array, "N L D"], rotation: tuple[Array, Array], *, attend: AttendFn, constrain: ConstrainFn
    ) -> tuple[Float[Array, "N L D"], Any]:
        config = self.config
        h = constrain(rms_norm(x, self.attention_norm[...], config.norm_epsilon), ("rows", "tokens", "embed"))

        def heads(name: str, count: int, axis: str) -> Array:
            projected = self._project(name, h).reshape(*h.shape[:2], count, config.head_dim)
            return constrain(projected, ("rows", "tokens", axis, "channels"))

        queries = heads("query", config.num_heads, "heads")
        keys = heads("key", config.num_kv_heads, "kv_heads")
        values = heads("value", config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            queries = rms_norm(queries, self.query_norm[...], config.norm_epsilon)
            keys = rms_norm(keys, self.key_norm[...], config.norm_epsilon)
        mixed, extra = attend(rotate(queries, rotation), rotate(keys, rotation), values)
        x = x + constrain(self._project("out", mixed.reshape(*x.shape[:2], -1)), ("rows", "apart", "embed"))
        h = constrain(rms_norm(x, self.mlp_norm[...], config.norm_epsilon), ("rows", "tokens", "embed"))
        gated = jax.nn.silu(self._project("gate", h)) * self._project("up", h)
        x = x + constrain(
            self._project("down", constrain(gated, ("rows", "tokens", "mlp"))), ("rows", "apart", "embed")
        )
        return x, extra

    def _project(self, name: str, h: Array) -> Array:
        """Multiplies with the matrix called `name`; adds its bias and its adapter where the model has them."""
        config = self.config
        out = linear.project(h, getattr(self, name)[...])
        if config.qkv_bias and name in ("query", "key", "value"):
            out = out + getattr(self, f"{name}_bias")[...][None, None]
        if config.lora and name in config.lora.targets:
            low = linear.project(h, getattr(self, f"{name}_lora_a")[...])
            high = linear.project(low, getattr(self, f"{name}_lora_b")[...])
            out = out + (config.lora.alpha / config.lora.rank) * high
        return out


class Decoder(nnx.Module):
    """Embedding, stacked layers (leading axis: layer), final norm and output head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = _param(jax.random.normal(rngs.params(), shape) * 0.02, ("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> Layer:
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
    return bind(Decoder, config, params).output_head


_Module = TypeVar("_Module", Layer, Decoder)


@functools.cache
def abstract(module: type[_Module], config: DecoderConfig) -> _Module:
    """Returns the module with shapes for parameters: what is known of it before any weights are."""
    return nnx.eval_shape(lambda: module(config, nnx.Rngs(0)))


def abstract_params(config: DecoderConfig) -> Params:
    """Returns a `jax.ShapeDtypeStruct` for each parameter."""
    return nnx.to_pure_dict(nnx.state(abstract(Decoder, config), nnx.Param))


@functools.cache
def axis_names(module: type[_Module], config: DecoderConfig) -> dict[str, Any]:
    """Names the logical axes of every parameter, in a tree like theirs; a lone Layer's have no "layers" axis."""
    state = nnx.state(abstract(module, config), nnx.Param)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    names = jax.tree.map(lambda variable: variable.get_metadata("out_sharding"), state, is_leaf=is_variable)
    return nnx.to_pure_dict(names)


def bind(module: type[_Module], config: DecoderConfig, params: Params) -> _Module:
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
    *,
    lengths: Sequence[Int[Array, " n"]],
    compute: Compute = Compute(),
) -> list[Float[Array, "n l D"]]:
    """Computes final hidden states of a tree of token rows, each prefix once.

    Level i holds n_i rows; n_i divides n_(i+1), and row r of level i + 1 continues row r // (n_(i+1) / n_i) of
    level i. Padding is on the right. Plain rows are a tree of one level, and so is a tree whose first levels have
    width 0. Devices split whole trees: the rows of the first level.

    Args:
        tokens: One array per level, from the root to the leaves.
        lengths: True length of each row, per level.

    Returns:
        One array per level. States at padding are finite and meaningless.
    """
    present = [(level, length) for level, length in zip(tokens, lengths, strict=True) if level.shape[1]]
    states = iter(_hidden_states(config, params, present, compute=compute))
    dtype = jnp.dtype(compute.dtype)
    return [next(states) if t.shape[1] else jnp.zeros((*t.shape, config.embed_dim), dtype) for t in tokens]


def _hidden_states(
    config: DecoderConfig, params: Params, levels: Sequence[tuple[Array, Array]], *, compute: Compute
) -> list[Array]:
    """Like `hidden_states`, of (tokens, lengths) of levels that have some width."""
    tokens, lengths = zip(*levels, strict=True)
    model = bind(Decoder, config, params)
    dtype = jnp.dtype(compute.dtype)
    shapes = [level.shape for level in tokens]

    def constrain(array: Array, names: tuple[str, ...]) -> Array:
        return logical_axes.constrain(compute.mesh, array, names)

    starts = zip(_starts(lengths), tokens, strict=True)
    rotation = rotary(config, _join([start[:, None] + jnp.arange(level.shape[1])[None] for start, level in starts]))

    def attend(queries: Array, keys: Array, values: Array) -> tuple[Array, None]:
        levels = [Level(*x) for x in zip(*(_split(x, shapes) for x in (queries, keys, values)), lengths, strict=True)]
        return _join(attention.attend_tree(levels, compute.attention, compute.mesh)), None

    def body(x: Array, layer_params: Params) -> tuple[Array, None]:
        layer_params = jax.tree.map(lambda leaf: leaf.astype(dtype), layer_params)
        layer = bind(Layer, config, gathered(config, layer_params, compute.mesh))
        return layer(x, rotation, attend=attend, constrain=constrain)[0], None

    x = linear.embed(model.embedding[...], _join(tokens), dtype=dtype, mesh=compute.mesh)
    x = constrain(x, ("rows", "apart", "embed"))
    x, _ = jax.lax.scan(_rematerialized(body, compute.remat), x, params["layers"])
    x = constrain(x, ("rows", "tokens", "embed"))
    return _split(rms_norm(x, model.final_norm[...], config.norm_epsilon), shapes)


def _rematerialized(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wraps a layer so that the backward pass recomputes what `Compute.remat` says."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    if remat == "full":
        return jax.checkpoint(body)
    if remat == "offload":
        return jax.checkpoint(body, policy=policies.offload_dot_with_no_batch_dims("device", "pinned_host"))
    # Projections have no batch dimensions, attention's products have: this keeps the former, and of "blocked" attention
    # what its backward pass starts from.
    kept = policies.save_only_these_names(attention.KEPT)
    both = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kept)
    return jax.checkpoint(body, policy=both)


def gathered(config: DecoderConfig, layer_params: Params, mesh: Mesh | None) -> Params:
    """Gathers a layer's parameters, stored in parts along "fsdp", so that each device has all of that axis."""
    # After the cast to `dtype`, so that what travels is as small as it can be.
    names = axis_names(Layer, config)
    return {name: logical_axes.gather(mesh, names[name], leaf) for name, leaf in layer_params.items()}


def _starts(lengths: Sequence[Array]) -> list[Array]:
    """Position of each row's first token: the total length of its ancestors."""
    starts: list[Array] = [jnp.zeros_like(lengths[0])]
    for parent, child in itertools.pairwise(lengths):
        starts.append(jnp.repeat(starts[-1] + parent, len(child) // len(parent)))
    return starts


def _join(levels: Sequence[Array]) -> Array:
    """Puts the tokens of each tree into one row: [n_i, l_i, ...] of each level to [n_0, Σ_i l_i n_i / n_0, ...]."""
    roots = len(levels[0])
    return jnp.concatenate([level.reshape(roots, -1, *level.shape[2:]) for level in levels], axis=1)


def _split(joined: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Undoes `_join`."""
    out, offset, roots = [], 0, shapes[0][0]
    for rows, length in shapes:
        width = rows // roots * length
        out.append(joined[:, offset : offset + width].reshape(rows, length, *joined.shape[2:]))
        offset += width
    return out


# --------------------------------------------------------------------------------------
# Norms and positions
# --------------------------------------------------------------------------------------


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "... D"]:
    """Computes x / sqrt(mean(x²) + ε) · scale in float32."""
    wide = x.astype(jnp.float32)
    normed = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)).astype(x.dtype)
    return normed * jnp.expand_dims(scale, range(x.ndim - 1)).astype(x.dtype)


def rotary(config: DecoderConfig, positions: Int[Array, "N L"]) -> tuple[Float[Array, "N L c"], Float[Array, "N L c"]]:
    """Cosines and sines of the rotary embedding, one per pair of channels: angle = position · frequency."""
    frequencies = jnp.asarray(rotary_frequencies(config), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
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


def rotate(x: Float[Array, "N L H C"], rotation: tuple[Array, Array]) -> Float[Array, "N L H C"]:
    """Rotates channel pairs (i, i + C/2), the "half" convention of Hugging Face checkpoints."""
    cos, sin = (r[:, :, None, :] for r in rotation)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
