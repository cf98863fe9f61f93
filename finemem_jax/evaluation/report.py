"""Writes one HTML page about a run: evaluations, training curves, and rollouts of the last step.

Only files of the run's workdir are read. Runs of earlier versions left less: what they did leave is shown. Chunks and
operations are counted from 1 on the page, from 0 in the files. `report_page` has the style, `report_plots` the curves
and `report_rollouts` the rollouts.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from finemem_jax.evaluation import evaluate, report_page, report_plots, report_rollouts
from finemem_jax.evaluation.report_page import about, folded, note, section, text, texts_table
from finemem_jax.evaluation.report_rollouts import Json
from finemem_jax.runtime import files


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `workdir/report.html` and returns its path.

    The page says in words what is missing or broken.

    Raises:
        ValueError: the folder is no workdir of a run.
    """
    config = _config(workdir)
    metrics, unreadable = _metrics(workdir)
    name = str(config.get("experiment") or workdir.resolve().name)
    body = "\n".join(
        [
            f"<header><h1>{text(name)}</h1><p class=lead>{_lead(config, metrics)}</p></header>",
            section("Held-out streams", _evaluations(workdir)),
            *_benchmarks(workdir),
            section("Training", _training(metrics, unreadable)),
            section("The last step’s memories", report_rollouts.draw(workdir, config)),
            section("Settings", _settings(config)),
        ]
    )
    path = workdir / "report.html"
    # Lone surrogates, which JSON can spell, have no UTF-8 form.
    page = report_page.page(f"{name} · finemem_jax", body).encode("utf-8", "replace").decode("utf-8")
    files.replace_text(path, page)
    return path


# --------------------------------------------------------------------------------------
# Files of the run
# --------------------------------------------------------------------------------------


def _config(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "config.json"
    remedy = "give --workdir the folder of a run that has begun, or begin one there with --mode=train"
    if not path.is_file():
        raise ValueError(f"--workdir={workdir} is no workdir: {path} does not exist; {remedy}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--workdir={workdir} is broken: {path} is no JSON ({error}); {remedy}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"--workdir={workdir} is broken: {path} holds no JSON object; {remedy}.")
    return config


def _metrics(workdir: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the lines of metrics.jsonl that can be read, and counts the others.

    A broken last line is not counted: a run that is being written, or was killed, has one.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    parsed = [_metrics_line(line) for line in lines]
    found = [line for line in parsed if line is not None]
    unreadable = sum(line is None for line in parsed[:-1])
    return found, unreadable


def _metrics_line(line: bytes) -> dict[str, Any] | None:
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None


# --------------------------------------------------------------------------------------
# The run as a whole
# --------------------------------------------------------------------------------------


def _lead(config: Json, metrics: Sequence[Json]) -> str:
    def setting(name: str) -> Any:
        return config.get(name, "?")  # Of a run of another version, perhaps.

    done = metrics[-1]["step"] + 1 if metrics else 0
    seconds = sum(line.get("time/step_seconds", 0) for line in metrics)
    facts = [
        f"{done} of {setting('train.num_steps')} training steps",
        f"{setting('rollout.streams_per_step')} streams × {setting('rollout.group_size')} rollouts a step",
        f"model {setting('model.weights' if setting('model.name') == 'auto' else 'model.name')}",
        f"data {setting('data.name')}",
    ]
    if "credit.rule" in config:
        facts.append(f"credit rule {setting('credit.rule')}")
    if seconds:
        facts.append(f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min in training steps")
    return " · ".join(map(text, facts))


def _evaluations(workdir: pathlib.Path) -> str:
    path = workdir / "evaluation.json"
    if not path.is_file():
        return note("No evaluation yet.")
    try:
        # Earlier versions wrote NaN where now is null.
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
        pair = {name: found[name] for name in ("before", "after") if name in found}
        shown = pair or dict(list(found.items())[-1:])
        parts = [texts_table(*evaluate.table(shown), kind="numbers")]
        steps = [f"“{name}”: after {one['step']} training steps. " for name, one in shown.items() if "step" in one]
        explained = "".join(steps) + "± is one standard error over streams; – where there are too few."
        if len(shown) == 2:
            explained += " The difference is paired, stream by stream."
        parts.append(about(explained))
        kinds = _by_kind(shown)
        if kinds:
            parts.append("<h3>Scores by kind of question</h3>" + kinds)
        if len(found) > len(shown):
            in_order = dict(sorted(found.items(), key=lambda item: item[1]["step"]))
            parts.append("<h3>All evaluations</h3>" + texts_table(*evaluate.table(in_order), kind="numbers"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return note(f"{path} could not be read ({type(error).__name__}: {error}); evaluate again.")
    return "\n".join(parts)


def _benchmarks(workdir: pathlib.Path) -> list[str]:
    path = workdir / "benchmark.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = [texts_table(one["header"], one["rows"], kind="numbers") for one in found["tables"]]
        parts += [about(one) for one in found["notes"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        parts = [note(f"{path} could not be read ({type(error).__name__}: {error}); evaluate again.")]
    return [section("Benchmarks", "\n".join(parts))]


def _by_kind(evaluations: Mapping[str, Json]) -> str:
    kinds = sorted({kind for evaluation in evaluations.values() for kind in evaluation["by_kind"]})
    rows = []
    for kind in kinds:
        estimates = [evaluation["by_kind"].get(kind) for evaluation in evaluations.values()]
        cells = [evaluate.cell(e["mean"], e["standard_error"]) if e else "–" for e in estimates]
        rows.append([kind or "(none given)", *cells, str(max(e["n"] for e in estimates if e))])
    return texts_table(["kind", *evaluations, "questions"], rows, kind="numbers") if rows else ""


def _training(metrics: Sequence[Json], unreadable: int) -> str:
    if not metrics:
        return note("No metrics yet.")
    warning = note(f"{unreadable} lines of metrics.jsonl could not be read and are left out.") if unreadable else ""
    return warning + report_plots.draw(metrics)


def _settings(config: Json) -> str:
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in sorted(config.items())]
    return folded(f"{len(rows)} settings", texts_table(["setting", "value"], rows))
