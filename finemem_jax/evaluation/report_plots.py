"""Draws the report's curves: metrics over training steps, as SVG in the colors of the page."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finemem_jax.evaluation.report_page import about, number, text

# {label: values}, a nan where there is no value.
_Lines = Mapping[str, Sequence[float]]

SMOOTHING = 0.8  # Weight of the past in the moving average; 5 steps fill most of it.


@dataclasses.dataclass(frozen=True)
class _Plot:
    """Describes a plot: title, what it shows, lines {label: metric}, and whether they are fractions of 1."""

    title: str
    about: str
    lines: Mapping[str, str]
    shares: bool = False


_PLOTS = (
    _Plot(
        "Reward and its parts",
        "means over rollouts and chunks, before their weights",
        {
            "total": "reward/total",
            "global questions": "reward/outcome",
            "credit from the global score": "reward/credit",
            "evidence": "reward/evidence",  # The credit of runs of earlier versions.
            "chunk questions": "reward/chunk",
            "likelihood of their answers": "reward/likelihood",
            "format": "reward/format",
            "compression": "reward/compression",
            "content judge": "reward/content",
        },
    ),
    _Plot(
        "What became of what was written",
        "shares of all written operations",
        {
            "valid": "operations/valid_fraction",
            "malformed": "operations/malformed_fraction",
            "duplicate": "operations/duplicate_fraction",
            "unknown id": "operations/unknown_id_fraction",
        },
        shares=True,
    ),
    _Plot(
        "Valid operations by kind",
        "shares of all written operations",
        {
            "insert": "operations/memory_insert_fraction",
            "update": "operations/memory_update_fraction",
            "delete": "operations/memory_delete_fraction",
            "skip": "operations/skip_fraction",
        },
        shares=True,
    ),
    _Plot("Length of the memory", "tokens after the last chunk, mean over rollouts", {"memory": "memory/tokens"}),
    _Plot("Entropy of the manager", "nats per token", {"entropy": "loss/entropy"}),
    _Plot("Distance from the starting weights", "KL divergence in nats per token", {"KL": "policy/kl_to_start"}),
    # Apart from the other rewards, which lie near [0, 1].
    _Plot("Distance as a reward", "log-ratio to the starting weights, nats per response", {"log-ratio": "reward/kl"}),
    _Plot(
        "Time",
        "seconds per step",
        {
            "manager": "time/manager_seconds",
            "reader": "time/reader_seconds",
            "update": "time/update_seconds",
            "whole step": "time/step_seconds",
        },
    ),
)
# 0 throughout a run without a content judge, or without KL to its starting weights.
_ONLY_IF_USED = ("reward/content", "reward/kl", "policy/kl_to_start")


def draw(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Returns HTML of all plots of which the run measured something.

    Args:
        metrics: Lines of metrics.jsonl, one at least, in order. Values that are missing or no finite number are gaps.
    """
    steps = [line["step"] + 1 for line in metrics]
    figures, missing = [], []
    for plot in _PLOTS:
        lines = {label: [_finite(line.get(name)) for line in metrics] for label, name in plot.lines.items()}
        lines = {label: values for label, values in lines.items() if _worth_showing(plot.lines[label], values)}
        if lines:
            figures.append(_figure(plot, steps, lines, name=f"plot{len(figures)}"))
        elif not set(plot.lines.values()) <= set(_ONLY_IF_USED):
            missing.append(plot.title)
    remarks = (
        f"Points are single steps; lines are their exponential moving average (decay {SMOOTHING}), "
        "whose last value stands beside its name."
    )
    if missing:
        remarks += f" Not measured in this run: {', '.join(missing)}."
    return f"<div class=plots>{''.join(figures)}</div>{about(remarks)}"


def moving_average(values: Sequence[float], decay: float = SMOOTHING) -> list[float]:
    """Computes an exponential moving average, corrected for its start: the weights of what it has seen sum to 1.

    A nan is not seen: it leaves the average as it is.
    """
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight if weight else math.nan)
    return averages


def _worth_showing(name: str, values: Sequence[float]) -> bool:
    seen = [value for value in values if not math.isnan(value)]
    return any(seen) if name in _ONLY_IF_USED else bool(seen)


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _figure(plot: _Plot, steps: Sequence[int], lines: _Lines, *, name: str) -> str:
    smooth = {label: moving_average(values) for label, values in lines.items()}
    legend = " ".join(
        f"<span class=key><i style='background:var(--line{i})'></i>{text(label)} <b>{number(values[-1])}</b></span>"
        for i, (label, values) in enumerate(smooth.items())
    )
    return (
        f"<figure role=img aria-label='{text(plot.title)}'><h3>{text(plot.title)}</h3>{about(plot.about)}"
        f"<p class=legend>{legend}</p>{_svg(steps, lines, smooth, shares=plot.shares, name=name)}</figure>"
    )


# Matplotlib writes fixed colors; these stand in for the page's own, which follow light and dark mode.
_INK, _GRID = "#00f0a0", "#00f0b0"


def _line_color(i: int) -> str:
    return f"#00f0c{i}"


def _svg(steps: Sequence[int], lines: _Lines, smooth: _Lines, *, shares: bool, name: str) -> str:
    """Draws points and smooth lines; `name` keeps the ids of different drawings on the page apart."""
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",  # Text stays text: smaller, and in the page's font.
            "svg.hashsalt": name,
            "font.size": 9,
            "axes.edgecolor": _GRID,
            "axes.labelcolor": _INK,
            "xtick.color": _GRID,
            "ytick.color": _GRID,
            "xtick.labelcolor": _INK,
            "ytick.labelcolor": _INK,
            "grid.color": _GRID,
            "grid.linewidth": 0.6,
        }
    ):
        # Not through pyplot, which would choose a backend and keep the figure in memory.
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for i, label in enumerate(lines):
            axes.plot(steps, lines[label], "o", color=_line_color(i), alpha=0.4, markersize=4, markeredgewidth=0)
            axes.plot(steps, smooth[label], color=_line_color(i), linewidth=1.6, solid_capstyle="round")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
        if shares:
            axes.set_ylim(-0.03, 1.03)
        elif min(v for values in lines.values() for v in values if not math.isnan(v)) >= 0:
            axes.set_ylim(bottom=0)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for i in range(len(lines)):
        svg = svg.replace(_line_color(i), f"var(--line{i})")
    svg = svg.replace(_INK, "var(--soft)").replace(_GRID, "var(--rule)")
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
