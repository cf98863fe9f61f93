"""Who earned what: Fine-Mem's rewards per step, as pure functions of scores and evidence (arXiv 2601.08435).

Knows nothing of text, readers or rollouts. Functions take one rollout; `step_rewards` maps them over streams and
groups. All are jitted where they are used, and follow the dtype of their input: the trainer calls them in
float64, because a group's standard deviation can be a thousand times smaller than its rewards.

Sizes: S streams, G rollouts per stream, T steps, J questions of a chunk, Q global questions, K evidence slots.
Masks are True where there is something; what stands elsewhere is never read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Weights(NamedTuple):
    """β and the weights of the reward's parts (METHOD: 0.5, 0.5, 0.05 and 1)."""

    beta: float
    chunk: float
    compression: float
    format: float


class RewardInputs(NamedTuple):
    """What was measured on each rollout. All arrays lead with [S, G].

    Attributes:
        step_mask: Steps that exist; the same for all rollouts of a stream.
        chunk_scores, chunk_mask: Scores of each chunk's own questions, answered from M_t.
        scores, question_mask: s_j, scores of the global questions, answered from M_T.
        source_step: φ(m) of each retrieved item, in [0, T).
        is_evidence: False in padding slots.
        valid_operations, written_operations: Counts per step.
        memory_tokens: tokens(M_T).
        stream_tokens: Σ_t tokens(c_t); positive.
    """

    step_mask: Bool[Array, "*SG T"]
    chunk_scores: Float[Array, "*SG T J"]
    chunk_mask: Bool[Array, "*SG T J"]
    scores: Float[Array, "*SG Q"]
    question_mask: Bool[Array, "*SG Q"]
    source_step: Int[Array, "*SG Q K"]
    is_evidence: Bool[Array, "*SG Q K"]
    valid_operations: Int[Array, "*SG T"]
    written_operations: Int[Array, "*SG T"]
    memory_tokens: Int[Array, "*SG"]
    stream_tokens: Int[Array, "*SG"]


class Rewards(NamedTuple):
    """r_t and its parts, before their weights. Zero at steps that do not exist.

    Attributes:
        total: r_t.
        evidence: r_EARA(t); sums to r_global over the steps, for every β.
        contribution: N_t; sums to r_global.
        chunk: r_chunk(t).
        format: r_fmt(t).
        compression: r_comp, the same at every step.
        outcome: r_global, one number per rollout.
    """

    total: Float[Array, "*SG T"]
    evidence: Float[Array, "*SG T"]
    contribution: Float[Array, "*SG T"]
    chunk: Float[Array, "*SG T"]
    format: Float[Array, "*SG T"]
    compression: Float[Array, "*SG T"]
    outcome: Float[Array, "*SG"]


def masked_mean(values: Float[Array, "... n"], mask: Bool[Array, "... n"]) -> Float[Array, ...]:
    """Mean over the last axis of what the mask holds; 0 where it holds nothing."""
    count = mask.sum(-1)
    return jnp.where(mask, values, 0).sum(-1) / jnp.maximum(count, 1)


def evidence_contribution(
    scores: Float[Array, " Q"],
    question_mask: Bool[Array, " Q"],
    source_step: Int[Array, "Q K"],
    is_evidence: Bool[Array, "Q K"],
    step_mask: Bool[Array, " T"],
) -> Float[Array, " T"]:
    """Credits each step with the answers that its memory items supported.

        N_t = Σ_j Σ_{m in M_j, φ(m)=t} s_j / (|M_j| Q)      (Fine-Mem, NEC)

    Credit is conserved: Σ_t N_t = mean(scores). A question without evidence credits all steps alike
    (METHOD.md, convention 2).

    Args:
        scores: s_j, in [0, 1].
        source_step: φ(m), the step that last wrote each item, in [0, T).
        is_evidence: False in padding slots, which hold source_step 0; the mask keeps them from crediting step 0.

    Returns:
        N_t, in the units of `scores`; zeros if there are no questions.
    """
    num_steps = step_mask.shape[0]
    num_questions = jnp.maximum(question_mask.sum(), 1)
    value = jnp.where(question_mask, scores, 0) / num_questions
    num_evidence = is_evidence.sum(-1)
    share = jnp.where(is_evidence, 1, 0) / jnp.maximum(num_evidence, 1)[:, None].astype(scores.dtype)
    # A comparison instead of a scatter: T and K are small, and a scatter would serialise on GPU and TPU.
    wrote = source_step[..., None] == jnp.arange(num_steps)[None, None]
    attributed = jnp.einsum("q,qk,qkt->t", value, share.astype(value.dtype), wrote.astype(value.dtype))
    unattributed = jnp.where(num_evidence == 0, value, 0).sum()
    evenly = step_mask / jnp.maximum(step_mask.sum(), 1).astype(value.dtype)
    return (attributed + unattributed * evenly).astype(scores.dtype)


def evidence_reward(
    outcome: Float[Array, ""], contribution: Float[Array, " T"], step_mask: Bool[Array, " T"], beta: float
) -> Float[Array, " T"]:
    """r_EARA(t) = (1 - β) r_global / T + β N_t      (Fine-Mem, EARA). Sums to r_global for every β."""
    evenly = step_mask * outcome / jnp.maximum(step_mask.sum(), 1).astype(outcome.dtype)
    return (1 - beta) * evenly + beta * contribution


def format_reward(valid: Int[Array, " T"], written: Int[Array, " T"], dtype) -> Float[Array, " T"]:
    """r_fmt(t) = valid operations / operations written; 0 where nothing was written."""
    return valid.astype(dtype) / jnp.maximum(written, 1).astype(dtype)


def compression_reward(memory_tokens: Int[Array, ""], stream_tokens: Int[Array, ""], dtype) -> Float[Array, ""]:
    """r_comp = 1 - tokens(M_T) / Σ_t tokens(c_t). Negative when the memory is longer than what was read."""
    return 1 - memory_tokens.astype(dtype) / stream_tokens.astype(dtype)


def rollout_rewards(inputs: RewardInputs, weights: Weights) -> Rewards:
    """All rewards of one rollout.

    r_t = r_EARA(t) + w_fmt r_fmt(t) + w1 r_chunk(t) + w2 r_comp      (Fine-Mem; w_fmt = 1)
    """
    step_mask, dtype = inputs.step_mask, inputs.scores.dtype
    outcome = masked_mean(inputs.scores, inputs.question_mask)
    contribution = evidence_contribution(
        inputs.scores, inputs.question_mask, inputs.source_step, inputs.is_evidence, step_mask
    )
    evidence = evidence_reward(outcome, contribution, step_mask, weights.beta)
    chunk = step_mask * masked_mean(inputs.chunk_scores, inputs.chunk_mask)
    form = step_mask * format_reward(inputs.valid_operations, inputs.written_operations, dtype)
    compression = step_mask * compression_reward(inputs.memory_tokens, inputs.stream_tokens, dtype)
    total = evidence + weights.format * form + weights.chunk * chunk + weights.compression * compression
    return Rewards(total, evidence, contribution, chunk, form, compression, outcome)


@jax.jit
def step_rewards(inputs: RewardInputs, weights: Weights) -> Rewards:
    """`rollout_rewards` for every rollout of every stream, [S, G, ...]."""
    over_groups = jax.vmap(rollout_rewards, in_axes=(0, None))
    return jax.vmap(over_groups, in_axes=(0, None))(inputs, weights)
