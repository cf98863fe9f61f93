"""Answers settings of earlier versions with their successors, and translates configs that earlier versions saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from finemem_jax.config.rules import fields_of
from finemem_jax.config.sections import Server

# The same value under another name.
_MOVED = {
    "manager.wire": "manager.tool_call_format",
    "prompts.manager": "manager.system",
    "prompts.reader": "reader.system",
    "prompts.answer_judge": "judge.answer_system",
    "prompts.content_judge": "judge.content_system",
    "prompts.generator": "questions.generator.system",
    "prompts.verifier": "questions.verifier.system",
    "prompts.closed_book": "questions.closed_book_system",
    "prompts.summary": "evaluate.summary_system",
}
# Part of another setting's text.
_RULE_ARGS = (
    "bloat_weight", "used_weight", "type_factor", "type_factor_on", "gain_transform", "gain_floor",
    "ablation_conserves", "cited_by", "content_weight",
)  # fmt: skip
_PRICES = ("generator_prompt", "generator_new", "verifier_prompt", "verifier_new")
# Of `evaluate`, what they are called in `data`, and what stood for "as in data".
_BENCHMARK_DATA = {
    "num_streams": ("num_test", -1),
    "chunks_per_stream": ("chunks_per_stream", 0),
    "chunk_words": ("chunk_words", 0),
    "questions_per_stream": ("questions_per_stream", 0),
}
# Constants now; none of them decided what a run does.
_FIXED = {
    "questions.samples": "5",
    "evaluate.rag_top_k": "2",
    "evaluate.resamples": "10,000",
    "follow.poll_seconds": "1",
    "export.shard_gigabytes": "5",
    "export.verify_tokens": "2,000",
}
# Settings that have no like in earlier versions, as these had them.
_NEW: dict[str, Any] = {
    "credit.rule_args": "",
    "evaluate.data": "",
    "questions.prices": "",
} | {f"servers.{entry}.{one.name}": one.default for entry in ("main", "second") for one in dataclasses.fields(Server)}
_ROLES = ("reader", "judge", "questions.generator", "questions.verifier")
_OLD_KIND, _KIND = "endpoint", "server"


def _successors() -> dict[str, str]:
    found = {old: f"it is {new} now" for old, new in _MOVED.items()}
    found |= {f"credit.{name}": f'say credit.rule_args="{name}=…"' for name in _RULE_ARGS}
    found |= {f"questions.prices.{name}": f'say questions.prices="{name}=…"' for name in _PRICES}
    found |= {f"evaluate.{old}": f'say evaluate.data="{new}=…"' for old, (new, _) in _BENCHMARK_DATA.items()}
    found["evaluate.chunk_questions"] = 'say evaluate.data="questions_per_chunk=…"'
    found |= dict.fromkeys(
        ("likelihood.final_chunk_share", "likelihood.anneal_steps"),
        'likelihood.chunk_share takes a schedule: "0:1,200:0" goes from 1 to 0 in 200 steps',
    )
    found |= {name: f"it is always {value} now" for name, value in _FIXED.items()}
    return found


SUCCESSORS: Mapping[str, str] = _successors()


def successor(name: str) -> str:
    """What to say instead of a setting of an earlier version; "" where there was none of that name."""
    role, is_endpoint, field = name.partition(".endpoint")
    if is_endpoint and role in _ROLES:
        return (
            f"servers are a table that roles name: it is servers.main{field} (or servers.second{field}) with "
            f"{role}.kind=server and {role}.server=main"
        )
    name = "prompts.manager" if name == "prompts" else name
    return SUCCESSORS.get(name, "")


def translate(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A flattened config of any earlier version in the names and values of this one; of this one, as it is."""
    values = dict(saved)
    if any(successor(name) for name in saved):
        values = _NEW | values
    for old, new in _MOVED.items():
        if old in values:
            values[new] = values.pop(old)
    _translate_servers(values)
    _translate_credit(values)
    _translate_likelihood(values)
    prices = {name: values.pop(f"questions.prices.{name}", 0.0) for name in _PRICES}
    if any(prices.values()):
        values["questions.prices"] = ",".join(f"{name}={_number(value)}" for name, value in prices.items() if value)
    _translate_benchmarks(values)
    for name in _FIXED:
        values.pop(name, None)
    return values


def _translate_servers(values: dict[str, Any]) -> None:
    """Each role had servers of its own; those that were asked get an entry, equal ones the same."""
    entries: dict[str, dict[str, Any]] = {}
    for role in _ROLES:
        prefix = f"{role}.{_OLD_KIND}."
        fields = {name.removeprefix(prefix): values.pop(name) for name in list(values) if name.startswith(prefix)}
        if fields:
            values[f"{role}.server"] = "main"
        if values.get(f"{role}.kind") != _OLD_KIND:
            continue
        values[f"{role}.kind"] = _KIND
        free = next(name for name in ("main", "second", role.rpartition(".")[2]) if name not in entries)
        entry = next((name for name, known in entries.items() if known == fields), free)
        entries[entry] = fields
        values[f"{role}.server"] = entry
    for entry, fields in entries.items():
        values |= {f"servers.{entry}.{name}": value for name, value in fields.items()}


def _translate_credit(values: dict[str, Any]) -> None:
    """Numbers of single rules were settings of their own; those of other rules than the run's decided nothing."""
    old = {name: values.pop(f"credit.{name}") for name in _RULE_ARGS if f"credit.{name}" in values}
    taken = fields_of(values.get("credit.rule", ""))
    changed = [f"{name}={_number(old[name])}" for name in taken if name in old and old[name] != taken[name].default]
    if changed:
        values["credit.rule_args"] = ",".join(changed)


def _translate_likelihood(values: dict[str, Any]) -> None:
    """Three numbers were what a schedule says now."""
    first = values.get("likelihood.chunk_share")
    last = values.pop("likelihood.final_chunk_share", first)
    steps = values.pop("likelihood.anneal_steps", 0)
    if isinstance(first, (int, float)):
        is_flat = not steps or first == last
        values["likelihood.chunk_share"] = _number(first) if is_flat else f"0:{_number(first)},{steps}:{_number(last)}"


def _translate_benchmarks(values: dict[str, Any]) -> None:
    """What benchmarks had otherwise than `data` were settings of their own."""
    changed = []
    for old, (new, same) in _BENCHMARK_DATA.items():
        value = values.pop(f"evaluate.{old}", same)
        if value != same:
            changed.append(f"{new}={value}")
    if values.pop("evaluate.chunk_questions", False):
        changed.append(f"questions_per_chunk={values.get('data.questions_per_chunk', 5)}")
    if changed:
        values["evaluate.data"] = ",".join(changed)


def _number(value: Any) -> str:
    """A number as somebody would write it: 1.0 as "1"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
