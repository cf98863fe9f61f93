"""Computes the metrics of a training step, from rewards, operations, answers, samplers and compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from finemem_jax.rl.advantages import Advantages
from finemem_jax.rl.batching import Group
from finemem_jax.rl.credit_rules import RewardInputs, Rewards
from finemem_jax.runtime import compilation
from finemem_jax.sampling.sampler import SamplerStats
from finemem_jax.types import Action, Operation, Trajectory


def of_rewards(inputs: RewardInputs, rewards: Rewards, advantages: Advantages) -> dict[str, float]:
    """Averages rewards, and what they were computed from, over a training step."""
    mask = inputs.step_mask
    count = mask.sum()
    with_questions = inputs.chunk_mask.any(-1)
    asked = inputs.question_mask.any(-1)
    groups = mask[:, 0].sum()
    return {
        "reward/total": float(rewards.total.sum() / count),
        "reward/credit": float(rewards.credit.sum() / count),
        "reward/format": float(rewards.format.sum() / count),
        "reward/compression": float(rewards.compression.sum() / count),
        "reward/content": float(rewards.content.sum() / count),
        "reward/kl": float(rewards.kl.sum() / count),
        # Means over chunks and rollouts that have questions.
        "reward/chunk": float(rewards.chunk[with_questions].mean()) if with_questions.any() else 0.0,
        "reward/likelihood": float(rewards.likelihood.sum() / count),
        "reward/outcome": float(rewards.outcome[asked].mean()) if asked.any() else 0.0,
        "reward/alive_groups": float(advantages.alive.sum() / groups),
        "data/chunks_per_stream": float(count / mask[:, :, 0].size),
        "memory/tokens": float(inputs.memory_tokens.mean()),
        "operations/valid_fraction": float(inputs.valid.sum() / max(inputs.written.sum(), 1)),
        "operations/per_step": float(inputs.written.sum() / count),
    }


def of_operations(trajectories: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Counts the operations that the manager wrote, as fractions of all, and the tokens of its responses."""
    steps = [step for rollouts in trajectories for one in rollouts for step in one.steps]
    outcomes = [outcome for step in steps for outcome in step.outcomes]
    total = max(len(outcomes), 1)
    metrics = {
        f"operations/{action.value}_fraction": sum(
            isinstance(o.operation, Operation) and o.operation.action is action and o.valid for o in outcomes
        )
        / total
        for action in Action
    }
    statuses = {"malformed": 0, "duplicate": 0, "unknown_id": 0}
    for outcome in outcomes:
        if outcome.status.value in statuses:
            statuses[outcome.status.value] += 1
    metrics |= {f"operations/{name}_fraction": number / total for name, number in statuses.items()}
    metrics["rollout/truncated_fraction"] = float(np.mean([s.completion.finish_reason == "length" for s in steps]))
    metrics["rollout/response_tokens"] = float(np.mean([len(s.completion.ids) for s in steps]))
    return metrics


def of_answers(trajectories: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Compares likelihoods of gold answers with scores of generated ones, and counts answers without a score.

    The rank correlation, Spearman's, is over the questions of a data source; there is none where all are alike. Below
    about 0.5, likelihoods measure something else than the task does.
    """
    by_source: dict[str, list[tuple[float, float]]] = {}
    unscored = total = 0
    likelihoods = []
    for one in (one for rollouts in trajectories for one in rollouts):
        for answer in (*one.answers, *(answer for step in one.steps for answer in step.answers)):
            total += 1
            unscored += answer.score is None and answer.likelihood is None
            if answer.likelihood is not None:
                likelihoods.append(answer.likelihood)
                if answer.score is not None:
                    by_source.setdefault(one.stream.source, []).append((answer.likelihood.value, answer.score))
    found = {"reader/unscored_fraction": unscored / max(total, 1)}
    if likelihoods:
        found["likelihood/mean"] = float(np.mean([one.value for one in likelihoods]))
        found["likelihood/greedy_fraction"] = float(np.mean([one.greedy for one in likelihoods]))
    for source, pairs in by_source.items():
        ranks = [scipy.stats.rankdata(values) for values in np.transpose(pairs)]
        if all(np.ptp(rank) for rank in ranks):
            found[f"likelihood/rank_correlation/{source}"] = float(np.corrcoef(*ranks)[0, 1])
    return found


def of_sampler_difference(groups: Sequence[Group], measured: Mapping[str, float]) -> dict[str, float]:
    """Computes |log π_trainer - log π_sampler|, mean and largest.

    Where the trainer's log-probabilities were not computed separately, the log ratio of the first update stands for it:
    its policy is still the one that sampled.
    """
    differences = [
        np.abs(old - np.asarray(step.completion.log_probs))
        for group in groups
        if group.old_log_probs is not None
        for step, old in zip(group.steps, group.old_log_probs, strict=True)
    ]
    if differences:
        joined = np.concatenate(differences)
        mean, largest = float(joined.mean()), float(joined.max())
    elif measured:
        mean, largest = measured["policy/absolute_log_ratio"], measured["policy/largest_log_ratio"]
    else:
        return {}
    return {"policy/sampler_difference_mean": mean, "policy/sampler_difference_largest": largest}


def together(stats: Sequence[SamplerStats]) -> SamplerStats:
    """Adds up the stats of samplers that worked at the same time: sums, and the seconds of the slowest."""
    merged = {field.name: [getattr(one, field.name) for one in stats] for field in dataclasses.fields(SamplerStats)}
    return SamplerStats(**{name: (max if "seconds" in name else sum)(values) for name, values in merged.items()})


def mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages what several processes measured, each metric over those that did."""
    names = sorted({name for one in found for name in one})
    return {name: float(np.mean([one[name] for one in found if name in one])) for name in names}


def of_samplers(manager: SamplerStats, reader: SamplerStats) -> dict[str, float]:
    """Describes what generating cost since the stats were last taken; times in seconds."""
    return {
        "time/new_tokens_per_second": manager.new_tokens / max(manager.seconds, 1e-9),
        "time/manager_seconds": manager.seconds,
        "time/reader_seconds": reader.seconds,
        "sampler/prefilled_fraction": manager.prefilled_tokens / max(manager.prompt_tokens, 1),
        "sampler/slot_occupancy": manager.slot_tokens / max(manager.slot_steps, 1),
        "sampler/host_seconds": manager.seconds - manager.device_seconds + reader.seconds - reader.device_seconds,
        "reader/questions_asked": float(reader.requests),
    }


def of_compilation(before: compilation.Counts) -> dict[str, float]:
    """Counts programs compiled since `before`; after the first steps, only new lengths of training rows need some."""
    now = compilation.counts()
    return {"compile/programs": float(now.programs - before.programs), "compile/seconds": now.seconds - before.seconds}
