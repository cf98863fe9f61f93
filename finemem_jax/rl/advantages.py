"""Computes advantages from rewards: compares the rollouts of a stream, step by step or operation by operation.

    A_{t,i} = (r_{t,i} - mean_i r_{t,i}) / (std_i r_{t,i} + ε)      (docs/method.md; Fine-Mem, 2601.08435)

and what some of the `credit_rules` do otherwise: other groups, parts standardized before they are summed, advantages
without a reward (hindsight), factors by memory type. How a group is standardized stands in `grpo`.

Knows nothing of text, readers or rollouts. Sizes as in `credit`; S streams, G rollouts per stream.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from finemem_jax.rl import credit, credit_rules, grpo
from finemem_jax.rl.credit import Array, Credit
from finemem_jax.rl.credit_rules import CreditConfig, RewardInputs
from finemem_jax.rl.grpo import Normalizer


class Advantages(NamedTuple):
    """What the objective maximizes.

    Attributes:
        step: A_{t,i} of each response.
        operation: A of each operation; equal to its step's unless per_operation, or a rule weighs types.
        unclipped_factor: Factor of the surrogate's unclipped term for each operation, ADRPO's variant; else 1.
        alive: Whether the step's group has anything to learn from.
    """

    step: Float[Array, "S G T"]
    operation: Float[Array, "S G T O"]
    unclipped_factor: Float[Array, "S G T O"]
    alive: Bool[Array, "S T"]


@functools.partial(jax.jit, static_argnames="normalizer")
def compute(
    inputs: RewardInputs, terms: Mapping[str, Credit], config: CreditConfig, normalizer: Normalizer
) -> Advantages:
    """Compares the rollouts of each stream.

    The weighted sum of the reward's terms is standardized or, with standardize_channels, each term before it is
    weighted and added. With per_operation every operation has its own advantage, from the mean and spread of its
    group's operations, each response weighing the same; never from other steps or by kind of operation.

    Args:
        terms: Of the reward, as `credit_rules.step_rewards` returns them.
    """
    used, weights = credit_rules.rule(config.rule), credit_rules.weights(config)
    if config.standardize_channels:
        # GDPO's order: a term that varies much no longer hides one that varies little.
        standardized = {name: _standardized(term, inputs, config, normalizer) for name, term in terms.items()}
        step, operation = (
            functools.reduce(jnp.add, [weights[name] * one[i] for name, one in standardized.items()]) for i in (0, 1)
        )
        # A term that counts nothing has nothing to teach, however much it varies.
        alive = functools.reduce(jnp.logical_or, [one[2] & (weights[name] != 0) for name, one in standardized.items()])
    else:
        step, operation, alive = _standardized(credit_rules.weighted_sum(terms, weights), inputs, config, normalizer)
    if used.attribute is None:
        hindsight, some = _hindsight(inputs, config, normalizer)
        if config.rule == "hindsight_top":
            hindsight = _top_half(hindsight, inputs)
            step, operation, alive = jnp.zeros_like(step), jnp.zeros_like(operation), jnp.zeros_like(alive)
            some = jnp.any(hindsight.operation > 0, (1, 3)) & inputs.step_mask[:, 0]
        own = credit_rules.per_operation(hindsight, inputs.written)
        own = own if config.per_operation else hindsight.total[..., None]
        step = step + config.global_weight * hindsight.total
        operation = operation + config.global_weight * jnp.where(inputs.written, own, 0)
        alive = alive | (some & (config.global_weight != 0))
    factor = jnp.ones_like(operation)
    if used.weighs_types:
        factor = _type_factors(inputs, config)
        if config.type_factor_on == "advantage":
            count = credit.at_least_one(inputs.written, -1)
            written = jnp.where(inputs.written, factor, 0).sum(-1)
            row = jnp.where(inputs.written.any(-1), written / count, 1)
            operation = operation * (factor if config.per_operation else row[..., None])
            step, factor = step * row, jnp.ones_like(operation)
    return Advantages(step, operation, factor, alive)


@jax.jit
def per_token(
    advantages: Advantages, token_operations: Int[Array, "S G T A"]
) -> tuple[Float[Array, "S G T A"], Float[Array, "S G T A"]]:
    """Returns advantage and unclipped factor of each response token: those of its operation, or (-1) of its step."""
    spread = credit.spread_to_tokens
    for _ in range(3):
        spread = jax.vmap(spread)
    values = spread(advantages.operation, advantages.step, token_operations)
    return values, spread(advantages.unclipped_factor, jnp.ones_like(advantages.step), token_operations)


def _standardized(
    term: Credit, inputs: RewardInputs, config: CreditConfig, normalizer: Normalizer
) -> tuple[Float[Array, "S G T"], Float[Array, "S G T O"], Bool[Array, "S T"]]:
    """Standardizes one term within its groups: of steps, of operations, and whether the group has any spread."""
    written, total = inputs.written, term.total
    # The rollouts of a stream, and where the rule says so their steps too.
    axis = (1,) if credit_rules.rule(config.rule).group == "step" else (1, 2)
    if config.per_operation:
        # The last entry is the step's own: it counts in mean and spread only where nothing was written.
        count = written.sum(-1, dtype=jnp.int32, keepdims=True)
        entries = jnp.append(credit_rules.per_operation(term, written), total[..., None], -1)
        weight = jnp.append(written / jnp.maximum(count, 1), count == 0, -1).astype(total.dtype)
        mask = jnp.append(written, jnp.ones_like(count, bool), -1) & inputs.step_mask[..., None]
        value, alive = grpo.standardize(entries, mask, (*axis, 3), normalizer, weight)
        step, operation, alive = value[..., -1], value[..., :-1], alive[..., 0]
    else:
        step, alive = grpo.standardize(total, inputs.step_mask, axis, normalizer)
        operation = jnp.where(written, step[..., None], 0)
    return step, operation, alive[:, 0] & inputs.step_mask[:, 0]


def _hindsight(inputs: RewardInputs, config: CreditConfig, normalizer: Normalizer) -> tuple[Credit, Bool[Array, "S T"]]:
    """S(t) = (1/Q) Σ_j A_j (1[gold evidence of j in chunk t] + λ · items of step t retrieved for j).

    A_j compares the answers of a stream's rollouts to question j. Signed, and an advantage already: it is not compared
    again (Mem-T, arXiv 2601.23014, in policy-gradient form; where no gold is known, only the λ term remains). There
    operations have a score, and each wrote one item; a step has what its operations have.
    """
    value, _ = grpo.standardize(inputs.scores, inputs.question_mask, 1, normalizer)

    def one(x: RewardInputs, value: Array) -> Credit:
        used = config.used_weight * value[:, None] * x.is_evidence
        operation = credit.attribute(used, x.slot, x.question_mask, x.written.shape)
        gold = jnp.where(x.gold & x.question_mask[:, None], value[:, None], 0).sum(0)
        return Credit(operation, jnp.where(x.step_mask, gold / credit.at_least_one(x.question_mask, -1), 0))

    hindsight = jax.vmap(jax.vmap(one))(inputs, value)
    return hindsight, jnp.any(hindsight.total != 0, 1)


def _top_half(hindsight: Credit, inputs: RewardInputs) -> Credit:
    """1 for the better half of the valid operations of each kind, else 0: filtered fine-tuning (Mem-T's own form)."""
    score = credit_rules.per_operation(hindsight, inputs.written)
    kept = credit.keep_top(
        score.reshape(-1), inputs.operation_action.reshape(-1), 0.5, (inputs.written & inputs.valid).reshape(-1)
    )
    kept = kept.reshape(score.shape).astype(score.dtype)
    count = credit.at_least_one(inputs.written, -1, keepdims=True)
    return Credit(kept / count, jnp.zeros_like(hindsight.step))


def _type_factors(inputs: RewardInputs, config: CreditConfig) -> Float[Array, "S G T O"]:
    """Factor of each operation: that of its memory type at this step (`credit.type_factors`)."""

    def one_step(types: Array, is_evidence: Array, mask: Array, operation_type: Array) -> Array:
        factors = credit.type_factors(
            types, is_evidence & mask[:, None], credit_rules.NUM_TYPES, credit_rules.CORE_TYPE, config.type_factor
        )
        return factors[operation_type]

    over_all = jax.vmap(jax.vmap(jax.vmap(one_step)))
    return over_all(inputs.chunk_type, inputs.chunk_is_evidence, inputs.chunk_mask, inputs.operation_type)
