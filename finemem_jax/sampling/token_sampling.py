"""Draws tokens from logits with temperature, top-k and top-p, each row by its own settings. No sort, no recompiling.

Sizes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

Array = jax.Array | np.ndarray
# Two-level drawing works on blocks of this many tokens.
_BLOCK = 256
# As an integer, the bit pattern of the first float32 above every probability.
_ABOVE_ONE = 0x3F800001


class SamplingParams(NamedTuple):
    """How each row draws.

    Attributes:
        temperature: 0 means greedy: the likeliest token, whatever `top_k` and `top_p` say.
        top_k: Only so many of the likeliest tokens may be drawn; 0 means all.
        top_p: Only the fewest likeliest tokens that together have this probability; 1 means all.
    """

    temperature: Float[Array, " N"]
    top_k: Int[Array, " N"]
    top_p: Float[Array, " N"]


class Sample(NamedTuple):
    """Tokens drawn.

    Attributes:
        log_prob: Under the distribution drawn from: of softmax(logits / temperature) what may be drawn at all and what
            top-k and then top-p leave of it, normalized. Greedy rows, which would have 0, report `raw_log_prob`.
        raw_log_prob: Under the model's own distribution, softmax(logits).
    """

    token: Int[Array, " N"]
    log_prob: Float[Array, " N"]
    raw_log_prob: Float[Array, " N"]


def sample(
    logits: Float[Array, "N V"],
    sampling: SamplingParams,
    uniform: Float[Array, " N"],
    *,
    allowed: UInt32[Array, "N W"] | None = None,
) -> Sample:
    """Draws a token per row.

    Args:
        uniform: A random number in [0, 1) for each row; all that a draw depends on beside its row of logits.
        allowed: Which tokens may be drawn at all, a bit each (`types.Matcher.mask`), at least one in every row; None
            for all.
    """
    greedy = sampling.temperature == 0.0
    raw = jax.nn.log_softmax(logits)
    if allowed is not None:
        logits = jnp.where(_bits(allowed, logits.shape[1]), logits, -jnp.inf)
    tempered = jax.nn.log_softmax(logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None])
    cut = ~greedy & ((sampling.top_k > 0) | (sampling.top_p < 1))
    # One condition for the whole batch, so that XLA runs one side only: batches that do not cut do not pay for cutting.
    left = jax.lax.cond(cut.any(), _cut, lambda log_probs, *_: log_probs, tempered, sampling.top_k, sampling.top_p)
    left = jnp.where(greedy[:, None], raw, left)
    token = jnp.where(greedy, logits.argmax(-1), inverse_cdf(left, uniform)).astype(jnp.int32)
    log_prob, raw_log_prob = (jnp.take_along_axis(x, token[:, None], axis=1)[:, 0] for x in (left, raw))
    return Sample(token, log_prob, raw_log_prob)


def _bits(words: Array, count: int) -> Array:
    """Unpacks `count` bits of each row of 32-bit words."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    return bits.reshape(len(words), -1)[:, :count] == 1


def _cut(log_probs: Array, top_k: Array, top_p: Array) -> Array:
    """Keeps what top-k, then top-p leave of each row, normalized; -inf elsewhere. Equals of the last token stay too."""
    probs = jnp.exp(log_probs)
    least = _largest(lambda least: (probs >= least[:, None]).sum(-1) >= top_k, len(probs))
    probs = jnp.where((top_k > 0)[:, None] & (probs < least[:, None]), 0, probs)
    wanted = top_p * probs.sum(-1)
    least = _largest(lambda least: jnp.where(probs >= least[:, None], probs, 0).sum(-1) >= wanted, len(probs))
    # Sums round: at 1, the least of all tokens might not change them.
    probs = jnp.where((top_p < 1)[:, None] & (probs < least[:, None]), 0, probs)
    return jnp.log(probs) - jnp.log(probs.sum(-1, keepdims=True))


def _largest(enough: Callable[[Array], Array], num_rows: int) -> Array:
    """Finds the largest probability per row for which enough(probability) holds; it does at 0, and at no larger after.

    By bisection of bit patterns, which are ordered like the floats: 30 passes over the row, where sorting would take
    many times as long.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        holds = enough(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    bounds = jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, _ABOVE_ONE, jnp.int32)
    low, _ = jax.lax.fori_loop(0, _ABOVE_ONE.bit_length(), halve, bounds)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def inverse_cdf(log_probs: Float[Array, "N V"], uniform: Float[Array, " N"]) -> Int[Array, " N"]:
    """Finds the token at which the cumulative probability passes `uniform`.

    One random number a row instead of V Gumbel ones. Two levels (blocks, then inside a block) keep the float32
    sums short, so that rare tokens keep their share.
    """
    n, vocab = log_probs.shape
    blocks = jnp.pad(jnp.exp(log_probs), ((0, 0), (0, -vocab % _BLOCK))).reshape(n, -1, _BLOCK)
    masses = blocks.sum(-1)
    cumulative = jnp.cumsum(masses, axis=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    block = jnp.argmax(cumulative > threshold, axis=-1)
    before = jnp.take_along_axis(cumulative - masses, block[:, None], axis=1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    passed = before + jnp.cumsum(inside, axis=-1) > threshold
    # Rounding can leave the threshold just above the block's own sum; its likeliest token is then as good as any.
    offset = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), jnp.argmax(inside, axis=-1))
    return block * _BLOCK + offset
