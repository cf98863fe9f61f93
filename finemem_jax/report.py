"""One HTML page about a run: evaluations, curves, and what the manager wrote in the last step.

Reads what the run left in its workdir, and nothing else. The page loads nothing from outside and runs no script;
whatever a model or a data set wrote is escaped. Chunks are counted from 1 on the page, from 0 in the files.
"""

from __future__ import annotations

import dataclasses
import gzip
import html
import io
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finemem_jax import evaluate, writer

_SMOOTHING = 0.8  # Weight of the past in the moving average; 5 steps fill most of it.


@dataclasses.dataclass(frozen=True)
class _Plot:
    """One plot: its title, what it shows, its lines {label: metric}, and whether they are shares of 1."""

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
            "chunk questions": "reward/chunk",
            "evidence": "reward/evidence",
            "format": "reward/format",
            "compression": "reward/compression",
        },
    ),
    _Plot(
        "What became of what was written",
        "shares of all written lines",
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
        "shares of all written lines",
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


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `workdir/report.html` and returns its path.

    What the run has not made yet, or left broken, the page says in words.

    Raises:
        ValueError: the folder is no workdir of a run.
    """
    config = _config(workdir)
    metrics, unreadable = _metrics(workdir)
    name = str(config.get("experiment") or workdir.resolve().name)
    body = "\n".join(
        [
            f"<header><h1>{_text(name)}</h1><p class=lead>{_lead(config, metrics)}</p></header>",
            _section("Held-out streams", _evaluations(workdir)),
            _section("Training", _plots(metrics, unreadable)),
            _section("The last step’s memories", _rollouts(workdir, config)),
            _section("Settings", _settings(config)),
        ]
    )
    page = _PAGE.format(title=_text(f"{name} · finemem_jax"), style=_STYLE, body=body)
    path = workdir / "report.html"
    # Lone surrogates, which JSON can spell, have no UTF-8 form.
    writer.replace_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


# --------------------------------------------------------------------------------------
# What the run left
# --------------------------------------------------------------------------------------


def _config(workdir):
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


def _metrics(workdir):
    """The readable lines of metrics.jsonl, and how many others there are.

    A broken last line is not counted: a run that is being written, or was killed, has one.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    parsed = [_metrics_line(line) for line in lines]
    found = [line for line in parsed if line is not None]
    unreadable = sum(line is None for line in parsed[:-1])
    return found, unreadable


def _metrics_line(line):
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None


def _rollouts_of(path):
    """The records of one trajectory file; raises what a broken file makes gzip and json raise."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        records = [json.loads(line) for line in file]
    if not records:
        raise ValueError("it holds no rollouts")
    return records


# --------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------


def _lead(config, metrics):
    def setting(name):
        return config.get(name, "?")  # Of a run of another version, perhaps.

    done = metrics[-1]["step"] + 1 if metrics else 0
    seconds = sum(line.get("time/step_seconds", 0) for line in metrics)
    facts = [
        f"{done} of {setting('train.num_steps')} training steps",
        f"{setting('rollout.streams_per_step')} streams × {setting('rollout.group_size')} rollouts a step",
        f"model {setting('model.name')}",
        f"data {setting('data.name')}",
    ]
    if seconds:
        facts.append(f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min in training steps")
    return " · ".join(map(_text, facts))


def _evaluations(workdir):
    path = workdir / "evaluation.json"
    if not path.is_file():
        return _note("No evaluation yet.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pair = {name: found[name] for name in ("before", "after") if name in found}
        shown = pair or dict(list(found.items())[-1:])
        parts = [_table(*evaluate.table(shown), classes="numbers")]
        steps = [f"“{name}”: after {one['step']} training steps. " for name, one in shown.items() if "step" in one]
        explained = "".join(steps) + "± is one standard error over streams; – where there are too few."
        if len(shown) == 2:
            explained += " The difference is paired, stream by stream."
        parts.append(f"<p class=about>{_text(explained)}</p>")
        kinds = _by_kind(shown)
        if kinds:
            parts.append("<h3>Scores by kind of question</h3>" + kinds)
        if len(found) > len(shown):
            in_order = dict(sorted(found.items(), key=lambda item: item[1]["step"]))
            parts.append("<h3>All evaluations</h3>" + _table(*evaluate.table(in_order), classes="numbers"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _note(f"{path} could not be read ({type(error).__name__}: {error}); evaluate again.")
    return "\n".join(parts)


def _by_kind(evaluations):
    kinds = sorted({kind for evaluation in evaluations.values() for kind in evaluation["by_kind"]})
    rows = []
    for kind in kinds:
        estimates = [evaluation["by_kind"].get(kind) for evaluation in evaluations.values()]
        cells = [_estimate(e["mean"], e["standard_error"]) if e else "–" for e in estimates]
        rows.append([kind or "(none given)", *cells, str(max(e["n"] for e in estimates if e))])
    return _table(["kind", *evaluations, "questions"], rows, classes="numbers") if rows else ""


def _plots(metrics, unreadable):
    if not metrics:
        return _note("No metrics yet.")
    parts = []
    if unreadable:
        parts.append(_note(f"{unreadable} lines of metrics.jsonl could not be read and are left out."))
    steps = [line["step"] + 1 for line in metrics]
    figures = []
    for index, plot in enumerate(_PLOTS):
        lines = {label: [_finite(line.get(metric)) for line in metrics] for label, metric in plot.lines.items()}
        lines = {label: values for label, values in lines.items() if not all(map(math.isnan, values))}
        if not lines:
            figures.append(f"<figure><h3>{_text(plot.title)}</h3>{_note('Not measured in this run.')}</figure>")
            continue
        smooth = {label: moving_average(values) for label, values in lines.items()}
        legend = " ".join(
            f"<span class=key><i style='background:var(--line{i})'></i>"
            f"{_text(label)} <b>{_number(values[-1])}</b></span>"
            for i, (label, values) in enumerate(smooth.items())
        )
        svg = _svg(f"plot{index}", steps, lines, smooth, plot.shares)
        figures.append(
            f"<figure role=img aria-label='{_text(plot.title)}'><h3>{_text(plot.title)}</h3>"
            f"<p class=about>{_text(plot.about)}</p><p class=legend>{legend}</p>{svg}</figure>"
        )
    parts.append(f"<div class=plots>{''.join(figures)}</div>")
    parts.append(
        f"<p class=about>Points are single steps; lines are their exponential moving average (decay {_SMOOTHING}), "
        "whose last value stands beside its name.</p>"
    )
    return "\n".join(parts)


def moving_average(values: Sequence[float], decay: float = _SMOOTHING) -> list[float]:
    """Exponential moving average, corrected for its start: the weights of what it has seen sum to 1.

    A nan is not seen: it leaves the average as it is.
    """
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight if weight else math.nan)
    return averages


# Matplotlib writes fixed colours; these stand in for the page's own, which follow light and dark mode.
_INK, _GRID = "#00f0a0", "#00f0b0"


def _svg(name, steps, lines, smooth, shares):
    settings = {
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
    with matplotlib.rc_context(settings):
        # Not through pyplot, which would choose a backend and keep the figure alive.
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
    # Ids must differ between the drawings of one page.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def _line_color(i):
    return f"#00f0c{i}"


def _rollouts(workdir, config):
    paths = sorted((workdir / "trajectories").glob("step_*.jsonl.gz"), reverse=True)
    if not paths:
        return _note("No trajectories yet.")
    parts = []
    for path in paths:
        try:
            records = _rollouts_of(path)
            parts.append(_best_and_worst(records, config, path.name))
            break
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            parts.append(_note(f"{path} is broken and left out ({type(error).__name__}: {error})."))
    return "\n".join(parts)


def _best_and_worst(records, config, file_name):
    stream = records[0]["stream_id"]
    group = sorted((r for r in records if r["stream_id"] == stream), key=_success, reverse=True)
    shown = {"best": group[0]} | ({"worst": group[-1]} if len(group) > 1 else {})
    about = (
        f"From {file_name}: stream {stream} of {records[0]['source']}, the first of "
        f"{len({r['stream_id'] for r in records})} in this step. Of its {len(group)} rollouts these are the ones with "
        "the most and the least outcome plus reward. Chunks are counted from 1."
    )
    parts = [f"<p class=about>{_text(about)}</p>"]
    for which, record in shown.items():
        heading = f"{which.capitalize()}: rollout {record['rollout'] + 1} of {len(group)}"
        facts = (
            f"outcome {_number(record['outcome'])} · reward {_number(_total_reward(record))} "
            f"over {len(record['steps'])} chunks · memory {record['memory_tokens']} tokens, "
            f"text {record['stream_tokens']}"
        )
        steps = "".join(_step(step, len(record["steps"]), config) for step in record["steps"])
        asked = _answers(record["answers"], "The stream has no global questions, or none was drawn.")
        parts.append(
            f"<details class=rollout open><summary>{_text(heading)} <small>{_text(facts)}</small></summary>{steps}"
            f"<article><h4>Global questions, from the last memory</h4>{asked}</article></details>"
        )
    return "\n".join(parts)


def _success(record):
    return record["outcome"] + _total_reward(record)


def _total_reward(record):
    return sum(step["rewards"]["total"] for step in record["steps"])


def _step(step, num_steps, config):
    rewards = step["rewards"]
    shown = {name: _number(value) for name, value in rewards.items()}
    advantage = step["advantage"]
    direction = "up" if advantage > 0 else "down" if advantage < 0 else ""
    written = "".join(map(_operation, step["operations"])) or "<li class=none>nothing</li>"
    memory = "".join(map(_item, step["memory"])) or "<li class=none>empty</li>"
    cut = " (cut off at the length limit)" if step["finish_reason"] == "length" else ""
    return (
        f"<article><h4>Chunk {step['step'] + 1} of {num_steps}"
        f" <span class='advantage {direction}'>advantage {_number(advantage, sign=True)}</span></h4>"
        f"<p class=rewards>reward <b>{shown['total']}</b> from evidence {shown['evidence']} (contribution "
        f"{shown['contribution']}) · chunk {shown['chunk']} · format {shown['format']} · compression "
        f"{shown['compression']}, before their weights</p>"
        f"<div class=columns><div><h5>Text</h5><blockquote>{_text(_chunk(step['prompt'], config))}</blockquote></div>"
        f"<div><h5>Written{cut}</h5><ul class=operations>{written}</ul>"
        f"<details><summary>the response itself</summary><pre>{_text(step['completion'])}</pre></details>"
        f"<h5>Memory afterwards</h5><ul class=memory>{memory}</ul></div></div>"
        f"<h5>Questions on this chunk</h5>{_answers(step['answers'], 'None.')}</article>"
    )


def _chunk(prompt, config):
    """The chunk's text in a manager's prompt (see `prompts.manager`), or the whole prompt if it has another form."""
    # Each worked example has one heading of its own. A chunk may hold both headings, but memory lines, being JSON,
    # hold no newline: the last "Memory:" ends the chunk.
    pieces = prompt.split("New text:\n", config.get("manager.num_examples", 0) + 1)
    text, heading, _ = pieces[-1].rpartition("\n\nMemory:\n")
    return text if heading and len(pieces) > 1 else prompt


def _operation(operation):
    status = operation["status"]
    chip = f"<span class='status {_text(status)}'>{_text(status.replace('_', ' '))}</span>"
    if "reason" in operation:
        reason = f"<span class=reason>{_text(operation['reason'])}</span>"
        return f"<li>{chip} <code>{_text(operation['text'])}</code> {reason}</li>"
    number = "" if operation["item_id"] is None else f" <b>#{_text(operation['item_id'])}</b>"
    return f"<li>{chip} {_text(operation['action'])}{number} {_text(operation['content'])}</li>"


def _item(item):
    source = f"<span class=source>from chunk {_text(item['source_step'] + 1)}</span>"
    return f"<li><b>#{_text(item['item_id'])}</b> {_text(item['text'])} {source}</li>"


def _answers(answers, otherwise):
    if not answers:
        return f"<p class=none>{_text(otherwise)}</p>"
    rows = []
    for answer in answers:
        evidence = "".join(map(_item, answer["evidence"]))
        evidence = f"<ul class=memory>{evidence}</ul>" if evidence else "<span class=none>none</span>"
        kind = f" <span class=source>{_text(answer['kind'])}</span>" if answer["kind"] else ""
        good = "good" if answer["score"] > 0 else ""
        rows.append(
            f"<tr><td>{_text(answer['question'])}{kind}</td><td>{evidence}</td><td>{_text(answer['answer'])}</td>"
            f"<td>{_text(' | '.join(answer['gold']))}</td><td class='score {good}'>{_number(answer['score'])}</td></tr>"
        )
    titles = ("question", "evidence → where it was written", "answer", "gold", "score")
    return _table(titles, "".join(rows), classes="answers")


def _settings(config):
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in sorted(config.items())]
    return f"<details><summary>{len(rows)} settings</summary>{_table(['setting', 'value'], rows)}</details>"


# --------------------------------------------------------------------------------------
# Words and numbers
# --------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title, content):
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _note(text):
    return f"<p class=note>{_text(text)}</p>"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]] | str, classes: str = "") -> str:
    """A table of texts; `rows` may also be HTML already."""
    if not isinstance(rows, str):
        rows = "".join(f"<tr>{''.join(f'<td>{_text(_dash(cell))}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    return f"<div class=wide><table class='{classes}'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _dash(cell):
    return cell.replace("+nan", "–").replace("nan", "–") if re.fullmatch(r"\S+ ± \S+", cell) else cell


def _estimate(mean, error):
    return f"{mean:.3f} ± {error:.3f}"


def _number(value, sign=False):
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _finite(value):
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfb; --ink: #22242a; --soft: #666b76; --rule: #dcdcd6; --shade: #f3f3ef;
  --good: #1b7a4b; --bad: #b3391f; --warn: #8a6100;
  --line0: #1f5fa8; --line1: #c8501a; --line2: #14805e; --line3: #a8478a; --line4: #97710a; --line5: #62666f; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181c; --ink: #e4e4e0; --soft: #9a9fa9; --rule: #363a42; --shade: #1f2227;
  --good: #5cc790; --bad: #f0856c; --warn: #dcb254;
  --line0: #6cabee; --line1: #f58f5c; --line2: #4bc69c; --line3: #df8fc6; --line4: #d9b64e; --line5: #a9aeb8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 1rem; padding-top: .8rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: 1rem; margin: 0 0 .2rem; }
h5 { font-size: .75rem; margin: 1rem 0 .3rem; color: var(--soft); font-weight: 600; text-transform: uppercase;
  letter-spacing: .06em; }
p { margin: .4rem 0; }
.lead, .about, .reason, .source, .none, summary small { color: var(--soft); }
.about, .rewards, .legend { font-size: .875rem; }
.about { max-width: 46rem; }
.reason, .source { font-size: .8125rem; }
.reason { font-style: italic; }
.source { white-space: nowrap; }
.note { padding: .6rem .9rem; border-left: 3px solid var(--warn); background: var(--shade); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-size: .8125rem; font-weight: 600; color: var(--soft); }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; padding-left: 1.2rem;
  white-space: nowrap; }
.answers { width: 100%; font-size: .9rem; overflow-wrap: anywhere; }
.answers th:nth-child(1) { width: 26%; } .answers th:nth-child(2) { width: 34%; }
.answers th:last-child, .score { text-align: right; padding-right: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.6rem 2.5rem; }
figure { margin: 0; display: flex; flex-direction: column; }
figure h3 { margin: 0; } figure .about { margin: 0; }
figure svg { width: 100%; height: auto; margin-top: auto; }
figure svg text { font-family: system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif !important; }
.key { white-space: nowrap; margin-right: .9rem; } .key b { font-variant-numeric: tabular-nums; font-weight: 600; }
.key i { display: inline-block; width: .9rem; height: .2rem; margin-right: .35rem; vertical-align: middle;
  border-radius: 1px; }
summary { cursor: pointer; }
.rollout { margin-top: 1.5rem; } .rollout > summary { font-weight: 600; font-size: 1.1rem; }
.rollout > summary small { font-weight: 400; font-size: .875rem; margin-left: .4rem; }
article { margin: 1rem 0; padding: 1rem 1.2rem; background: var(--shade); border-radius: 6px; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2.2rem; }
.columns > div { min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 46rem) { .columns { grid-template-columns: 1fr; } }
blockquote { margin: 0; white-space: pre-wrap; font-family: Charter, Georgia, "Noto Serif", "DejaVu Serif", serif; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8125rem; margin: .4rem 0;
  padding: .6rem .8rem; background: var(--paper); border-radius: 4px; }
code { font-size: .8125rem; overflow-wrap: anywhere; }
ul { list-style: none; margin: 0; padding: 0; } li { margin: .3rem 0; }
.columns details summary { font-size: .8125rem; color: var(--soft); }
.status { font-size: .75rem; font-weight: 600; padding: .05rem .45rem; border: 1px solid; border-radius: 1rem;
  white-space: nowrap; color: var(--warn); }
.status.applied, .advantage.up, .score.good { color: var(--good); }
.status.malformed, .advantage.down { color: var(--bad); }
.advantage { font-weight: 400; font-size: .875rem; margin-left: .5rem; font-variant-numeric: tabular-nums; }
"""
