"""One HTML page about a run: evaluations, curves, and what the manager wrote in the last step and earned by it.

Reads what the run left in its workdir, and nothing else; how the page looks is left to `report_page`. Chunks and
operations are counted from 1 on the page, from 0 in the files. Runs of earlier versions left less: what they did leave
is shown.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from finemem_jax.evaluation import evaluate, report_page, report_plots
from finemem_jax.evaluation.report_page import (
    about,
    chip,
    folded,
    note,
    number,
    section,
    signed,
    table,
    text,
    texts_table,
)
from finemem_jax.rl import credit_rules
from finemem_jax.runtime import files


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
            f"<header><h1>{text(name)}</h1><p class=lead>{_lead(config, metrics)}</p></header>",
            section("Held-out streams", _evaluations(workdir)),
            *_benchmarks(workdir),
            section("Training", _training(metrics, unreadable)),
            section("The last step’s memories", _rollouts(workdir, config)),
            section("Settings", _settings(config)),
        ]
    )
    path = workdir / "report.html"
    # Lone surrogates, which JSON can spell, have no UTF-8 form.
    page = report_page.page(f"{name} · finemem_jax", body).encode("utf-8", "replace").decode("utf-8")
    files.replace_text(path, page)
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


def _records(path):
    """The records of one trajectory file; raises what a broken file makes gzip and json raise."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        records = [json.loads(line) for line in file]
    if not records:
        raise ValueError("it holds no rollouts")
    return records


# --------------------------------------------------------------------------------------
# The run as a whole
# --------------------------------------------------------------------------------------


def _lead(config, metrics):
    def setting(name):
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


def _evaluations(workdir):
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


def _benchmarks(workdir):
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


def _by_kind(evaluations):
    kinds = sorted({kind for evaluation in evaluations.values() for kind in evaluation["by_kind"]})
    rows = []
    for kind in kinds:
        estimates = [evaluation["by_kind"].get(kind) for evaluation in evaluations.values()]
        cells = [evaluate.cell(e["mean"], e["standard_error"]) if e else "–" for e in estimates]
        rows.append([kind or "(none given)", *cells, str(max(e["n"] for e in estimates if e))])
    return texts_table(["kind", *evaluations, "questions"], rows, kind="numbers") if rows else ""


def _training(metrics, unreadable):
    if not metrics:
        return note("No metrics yet.")
    warning = note(f"{unreadable} lines of metrics.jsonl could not be read and are left out.") if unreadable else ""
    return warning + report_plots.draw(metrics)


def _settings(config):
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in sorted(config.items())]
    return folded(f"{len(rows)} settings", texts_table(["setting", "value"], rows))


# --------------------------------------------------------------------------------------
# Single rollouts
# --------------------------------------------------------------------------------------


def _rollouts(workdir, config):
    paths = sorted((workdir / "trajectories").glob("step_*.jsonl.gz"), reverse=True)
    if not paths:
        return note("No trajectories yet.")
    parts = []
    for path in paths:
        try:
            records = _records(path)
            parts.append(_best_and_worst(records, config, path.name))
            break
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            parts.append(note(f"{path} is broken and left out ({type(error).__name__}: {error})."))
    return "\n".join(parts)


def _best_and_worst(records, config, file_name):
    stream = records[0]["stream_id"]
    group = sorted((r for r in records if r["stream_id"] == stream), key=_success, reverse=True)
    shown = {"best": group[0]} | ({"worst": group[-1]} if len(group) > 1 else {})
    scale = _scale(shown.values())
    parts = [
        about(
            f"From {file_name}: stream {stream} of {records[0]['source']}, the first of "
            f"{len({r['stream_id'] for r in records})} in this step. Of its {len(group)} rollouts these are the ones "
            "with the most and the least outcome plus reward. Chunks and operations are counted from 1."
        ),
    ]
    if "credit.rule" in config:
        parts.append(about(_explanation(config["credit.rule"])))
    for which, record in shown.items():
        heading = f"{which.capitalize()}: rollout {record['rollout'] + 1} of {len(group)}"
        facts = (
            f"outcome {number(record['outcome'])} · reward {number(_total_reward(record))} "
            f"over {len(record['steps'])} chunks · memory {record['memory_tokens']} tokens, "
            f"text {record['stream_tokens']}"
        )
        steps = "".join(_step(step, len(record["steps"]), scale) for step in record["steps"])
        asked = _answers(record["answers"], "The stream has no global questions, or none was drawn.")
        parts.append(
            f"<details class=rollout open><summary>{text(heading)} <small>{text(facts)}</small></summary>{steps}"
            f"<article><h4>Global questions, from the last memory</h4>{asked}</article></details>"
        )
    return "\n".join(parts)


def _explanation(rule):
    explained = (
        f"Credit is what the rule “{rule}” makes of the global questions’ scores, before its weight; a chunk’s is the "
        "sum over its operations, if there are any. "
    )
    if rule in credit_rules.RULES and credit_rules.RULES[rule].attribute is None:
        explained += "This rule makes advantages of them at once, and no credit. "
    return explained + (
        "Rules differ in whether chunk and content count in the reward. Advantages compare the rollouts: a token is "
        "trained with that of its operation, or of its chunk if it belongs to none. Bars of chunks share one scale in "
        "both rollouts, and so do those of operations."
    )


def _success(record):
    return record["outcome"] + _total_reward(record)


def _total_reward(record):
    return sum(step["rewards"]["total"] for step in record["steps"])


class _Scale(NamedTuple):
    """What all steps on the page have in common: the sizes at which bars are full, and the reward's parts."""

    step_credit: float
    operation_credit: float
    advantage: float
    parts: tuple[str, ...]


# Parts of the reward that most runs do not have; not mentioned where they are 0 throughout.
_ONLY_IF_USED = ("likelihood", "content", "kl")


def _scale(records: Iterable[Mapping[str, Any]]) -> _Scale:
    steps = [step for record in records for step in record["steps"]]
    operations = [operation for step in steps for operation in step["operations"]]

    def largest(values):
        return max(map(abs, values), default=0)

    # The contribution is measured under every rule, but no part of the sum.
    parts = dict.fromkeys(name for step in steps for name in step["rewards"] if name not in ("total", "contribution"))
    used = (name for name in parts if name not in _ONLY_IF_USED or any(step["rewards"].get(name) for step in steps))
    return _Scale(
        step_credit=largest(step["rewards"].get("credit", 0) for step in steps),
        operation_credit=largest(operation.get("credit", 0) for operation in operations),
        advantage=largest(one.get("advantage", 0) for one in (*steps, *operations)),
        parts=tuple(used),
    )


def _step(step, num_steps, scale):
    rewards = step["rewards"]
    heading = f"Chunk {step['step'] + 1} of {num_steps}"
    parts = " · ".join(f"{name} {number(rewards[name])}" for name in scale.parts if name in rewards)
    measures = _measure("advantage", step["advantage"], scale.advantage)
    if "credit" in rewards:
        measures = _measure("credit", rewards["credit"], scale.step_credit) + measures
    memory = "".join(f"<li>{_item(item)}</li>" for item in step["memory"]) or "<li class=none>empty</li>"
    cut = " (cut off at the length limit)" if step["finish_reason"] == "length" else ""
    return (
        f"<article><header><h4>{text(heading)}</h4>{measures}</header>"
        f"<p class=rewards>reward <b>{number(rewards['total'])}</b> from {text(parts)}, before their weights; "
        f"evidence contribution {number(rewards['contribution'])}</p>"
        f"<div class=columns><div>{_read(step)}</div>"
        f"<div><h5>Written{cut}</h5>{_operations(step['operations'], scale)}"
        f"{folded('the response itself', _verbatim(step['completion']))}"
        f"<h5>Memory afterwards</h5><ul>{memory}</ul></div></div>"
        f"<h5>Questions on this chunk</h5>{_answers(step['answers'], 'None.')}</article>"
    )


def _measure(name, value, largest):
    return f"<span class=measure>{text(name)} {signed(value, largest)}</span>"


def _read(step):
    """The chunk and, folded, the prompt that it stood in; earlier versions kept the prompt alone."""
    prompt = _verbatim(step["prompt"])
    if "chunk" not in step:
        return f"<h5>Prompt</h5>{prompt}"
    return f"<h5>Text</h5><blockquote>{text(step['chunk'])}</blockquote>{folded('the prompt itself', prompt)}"


def _verbatim(words):
    return f"<pre>{text(words)}</pre>"


def _operations(operations, scale):
    if not operations:
        return "<p class=none>nothing</p>"
    largest = {"credit": scale.operation_credit, "advantage": scale.advantage}
    measured = {name: size for name, size in largest.items() if all(name in o for o in operations)}
    rows = [
        [str(index), _operation(operation), *(signed(operation[name], size) for name, size in measured.items())]
        for index, operation in enumerate(operations, start=1)
    ]
    return table(["", "operation", *measured], rows, kind="operations")


def _operation(operation):
    status = operation["status"]
    shown = [chip(status.replace("_", " "), status)]
    if "verdict" in operation and operation["verdict"] is not None:
        shown.append(chip("worth keeping", "good") if operation["verdict"] else chip("not worth keeping", "bad"))
    if "reason" in operation:
        shown += [f"<code>{text(operation['text'])}</code>", f"<span class=reason>{text(operation['reason'])}</span>"]
        return " ".join(shown)
    shown.append(text(operation["action"].removeprefix("memory_")))
    shown.append(_memory_type(operation))
    named = operation["written_id"] if operation["item_id"] is None else operation["item_id"]
    if named is not None:
        shown.append(f"<b>#{text(named)}</b>")
    if operation.get("previous"):
        shown.append(f"<del>{text(operation['previous']['text'])}</del>")
    shown.append(text(operation["content"]))
    return " ".join(filter(None, shown))


def _item(item):
    source = f"from chunk {item['source_step'] + 1}"
    if "source_operation" in item:
        source += f", operation {item['source_operation'] + 1}"
    shown = [f"<b>#{text(item['item_id'])}</b>", _memory_type(item), text(item["text"])]
    return " ".join([*filter(None, shown), f"<span class=source>{text(source)}</span>"])


def _memory_type(holder):
    return f"<span class=type>{text(holder['memory_type'])}</span>" if holder.get("memory_type") else ""


def _answers(answers, otherwise):
    if not answers:
        return f"<p class=none>{text(otherwise)}</p>"
    titles = ("question", "evidence → where it was written", "answer", "gold", "score")
    return table(titles, map(_answer, answers), kind="answers")


def _answer(answer):
    evidence = "".join(
        f"<li class=cited>{chip('cited', 'good')} {_item(item)}</li>" if cited else f"<li>{_item(item)}</li>"
        for item, cited in itertools.zip_longest(answer["evidence"], answer.get("cited", ()))
    )
    kind = f" <span class=source>{text(answer['kind'])}</span>" if answer["kind"] else ""
    steps = ", ".join(str(step + 1) for step in answer.get("gold_steps", ()))
    said = f" <span class=source>said in chunk {steps}</span>" if steps else ""
    return [
        text(answer["question"]) + kind,
        f"<ul>{evidence}</ul>" if evidence else "<span class=none>none</span>",
        text(answer["answer"]),
        text(" | ".join(answer["gold"])) + said,
        _score(answer),
    ]


def _score(answer):
    """Of a generated answer, and how likely the gold one was found; – for what nobody asked or a judge left open."""
    score, likelihood = answer["score"], answer.get("likelihood")
    shown = f"<span class='score{' good' if score else ''}'>{'–' if score is None else number(score)}</span>"
    if likelihood:
        closed, log_prob = likelihood["closed"], likelihood["log_prob"]
        shown += f" <span class=source>p {number(math.exp(log_prob) if closed is None else closed)}</span>"
    return shown
