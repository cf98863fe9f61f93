"""Computes GRPO over memory steps: advantages within groups, and the clipped objective. Pure functions of arrays.

Sizes: S streams, G rollouts per stream, T steps, N rows (one response each), A response tokens per row.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

# Either kind: JAX's under `jit`, NumPy's where the host fills in values. Functions of JAX take both.
Array = jax.Array | np.ndarray

# Rewards of a group that differ by less than this share of their size are equal but for rounding.
_ROUNDING = 1e-6
# exp(20) is far outside any clip; beyond 88 it would be inf in float32, and its gradient NaN even where it is clipped.
_LARGEST_LOG_RATIO = 20.0

AGGREGATIONS = ("row", "token", "stream", "constant")


# --------------------------------------------------------------------------------------
# Advantages
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """How rewards of a group are compared.

    Attributes:
        scale: "std" divides by the group's standard deviation, "none" only takes its mean away (Dr.GRPO).
        ddof: 1 = sample standard deviation, 0 = population.
        epsilon: ε, added to the standard deviation; in the units of the rewards.
        std_floor: Smallest standard deviation divided by: continuous rewards never tie, and a z-score would blow up
            their noise to unit size when all rollouts are equally good.
    """

    scale: str = "std"
    ddof: int = 1
    epsilon: float = 1e-6
    std_floor: float = 0.0


def standardize(
    x: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    axis: int | tuple[int, ...],
    normalizer: Normalizer,
    weight: Float[Array, "*shape"] | None = None,
) -> tuple[Float[Array, "*shape"], Bool[Array, "*_"]]:
    """Compares each entry with its group: the entries along `axis`.

        A = (x - mean) / (max(std, floor) + ε),   std² = Σ w (x - mean)² / (Σ w - ddof)

    Of the rewards of one stream's rollouts at one step, with ddof 1, this is Fine-Mem's advantage (arXiv 2601.08435).
    Normalizing per step is unbiased because the stream, not the policy, fixes the number of steps.

    A group whose entries are all equal, up to rounding, gets exactly 0; so does a group of one.

    Args:
        mask: Entries that take part, and get a result; the others get 0.
        weight: w, how much an entry counts in mean and std; 1 unless given.

    Returns:
        The standardized entries, and whether each group has unequal ones; of that `axis` keeps size 1.
    """
    weight = jnp.where(mask, jnp.ones_like(x) if weight is None else weight, 0)
    x = jnp.where(mask, x, 0)
    total = weight.sum(axis, keepdims=True)
    centred = jnp.where(mask, x - (weight * x).sum(axis, keepdims=True) / jnp.maximum(total, 1e-12), 0)
    # Equal but for rounding: the mean of equal numbers need not be that number.
    noise = _ROUNDING * jnp.maximum(1, jnp.abs(x).max(axis, keepdims=True))
    alive = jnp.abs(centred).max(axis, keepdims=True) > noise
    if normalizer.scale == "std":
        variance = (weight * centred**2).sum(axis, keepdims=True) / jnp.maximum(total - normalizer.ddof, 1e-12)
        std = jnp.sqrt(jnp.where(alive, variance, 1))
        scale = jnp.maximum(std, normalizer.std_floor) + normalizer.epsilon
    elif normalizer.scale == "none":
        scale = jnp.ones_like(total)
    else:
        raise ValueError(f"objective.advantage_scale must be 'std' or 'none', got {normalizer.scale!r}.")
    return jnp.where(alive, centred / scale, 0), alive


# --------------------------------------------------------------------------------------
# The objective
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions:
    """Which surrogate is maximized; see `clipped_objective`. Static: part of the compilation key.

    Raises:
        ValueError: `kl_estimator` is "k1", or a name is unknown.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    ratio: str = "token"
    kl_weight: float = 0.0
    kl_estimator: str = "k3"
    entropy_weight: float = 0.0
    importance_cap: float = 0.0

    def __post_init__(self):
        if self.kl_estimator == "k1":
            raise ValueError(
                "objective.kl_estimator='k1' cannot be used in the loss: the gradient of log π - log π_ref is that of "
                "log π alone, whose mean over samples is zero, so the penalty would be pure noise. Use 'k2' or 'k3' "
                "here, or put k1 into the reward with credit.kl_weight."
            )
        if self.kl_estimator not in ("k2", "k3"):
            raise ValueError(f"objective.kl_estimator must be 'k2' or 'k3', got {self.kl_estimator!r}.")
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f"objective.ratio must be 'token' or 'sequence', got {self.ratio!r}.")
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError(f"objective.dual_clip must be above 1, or 0 for none; got {self.dual_clip}.")


class Rows(NamedTuple):
    """What the objective reads of N responses, besides the policy that is trained.

    Attributes:
        token_mask: 1 = trained on.
        advantages: One value per token; every token of a response carries the same in Fine-Mem.
        old_log_probs: log π_old of the sampled tokens, in nats: the policy before this batch's first update.
        sampler_log_probs: The same as the sampler computed them; None where they are not told apart.
        reference_log_probs: log π_ref, of the starting weights; None where no KL is asked for.
        unclipped_factor: Factor of the surrogate's unclipped term (ADRPO); None for 1.
        weight, share: What each token of a row counts in the numerator, and the row in the denominator
            (`aggregation_weights`).
    """

    token_mask: Bool[Array, "N A"]
    advantages: Float[Array, "N A"]
    old_log_probs: Float[Array, "N A"]
    weight: Float[Array, " N"]
    share: Float[Array, " N"]
    sampler_log_probs: Float[Array, "N A"] | None = None
    reference_log_probs: Float[Array, "N A"] | None = None
    unclipped_factor: Float[Array, "N A"] | None = None


class Objective(NamedTuple):
    """A sum to maximize, and what to divide it by once all micro-batches and devices are summed."""

    numerator: Float[Array, ""]
    denominator: Float[Array, ""]


class Diagnostics(NamedTuple):
    """Sums over the trained tokens; divide by `tokens`. `largest_log_ratio` is a maximum.

    Attributes:
        tokens: Number of trained tokens.
        clipped: Tokens at which the clip cut the gradient.
        log_ratio: Σ log(π_θ / π_old), an estimate of -KL(old ‖ θ).
        absolute_log_ratio: Σ |log(π_θ / π_old)|.
        largest_log_ratio: max |log(π_θ / π_old)|.
        entropy: Σ entropy of π_θ, in nats.
        kl: Σ k3 estimate of KL(π_θ ‖ π_ref), in nats; 0 without a reference.
        importance: Σ importance weight between trainer and sampler, after the cap.
    """

    tokens: Float[Array, ""]
    clipped: Float[Array, ""]
    log_ratio: Float[Array, ""]
    absolute_log_ratio: Float[Array, ""]
    largest_log_ratio: Float[Array, ""]
    entropy: Float[Array, ""]
    kl: Float[Array, ""]
    importance: Float[Array, ""]


def clipped_objective(
    log_probs: Float[Array, "N A"], entropy: Float[Array, "N A"], rows: Rows, options: ObjectiveOptions
) -> tuple[Objective, Diagnostics]:
    """GRPO's clipped surrogate, with what the field adds to it.

        J = Σ_rows w Σ_tokens ( c min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) - κ KL + η H ) / Σ_rows share

    - ρ = exp(log π_θ - log π_old) of the token; with ratio="sequence" exp of its mean over the row, whose gradient
      reaches the row's tokens alike (GSPO, arXiv 2507.18071).
    - dual_clip > 0: for A < 0 a token counts at least dual_clip × A (arXiv 1912.09729).
    - importance_cap > 0: c = min(π_old / π_sampler, cap), truncated importance sampling; else c = 1.
    - KL by k2 = ½ (log π_θ - log π_ref)² or k3 = exp(log π_ref - log π_θ) - (log π_ref - log π_θ) - 1.

    Args:
        log_probs: log π_θ of the sampled tokens, in nats, at the sampling temperature.
        entropy: H of π_θ, in nats.
    """
    mask = rows.token_mask
    log_ratio = jnp.where(mask, log_probs - rows.old_log_probs, 0)
    ratio = jnp.exp(jnp.clip(_row_ratio(log_ratio, mask, options.ratio), -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
    factor = 1 if rows.unclipped_factor is None else rows.unclipped_factor
    unclipped = factor * ratio * rows.advantages
    gain = jnp.minimum(unclipped, clipped * rows.advantages)
    if options.dual_clip:
        gain = jnp.where(rows.advantages < 0, jnp.maximum(gain, options.dual_clip * rows.advantages), gain)
    cut = mask & (gain != unclipped)

    importance = jnp.ones_like(log_ratio)
    if options.importance_cap:
        assert rows.sampler_log_probs is not None, "the importance weight compares with the sampler"
        mismatch = jnp.where(mask, rows.old_log_probs - rows.sampler_log_probs, 0)
        importance = jnp.exp(jnp.clip(mismatch, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
        importance = jnp.minimum(importance, options.importance_cap)
    value = importance * gain
    if options.entropy_weight:  # Not by a weight of 0: the gradient of the entropy costs as much as the policy's.
        value = value + options.entropy_weight * entropy
    kl = jnp.zeros_like(log_ratio)
    if rows.reference_log_probs is not None:
        kl = kl_estimate(log_probs, rows.reference_log_probs, "k3", mask)
        value = value - options.kl_weight * kl_estimate(log_probs, rows.reference_log_probs, options.kl_estimator, mask)
    objective = Objective(
        (rows.weight * jnp.where(mask, value, 0).sum(1)).sum(), rows.share.sum().astype(log_ratio.dtype)
    )
    diagnostics = Diagnostics(
        tokens=mask.sum().astype(jnp.float32),
        clipped=cut.sum().astype(jnp.float32),
        log_ratio=log_ratio.sum(),
        absolute_log_ratio=jnp.abs(log_ratio).sum(),
        largest_log_ratio=jnp.abs(log_ratio).max(),
        entropy=jnp.where(mask, entropy, 0).sum(),
        kl=kl.sum(),
        importance=jnp.where(mask, importance, 0).sum(),
    )
    return objective, jax.lax.stop_gradient(diagnostics)


def _row_ratio(log_ratio: Float[Array, "N A"], mask: Bool[Array, "N A"], kind: str) -> Float[Array, "N A"]:
    if kind == "token":
        return log_ratio
    mean = log_ratio.sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1)
    # Value: the row's; gradient: each token's own, which sums to the row's under any advantage per token.
    return jax.lax.stop_gradient(mean - log_ratio) + log_ratio


def kl_estimate(
    log_probs: Float[Array, "N A"], reference_log_probs: Float[Array, "N A"], estimator: str, mask: Bool[Array, "N A"]
) -> Float[Array, "N A"]:
    """KL(π_θ ‖ π_ref) at each token, estimated from the sampled token alone; 0 where the mask is 0.

    "k2" and "k3" (see `clipped_objective`) are never negative. Differences beyond ±20 nats count as 20.
    """
    difference = jnp.clip(jnp.where(mask, reference_log_probs - log_probs, 0), -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return difference**2 / 2 if estimator == "k2" else jnp.exp(difference) - difference - 1


def aggregation_weights(
    row_tokens: Int[np.ndarray, " N"], stream: Int[np.ndarray, " N"], aggregation: str, *, constant: int
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """How rows are averaged: the weight of a row's tokens in the numerator, and its share in the denominator.

    - "row": mean over rows of the mean over their tokens (the paper's 1/|a_t|).
    - "token": mean over all tokens.
    - "stream": mean over streams of the mean over their tokens.
    - "constant": sum over tokens, divided by rows times `constant` (Dr.GRPO): long responses are not discounted.

    Computed from all rows of an update before they are split, so that the split changes nothing. Rows without tokens
    have none.

    Args:
        row_tokens: Trained tokens of each row.
        stream: Id of each row's stream; any integers.
        constant: Longest response, in tokens.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"objective.aggregation must be one of {', '.join(AGGREGATIONS)}; got {aggregation!r}.")
    used = (row_tokens > 0).astype(np.float32)
    if aggregation == "token":
        return used, row_tokens.astype(np.float32)
    if aggregation == "constant":
        return used, used * constant
    if aggregation == "row":
        return used / np.maximum(row_tokens, 1), used
    _, place = np.unique(stream, return_inverse=True)
    tokens = np.bincount(place, row_tokens)[place]
    rows = np.bincount(place, used)[place]
    return (used / np.maximum(tokens, 1)).astype(np.float32), (used / np.maximum(rows, 1)).astype(np.float32)
