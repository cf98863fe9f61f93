"""Computes generation on the device: prefill, decoding of several steps, and first draws. All pure and jitted.

Sizes: N slots (rows decoded together), A rows prefilled together, L tokens per row, S cache positions per slot, K steps
per call, M targets, V vocabulary. Knows nothing of requests, queues or text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, UInt32

from finemem_jax.models import kv_cache, logical_axes
from finemem_jax.models.attention import Array
from finemem_jax.models.kv_cache import Context, LayerCache, NewTokens, Packed
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.sampling import token_sampling
from finemem_jax.sampling.token_sampling import Sample, SamplingParams

# Tokens whose logits over the vocabulary `teacher_forced` computes at a time.
TARGETS_TOGETHER = 64


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a program is compiled for: its static argument.

    Attributes:
        mesh: Devices that hold the weights, and split the rows if they can; None for one.
        num_steps: K; of `decode` alone.
    """

    config: DecoderConfig
    mesh: Mesh | None = None
    num_steps: int = 0


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


class PromptEnds(NamedTuple):
    """Where prompts end: last hidden states, and which of these rows is each slot's."""

    hidden: Float[Array, "A D"]
    row_of_slot: Int[Array, " N"]


class Rules(NamedTuple):
    """When decoding stops, and what it may draw.

    Attributes:
        leave_at: A call stops early once so many slots or fewer are still at work: 0 to go on as long as one is, more
            where requests wait for slots.
        end_ids: Tokens that end a completion.
        allowed: Which tokens each slot may draw (`token_sampling.sample`), at all of the steps; None for all tokens.
    """

    leave_at: Int[Array, ""] | np.int32
    end_ids: Int[Array, " E"]
    allowed: UInt32[Array, "N W"] | None = None


class Targets(NamedTuple):
    """Tokens whose likelihood is asked for. M is a multiple of `TARGETS_TOGETHER`.

    Attributes:
        rows, places, ids: Token `ids` is to follow place `places` of row `rows`; -1 for any token that ends a turn.
        num_targets: How many of the M there are; the others are padding, and what is returned of them is 0.
    """

    rows: Int[Array, " M"]
    places: Int[Array, " M"]
    ids: Int[Array, " M"]
    num_targets: Int[Array, ""] | np.int32


def idle(slots: int) -> SlotState:
    """Returns NumPy arrays for slots without anything to do; the host fills them in."""
    return SlotState(
        token=np.zeros(slots, np.int32),
        filled=np.zeros(slots, np.int32),
        remaining=np.zeros(slots, np.int32),
        sampling=SamplingParams(np.zeros(slots, np.float32), np.zeros(slots, np.int32), np.ones(slots, np.float32)),
        key=np.zeros((slots, 2), np.uint32),
    )


# --------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="rows")
def prefill(
    context: Context, rows: list[LayerCache], new: NewTokens, *, spec: Spec
) -> tuple[Float[Array, "A D"], list[LayerCache]]:
    """Appends tokens of prompts to rows of a cache; returns each row's last hidden state and the cache.

    Hidden states and not logits: most prefills are of prefixes, whose logits nobody asks for. Slots are prefilled in
    copies of their rows (`copy_rows`): where one program takes rows out of a cache, computes and puts them back, XLA on
    CPUs copies the cache whole.
    """
    hidden, rows = kv_cache.extend(spec.config, context, rows, new=new, mesh=spec.mesh)
    assert new.lengths is not None, "the last token of each row is asked for"
    last = jnp.take_along_axis(hidden, (new.lengths - 1)[:, None, None], axis=1)[:, 0]
    return logical_axes.constrain(spec.mesh, last, kv_cache.STATES), kv_cache.constrain(spec.mesh, rows)


@functools.partial(jax.jit, static_argnames="spec")
def draw_first(
    context: Context, ends: PromptEnds, state: SlotState, allowed: UInt32[Array, "N W"] | None, *, spec: Spec
) -> Sample:
    """Draws a token for each slot from the state of its last prompt token."""
    logits = kv_cache.logits(spec.config, context.weights, ends.hidden)[ends.row_of_slot]
    return _draw(logits, state, prefix_length=context.prefix_length, allowed=allowed)


# --------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------


# Step, cache, state and what was drawn so far.
_Carry = tuple[Array | int, list[LayerCache], SlotState, Sample]


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def decode(
    context: Context, cache: list[LayerCache], state: SlotState, rules: Rules, *, spec: Spec
) -> tuple[list[LayerCache], SlotState, Sample]:
    """Draws up to `spec.num_steps` tokens per slot.

    Returns:
        Cache and state after it, and what was drawn, [N K] each; the token is -1 where a slot drew none.
    """
    config, num_steps = spec.config, spec.num_steps

    def go_on(carry: _Carry) -> Array:
        step, _, state, _ = carry
        return (step < num_steps) & ((state.remaining > 0).sum() > rules.leave_at)

    def one_step(carry: _Carry) -> _Carry:
        step, cache, state, drawn = carry
        # Without a mesh: of one token a row, partial sums are less to send than a layer's weights.
        hidden, cache = kv_cache.extend(config, context, cache, new=NewTokens(state.token[:, None], state.filled))
        active = state.remaining > 0
        state = state._replace(filled=state.filled + active)
        logits = kv_cache.logits(config, context.weights, hidden[:, 0])
        new = _draw(logits, state, prefix_length=context.prefix_length, allowed=rules.allowed)
        drawn = jax.tree.map(
            lambda all_, one, idle: all_.at[:, step].set(jnp.where(active, one, idle)), drawn, new, nothing
        )
        ended = (new.token[:, None] == rules.end_ids[None]).any(1)
        remaining = jnp.where(active & ~ended, state.remaining - 1, 0)
        state = state._replace(token=new.token, remaining=remaining)
        return step + 1, kv_cache.constrain(spec.mesh, cache), state, drawn

    nothing = Sample(jnp.int32(-1), jnp.float32(0), jnp.float32(0))
    drawn = jax.tree.map(lambda value: jnp.full((len(state.token), num_steps), value), nothing)
    _, cache, state, drawn = jax.lax.while_loop(go_on, one_step, (0, cache, state, drawn))
    return cache, state, drawn


def _draw(
    logits: Float[Array, "N V"],
    state: SlotState,
    *,
    prefix_length: Int[Array, ""] | np.int32,
    allowed: UInt32[Array, "N W"] | None,
) -> Sample:
    """Draws a token per row with the random number that belongs to its request and position."""
    uniform = jax.vmap(
        lambda key, position: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position))
    )(state.key, prefix_length + state.filled)
    return token_sampling.sample(logits, state.sampling, uniform, allowed=allowed)


# --------------------------------------------------------------------------------------
# Likelihoods of given tokens
# --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="spec")
def teacher_forced(
    context: Context, packed: Packed, targets: Targets, end_ids: Int[Array, " E"], *, spec: Spec
) -> tuple[Float[Array, " M"], Bool[Array, " M"]]:
    """Computes how likely given tokens are after texts that are given too: no drawing, and one pass for all.

    Args:
        packed: Rows that all go on from the shared prefix.

    Returns:
        log π(target), and whether the target is the likeliest token.
    """
    config, (number, length) = spec.config, packed.ids.shape
    cache = kv_cache.empty(config, number, length, dtype=jax.tree.leaves(context.prefix)[0].dtype.name)
    new = NewTokens(packed.ids, jnp.zeros(number, jnp.int32), packed=packed)
    hidden, _ = kv_cache.extend(config, context, cache, new=new, mesh=spec.mesh)
    hidden = hidden[targets.rows, targets.places]

    def one_block(i: Array, found: tuple[Array, Array]) -> tuple[Array, ...]:
        # Block by block: logits of all targets at once would take hundreds of megabytes.
        start = i * TARGETS_TOGETHER
        states, wanted = (jax.lax.dynamic_slice_in_dim(x, start, TARGETS_TOGETHER) for x in (hidden, targets.ids))
        logits = kv_cache.logits(config, context.weights, states)
        ends = wanted < 0
        of_token = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[:, None], axis=1)[:, 0]
        chosen = jnp.where(ends, jax.nn.logsumexp(logits[:, end_ids], axis=1), of_token)
        likeliest = logits.argmax(1)
        is_top = jnp.where(ends, (likeliest[:, None] == end_ids[None]).any(1), likeliest == wanted)
        new = chosen - jax.nn.logsumexp(logits, axis=1), is_top
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, start, 0) for x, y in zip(found, new, strict=True))

    size = len(targets.ids)
    found = jnp.zeros(size, jnp.float32), jnp.zeros(size, bool)
    return jax.lax.fori_loop(0, -(-targets.num_targets // TARGETS_TOGETHER), one_block, found)


# --------------------------------------------------------------------------------------
# Caches
# --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "rows", "positions", "dtype", "mesh"))
def empty(
    *, config: DecoderConfig, rows: int, positions: int, dtype: str, mesh: Mesh | None = None
) -> list[LayerCache]:
    """Returns a cache of zeros, made where it belongs on the mesh."""
    return kv_cache.constrain(mesh, kv_cache.empty(config, rows, positions, dtype=dtype))


class Copies(NamedTuple):
    """Which rows are copied where: row rows[i] over row targets[i], for i < count, one after the other.

    Where devices split the rows, each data shard has its own count and its part of the pairs, with rows counted within
    it.
    """

    targets: Int[Array, " N"]
    rows: Int[Array, " N"]
    counts: Int[Array, " shards"]


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="cache")
def copy_rows(
    cache: list[LayerCache], source: list[LayerCache], copies: Copies, *, mesh: Mesh | None = None
) -> list[LayerCache]:
    """Copies rows of `source` over rows of `cache`.

    Where one cache has more positions than the other, the later ones are left out, or as they were.
    """
    return _by_shard(_copied, mesh, cache, source, copies)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="cache")
def copy_within(cache: list[LayerCache], copies: Copies, *, mesh: Mesh | None = None) -> list[LayerCache]:
    """Copies rows of a cache over others of it."""
    return _by_shard(lambda cache, copies: _copied(cache, None, copies), mesh, cache, copies)


def _by_shard(
    function: Callable[..., list[LayerCache]], mesh: Mesh | None, cache: list[LayerCache], *others: list | Copies
) -> list[LayerCache]:
    """Computes function(cache, *others) in each data shard on its own rows.

    With `shard_map`, since the compiler does not know that no shard looks at another's rows, and would send them all.
    """
    if kv_cache.data_shards(mesh, len(cache[0][0])) == 1:
        return function(cache, *others)
    assert mesh is not None, "one device has all rows"
    caches = jax.tree.map(lambda place: place.spec, kv_cache.cache_shardings(mesh, cache))
    specs = tuple(caches if isinstance(argument, list) else P(logical_axes.ROWS) for argument in (cache, *others))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=caches, check_vma=False)(cache, *others)


def _copied(cache: list[LayerCache], source: list[LayerCache] | None, copies: Copies) -> list[LayerCache]:
    """Copies one shard's rows; source None: from the cache itself."""

    def one(i: Array, cache: list[LayerCache]) -> list[LayerCache]:
        def copied(to: Array, came_from: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(came_from, copies.rows[i], 1)
            row = row[tuple(slice(min(a, b)) for a, b in zip(row.shape, to.shape, strict=True))]
            return jax.lax.dynamic_update_slice(to, row, (copies.targets[i], 0, 0, 0))

        return jax.tree.map(copied, cache, cache if source is None else source)

    return jax.lax.fori_loop(0, copies.counts[0], one, cache)
