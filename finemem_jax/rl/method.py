"""Builds the method that a config chooses: credit rule, how rewards are compared, objective, and rollout options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.memory import retrieval
from finemem_jax.reading.answering import chunk_share
from finemem_jax.rl import credit_rules, probes
from finemem_jax.rl.credit_rules import CreditConfig, Rule
from finemem_jax.rl.grpo import Normalizer, ObjectiveOptions
from finemem_jax.rl.rewards import Sizes
from finemem_jax.rl.rollout import RolloutOptions
from finemem_jax.types import Constraint

# Few responses have more; where one has, reward arrays are twice as large.
_LEAST_OPERATIONS = 8


@dataclasses.dataclass(frozen=True)
class Method:
    """How scores become gradients: the credit rule, its numbers, how rewards are compared, the objective."""

    rule: Rule
    credit: CreditConfig
    normalizer: Normalizer
    objective: ObjectiveOptions

    @classmethod
    def from_config(cls, config: Config) -> Method:
        """Returns the method that a config chooses.

        Raises:
            ValueError: the choices cannot work, or not together.
        """
        rule = credit_rules.rule(config.credit.rule)
        if rule.weighs_types and config.memory.layout != "typed":
            raise ValueError(
                f"credit.rule={config.credit.rule!r} weighs memory types, and memory.layout={config.memory.layout!r} "
                "has none; set memory.layout='typed'."
            )
        most = retrieval.max_evidence(config.memory.top_k, config.memory.layout) + 2
        if probes.SUBSETS in rule.needs and most > probes.MAX_PLAYERS:
            raise ValueError(
                f"credit.rule={config.credit.rule!r} asks about every subset of what was retrieved; with memory.top_k="
                f"{config.memory.top_k} (memory.layout={config.memory.layout!r}) these are too many. "
                "Lower memory.top_k, or use credit.rule='ablation'."
            )
        args = checks.rule_args(config)
        chosen = {**vars(config.credit), **vars(args)}
        return cls(
            rule=rule,
            # The share of likelihoods is a matter of the training step.
            credit=CreditConfig(**{name: chosen[name] for name in _names_of(CreditConfig) if name in chosen}),
            normalizer=Normalizer(
                scale=config.objective.advantage_scale,
                ddof=config.objective.advantage_ddof,
                epsilon=config.objective.advantage_epsilon,
                std_floor=config.objective.std_floor,
            ),
            objective=ObjectiveOptions(
                **{name: getattr(config.objective, name) for name in _names_of(ObjectiveOptions)}
            ),
        )


def _names_of(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def reward_sizes(config: Config) -> Sizes:
    """Returns how many of each thing the reward arrays of a training step have room for."""
    rollout, kept = config.rollout, config.data.questions_per_stream
    asked = max(rollout.global_question_threshold, math.ceil(rollout.global_question_fraction * kept))
    return Sizes(
        steps=config.data.chunks_per_stream,
        operations=_LEAST_OPERATIONS,
        chunk_questions=max(config.data.questions_per_chunk, 1),
        questions=max(min(kept, asked), 1),
        evidence=retrieval.max_evidence(config.memory.top_k, config.memory.layout),
        tokens=rollout.max_new_tokens,
    )


def rollout_options(config: Config, evaluation: bool, constraint: Constraint | None = None) -> RolloutOptions:
    """Returns how streams are rolled out: in groups and sampled to train; once, greedily and in full to evaluate.

    Evaluation's answers are generated; `with_likelihoods` says when training asks for something else.
    """
    needs = Method.from_config(config).rule.needs
    return RolloutOptions(
        group_size=1 if evaluation else config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=0.0 if evaluation else config.rollout.temperature,
        retrieval=config.memory.retrieval,
        top_k=config.memory.top_k,
        global_question_fraction=1.0 if evaluation else config.rollout.global_question_fraction,
        global_question_threshold=config.rollout.global_question_threshold,
        # Evaluation scores answers; nobody is credited.
        needs=needs & {"citations"} if evaluation else needs,
        cited_by=checks.rule_args(config).cited_by,
        view_top_k=config.memory.view_top_k,
        keep_prompts=not evaluation,
        draw_top_k=config.rollout.top_k,
        draw_top_p=config.rollout.top_p,
        constraint=constraint,
    )


def with_likelihoods(config: Config, options: RolloutOptions, step: int) -> RolloutOptions:
    """Returns how streams are rolled out at a training step (counted from 0), as far as likelihoods are used."""
    share, every = chunk_share(config, step), config.likelihood.check_every
    used = share > 0 or config.likelihood.probes
    compared = used and every > 0 and step % every == 0
    return dataclasses.replace(
        options,
        chunk_answers=share < 1 or compared,
        chunk_likelihoods=share > 0 or compared,
        final_likelihoods=compared,
        probe_likelihoods=config.likelihood.probes,
    )
