"""Carries scores to the steps and operations that earned them: the kernels of all credit rules. Pure functions.

Knows nothing of text, readers or rollouts, and does not say which kernels make up Fine-Mem or a rival's rule:
`credit_rules` does. Functions take one rollout and are mapped over streams and groups by `jax.vmap`. They follow the
dtype of their input: the trainer calls them in float64, because a group's standard deviation can be a thousand times
smaller than its rewards.

Sizes: T steps, O operations of a step, N = T O slots, Q global questions, J questions of a chunk, K evidence slots,
P players of a game, A tokens. Slot t O + o is operation o of step t.
Masks are True where there is something; what stands elsewhere is never read.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

# Either kind: JAX's under `jit`, NumPy's where the host fills in values. Functions of JAX take both.
Array = jax.Array | np.ndarray


class Credit(NamedTuple):
    """Credit of one rollout, kept where it can be pinned down.

    Attributes:
        operation: Credit of single operations.
        step: Credit of a step as a whole, which belongs to none of its operations more than to another.
    """

    operation: Float[Array, "*SG T O"]
    step: Float[Array, "*SG T"]

    @property
    def total(self) -> Float[Array, "*SG T"]:
        """Credit of each step, its operations included."""
        return sum_last(self.operation) + self.step


def masked_mean(values: Float[Array, "... n"], mask: Bool[Array, "... n"]) -> Float[Array, "*_"]:
    """Returns the mean over the last axis of what the mask holds; 0 where it holds nothing."""
    return sum_last(jnp.where(mask, values, 0)) / at_least_one(mask, -1)


def sum_last(values: Float[Array, "... n"]) -> Float[Array, "*_"]:
    """Sums over the last axis."""
    # Of a few entries as additions of whole arrays: a processor's loop over an axis of four has no vectors, and takes
    # eight times as long.
    if 0 < values.shape[-1] <= 8:
        return functools.reduce(jnp.add, [values[..., i] for i in range(values.shape[-1])])
    return values.sum(-1)


def at_least_one(mask: Bool[Array, "*_"], axis: int, keepdims: bool = False) -> Float[Array, "*_"]:
    """Counts what the mask holds along an axis, to divide by: 1 where it holds nothing."""
    # Counted in int32 even where the default is 64 bits, which takes twice as long; then as precise as the rest.
    count = mask.sum(axis, dtype=jnp.int32, keepdims=keepdims)
    return jnp.maximum(count, 1).astype(jnp.result_type(float))


# --------------------------------------------------------------------------------------
# From questions to steps and operations
# --------------------------------------------------------------------------------------


def scatter(worth: Float[Array, "Q K"], slot: Int[Array, "Q K"], num_slots: int) -> Float[Array, " N"]:
    """Sums what stands in each slot: result_n = Σ_j Σ_k worth_jk 1[slot_jk = n].

    Args:
        worth: 0 in padding.
        slot: Who wrote evidence k of question j, in [0, num_slots); anything in padding.
    """

    # TPUs add one entry at a time; there a product with zeros and ones is faster. Elsewhere adding is.
    return jax.lax.platform_dependent(
        worth,
        slot,
        tpu=functools.partial(_by_comparing, num_slots=num_slots),
        default=functools.partial(_by_adding, num_slots=num_slots),
    )


def _by_comparing(worth: Float[Array, "Q K"], slot: Int[Array, "Q K"], num_slots: int) -> Float[Array, " N"]:
    wrote = slot.reshape(-1)[:, None] == jnp.arange(num_slots, dtype=slot.dtype)[None]
    return jnp.einsum("i,in->n", worth.reshape(-1), wrote.astype(worth.dtype))


def _by_adding(worth: Float[Array, "*_"], slot: Int[Array, "*_"], num_slots: int) -> Float[Array, " N"]:
    @jax.custom_batching.custom_vmap
    def add(worth: Array, slot: Array) -> Array:
        return jnp.zeros(num_slots, worth.dtype).at[slot.reshape(-1)].add(worth.reshape(-1), mode="drop")

    @add.def_vmap
    def add_all(size: int, batched: list[bool], worth: Array, slot: Array) -> tuple[Array, bool]:
        # As one long row of slots: adding with two indices takes three times as long on a CPU.
        worth, slot = (
            part if is_batched else jnp.broadcast_to(part[None], (size, *part.shape))
            for part, is_batched in zip((worth, slot), batched, strict=True)
        )
        first = num_slots * jnp.arange(size, dtype=slot.dtype).reshape(-1, *(1 for _ in slot.shape[1:]))
        # What lies outside stays outside: no rollout writes into another's slots.
        inside = (slot >= 0) & (slot < num_slots)
        shifted = jnp.where(inside, first + slot, size * num_slots)
        return _by_adding(worth, shifted, size * num_slots).reshape(size, num_slots), True

    return add(worth, slot)


def attribute(
    worth: Float[Array, "Q K"],
    slot: Int[Array, "Q K"],
    question_mask: Bool[Array, " Q"],
    shape: tuple[int, ...],
) -> Float[Array, "T O"]:
    """Σ_j Σ_k worth_jk 1[slot_jk = (t, o)] / Q: the mean over questions of what each operation's evidence is worth.

    Args:
        shape: (T, O).
    """
    num_questions = at_least_one(question_mask, -1)
    return (
        scatter(jnp.where(question_mask[:, None], worth, 0), slot, shape[0] * shape[1]).reshape(shape) / num_questions
    )


def evenly(amount: Float[Array, ""], step_mask: Bool[Array, " T"]) -> Float[Array, " T"]:
    """The same share of an amount for every step."""
    return jnp.where(step_mask, amount, 0) / at_least_one(step_mask, -1)


def equal_share(is_evidence: Bool[Array, "Q K"]) -> Float[Array, "Q K"]:
    """1 / |M_j| for each of the items retrieved for question j; a question without evidence has no shares."""
    # One division a question, not one an item.
    return jnp.where(is_evidence, 1 / at_least_one(is_evidence, -1, keepdims=True), 0)


def cited_share(cited: Bool[Array, "Q K"], is_evidence: Bool[Array, "Q K"]) -> Float[Array, "Q K"]:
    """1 / #cited for each cited item; where none is cited, all that was retrieved shares alike."""
    cited = cited & is_evidence
    return jnp.where(cited.any(-1, keepdims=True), equal_share(cited), equal_share(is_evidence))


def contribution(
    scores: Float[Array, " Q"],
    share: Float[Array, "Q K"],
    slot: Int[Array, "Q K"],
    question_mask: Bool[Array, " Q"],
    step_mask: Bool[Array, " T"],
    num_operations: int,
) -> Credit:
    """Hands each score to the operations that hold shares in it; what nobody holds goes to all steps alike.

        N_t = (1/Q) Σ_j s_j Σ_k share_jk 1[φ(m_jk) = t] + (1/T) (1/Q) Σ_j s_j (1 - Σ_k share_jk)

    Credit is conserved: Σ_t N_t = mean(scores). With share = 1 / |M_j| this is Fine-Mem's evidence contribution
    (arXiv 2601.08435, NEC); a question without evidence is shared out to all steps alike.

    Args:
        scores: s_j, in [0, 1].
        share: At most 1 in all for a question; 0 in padding.
        slot: Operation that last wrote each item.
    """
    shape = (len(step_mask), num_operations)
    operation = attribute(scores[:, None] * share, slot, question_mask, shape)
    unshared = masked_mean(scores * (1 - share.sum(-1)), question_mask)
    return Credit(operation, evenly(unshared, step_mask))


def evidence_reward(
    outcome: Float[Array, ""], contribution: Credit, step_mask: Bool[Array, " T"], beta: float
) -> Credit:
    """r_EARA(t) = (1 - β) r_global / T + β N_t      (Fine-Mem, EARA).

    Sums to r_global for every β if the contribution does.
    """
    return Credit(beta * contribution.operation, (1 - beta) * evenly(outcome, step_mask) + beta * contribution.step)


def by_gold(
    value: Float[Array, " Q"],
    gold: Bool[Array, "Q T"],
    question_mask: Bool[Array, " Q"],
    default_step: Int[Array, ""],
    reduce: str,
) -> Float[Array, " T"]:
    """Gives each question's value to the steps that read its gold evidence.

    Args:
        gold: Steps whose chunk states what the answer needs. Questions without any go to `default_step`.
        reduce: "mean" or "sum" over the questions of a step; a step without questions gets 0.
    """
    by_default = jnp.arange(gold.shape[1])[None] == default_step
    belongs = jnp.where(gold.any(-1, keepdims=True), gold, by_default) & question_mask[:, None]
    if reduce == "sum":
        return jnp.where(belongs, value[:, None], 0).sum(0)
    return masked_mean(jnp.broadcast_to(value[:, None], gold.shape).T, belongs.T)


def differences(state_value: Float[Array, " n"]) -> Float[Array, " n-1"]:
    """v_n - v_{n-1}. Telescopes: sums to the last value minus the first."""
    return state_value[1:] - state_value[:-1]


def to_go(reward: Float[Array, " T"], step_mask: Bool[Array, " T"], gamma: float, reduce: str) -> Float[Array, " T"]:
    """Σ_{u ≥ t} γ^{u-t} r_u over the steps that exist, or ("mean") that divided by Σ_{u ≥ t} γ^{u-t}; 0 elsewhere."""
    steps = jnp.arange(len(reward))
    ahead = steps[None] - steps[:, None]
    # 0 ** 0 = 1, so that γ = 0 gives the reward itself.
    weight = jnp.where((ahead >= 0) & step_mask[None], jnp.asarray(gamma, reward.dtype) ** jnp.maximum(ahead, 0), 0)
    total = weight @ jnp.where(step_mask, reward, 0)
    if reduce == "mean":
        total = total / jnp.maximum(weight.sum(-1), 1e-12)
    return jnp.where(step_mask, total, 0)


# --------------------------------------------------------------------------------------
# What an item was worth
# --------------------------------------------------------------------------------------


def ablation_worth(
    scores: Float[Array, " Q"], without: Float[Array, "Q K"], is_evidence: Bool[Array, "Q K"], conserve: bool
) -> Float[Array, "Q K"]:
    """Leave-one-out: s_j - s_j(M_j without item k). Negative where the answer is better without the item.

    Args:
        without: Score of the answer from all retrieved items but k.
        conserve: Scale the positive differences of a question so that they add up to s_j; if no item alone is
            needed, all retrieved items share alike.
    """
    worth = jnp.where(is_evidence, scores[:, None] - without, 0)
    if not conserve:
        return worth
    gain = jnp.maximum(worth, 0)
    total = gain.sum(-1, keepdims=True)
    share = jnp.where(total > 0, gain / jnp.where(total > 0, total, 1), equal_share(is_evidence))
    return scores[:, None] * share


def shapley_worth(subset_scores: Float[Array, "Q 2**P"]) -> Float[Array, "Q P"]:
    """The Shapley value of each of P players, exact over all 2^P coalitions.

        φ_p = Σ_{C ∌ p} |C|! (P - |C| - 1)! / P!  (v(C ∪ {p}) - v(C))

    Σ_p φ_p = v(all) - v(none). A player that changes nothing gets 0.

    Args:
        subset_scores: v(C) at index Σ_{p in C} 2^p: index 0 is the empty coalition, the last one everybody.
    """
    num_coalitions = subset_scores.shape[-1]
    num_players = num_coalitions.bit_length() - 1

    def weight(coalition: int, player: int) -> float:
        # Of v(coalition) in the player's value: with the player in it what it adds to, without it what it is added to.
        inside, others = coalition >> player & 1, (coalition & ~(1 << player)).bit_count()
        orders = math.factorial(others) * math.factorial(num_players - others - 1) / math.factorial(num_players)
        return orders if inside else -orders

    weights = [[weight(coalition, player) for player in range(num_players)] for coalition in range(num_coalitions)]
    return subset_scores @ jnp.asarray(weights, subset_scores.dtype).reshape(num_coalitions, num_players)


def state_gain(
    state_scores: Float[Array, "n Q"], question_mask: Bool[Array, " Q"], transform: str, floor: float
) -> Float[Array, " n-1"]:
    """V(M_n) - V(M_{n-1}), V = mean_j v_j: what each change of the memory was worth. Sums to V(last) - V(first).

    IGPO's gain per turn (arXiv 2510.14967), moved from a search agent's history to a memory.

    Args:
        state_scores: v_j of each state of the memory, in [0, 1]; the first is that of the empty memory.
        transform: "prob" takes v as it is, "log" its logarithm, at least `floor`.
    """
    value = state_scores if transform == "prob" else jnp.log(jnp.maximum(state_scores, jnp.exp(floor)))
    return differences(masked_mean(value, question_mask[None]))


def bloat(memory_tokens: Int[Array, ""], stream_tokens: Int[Array, ""], dtype: Any) -> Float[Array, ""]:
    """max(0, tokens(M_T) - 0.7 Σ_t tokens(c_t)) / Σ_t tokens(c_t)      (Memory-R2, arXiv 2605.21768)."""
    memory_tokens, stream_tokens = memory_tokens.astype(dtype), stream_tokens.astype(dtype)
    return jnp.maximum(memory_tokens - 0.7 * stream_tokens, 0) / stream_tokens


# --------------------------------------------------------------------------------------
# Parts of the reward that ask nobody, and weights
# --------------------------------------------------------------------------------------


def chunk_reward(
    scores: Float[Array, "T J"], mask: Bool[Array, "T J"], slot: Int[Array, "T J K"], is_evidence: Bool[Array, "T J K"],
    num_operations: int,
) -> Credit:  # fmt: skip
    """r_chunk(t): mean score of the chunk's own questions, answered from M_t      (Fine-Mem, CSR).

    What evidence written at step t itself supported belongs to its operations, the rest to the step.
    """
    num_steps = len(scores)
    first = num_operations * jnp.arange(num_steps, dtype=slot.dtype)[:, None, None]
    # Not slot // num_operations == t: processors have no vectors of integer divisions.
    here = (slot >= first) & (slot < first + num_operations) & is_evidence & mask[..., None]
    worth = (scores / at_least_one(mask, -1, keepdims=True))[..., None] * equal_share(is_evidence)
    worth = jnp.where(here, worth, 0).reshape(num_steps, -1)
    own = scatter(worth, slot.reshape(num_steps, -1), num_steps * num_operations).reshape(num_steps, num_operations)
    return Credit(own, masked_mean(scores, mask) - sum_last(own))


def mean_over_operations(values: Float[Array, "T O"], mask: Bool[Array, "T O"]) -> Credit:
    """The mean over a step's operations, as the sum of what each brings in; 0 for steps without operations.

    With values 1 for valid operations and 0 for others: r_fmt(t) = valid operations / operations written.
    """
    share = jnp.where(mask, values, 0) / at_least_one(mask, -1, keepdims=True)
    return Credit(share, jnp.zeros(len(values), values.dtype))


def compression_reward(memory_tokens: Int[Array, ""], stream_tokens: Int[Array, ""], dtype: Any) -> Float[Array, ""]:
    """r_comp = 1 - tokens(M_T) / Σ_t tokens(c_t). Negative when the memory is longer than what was read."""
    return 1 - memory_tokens.astype(dtype) / stream_tokens.astype(dtype)


def type_factors(
    evidence_type: Int[Array, "J K"], is_evidence: Bool[Array, "J K"], num_types: int, exempt: int, factor: float
) -> Float[Array, " types"]:
    """`factor` for the memory type that was retrieved most (of equals the first), 1 for the others.

    The weights of ADRPO (MemBuilder, arXiv 2601.05488). The type `exempt` (its core memory, which is not retrieved but
    always shown) never wins. If nothing was retrieved, all are 1.
    """
    types = jnp.arange(num_types)
    counts = ((evidence_type[..., None] == types[None, None]) & is_evidence[..., None]).sum((0, 1))
    counts = jnp.where(types == exempt, 0, counts)
    return jnp.where((types == counts.argmax()) & (counts > 0), factor, 1)


def keep_top(
    score: Float[Array, " n"], category: Int[Array, " n"], fraction: float, valid: Bool[Array, " n"]
) -> Bool[Array, " n"]:
    """The best `fraction` of each category, rounded up; of equals those that stand first. Invalid entries never.

    Mem-T (arXiv 2601.23014) trains on the better half of each operation type.
    """
    # Sorted by category, then validity, then score: the rank within a category is the distance from its first entry.
    order = jnp.lexsort((-score, ~valid, category))
    sorted_category = category[order]
    first = jnp.searchsorted(sorted_category, sorted_category, side="left")
    end = jnp.searchsorted(sorted_category, sorted_category, side="right")
    num_valid = jnp.append(0, jnp.cumsum(valid[order]))
    kept = jnp.arange(len(order)) - first < jnp.ceil(fraction * (num_valid[end] - num_valid[first]))
    return valid & jnp.zeros_like(valid).at[order].set(kept)


def spread_to_tokens(
    operation: Float[Array, " O"], step: Float[Array, ""], token_operations: Int[Array, " A"]
) -> Float[Array, " A"]:
    """For each token its operation's value, or (-1) the step's."""
    # Index -1 is the last entry.
    return jnp.append(operation, step)[token_operations]
