"""Computes log-probabilities and entropies of given tokens without ever holding all logits. Knows no losses.

Sizes: N tokens, D width of a hidden state, V vocabulary, whose entries are called words here; on a device of a mesh,
its own part of each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from finemem_jax.models import logical_axes
from finemem_jax.models.logical_axes import Array

_VOCAB, _EMBED = logical_axes.STORED["vocab"], logical_axes.STORED["embed"]
_STATES, _HEAD, _TOKENS = P(logical_axes.ROWS, None), P(_VOCAB, _EMBED), P(logical_axes.ROWS)
# Finite, so that differences of two of them are 0 and not NaN.
_LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut up; known at compile time.

    Attributes:
        token_block, vocab_block: Most tokens and words in a block. 2,048 of each take 16 MB: little enough for
            a CPU, which is several times as slow when logits of 50 MB come and go, and large products for a GPU.
        mesh: Where given, every device handles its own tokens and its own slice of the vocabulary, as
            `logical_axes.STORED` splits the head; only sums over words cross the vocabulary's mesh axis. None: JAX
            decides.
    """

    token_block: int = 2048
    vocab_block: int = 2048
    mesh: Mesh | None = None


def token_log_probs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    temperature: Float[Array, "*_"] | float,
    plan: Plan = Plan(),
) -> tuple[Float[jax.Array, " N"], Float[jax.Array, " N"]]:
    """Computes log softmax(head · hidden / temperature)[target] and the entropy of that distribution, in nats.

    Logits exist for one block of tokens and words at a time, and again in the backward pass; float32 logits of 8,192
    tokens over 151,936 words would take 5 GB. With z = logits / temperature, ℓ = log Σ_v exp z_v, p = exp(z - ℓ):

        log p_target = z_target - ℓ          H = ℓ - Σ_v p_v z_v
        ∂/∂z_v: g (1[v = target] - p_v) - g_H p_v (log p_v + H)

    where g and g_H are the incoming gradients. Gradients reach hidden, head and temperature, in reverse mode, once.

    Args:
        hidden: May be bfloat16, as `head` may; logits, sums and results are float32 (float64 if an input is).
        targets: In [0, V).
        temperature: Positive; one for all, or one per token.
    """
    n = len(hidden)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(hidden, head))
    if n == 0:
        return jnp.zeros(0, dtype), jnp.zeros(0, dtype)
    padding = 0 if plan.mesh is None else -n % logical_axes.size(plan.mesh, logical_axes.ROWS)
    inputs = _Inputs(
        jnp.pad(hidden, ((0, padding), (0, 0))),
        jnp.asarray(head),
        jnp.pad(targets, (0, padding)),
        jnp.pad(jnp.broadcast_to(jnp.asarray(temperature, dtype), (n,)), (0, padding), constant_values=1),
    )
    log_probs, entropy = _log_probs(plan, inputs)
    return log_probs[:n], entropy[:n]


class _Inputs(NamedTuple):
    """What log-probabilities are computed from, on a mesh or of one device: [N D], [V D], [N] and [N]."""

    hidden: Array
    head: Array
    targets: Array
    temperature: Array


class _Logits(NamedTuple):
    """What the forward pass keeps of the logits, [N] each. ℓ = maximum + log_sum would lose the digits of log_sum."""

    maximum: Array
    log_sum: Array
    entropy: Array


def _values(plan: Plan, inputs: _Inputs) -> tuple[Array, Array]:
    return _forward(plan, inputs)[0]


def _forward(plan: Plan, inputs: _Inputs) -> tuple[tuple[Array, Array], tuple[_Inputs, _Logits]]:
    chosen, logits = _on_mesh(plan, _local_forward, (_TOKENS, _TOKENS))(inputs)
    return (chosen, logits.entropy), (inputs, logits)


def _backward(plan: Plan, kept: tuple[_Inputs, _Logits], slopes: tuple[Array, Array]) -> tuple[tuple[Any, ...]]:
    local = _on_mesh(plan, _local_backward, (_STATES, _HEAD, _TOKENS))
    hidden_slope, head_slope, temperature_slope = local(*kept, slopes)
    return (_Inputs._make((hidden_slope, head_slope, None, temperature_slope)),)


def _on_mesh(plan: Plan, local: Callable[..., Any], out_specs: tuple[P, ...]) -> Callable[..., Any]:
    """Runs `local(plan, inputs, ...)`, on every device with its own parts; arrays after `inputs` are [N]."""
    local = functools.partial(local, plan)
    if plan.mesh is None:
        return local

    def everywhere(*arguments: Any) -> Any:
        in_specs = (_Inputs._make((_STATES, _HEAD, _TOKENS, _TOKENS)), *(_TOKENS for _ in arguments[1:]))
        # Unchecked: the loops' first values, zeros, would have to be declared as different on every device.
        return jax.shard_map(local, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)

    return everywhere


_log_probs = jax.custom_vjp(_values, nondiff_argnums=(0,))
_log_probs.defvjp(_forward, _backward)


def _local_forward(plan: Plan, inputs: _Inputs) -> tuple[Array, _Logits]:
    """Log-probabilities of one device's tokens, and what the backward pass needs; sums over words cross the mesh."""
    hidden, head, targets, temperature = inputs
    tokens, words = _Blocks.of(len(hidden), plan.token_block), _Blocks.of(len(head), plan.vocab_block)
    targets = _local_targets(plan, targets, len(head))
    dtype = temperature.dtype

    def add_words(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        weights = _weights(plan, words, i, head=head)

        def add_tokens(j: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            # Relative to the largest logit so far: sum of exp, of exp × logit, and the target's logit itself.
            largest, total, weighted, chosen = old = tuple(tokens.read(j, x) for x in sums)
            z = _scaled(_read(tokens, j, hidden), weights, tokens.read(j, temperature))
            is_target = _is_target(words, i, tokens.read(j, targets))
            is_new_word = words.is_new(i)[None]
            z = jnp.where(is_new_word, z, _LEAST)
            new_largest = jnp.maximum(largest, z.max(1))
            shifted = z - new_largest[:, None]
            e = jnp.exp(shifted)
            shrink = jnp.exp(largest - new_largest)
            new = (
                new_largest,
                total * shrink + e.sum(1),
                (weighted + total * (largest - new_largest)) * shrink + (e * shifted).sum(1),
                chosen + jnp.where(is_target & is_new_word, z, 0).sum(1),
            )
            is_new = tokens.is_new(j)
            return tuple(
                tokens.write(j, x, jnp.where(is_new, now, before))
                for x, now, before in zip(sums, new, old, strict=True)
            )

        return lax.fori_loop(0, tokens.number, add_tokens, sums)

    zero = jnp.zeros(len(hidden), dtype)
    largest, total, weighted, chosen = lax.fori_loop(0, words.number, add_words, (zero + _LEAST, zero, zero, zero))
    if plan.mesh is not None:
        over_all = lax.pmax(largest, _VOCAB)
        shrink = jnp.exp(largest - over_all)
        weighted = lax.psum((weighted + total * (largest - over_all)) * shrink, _VOCAB)
        total, chosen, largest = lax.psum(total * shrink, _VOCAB), lax.psum(chosen, _VOCAB), over_all
    log_sum = jnp.log(total)
    return chosen - largest - log_sum, _Logits(largest, log_sum, log_sum - weighted / total)


def _local_backward(
    plan: Plan, inputs: _Inputs, logits: _Logits, slopes: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Gradients of one device's hidden states, head slice and temperatures.

    Words in the outer loop: the gradient of a block's head rows is complete, over all tokens, when it is written, so it
    is added up in float32 without a float32 copy of the head. What is carried along, [N, D] for the hidden states, is
    smaller than the head wherever N < V.
    """
    hidden, head, targets, temperature = inputs
    tokens, words = _Blocks.of(len(hidden), plan.token_block), _Blocks.of(len(head), plan.vocab_block)
    targets = _local_targets(plan, targets, len(head))
    dtype = temperature.dtype
    width = hidden.shape[1]

    def add_words(i: Array, slopes_so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_slope, head_slope = slopes_so_far
        weights = _weights(plan, words, i, head=head)
        # What an earlier block has done: these words' gradient is written again, but the states' must not grow again.
        new_weights = jnp.where(words.is_new(i)[:, None], weights, 0)

        def add_tokens(j: Array, slopes_so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden_slope, weights_slope = slopes_so_far
            states, degrees = _read(tokens, j, hidden), tokens.read(j, temperature)
            largest, log_sum, entropy = (tokens.read(j, x)[:, None] for x in logits)
            scale = jnp.where(tokens.is_new(j), 1 / degrees, 0)
            slope, entropy_slope = ((tokens.read(j, x) * scale)[:, None] for x in slopes)
            log_p = _scaled(states, weights, degrees) - largest - log_sum
            is_target = _is_target(words, i, tokens.read(j, targets))
            # By the logits before the division by the temperature.
            logit_slope = jnp.where(is_target, slope, 0) - jnp.exp(log_p) * (slope + entropy_slope * (log_p + entropy))
            logit_slope = logit_slope.astype(jnp.result_type(states, weights))
            back = jnp.einsum("nv,vd->nd", logit_slope, new_weights, preferred_element_type=dtype)
            here = jnp.einsum("nv,nd->vd", logit_slope, states, preferred_element_type=dtype)
            return tokens.write(j, hidden_slope, tokens.read(j, hidden_slope) + back), weights_slope + here

        nothing = jnp.zeros((words.size, width), dtype)
        hidden_slope, weights_slope = lax.fori_loop(0, tokens.number, add_tokens, (hidden_slope, nothing))
        if plan.mesh is not None:
            weights_slope = lax.psum_scatter(weights_slope, _EMBED, scatter_dimension=1, tiled=True)
            weights_slope = lax.psum(weights_slope, tuple(axis for axis in logical_axes.ROWS if axis != _EMBED))
        return hidden_slope, words.write(i, head_slope, weights_slope.astype(head.dtype))

    nothing = jnp.zeros(hidden.shape, dtype), jnp.zeros_like(head)
    hidden_slope, head_slope = lax.fori_loop(0, words.number, add_words, nothing)
    if plan.mesh is not None:
        hidden_slope = lax.psum(hidden_slope, _VOCAB)
    # a = head · h, z = a / temperature: ∂/∂temperature = -Σ_v a_v ∂/∂a_v / temperature, and Σ_v head_v ∂/∂a_v = ∂/∂h.
    temperature_slope = -(hidden * hidden_slope).sum(1) / temperature
    return hidden_slope.astype(hidden.dtype), head_slope, temperature_slope


class _Blocks(NamedTuple):
    """An axis cut into equal blocks; the last is moved back to end where the axis ends, and so repeats some elements.

    A padded copy would cost as much as the array itself.
    """

    total: int
    size: int
    number: int

    @classmethod
    def of(cls, total: int, most: int) -> _Blocks:
        """As few blocks as `most` allows, as even as possible; of whole tiles of an accelerator if `most` is."""
        count = -(-total // most)
        tile = 128 if most % 128 == 0 else 1
        even = -(-total // (count * tile)) * tile
        return cls(total, min(even, total), count)

    def start(self, i: Array) -> Array:
        """Where block i starts."""
        return jnp.minimum(i * self.size, self.total - self.size)

    def is_new(self, i: Array) -> Array:
        """Whether an element of block i stands in no earlier block, [size]."""
        return self.start(i) + jnp.arange(self.size) >= i * self.size

    def read(self, i: Array, x: Array) -> Array:
        """Returns block i of an array."""
        return lax.dynamic_slice_in_dim(x, self.start(i), self.size)

    def write(self, i: Array, x: Array, block: Array) -> Array:
        """Returns the array with another block i."""
        return lax.dynamic_update_slice_in_dim(x, block, self.start(i), 0)


def _scaled(states: Array, weights: Array, temperature: Array) -> Array:
    """Logits of a block of tokens and words, divided by the temperature."""
    logits = jnp.einsum("nd,vd->nv", states, weights, preferred_element_type=temperature.dtype)
    return logits / temperature[:, None]


def _is_target(words: _Blocks, i: Array, targets: Array) -> Array:
    """[n, v]: whether word v of block i is token n's target."""
    return targets[:, None] == words.start(i) + jnp.arange(words.size)[None]


def _local_targets(plan: Plan, targets: Array, size: int) -> Array:
    """Targets as rows of this device's slice of the head; outside [0, size) where another device has the row."""
    return targets if plan.mesh is None else targets - lax.axis_index(_VOCAB) * size


def _weights(plan: Plan, words: _Blocks, i: Array, *, head: Array) -> Array:
    """The head's rows of block i, in full width; gathered block by block, so that no device ever holds more."""
    weights = _read(words, i, head)
    return weights if plan.mesh is None else lax.all_gather(weights, _EMBED, axis=1, tiled=True)


def _read(blocks: _Blocks, i: Array, x: Array) -> Array:
    """Returns block i of what does not change in a loop.

    Tied to the loop's index as if it did: XLA before jax 0.12 otherwise converts all of a bfloat16 array to float32
    before the loop, on a CPU, and keeps the copy.
    """
    x, i = lax.optimization_barrier((x, i))
    return blocks.read(i, x)
