"""Computes rewards by the credit rules of the field, each a composition of `credit`'s kernels.

`RULES` is the table. A rule turns the global scores of one rollout into credit of its steps and operations; the other
parts of the reward (format, compression, and for some rules the chunk's own score) are added alike for all of them:

    r_t = w_global credit_t + w_fmt r_fmt(t) + w1 r_chunk(t) + w2 r_comp      (docs/method.md)

where r_chunk may be, in part or whole, the likelihood of the gold answers instead of generated answers' scores.

Knows nothing of text, readers or rollouts. Sizes as in `credit`; S streams, G rollouts per stream.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from finemem_jax.rl import credit
from finemem_jax.rl.credit import Array, Credit

# Memory types as numbers: flat, core, semantic, episodic.
NUM_TYPES = 4
CORE_TYPE = 1


def _static(default: Any) -> Any:
    """Returns a field that `jit` compiles for."""
    return dataclasses.field(default=default, metadata={"static": True})


class RewardInputs(NamedTuple):
    """What was measured on each rollout. All arrays lead with [S, G]; slots are numbered t O + o (see `credit`).

    Attributes:
        step_mask: Steps that exist; the same for all rollouts of a stream.
        chunk_scores, chunk_mask: Scores of each chunk's own questions, answered from M_t.
        chunk_slot, chunk_is_evidence, chunk_type: Of the items retrieved for them: who last wrote each, and its type.
        scores, question_mask: s_j, scores of the global questions, answered from M_T.
        slot, is_evidence: Who last wrote each item retrieved for them; False in padding.
        gold: Steps whose chunk states what a question's answer needs; none where unknown.
        written, valid: Operations written at each step, and those that took effect.
        operation_type: Memory type that each operation is about.
        operation_action: Which of the actions it is; a category for `credit.keep_top`.
        memory_tokens: tokens(M_T).
        stream_tokens: Σ_t tokens(c_t); positive.
        cited: Retrieved items that the answer rests on; for rules that need "citations".
        content, content_mask: Verdicts of the content judge, 1 valid or 0; the mask leaves out where it gave none.
        state_scores: Score of each global question, answered from the empty memory, then from the memory after each
            operation slot (slots without an operation repeat what was before); for rules that need "states".
        without: Score of each question's answer without evidence k; "without".
        full: What `without` is compared with, where that is not `scores`.
        subset_scores, player_slot, is_player: Scores of all coalitions of each question's players
            (`credit.shapley_worth`), and which operation each player is; "subsets".
        kl: Σ over a response's tokens of log π_old - log π_ref, in nats.
        chunk_likelihoods, likelihood_mask: Likelihoods of the gold answers to each chunk's own questions, given M_t.
    """

    step_mask: Bool[Array, "*SG T"]
    chunk_scores: Float[Array, "*SG T J"]
    chunk_mask: Bool[Array, "*SG T J"]
    chunk_slot: Int[Array, "*SG T J K"]
    chunk_is_evidence: Bool[Array, "*SG T J K"]
    chunk_type: Int[Array, "*SG T J K"]
    scores: Float[Array, "*SG Q"]
    question_mask: Bool[Array, "*SG Q"]
    slot: Int[Array, "*SG Q K"]
    is_evidence: Bool[Array, "*SG Q K"]
    gold: Bool[Array, "*SG Q T"]
    written: Bool[Array, "*SG T O"]
    valid: Bool[Array, "*SG T O"]
    operation_type: Int[Array, "*SG T O"]
    operation_action: Int[Array, "*SG T O"]
    memory_tokens: Int[Array, "*SG"]
    stream_tokens: Int[Array, "*SG"]
    cited: Bool[Array, "*SG Q K"] | None = None
    content: Float[Array, "*SG T O"] | None = None
    content_mask: Bool[Array, "*SG T O"] | None = None
    state_scores: Float[Array, "*SG N+1 Q"] | None = None
    without: Float[Array, "*SG Q K"] | None = None
    full: Float[Array, "*SG Q"] | None = None
    subset_scores: Float[Array, "*SG Q 2**P"] | None = None
    player_slot: Int[Array, "*SG Q P"] | None = None
    is_player: Bool[Array, "*SG Q P"] | None = None
    kl: Float[Array, "*SG T"] | None = None
    chunk_likelihoods: Float[Array, "*SG T J"] | None = None
    likelihood_mask: Bool[Array, "*SG T J"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CreditConfig:
    """The credit rule, its numbers and its choices; `config.sections.Credit` and `config.rules` say what each means.

    A pytree of its numbers, so that `jit` compiles once for all of them; rule and choices are part of the compilation
    key.

    Attributes:
        likelihood_share: How much of the chunk reward is the gold answers' likelihood, instead of generated answers'
            scores, in [0, 1].
    """

    beta: float = 0.5
    global_weight: float = 1.0
    chunk_weight: float = 0.5
    compression_weight: float = 0.05
    format_weight: float = 1.0
    content_weight: float = 0.1
    kl_weight: float = 0.0
    bloat_weight: float = 0.3
    used_weight: float = 0.1
    type_factor: float = 4.0
    gain_floor: float = -5.0
    likelihood_share: float = 0.0
    rule: str = _static("full")
    gain_transform: str = _static("prob")
    ablation_conserves: bool = _static(False)
    type_factor_on: str = _static("advantage")
    standardize_channels: bool = _static(False)
    per_operation: bool = _static(False)


class Rewards(NamedTuple):
    """r_t and its parts, before their weights. Zero at steps that do not exist.

    Attributes:
        total: r_t.
        credit: What the rule makes of the global scores; for Fine-Mem r_EARA(t).
        contribution: N_t, Fine-Mem's evidence contribution, under every rule; sums to r_global.
        chunk: r_chunk(t), of generated answers.
        likelihood: The same with the likelihoods of gold answers in place of scores; 0 where nobody asked.
        format: r_fmt(t).
        compression: r_comp, the same at every step.
        content: Share of operations that the content judge found valid; 0 without a judge.
        kl: Σ over the response's tokens of log π_old - log π_ref; 0 without a reference.
        outcome: r_global, one number per rollout.
        operation_credit: The rule's credit of each operation; a step's own is split over its operations, so that these
            sum to `credit` wherever anything was written.
        operation_total: r_t as if the whole step were like this operation; its mean over the step's operations is r_t.
    """

    total: Float[Array, "*SG T"]
    credit: Float[Array, "*SG T"]
    contribution: Float[Array, "*SG T"]
    chunk: Float[Array, "*SG T"]
    likelihood: Float[Array, "*SG T"]
    format: Float[Array, "*SG T"]
    compression: Float[Array, "*SG T"]
    content: Float[Array, "*SG T"]
    kl: Float[Array, "*SG T"]
    outcome: Float[Array, "*SG"]
    operation_credit: Float[Array, "*SG T O"]
    operation_total: Float[Array, "*SG T O"]


# --------------------------------------------------------------------------------------
# The rules: global scores of one rollout → credit
# --------------------------------------------------------------------------------------


def _outcome_score(x: RewardInputs) -> Float[Array, ""]:
    return credit.masked_mean(x.scores, x.question_mask)


def _step_credit(x: RewardInputs, per_step: Float[Array, " T"]) -> Credit:
    """Credit that belongs to steps as wholes."""
    return Credit(jnp.zeros(x.written.shape, x.scores.dtype), jnp.where(x.step_mask, per_step, 0))


def _contribution(x: RewardInputs, share: Float[Array, "Q K"]) -> Credit:
    return credit.contribution(x.scores, share, x.slot, x.question_mask, x.step_mask, x.written.shape[-1])


def outcome(x: RewardInputs, config: CreditConfig) -> Credit:
    """r_global / T at every step. Conserves r_global.

    The final score alone, as Memory-R1 (2508.19828), AgeMem (2601.01885), AtomMem (2601.08323) and MemAgent
    (2507.02259) use it; they give every step r_global itself, which is global_weight = T here.
    """
    return _step_credit(x, credit.evenly(_outcome_score(x), x.step_mask))


def evidence(x: RewardInputs, config: CreditConfig) -> Credit:
    """r_EARA(t) = (1 - β) r_global / T + β N_t      (Fine-Mem, 2601.08435). Conserves r_global for every β."""
    contribution = _contribution(x, credit.equal_share(x.is_evidence))
    return credit.evidence_reward(_outcome_score(x), contribution, x.step_mask, config.beta)


def cited(x: RewardInputs, config: CreditConfig) -> Credit:
    """EARA with N_t shared by the items that the answer rests on: 1 / #cited instead of 1 / |M_j|.

    Repairs "retrieved = used". Conserves r_global; equals `evidence` where all is cited, or nothing. Ours.
    """
    # Citations are missing where nothing was retrieved for any question: then there is nothing to share.
    share = credit.equal_share(x.is_evidence) if x.cited is None else credit.cited_share(x.cited, x.is_evidence)
    contribution = _contribution(x, share)
    return credit.evidence_reward(_outcome_score(x), contribution, x.step_mask, config.beta)


def persession(x: RewardInputs, config: CreditConfig) -> Credit:
    """mean of s_j over questions whose gold evidence lies in chunk t, minus λ bloat      (Memory-R2, 2605.21768).

    Questions without gold evidence go to the last step; a step without questions gets -λ bloat. Does not conserve.
    """
    last = jnp.maximum(x.step_mask.sum() - 1, 0)
    by_gold = credit.by_gold(x.scores, x.gold, x.question_mask, last, "mean")
    penalty = config.bloat_weight * credit.bloat(x.memory_tokens, x.stream_tokens, x.scores.dtype)
    return _step_credit(x, by_gold - penalty)


def cumulative(x: RewardInputs, config: CreditConfig) -> Credit:
    """Mean of `persession` over this and all later steps      (Memory-R2, 2605.21768). Does not conserve."""
    return _step_credit(x, credit.to_go(persession(x, config).step, x.step_mask, 1.0, "mean"))


def step_gain(x: RewardInputs, config: CreditConfig) -> Credit:
    """V(M_t) - V(M_{t-1}), V = mean_j of what the memory scores      (after IGPO, 2510.14967).

    Conserves the gain V(M_T) - V(∅), and charges whoever deletes, overwrites or crowds out what answered. Each
    operation has the gain of its own change. IGPO measures V by the answer's likelihood, as likelihood.probes=True does
    here; otherwise it is the score of a generated answer.
    """
    assert x.state_scores is not None
    gain = credit.state_gain(x.state_scores, x.question_mask, config.gain_transform, config.gain_floor)
    return Credit(gain.reshape(x.written.shape), jnp.zeros(x.step_mask.shape, gain.dtype))


def ablation(x: RewardInputs, config: CreditConfig) -> Credit:
    """EARA with N_t = (1/Q) Σ_j (s_j - s_j without the item): leave-one-out.

    The nearest to AttriMem (2607.21106) whose formula is unpublished. Signed; with ablation_conserves scaled so
    that N_t conserves r_global.
    """
    assert x.without is not None
    worth = credit.ablation_worth(
        x.scores if x.full is None else x.full, x.without, x.is_evidence, config.ablation_conserves
    )
    operation = credit.attribute(worth, x.slot, x.question_mask, x.written.shape)
    contribution = Credit(operation, jnp.zeros(x.step_mask.shape, operation.dtype))
    if config.ablation_conserves:
        # What no evidence holds goes to all steps, as in EARA.
        contribution = contribution._replace(step=_contribution(x, credit.equal_share(x.is_evidence)).step)
    return credit.evidence_reward(_outcome_score(x), contribution, x.step_mask, config.beta)


def shapley(x: RewardInputs, config: CreditConfig) -> Credit:
    """EARA with N_t = (1/Q) Σ_j φ_j(item): each item's exact Shapley value in the answer's score. Ours.

    N sums to mean_j (v_full - v_∅), and is signed. A deleted item that would have been retrieved takes part as two
    players, the operation that wrote it and the one that deleted it: with either the item is as it is now, gone; so a
    harmful DELETE is charged, and the writer gets what the DELETE destroyed.
    """
    assert x.subset_scores is not None and x.player_slot is not None and x.is_player is not None
    worth = jnp.where(x.is_player, credit.shapley_worth(x.subset_scores), 0)
    operation = credit.attribute(worth, x.player_slot, x.question_mask, x.written.shape)
    contribution = Credit(operation, jnp.zeros(x.step_mask.shape, operation.dtype))
    return credit.evidence_reward(_outcome_score(x), contribution, x.step_mask, config.beta)


def broadcast(x: RewardInputs, config: CreditConfig) -> Credit:
    """r_global at every step, undivided      (Mem-alpha's r1, 2509.25911). Does not conserve."""
    return _step_credit(x, _outcome_score(x))


class Rule(NamedTuple):
    """One line of the table.

    Attributes:
        attribute: Global scores to credit; None for `hindsight` and its like, which need the whole group.
        chunk: Whether the chunk's own score is part of the reward.
        needs: What must be measured beyond answers: "citations", "states", "without", "subsets", "content".
        sums_to: What the credit adds up to over the steps of a rollout; "" for nothing in particular.
        group: What is compared: the same "step" of a stream's rollouts, or all steps of the "stream".
        weighs_types: Whether advantages are weighed by the memory type that was retrieved most (ADRPO, MemBuilder,
            2601.05488).
    """

    attribute: Callable[[RewardInputs, CreditConfig], Credit] | None
    chunk: bool
    needs: frozenset[str] = frozenset()
    sums_to: str = ""
    group: str = "step"
    weighs_types: bool = False


RULES: Mapping[str, Rule] = {
    # The paper and its ablations.
    "outcome": Rule(outcome, chunk=False, sums_to="r_global"),
    "chunk": Rule(outcome, chunk=True, sums_to="r_global"),
    "evidence": Rule(evidence, chunk=False, sums_to="r_global"),
    "full": Rule(evidence, chunk=True, sums_to="r_global"),
    # Repairs of "retrieved = used": Fine-Mem with another N_t.
    "cited": Rule(cited, chunk=True, needs=frozenset(["citations"]), sums_to="r_global"),
    "ablation": Rule(ablation, chunk=True, needs=frozenset(["without"])),
    "shapley": Rule(shapley, chunk=True, needs=frozenset(["subsets"])),
    # Rivals.
    "persession": Rule(persession, chunk=False),
    "cumulative": Rule(cumulative, chunk=False),
    "hindsight": Rule(None, chunk=False),
    "hindsight_top": Rule(None, chunk=False),
    "type_weight": Rule(outcome, chunk=True, sums_to="r_global", weighs_types=True),
    "step_gain": Rule(step_gain, chunk=False, needs=frozenset(["states"]), sums_to="V(M_T) - V(∅)"),
    "mem_alpha": Rule(broadcast, chunk=False, needs=frozenset(["content"]), group="stream"),
}


def rule(name: str) -> Rule:
    """Looks a rule up.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in RULES:
        raise ValueError(f"credit.rule must be one of {', '.join(RULES)}; got {name!r}.")
    return RULES[name]


# --------------------------------------------------------------------------------------
# From inputs to rewards
# --------------------------------------------------------------------------------------


def _terms(x: RewardInputs, config: CreditConfig) -> dict[str, Credit]:
    """Computes the terms of one rollout's reward by name, before their weights."""
    used, dtype = rule(config.rule), x.scores.dtype
    compression = credit.compression_reward(x.memory_tokens, x.stream_tokens, dtype)
    no_score = _step_credit(x, jnp.zeros(x.step_mask.shape, dtype))
    likelihood = content = no_score
    if x.chunk_likelihoods is not None and x.likelihood_mask is not None:
        likelihood = credit.chunk_reward(
            x.chunk_likelihoods, x.likelihood_mask, x.chunk_slot, x.chunk_is_evidence, x.written.shape[-1]
        )
    if x.content is not None and x.content_mask is not None:
        content = credit.mean_over_operations(x.content, x.content_mask & x.written)
    return {
        "credit": used.attribute(x, config) if used.attribute else no_score,
        "chunk": credit.chunk_reward(
            x.chunk_scores, x.chunk_mask, x.chunk_slot, x.chunk_is_evidence, x.written.shape[-1]
        ),
        "likelihood": likelihood,
        "format": credit.mean_over_operations(x.valid.astype(dtype), x.written),
        "compression": _step_credit(x, jnp.full(x.step_mask.shape, compression)),
        "content": content,
        "kl": no_score if x.kl is None else _step_credit(x, x.kl),
    }


def weights(config: CreditConfig) -> dict[str, float]:
    """Returns the weight of each term of the reward by name; 0 for what the rule leaves out."""
    used = rule(config.rule)
    return {
        "credit": config.global_weight,
        "chunk": config.chunk_weight * (1 - config.likelihood_share) if used.chunk else 0.0,
        "likelihood": config.chunk_weight * config.likelihood_share if used.chunk else 0.0,
        "format": config.format_weight,
        "compression": config.compression_weight,
        "content": config.content_weight if "content" in used.needs else 0.0,
        "kl": -config.kl_weight,
    }


def weighted_sum(terms: Mapping[str, Credit], weights: Mapping[str, float]) -> Credit:
    """Computes r_t, and what of it belongs to operations."""
    weighted = [jax.tree.map(lambda part, w=weights[name]: w * part, term) for name, term in terms.items()]
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), weighted)


def per_operation(term: Credit, written: Bool[Array, "*SG T O"]) -> Float[Array, "*SG T O"]:
    """Computes a step's credit as if all of it were like one of its operations.

        n c_o + c,   n operations written, c_o credit of this one, c of the step as a whole

    Its mean over the operations is the step's credit, so that crediting operations instead of steps moves credit
    within a response, and changes no response's sum.
    """
    value = written.sum(-1, dtype=jnp.int32, keepdims=True) * term.operation + term.step[..., None]
    return jnp.where(written, value, 0)


@jax.jit
def step_rewards(inputs: RewardInputs, config: CreditConfig) -> tuple[Rewards, dict[str, Credit]]:
    """Computes the rewards of every rollout of every stream, and their terms, [S, G, ...]."""

    def one(x: RewardInputs) -> tuple[Rewards, dict[str, Credit]]:
        terms = _terms(x, config)
        total = weighted_sum(terms, weights(config))
        contribution = _contribution(x, credit.equal_share(x.is_evidence))
        count = credit.at_least_one(x.written, -1, keepdims=True)
        rewards = Rewards(
            total=total.total,
            credit=terms["credit"].total,
            contribution=contribution.total,
            chunk=terms["chunk"].total,
            likelihood=terms["likelihood"].total,
            format=terms["format"].total,
            compression=terms["compression"].total,
            content=terms["content"].total,
            kl=terms["kl"].total,
            outcome=_outcome_score(x),
            operation_credit=jnp.where(x.written, per_operation(terms["credit"], x.written) / count, 0),
            operation_total=per_operation(total, x.written),
        )
        return rewards, terms

    return jax.vmap(jax.vmap(one))(inputs)
