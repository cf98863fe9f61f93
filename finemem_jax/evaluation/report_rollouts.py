"""Shows the best and the worst rollout of a stream, for the report: texts, operations, memories, answers and credit.

Works on the records of a file of trajectories (`rl.records`); those of earlier versions lack some fields.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from finemem_jax.evaluation.report_page import about, chip, folded, note, number, signed, table, text
from finemem_jax.rl import credit_rules

# A record, or a part of one.
Json = Mapping[str, Any]


def draw(workdir: pathlib.Path, config: Json) -> str:
    """Returns HTML of the best and the worst rollout of a stream, from the newest whole file of trajectories."""
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


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a file of trajectories; raises what a broken file makes gzip and json raise."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        records = [json.loads(line) for line in file]
    if not records:
        raise ValueError("it holds no rollouts")
    return records


def _best_and_worst(records: Sequence[Json], config: Json, file_name: str) -> str:
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


def _explanation(rule: str) -> str:
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


def _success(record: Json) -> float:
    return record["outcome"] + _total_reward(record)


def _total_reward(record: Json) -> float:
    return sum(step["rewards"]["total"] for step in record["steps"])


class _Scale(NamedTuple):
    """Holds what all steps on the page share: the sizes at which bars are full, and the reward terms."""

    step_credit: float
    operation_credit: float
    advantage: float
    terms: tuple[str, ...]


# Reward terms that most runs do not have; not mentioned where they are 0 throughout.
_ONLY_IF_USED = ("likelihood", "content", "kl")


def _scale(records: Iterable[Json]) -> _Scale:
    steps = [step for record in records for step in record["steps"]]
    operations = [operation for step in steps for operation in step["operations"]]

    def largest(values: Iterable[float]) -> float:
        return max(map(abs, values), default=0)

    # The contribution is measured under every rule, but is no term of the sum.
    terms = dict.fromkeys(name for step in steps for name in step["rewards"] if name not in ("total", "contribution"))
    used = (name for name in terms if name not in _ONLY_IF_USED or any(step["rewards"].get(name) for step in steps))
    return _Scale(
        step_credit=largest(step["rewards"].get("credit", 0) for step in steps),
        operation_credit=largest(operation.get("credit", 0) for operation in operations),
        advantage=largest(one.get("advantage", 0) for one in (*steps, *operations)),
        terms=tuple(used),
    )


def _step(step: Json, num_steps: int, scale: _Scale) -> str:
    rewards = step["rewards"]
    heading = f"Chunk {step['step'] + 1} of {num_steps}"
    terms = " · ".join(f"{name} {number(rewards[name])}" for name in scale.terms if name in rewards)
    measures = _measure("advantage", step["advantage"], scale.advantage)
    if "credit" in rewards:
        measures = _measure("credit", rewards["credit"], scale.step_credit) + measures
    memory = "".join(f"<li>{_item(item)}</li>" for item in step["memory"]) or "<li class=none>empty</li>"
    cut = " (cut off at the length limit)" if step["finish_reason"] == "length" else ""
    return (
        f"<article><header><h4>{text(heading)}</h4>{measures}</header>"
        f"<p class=rewards>reward <b>{number(rewards['total'])}</b> from {text(terms)}, before their weights; "
        f"evidence contribution {number(rewards['contribution'])}</p>"
        f"<div class=columns><div>{_read(step)}</div>"
        f"<div><h5>Written{cut}</h5>{_operations(step['operations'], scale)}"
        f"{folded('the response itself', _verbatim(step['completion']))}"
        f"<h5>Memory afterwards</h5><ul>{memory}</ul></div></div>"
        f"<h5>Questions on this chunk</h5>{_answers(step['answers'], 'None.')}</article>"
    )


def _measure(name: str, value: float, largest: float) -> str:
    return f"<span class=measure>{text(name)} {signed(value, largest)}</span>"


def _read(step: Json) -> str:
    """Shows the chunk and, folded, the prompt that it stood in; earlier versions kept the prompt alone."""
    prompt = _verbatim(step["prompt"])
    if "chunk" not in step:
        return f"<h5>Prompt</h5>{prompt}"
    return f"<h5>Text</h5><blockquote>{text(step['chunk'])}</blockquote>{folded('the prompt itself', prompt)}"


def _verbatim(words: str) -> str:
    return f"<pre>{text(words)}</pre>"


def _operations(operations: Sequence[Json], scale: _Scale) -> str:
    if not operations:
        return "<p class=none>nothing</p>"
    largest = {"credit": scale.operation_credit, "advantage": scale.advantage}
    measured = {name: size for name, size in largest.items() if all(name in o for o in operations)}
    rows = [
        [str(index), _operation(operation), *(signed(operation[name], size) for name, size in measured.items())]
        for index, operation in enumerate(operations, start=1)
    ]
    return table(["", "operation", *measured], rows, kind="operations")


def _operation(operation: Json) -> str:
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


def _item(item: Json) -> str:
    source = f"from chunk {item['source_step'] + 1}"
    if "source_operation" in item:
        source += f", operation {item['source_operation'] + 1}"
    shown = [f"<b>#{text(item['item_id'])}</b>", _memory_type(item), text(item["text"])]
    return " ".join([*filter(None, shown), f"<span class=source>{text(source)}</span>"])


def _memory_type(holder: Json) -> str:
    return f"<span class=type>{text(holder['memory_type'])}</span>" if holder.get("memory_type") else ""


def _answers(answers: Sequence[Json], otherwise: str) -> str:
    if not answers:
        return f"<p class=none>{text(otherwise)}</p>"
    titles = ("question", "evidence → where it was written", "answer", "gold", "score")
    return table(titles, map(_answer, answers), kind="answers")


def _answer(answer: Json) -> list[str]:
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


def _score(answer: Json) -> str:
    """Shows the score, – where a judge left it open, and the gold answer's probability where it was computed."""
    score, likelihood = answer["score"], answer.get("likelihood")
    shown = f"<span class='score{' good' if score else ''}'>{'–' if score is None else number(score)}</span>"
    if likelihood:
        closed, log_prob = likelihood["closed"], likelihood["log_prob"]
        shown += f" <span class=source>p {number(math.exp(log_prob) if closed is None else closed)}</span>"
    return shown
