"""The device side of generation: caches, prefill, k-step decoding, drawing tokens. All pure and jitted.

Sizes: N slots (rows decoded together), A rows prefilled together, S cache positions per slot, K steps per call,
V vocabulary. Knows nothing of requests, queues or text.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, UInt32

from finemem_jax.models import kv_cache, logical_axes
from finemem_jax.models.attention import Array
from finemem_jax.models.kv_cache import LayerCache, Tree, Weights
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.sampling import token_sampling
from finemem_jax.sampling.token_sampling import Sample, SamplingParams

# Tokens whose logits over the vocabulary `teacher_forced` holds at a time.
TARGETS_TOGETHER = 64


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
    sampling: SamplingParams
    key: Int[Array, "N 2"]


def idle(slots: int) -> SlotState:
    """NumPy arrays for slots without anything to do; the host fills them in."""
    return SlotState(
        token=np.zeros(slots, np.int32),
        filled=np.zeros(slots, np.int32),
        remaining=np.zeros(slots, np.int32),
        sampling=SamplingParams(np.zeros(slots, np.float32), np.zeros(slots, np.int32), np.ones(slots, np.float32)),
        key=np.zeros((slots, 2), np.uint32),
    )


@functools.partial(jax.jit, static_argnames=("config", "rows", "positions", "dtype", "mesh"))
def empty(
    *, config: DecoderConfig, rows: int, positions: int, dtype: str, mesh: Mesh | None = None
) -> list[LayerCache]:
    """A cache of zeros, made where it belongs on the mesh."""
    return kv_cache.constrain(mesh, kv_cache.empty(config, rows, positions, dtype))


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="rows")
def prefill(
    weights: Weights,
    shared_prefix: list[LayerCache],
    rows: list[LayerCache],
    tokens: Int[Array, "A L"],
    lengths: Int[Array, " A"],
    shared_prefix_length: Int[Array, ""],
    starts: Int[Array, " A"],
    *,
    config: DecoderConfig,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "A D"], list[LayerCache]]:
    """Appends `lengths` tokens to each row of a cache; returns each row's last hidden state and the cache.

    Hidden states and not logits: most prefills are of prefixes, whose logits nobody asks for. Slots are prefilled in
    copies of their rows (`copy_rows`): where one program takes rows out of a cache, computes and puts them back, XLA on
    CPUs copies the cache whole.

    Args:
        starts: Filled positions of each row.
        mesh: Devices that hold the weights, and share out the rows if they can; None for one.
    """
    hidden, rows = kv_cache.extend(config, weights, shared_prefix, rows, tokens, shared_prefix_length, starts, mesh)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return logical_axes.constrain(mesh, last, kv_cache.STATES), kv_cache.constrain(mesh, rows)


def _by_share(function, mesh, like, *arguments):
    """function(*arguments), by each share of devices on its own rows; `like` is a cache, as is the result.

    Told of devices, since the compiler does not know that no share looks at another's rows, and would send them all.
    """
    if kv_cache.shares(mesh, len(like[0][0])) == 1:
        return function(*arguments)
    caches = jax.tree.map(lambda place: place.spec, kv_cache.cache_shardings(mesh, like))
    specs = [caches if isinstance(argument, list) else P(logical_axes.ROWS) for argument in arguments]
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=caches, check_vma=False)(*arguments)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="cache")
def copy_rows(
    cache: list[LayerCache],
    source: list[LayerCache],
    targets: Int[Array, " N"],
    rows: Int[Array, " N"],
    counts: Int[Array, " shares"],
    *,
    mesh: Mesh | None = None,
) -> list[LayerCache]:
    """Writes row rows[i] of `source` over row targets[i] of `cache`, for i < count, one after the other.

    Where devices share out rows, each share has its own count and its part of the pairs, with rows counted within it.
    Where one cache has more positions than the other, the later ones are left out, or as they were.
    """
    return _by_share(_copied, mesh, cache, cache, source, targets, rows, counts)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="cache")
def copy_within(
    cache: list[LayerCache],
    targets: Int[Array, " N"],
    rows: Int[Array, " N"],
    counts: Int[Array, " shares"],
    *,
    mesh: Mesh | None = None,
) -> list[LayerCache]:
    """`copy_rows` from a cache to itself."""
    return _by_share(lambda cache, *places: _copied(cache, None, *places), mesh, cache, cache, targets, rows, counts)


def _copied(cache, source, targets, rows, counts):
    def one(i, cache):
        def copied(to, came_from):
            row = jax.lax.dynamic_slice_in_dim(to if came_from is None else came_from, rows[i], 1)
            row = row[tuple(slice(min(a, b)) for a, b in zip(row.shape, to.shape, strict=True))]
            return jax.lax.dynamic_update_slice(to, row, (targets[i], 0, 0, 0))

        if source is None:
            return jax.tree.map(lambda to: copied(to, None), cache)
        return jax.tree.map(copied, cache, source)

    return jax.lax.fori_loop(0, counts[0], one, cache)


@functools.partial(jax.jit, static_argnames="config")
def draw_first(
    weights: Weights,
    hidden: Float[Array, "A D"],
    rows: Int[Array, " N"],
    state: SlotState,
    shared_prefix_length: Int[Array, ""],
    allowed: UInt32[Array, "N W"] | None,
    *,
    config: DecoderConfig,
) -> Sample:
    """Draws a token for each slot from the state of its last prompt token, which is row rows[n] of `hidden`."""
    return _draw(kv_cache.logits(config, weights, hidden)[rows], state, shared_prefix_length, allowed)


@functools.partial(jax.jit, static_argnames=("config", "num_steps", "mesh"), donate_argnames="cache")
def decode(
    weights: Weights,
    shared_prefix: list[LayerCache],
    cache: list[LayerCache],
    state: SlotState,
    shared_prefix_length: Int[Array, ""],
    leave_at: Int[Array, ""],
    end_ids: Int[Array, " E"],
    allowed: UInt32[Array, "N W"] | None,
    *,
    config: DecoderConfig,
    num_steps: int,
    mesh: Mesh | None = None,
) -> tuple[list[LayerCache], SlotState, Sample]:
    """Draws up to `num_steps` tokens per slot.

    Args:
        leave_at: It stops early once so many slots or fewer are still at work: 0 to go on as long as one is, more
            where others wait for the slots that are done.
        allowed: Which tokens each slot may draw (`token_sampling.draw`), at all of the steps; None for all tokens.
        mesh: Devices that share out slots and heads; None for one.

    Returns:
        Cache and state after it, and what was drawn, [N K] each; the token is -1 where a slot drew none.
    """
    n = state.token.shape[0]

    def go_on(carry):
        step, _, state, _ = carry
        return (step < num_steps) & ((state.remaining > 0).sum() > leave_at)

    def one(carry):
        step, cache, state, drawn = carry
        hidden, cache = kv_cache.extend(
            config, weights, shared_prefix, cache, state.token[:, None], shared_prefix_length, state.filled
        )
        active = state.remaining > 0
        state = state._replace(filled=state.filled + active)
        new = _draw(kv_cache.logits(config, weights, hidden[:, 0]), state, shared_prefix_length, allowed)
        drawn = jax.tree.map(
            lambda all_, one, idle: all_.at[:, step].set(jnp.where(active, one, idle)), drawn, new, nothing
        )
        ended = (new.token[:, None] == end_ids[None]).any(1)
        remaining = jnp.where(active & ~ended, state.remaining - 1, 0)
        state = state._replace(token=new.token, remaining=remaining)
        return step + 1, kv_cache.constrain(mesh, cache), state, drawn

    nothing = Sample(jnp.int32(-1), jnp.float32(0), jnp.float32(0))
    drawn = jax.tree.map(lambda value: jnp.full((n, num_steps), value), nothing)
    _, cache, state, drawn = jax.lax.while_loop(go_on, one, (0, cache, state, drawn))
    return cache, state, drawn


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def teacher_forced(
    weights: Weights,
    shared_prefix: list[LayerCache],
    tokens: Int[Array, "A L"],
    tree: Tree,
    rows: Int[Array, " M"],
    places: Int[Array, " M"],
    targets: Int[Array, " M"],
    count: Int[Array, ""],
    shared_prefix_length: Int[Array, ""],
    end_ids: Int[Array, " E"],
    *,
    config: DecoderConfig,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, " M"], Bool[Array, " M"]]:
    """How likely given tokens are after texts that are given too: no drawing, and one pass for all.

    Args:
        tokens: Rows that all go on from the shared prefix.
        rows, places, targets: The token that is to follow place p of row r: its id, or -1 for any that ends a turn.
            M is a multiple of `TARGETS_TOGETHER`.
        count: How many of these there are; the others are padding, and what is returned of them is 0.

    Returns:
        log π(target), and whether the target is the likeliest token.
    """
    number, length = tokens.shape
    cache = kv_cache.empty(config, number, length, jax.tree.leaves(shared_prefix)[0].dtype.name)
    nothing = jnp.zeros(number, jnp.int32)
    hidden, _ = kv_cache.extend(
        config, weights, shared_prefix, cache, tokens, shared_prefix_length, nothing, mesh, tree
    )
    hidden = hidden[rows, places]

    def some(i, found):
        # Block by block: logits of all targets at once would take hundreds of megabytes.
        start = i * TARGETS_TOGETHER
        states, wanted = (jax.lax.dynamic_slice_in_dim(x, start, TARGETS_TOGETHER) for x in (hidden, targets))
        logits = kv_cache.logits(config, weights, states)
        ends = wanted < 0
        word = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[:, None], axis=1)[:, 0]
        chosen = jnp.where(ends, jax.nn.logsumexp(logits[:, end_ids], axis=1), word)
        likeliest = logits.argmax(1)
        is_top = jnp.where(ends, (likeliest[:, None] == end_ids[None]).any(1), likeliest == wanted)
        new = chosen - jax.nn.logsumexp(logits, axis=1), is_top
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, start, 0) for x, y in zip(found, new, strict=True))

    found = jnp.zeros(len(targets), jnp.float32), jnp.zeros(len(targets), bool)
    return jax.lax.fori_loop(0, -(-count // TARGETS_TOGETHER), some, found)


def _draw(logits, state, shared_prefix_length, allowed):
    """Draws a token per row with the random number that belongs to its request and position."""
    uniform = jax.vmap(
        lambda key, position: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position))
    )(state.key, shared_prefix_length + state.filled)
    return token_sampling.sample(logits, state.sampling, uniform, allowed)
