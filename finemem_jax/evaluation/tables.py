"""Makes tables, standard errors and comparisons from the lines of an evaluation, one for each method and stream.

A line is a dict:
    method, source, stream_id, chunks
    scores: of its global questions, None where a judge came to no verdict
    chunk_scores: for each chunk of its questions; [] where they were not asked
    memory_tokens, operations, valid_operations, reader_calls, seconds
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from finemem_jax.evaluation import published_results
from finemem_jax.evaluation.evaluate import Estimate, cell, estimate

Line = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # Header and rows.

# The costs of a method for each stream, with their titles in tables.
COSTS = {
    "memory_tokens": "memory (tokens)",
    "operations": "operations",
    "valid_fraction": "valid",
    "reader_calls": "reader calls",
    "seconds": "seconds",
}
AVERAGE = "average"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Tells how much better one method is than another, on the streams that both have played.

    Attributes:
        mean: Difference of the averages over sources.
        low, high: 95 % interval of the paired bootstrap.
        p: Two-sided: twice the share of resamples in which the sign is the other, at least 1 / resamples.
        units: How many streams (or questions, of sources with one stream) were resampled.
    """

    mean: float
    low: float
    high: float
    p: float
    units: int


def scores(lines: Sequence[Line], kind: str = "scores") -> dict[str, dict[str, Estimate]]:
    """Computes {method: {source: estimate}}, and under `AVERAGE` the unweighted mean over the sources.

    The score of a stream is the mean over its questions, that of a source the mean over its streams. The standard error
    is over streams; of a source with one stream, over its questions. A method that lacks a source has no average.

    Args:
        kind: "scores", or "chunk_scores": the mean over chunks of the mean over their questions.
    """
    sources = in_order(line["source"] for line in lines)
    found: dict[str, dict[str, Estimate]] = {}
    for method in in_order(line["method"] for line in lines):
        units = {source: list(_units(lines, method, source, kind=kind).values()) for source in sources}
        of_source = {source: estimate(values) for source, values in units.items() if values}
        errors = [one.standard_error for one in of_source.values()]
        if len(of_source) == len(sources):
            error = None if None in errors else math.sqrt(sum(e * e for e in errors if e is not None)) / len(sources)
            mean = sum(one.mean or 0.0 for one in of_source.values()) / len(sources)
            of_source[AVERAGE] = Estimate(mean, error, sum(one.n for one in of_source.values()))
        found[method] = of_source
    return found


def costs(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Computes {method: {cost: mean over streams}} (`COSTS`).

    valid_fraction is over all operations, and absent without any.
    """
    found = {}
    for method in in_order(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == method]
        found[method] = {name: sum(line[name] for line in own) / len(own) for name in COSTS if name in own[0]}
        if written := sum(line["operations"] for line in own):
            found[method]["valid_fraction"] = sum(line["valid_operations"] for line in own) / written
    return found


def compare(lines: Sequence[Line], method: str, other: str, *, resamples: int = 10_000) -> Comparison | None:
    """Compares `method` with `other`: a paired bootstrap over streams, source by source.

    In each resample every source draws as many streams as it has, with replacement, the same for both methods; its
    difference is their mean, and the sources' differences are averaged. Of a source of which both have one stream,
    questions are drawn in place of streams. Seeded: the same lines give the same numbers.

    Returns:
        None where they have no stream in common.
    """
    rng = np.random.default_rng(0)
    drawn, means, units = np.zeros(resamples), [], 0
    for source in in_order(line["source"] for line in lines):
        mine, theirs = (_units(lines, name, source) for name in (method, other))
        names = [name for name in mine if name in theirs]
        if not names:
            continue
        differences = np.array([mine[name] - theirs[name] for name in names])
        means.append(differences.mean())
        units += len(names)
        # A resample at a time would need a Python loop, and all at once resamples times streams of memory.
        for start in range(0, resamples, 1_000):
            places = rng.integers(len(names), size=(min(1_000, resamples - start), len(names)))
            drawn[start : start + len(places)] += differences[places].mean(axis=1)
    if not means:
        return None
    drawn /= len(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = 2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    return Comparison(float(np.mean(means)), float(low), float(high), float(min(max(p, 1 / resamples), 1)), units)


def comparisons(lines: Sequence[Line], resamples: int = 10_000) -> dict[tuple[str, str], Comparison]:
    """Compares every two methods: {(method, other): comparison}; see `compare`."""
    found = {}
    methods = in_order(line["method"] for line in lines)
    for other, method in itertools.combinations(methods, 2):
        if (one := compare(lines, method, other, resamples=resamples)) is not None:
            found[method, other] = one
    return found


def _units(lines: Sequence[Line], method: str, source: str, *, kind: str = "scores") -> dict[str, float]:
    """Returns {name: score} of what a standard error is over: streams, or the questions of the only one."""
    own = [line for line in lines if line["method"] == method and line["source"] == source]
    if len(own) == 1 and kind == "scores":
        return {
            f"{own[0]['stream_id']} question {i}": score
            for i, score in enumerate(own[0]["scores"])
            if score is not None
        }
    found = {}
    for line in own:
        if kind == "scores":
            values = [score for score in line["scores"] if score is not None]
        else:
            of_chunks = ([s for s in chunk if s is not None] for chunk in line["chunk_scores"])
            values = [sum(chunk) / len(chunk) for chunk in of_chunks if chunk]
        if values:
            found[line["stream_id"]] = sum(values) / len(values)
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Returns the different names, in the order in which they first come."""
    return list(dict.fromkeys(names))


# --------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------


def score_table(lines: Sequence[Line], published: Sequence[str] = ()) -> Table:
    """Lays out scores: a method a row, a source a column; below them, published rows of the same sources.

    Args:
        published: Builders whose published results are to be shown (`published_results.RESULTS`).
    """
    sources = in_order(line["source"] for line in lines)
    columns, empty = [*sources, AVERAGE], Estimate(None, None, 0)
    rows = []
    for method, of_source in scores(lines).items():
        estimates = [of_source.get(column, empty) for column in columns]
        rows.append([method, *(cell(one.mean, one.standard_error) for one in estimates)])
    for builder in published:
        for method, of_source in published_results.RESULTS.get(builder, {}).items():
            known = [of_source[source] for source in sources if source in of_source]
            if known:
                whole = f"{sum(known) / len(known):.3f}" if len(known) == len(sources) else "–"
                values = (f"{of_source[source]:.3f}" if source in of_source else "–" for source in sources)
                rows.append([f"{method} (published)", *values, whole])
    return ["score", *columns], rows


def cost_table(lines: Sequence[Line]) -> Table:
    """Lays out what each method costs for a stream."""
    rows = []
    for method, found in costs(lines).items():
        rows.append([method, *(f"{found[name]:,.2f}" if name in found else "–" for name in COSTS)])
    return ["for each stream", *COSTS.values()], rows


def comparison_table(compared: Mapping[tuple[str, str], Comparison]) -> Table:
    """Lays out some `comparisons`."""
    rows = []
    for (method, other), one in compared.items():
        shown = f"{one.mean:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}", f"{one.p:.4f}"
        rows.append([f"{method} against {other}", *shown, str(one.units)])
    return ["difference of averages", "mean", "95 %", "p", "n"], rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table as Markdown, numbers aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(text.strip().replace('|', '/') for text in line)} |\n" for line in lines)
