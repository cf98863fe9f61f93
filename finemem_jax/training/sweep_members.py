"""Finds the members of a sweep: in an experiment's `sweep()`, or from values of settings on the command line."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import itertools
import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config


@dataclasses.dataclass(frozen=True)
class Member:
    """Describes one run of a sweep.

    Attributes:
        name: Its row in the table, and its folder in the sweep's workdir.
        arguments: What on the command line makes its config: --config=…, then --config.a.b=….
        config: That config.
    """

    name: str
    arguments: tuple[str, ...]
    config: Config


def find(experiment: str, overrides: Mapping[str, Any], fields: str = "") -> list[Member]:
    """Finds the members of a sweep, the one that others are compared with first.

    Without `fields`, they are the args that the experiment's `sweep()` returns, or `sweep(ARG)` for "FILE:ARG".

    Args:
        experiment: What --config takes: "FILE" or "FILE:ARG".
        overrides: {dotted field: value}, the same for all members.
        fields: "a.b=1,2;c.d=x,y": all combinations of these values. Quotes keep a value with , or ; together, and
            stand for an empty one.

    Raises:
        ValueError: no such file, nothing to sweep, fields or values that do not exist, or an invalid config.
    """
    file, *argument = experiment.split(":", 1)
    module = _load(file)
    found = []
    if fields:
        for values in _product(fields):
            twice = sorted(overrides.keys() & values.keys())
            if twice:
                raise ValueError(f"--sweep and --config.{twice[0]} both set {twice[0]}; leave one of them out.")
            name = ",".join(f"{field}={value}" for field, value in values.items())
            found.append(_member(name, module, experiment, values={**overrides, **values}))
    else:
        given = "".join(f"{part}," for part in argument)
        for arg in _declared(module, file, argument):
            found.append(_member(arg.removeprefix(given), module, f"{file}:{arg}" if arg else file, values=overrides))
    repeated = [name for name, count in collections.Counter(member.name for member in found).items() if count > 1]
    if repeated:
        raise ValueError(f"two members of the sweep are called {repeated[0]!r}; leave one of them out.")
    return found


def _member(name: str, module: types.ModuleType, experiment: str, *, values: Mapping[str, Any]) -> Member:
    name = re.sub(r"[^\w.=,+-]", "_", name).lstrip(".") or "default"
    options = [f"--config.{field}={value}" for field, value in values.items()]
    try:
        config = _config(module, experiment.split(":", 1)[1:], options)
    except (ValueError, TypeError, flags.Error) as error:
        raise ValueError(f"member {name} of the sweep: {error}") from error
    return Member(name, (f"--config={experiment}", *options), config)


def _load(file: str) -> types.ModuleType:
    if not pathlib.Path(file).is_file():
        raise ValueError(f"--config={file}: there is no such file.")
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={file} must be a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _declared(module: types.ModuleType, file: str, argument: Sequence[str]) -> list[str]:
    if not hasattr(module, "sweep"):
        raise ValueError(
            f'{file} has no function sweep() that lists its members; add one, or say --sweep="field=value,value".'
        )
    try:
        declared = module.sweep(*argument)
    except TypeError as error:
        raise ValueError(f"sweep() of {file} cannot be called with {list(argument)}: {error}") from error
    if not declared:
        raise ValueError(f"sweep() of {file} returned no members.")
    return list(declared)


def _product(text: str) -> list[dict[str, str]]:
    """Parses "a.b=1,2;c.d=x,y" to all combinations of its values, each {field: value}."""
    axes = {}
    for part in _split(text, ";"):
        field, equals, values = part.partition("=")
        field = field.strip()
        if not (field and equals):
            raise ValueError(f'--sweep must look like "credit.beta=0,0.5;seed=0,1"; got the part {part!r}.')
        if field in axes:
            raise ValueError(f"--sweep has {field} twice; write all its values behind one.")
        axes[field] = [_unquoted(value, field) for value in _split(values, ",")]
        if len(set(axes[field])) < len(axes[field]):
            raise ValueError(f"--sweep has a value of {field} twice in {values!r}; leave one out.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _split(text: str, separator: str) -> list[str]:
    # A separator counts if what follows it has its quotes in pairs.
    return re.split(separator + r"""(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""", text)


def _unquoted(value: str, field: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    if not value or value[0] in "'\"":
        raise ValueError(f"--sweep has a value of {field} that is empty or lacks a quote; write '' for an empty text.")
    return value


def _config(module: types.ModuleType, argument: Sequence[str], options: Sequence[str]) -> Config:
    """Returns the config as the member's own command line will read it."""
    config = module.get_config(*argument)
    known = config_lib.flatten(config)
    for option in options:
        name = option.removeprefix("--config.").partition("=")[0]
        if name not in known:
            raise ValueError(config_lib.no_setting(name))
    line, parsed = ["sweep", *options], flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=line)
    # Writes the values into `config`.
    parsed(line)
    return config_lib.parse(config)
