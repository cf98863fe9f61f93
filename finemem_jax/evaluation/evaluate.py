"""Estimates how good a manager is on held-out streams: scores with standard errors, and paired differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finemem_jax.memory.environment import Environment
from finemem_jax.rl import rollout
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.types import Answer, Stream, Trajectory

# The metrics of a stream, with their titles in tables.
METRICS = {
    "score": "held-out score",
    "chunk_score": "chunk score",
    "valid_operations": "valid operations",
    "memory_tokens": "memory length (tokens)",
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Holds a mean over streams, its standard error (sample std / √n), and n; None where there are too few."""

    mean: float | None
    standard_error: float | None
    n: int


def run(
    streams: Sequence[Stream], options: RolloutOptions, players: Players, *, key: Sequence[int | str]
) -> list[Trajectory]:
    """Rolls out each stream once; arguments as of `rollout.run`."""
    return [group[0] for group in rollout.run(streams, options, players, key)]


def per_stream(trajectories: Sequence[Trajectory], environment: Environment) -> dict[str, dict[str, float]]:
    """Computes {metric: {stream id: value}}; a stream without scored questions has no score, and is left out there.

    score: mean over its global questions. chunk_score: mean over its chunks of the mean over their questions.
    valid_operations: valid ÷ written over all its steps; 0 if nothing was written. memory_tokens: tokens(M_T).
    """
    values: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for trajectory in trajectories:
        name = trajectory.stream.stream_id
        if scores := _scores(trajectory.answers):
            values["score"][name] = _mean(scores)
        if chunks := [_mean(scores) for step in trajectory.steps if (scores := _scores(step.answers))]:
            values["chunk_score"][name] = _mean(chunks)
        outcomes = [outcome for step in trajectory.steps for outcome in step.outcomes]
        values["valid_operations"][name] = _mean([float(outcome.valid) for outcome in outcomes]) if outcomes else 0.0
        values["memory_tokens"][name] = float(environment.memory_tokens(trajectory.steps[-1].memory))
    return values


def by_kind(trajectories: Sequence[Trajectory]) -> dict[str, Estimate]:
    """Estimates the score of the global questions of each kind, over questions."""
    scores: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for answer in trajectory.answers:
            if answer.score is not None:
                scores.setdefault(answer.question.kind, []).append(answer.score)
    return {kind: estimate(values) for kind, values in sorted(scores.items())}


def estimate(values: Sequence[float]) -> Estimate:
    """Computes mean and standard error of a sample."""
    n = len(values)
    if n == 0:
        return Estimate(None, None, 0)
    mean = _mean(values)
    if n == 1:
        return Estimate(mean, None, 1)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> Estimate:
    """Estimates after - before over the streams that both have: paired, so that stream difficulty cancels."""
    return estimate([after[name] - before[name] for name in sorted(before.keys() & after.keys())])


def summary(trajectories: Sequence[Trajectory], environment: Environment) -> dict[str, Any]:
    """Returns an evaluation as `evaluation.json` holds it."""
    values = per_stream(trajectories, environment)
    return {
        "estimates": {name: dataclasses.asdict(estimate(list(v.values()))) for name, v in values.items()},
        "by_kind": {kind: dataclasses.asdict(value) for kind, value in by_kind(trajectories).items()},
        "per_stream": values,
    }


def table(summaries: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows that lay evaluations side by side; of two, with their paired difference."""
    names = list(summaries)
    header = ["on held-out streams", *names, *(["difference"] if len(names) == 2 else []), "n"]
    rows = []
    for metric, title in METRICS.items():
        estimates = [summaries[name]["estimates"][metric] for name in names]
        row = [title, *(cell(e["mean"], e["standard_error"]) for e in estimates)]
        count = estimates[0]["n"]
        if len(names) == 2:
            change = difference(*(summaries[name]["per_stream"][metric] for name in names))
            row.append(cell(change.mean, change.standard_error, sign=True))
            count = change.n
        rows.append([*row, str(count)])
    return header, rows


def cell(mean: float | None, error: float | None, sign: bool = False) -> str:
    """Formats an estimate: mean ± standard error, and – for what is None.

    Args:
        sign: Whether to write a + before what is not negative, as of a difference.
    """
    if mean is None:
        return "–"
    digits = 1 if abs(mean) >= 10 else 3
    spread = "–" if error is None else f"{error:.{digits}f}"
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {spread}"


def _scores(answers: Iterable[Answer]) -> list[float]:
    """The scores of answers that have one: a judge may have come to no verdict."""
    return [answer.score for answer in answers if answer.score is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
