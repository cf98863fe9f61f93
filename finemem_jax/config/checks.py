"""Checks settings against each other, before anything is loaded or compiled, and without JAX."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from finemem_jax.config import fields, schedules
from finemem_jax.config.rules import RuleArgs, fields_of
from finemem_jax.config.sections import Config, Data, Judge, Prices, QuestionModel, Reader


def validate(config: Config) -> None:
    """Refuses settings that cannot work together; each alone was checked when the config was made.

    Raises:
        ValueError: naming the field, what it must be, and its value.
    """
    if config.credit.kl_weight and (config.rollout.top_k or config.rollout.top_p < 1):
        raise ValueError(
            "credit.kl_weight measures the divergence on what the whole policy draws; set rollout.top_k=0 and "
            "rollout.top_p=1, or use objective.kl_weight."
        )
    if config.sampler.in_place and (config.sampler.int8 or config.sampler.dtype != config.model.param_dtype):
        raise ValueError(
            "sampler.in_place=True decodes with the trainer's arrays as they are; set sampler.int8=False and "
            f"sampler.dtype={config.model.param_dtype!r} (model.param_dtype), or sampler.in_place=False."
        )
    if config.export.dtype == "float16" and config.export.form != "gguf":
        raise ValueError(
            f"export.dtype='float16' is for export.form='gguf' only, got export.form={config.export.form!r}; set "
            "export.dtype='bfloat16'."
        )
    for name, role in _roles(config):
        if role.kind == "server":
            _check_server(config, name, role.server)
    rule_args(config)
    schedules.curriculum(config.train, config.data)
    schedules.chunk_share(config.likelihood.chunk_share)
    prices(config)
    benchmark_data(config)


def _roles(config: Config) -> Iterator[tuple[str, Reader | Judge | QuestionModel]]:
    """Who may be asked on servers, by the names of the settings."""
    yield "reader", config.reader
    yield "judge", config.judge
    yield "questions.generator", config.questions.generator
    yield "questions.verifier", config.questions.verifier


def _check_server(config: Config, role: str, name: str) -> None:
    if name not in config.servers:
        raise ValueError(f"{role}.server must be an entry of servers, {', '.join(config.servers)}; got {name!r}.")
    for setting in ("urls", "model"):
        value = getattr(config.servers[name], setting)
        if not value.strip():
            raise ValueError(
                f"servers.{name}.{setting} must not be empty where {role}.kind is 'server'; got {value!r}. E.g. "
                f"--config.servers.{name}.urls=http://localhost:8000/v1 --config.servers.{name}.model=NAME."
            )
    extra_fields(config, name)


def extra_fields(config: Config, server: str) -> dict[str, Any]:
    """The fields that `extra` of an entry of `servers` adds to a request.

    Raises:
        ValueError: it is no JSON object.
    """
    text = config.servers[server].extra
    try:
        extra = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"servers.{server}.extra must be a JSON object ({error}); got {text!r}.") from error
    if not isinstance(extra, dict):
        raise ValueError(f"servers.{server}.extra must be a JSON object; got {text!r}.")
    return extra


def rule_args(config: Config) -> RuleArgs:
    """What `credit.rule_args` says.

    Raises:
        ValueError: an argument that is not the rule's, which are named; or a value that cannot be.
    """
    rule = config.credit.rule
    return RuleArgs(
        **fields.arguments("credit.rule_args", config.credit.rule_args, fields_of(rule), f"credit.rule={rule!r}")
    )


def prices(config: Config) -> Prices:
    """What `questions.prices` says.

    Raises:
        ValueError: an unknown name, or no number.
    """
    known = {one.name: one for one in dataclasses.fields(Prices)}
    return Prices(**fields.arguments("questions.prices", config.questions.prices, known))


def benchmark_data(config: Config) -> Data:
    """The settings of held-out streams where methods are compared: those of `data`, and what `evaluate` says."""
    known = {one.name: one for one in dataclasses.fields(Data) if not one.name.startswith(("name", "test_", "weights"))}
    asked = config.evaluate
    changes: dict[str, Any] = {
        "test_name": asked.sources or config.data.test_name,
        "test_dir": asked.source_dir or config.data.test_dir,
        "questions_per_chunk": 0,
    }
    return dataclasses.replace(config.data, **changes | fields.arguments("evaluate.data", asked.data, known))
