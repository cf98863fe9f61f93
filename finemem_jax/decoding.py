"""The device side of generation: caches, prefill, k-step decoding, drawing tokens. All pure and jitted.

Sizes: N slots (rows decoded together), S cache positions per slot, K steps per call, V vocabulary.
Knows nothing of requests, queues or text.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from finemem_jax import drawing
from finemem_jax.drawing import Draw, Sampling
from finemem_jax.models import decoder
from finemem_jax.models.attention import Array
from finemem_jax.models.decoder import LayerCache
from finemem_jax.models.presets import DecoderConfig


class SlotState(NamedTuple):
    """What decoding knows of each slot. A slot with nothing left to do has `remaining` 0.

    Attributes:
        token: The last token, not yet in the cache.
        filled: Positions of the slot's cache in use.
        remaining: Tokens that may still be drawn.
        sampling: How its request draws.
        key: Key data of the slot's request; the draw at a position depends on these two alone.
    """

    token: Int[Array, " N"]
    filled: Int[Array, " N"]
    remaining: Int[Array, " N"]
    sampling: Sampling
    key: Int[Array, "N 2"]


def empty_cache(config: DecoderConfig, rows: int, positions: int, dtype: str = "float32") -> list[LayerCache]:
    """Zeros for keys and values, one pair per layer (two arrays each, since donation forbids sharing)."""
    shape = (rows, config.num_kv_heads, positions, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=3)
def prefill(
    config: DecoderConfig,
    unstacked,
    trunk: list[LayerCache],
    cache: list[LayerCache],
    tokens: Int[Array, "N L"],
    lengths: Int[Array, " N"],
    trunk_length: Int[Array, ""],
    starts: Int[Array, " N"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "N D"], list[LayerCache]]:
    """Appends `lengths` tokens to each row; returns each row's last hidden state and the cache.

    Hidden states and not logits: most prefills are of prefixes, whose logits nobody asks for.

    Args:
        mesh: Devices that hold the weights, to share out the rows; None for one.
    """
    hidden, cache = decoder.extend(config, unstacked, trunk, cache, tokens, trunk_length, starts, mesh)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache


@functools.partial(jax.jit, static_argnums=2)
def gather_rows(cache: list[LayerCache], rows: Int[Array, " N"], positions: int) -> list[LayerCache]:
    """Copies rows of a cache: row n of the result is row rows[n], with zeros after it up to so many positions."""
    return jax.tree.map(lambda x: jnp.pad(x[rows], ((0, 0), (0, 0), (0, positions - x.shape[2]), (0, 0))), cache)


@functools.partial(jax.jit, donate_argnums=0)
def insert_rows(
    cache: list[LayerCache], new: list[LayerCache], slots: Int[Array, " A"], rows: Int[Array, " A"]
) -> list[LayerCache]:
    """Writes row rows[i] of `new` into slot slots[i] of `cache`; a slot out of range is dropped."""
    return jax.tree.map(lambda x, y: x.at[slots].set(y[rows], mode="drop"), cache, new)


@functools.partial(jax.jit, static_argnums=0)
def draw_first(
    config: DecoderConfig, unstacked, hidden: Float[Array, "N D"], state: SlotState, trunk_length: Int[Array, ""]
) -> Draw:
    """Draws the first token of each row from its last prompt position."""
    return _draw(_logits(config, unstacked, hidden), state, trunk_length)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def decode(
    config: DecoderConfig,
    unstacked,
    trunk: list[LayerCache],
    cache: list[LayerCache],
    state: SlotState,
    trunk_length: Int[Array, ""],
    num_steps: int,
    end_ids: Int[Array, " E"],
) -> tuple[list[LayerCache], SlotState, Draw]:
    """Draws up to `num_steps` tokens per slot; stops early when no slot has any left.

    Returns:
        Cache and state after it, and what was drawn, [N K] each; the token is -1 where a slot drew none.
    """
    n = state.token.shape[0]

    def go_on(carry):
        step, _, state, _ = carry
        return (step < num_steps) & (state.remaining > 0).any()

    def one(carry):
        step, cache, state, drawn = carry
        hidden, cache = decoder.extend(
            config, unstacked, trunk, cache, state.token[:, None], trunk_length, state.filled
        )
        active: Bool[Array, " N"] = state.remaining > 0
        state = state._replace(filled=state.filled + active)
        new = _draw(_logits(config, unstacked, hidden[:, 0]), state, trunk_length)
        drawn = jax.tree.map(
            lambda all_, one, idle: all_.at[:, step].set(jnp.where(active, one, idle)), drawn, new, idle
        )
        ended = (new.token[:, None] == end_ids[None]).any(1)
        remaining = jnp.where(active & ~ended, state.remaining - 1, 0)
        return step + 1, cache, state._replace(token=new.token, remaining=remaining), drawn

    idle = Draw(jnp.int32(-1), jnp.float32(0), jnp.float32(0))
    nothing = jax.tree.map(lambda value: jnp.full((n, num_steps), value), idle)
    _, cache, state, drawn = jax.lax.while_loop(go_on, one, (0, cache, state, nothing))
    return cache, state, drawn


def _logits(config, unstacked, hidden):
    head = unstacked[0]["embedding" if config.tie_embeddings else "head"]
    return jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)


def _draw(logits: Float[Array, "N V"], state: SlotState, trunk_length: Int[Array, ""]) -> Draw:
    """Draws a token per row with the random number that belongs to its request and position."""
    uniform = jax.vmap(
        lambda key, position: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position))
    )(state.key, trunk_length + state.filled)
    return drawing.draw(logits, state.sampling, uniform)
