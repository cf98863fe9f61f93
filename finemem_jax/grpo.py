"""GRPO over memory steps: advantages within a group at a step, and the clipped objective. Pure functions of arrays.

Sizes: S streams, G rollouts per stream, T steps, N rows (one response each), A response tokens per row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Rewards of a group that differ by less than this share of their size are equal but for rounding.
_ROUNDING = 1e-6


class Group(NamedTuple):
    """Group-relative advantages.

    Attributes:
        advantages: A_{t,i}; 0 at steps that do not exist.
        alive: Whether a group has unequal rewards, and so something to learn from.
    """

    advantages: Float[Array, "S G T"]
    alive: Bool[Array, "S T"]


@jax.jit
def group_advantage(rewards: Float[Array, "S G T"], step_mask: Bool[Array, "S T"], epsilon: float = 1e-6) -> Group:
    """Compares the rollouts of one stream at the same step.

        A_{t,i} = (r_{t,i} - mean_i r_{t,i}) / (std_i r_{t,i} + ε)      (Fine-Mem; std with ddof 1)

    A group whose rewards are all equal, up to rounding, gets exactly 0. Normalising per step is unbiased because
    the stream, not the policy, fixes the number of steps (METHOD.md, convention 5).

    Args:
        rewards: r_{t,i}; i runs along axis 1.
        step_mask: True at steps that exist.
        epsilon: ε, in the units of the rewards.
    """
    spread = rewards.max(1) - rewards.min(1)
    alive = step_mask & (spread > _ROUNDING * jnp.maximum(1, jnp.abs(rewards).max(1)))
    centred = rewards - rewards.mean(1, keepdims=True)
    std = jnp.sqrt((centred**2).sum(1, keepdims=True) / max(rewards.shape[1] - 1, 1))
    return Group(jnp.where(alive[:, None], centred / (std + epsilon), 0), alive)


class Objective(NamedTuple):
    """A sum to maximise, and what to divide it by once all micro-batches and devices are summed."""

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
    """

    tokens: Float[Array, ""]
    clipped: Float[Array, ""]
    log_ratio: Float[Array, ""]
    absolute_log_ratio: Float[Array, ""]
    largest_log_ratio: Float[Array, ""]
    entropy: Float[Array, ""]


def clipped_objective(
    log_probs: Float[Array, "N A"],
    old_log_probs: Float[Array, "N A"],
    advantages: Float[Array, "N A"],
    token_mask: Bool[Array, "N A"],
    entropy: Float[Array, "N A"],
    *,
    clip_low: float,
    clip_high: float,
    aggregation: str,
) -> tuple[Objective, Diagnostics]:
    """GRPO's clipped surrogate.

        min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A),   ρ = exp(log π_θ - log π_old)

    Args:
        log_probs: log π_θ of the sampled tokens, in nats.
        old_log_probs: The same under the policy that sampled them, at the same temperature.
        advantages: One value per token; every token of a response carries the same in Fine-Mem.
        token_mask: 1 = trained on.
        aggregation: "token": mean over all tokens. "row": mean over rows of the mean over their tokens.
    """
    log_ratio = jnp.where(token_mask, log_probs - old_log_probs, 0)
    # exp(20) is far outside any clip; beyond 88 it would be inf, and its gradient NaN even where it is clipped.
    ratio = jnp.exp(jnp.clip(log_ratio, -20, 20))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = jnp.where(token_mask, jnp.minimum(ratio * advantages, clipped * advantages), 0)
    row_tokens = token_mask.sum(1)
    if aggregation == "token":
        objective = Objective(surrogate.sum(), row_tokens.sum().astype(surrogate.dtype))
    elif aggregation == "row":
        per_row = surrogate.sum(1) / jnp.maximum(row_tokens, 1)
        objective = Objective(per_row.sum(), (row_tokens > 0).sum().astype(surrogate.dtype))
    else:
        raise ValueError(f"objective.aggregation must be 'token' or 'row', got {aggregation!r}.")
    cut = token_mask & (clipped * advantages < ratio * advantages)
    diagnostics = Diagnostics(
        tokens=row_tokens.sum().astype(jnp.float32),
        clipped=cut.sum().astype(jnp.float32),
        log_ratio=log_ratio.sum(),
        absolute_log_ratio=jnp.abs(log_ratio).sum(),
        largest_log_ratio=jnp.abs(log_ratio).max(),
        entropy=jnp.where(token_mask, entropy, 0).sum(),
    )
    return objective, jax.lax.stop_gradient(diagnostics)
