"""Makes configs: the defaults as a ConfigDict for flags and experiments, and from one a checked, frozen `Config`.

`sections` lists every setting. Experiments change values, never names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from finemem_jax.config import checks, fields, renamed
from finemem_jax.config.sections import Config, Server

if TYPE_CHECKING:
    # Experiments set its fields, whose types ml_collections does not know. What reads settings takes a `Config`.
    class ConfigDict(Any): ...
else:
    from ml_collections import ConfigDict

T = TypeVar("T")


def default() -> ConfigDict:
    """Returns every setting with its default, for flags and experiments to change."""
    return _config_dict(Config())


def server(**values: Any) -> ConfigDict:
    """Returns one more entry for `servers`, to be named by a role: config.servers.large = server(urls=…, model=…)."""
    return _config_dict(dataclasses.replace(Server(), **values))


def _config_dict(of: Any) -> ConfigDict:
    return ConfigDict({name: _config_dict(value) if _is_group(value) else value for name, value in _items(of)})


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, (Mapping, ConfigDict))


def _items(of: Any) -> list[tuple[str, Any]]:
    """The names and values of a section, a table or a ConfigDict."""
    if dataclasses.is_dataclass(of):
        return [(one.name, getattr(of, one.name)) for one in dataclasses.fields(of)]
    return list(of.items())


def shrink(config: ConfigDict) -> ConfigDict:
    """Makes any experiment small enough for a test: two layers, random weights, few and short responses.

    The vocabulary is bytes plus whole operations, so that even random weights write some valid ones.
    """
    config.model.name = "tiny"
    config.model.weights = "random"
    config.model.tokenizer = "bytes_and_operations"
    config.manager.num_examples = 0
    config.manager.chunk_tokens = 512
    config.memory.view_tokens = 128
    config.rollout.streams_per_step = 2
    config.rollout.group_size = 4
    config.rollout.max_new_tokens = 24
    config.sampler.num_slots = 8
    config.sampler.steps_per_call = 8
    config.sampler.prefill_tokens = 128
    config.reader.max_new_tokens = 4
    config.reader.num_slots = 8
    config.reader.num_examples = 0
    config.train.num_steps = 3
    config.train.length_multiple = 128
    config.train.checkpoint_every = 1
    return config


# --------------------------------------------------------------------------------------
# From values to a Config
# --------------------------------------------------------------------------------------


def parse(config: ConfigDict) -> Config:
    """Returns the settings of a ConfigDict, checked; system messages that name a file ("@FILE") hold its contents.

    Raises:
        ValueError: a setting that does not exist, or cannot be what it is; naming it, what it must be, and its value.
    """
    return _checked(flatten(config))


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a config with other values, {dotted name: value}, checked as `parse` does.

    Raises:
        ValueError: as `parse` does.
    """
    return _checked(flatten(config) | dict(values))


def from_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """Returns values for `changed` of settings that are written as texts, {dotted name: text}.

    Raises:
        ValueError: a setting that does not exist, or cannot be what it is.
    """
    found: dict[str, Any] = {}
    for name, text in texts.items():
        path = _fields_to(name)
        if not path:
            raise ValueError(no_setting(name))
        found[name] = fields.from_text(name, text, path[-1])
    return found


def from_saved(saved: Mapping[str, Any]) -> Config:
    """Returns the settings of a flattened config that any version saved; the rest have their defaults.

    What exists no more is left out. Whether settings can work together is not checked: `changed` does that.

    Raises:
        ValueError: a value of another type, or out of range.
    """
    return _section(Config, renamed.translate(saved))


def _checked(values: Mapping[str, Any]) -> Config:
    config = _section(Config, {name: _contents(name, value) for name, value in values.items()})
    unknown = values.keys() - flatten(config).keys()
    if unknown:
        raise ValueError(no_setting(min(unknown)))
    checks.validate(config)
    return config


def _section(of: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """A section with those of its fields that are among the values, by dotted name."""
    made: dict[str, Any] = {}
    for one, about in fields.infos(of):
        name = f"{prefix}{one.name}"
        if about.is_table and about.of is not None:
            given = (key.removeprefix(f"{name}.").partition(".")[0] for key in values if key.startswith(f"{name}."))
            entries = dict.fromkeys([*getattr(Config(), one.name), *given])
            made[one.name] = {entry: _section(about.of, values, f"{name}.{entry}.") for entry in entries}
        elif about.of is not None:
            made[one.name] = _section(about.of, values, f"{name}.")
        elif name in values:
            made[one.name] = fields.check(name, values[name], one)
    return of(**made)


def _contents(name: str, value: Any) -> Any:
    """What a file says in place of its name, so that a run's config says what it told its models."""
    if not (name.endswith("system") and isinstance(value, str) and value.startswith("@")):
        return value
    try:
        return pathlib.Path(value[1:]).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={value!r} cannot be read as UTF-8 text: {error}.") from error


# --------------------------------------------------------------------------------------
# Names and values
# --------------------------------------------------------------------------------------


def flatten(config: Any) -> dict[str, Any]:
    """All settings of a Config, a section or a ConfigDict as {dotted name: value}."""
    flat: dict[str, Any] = {}
    for name, value in _items(config):
        if _is_group(value):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def no_setting(name: str) -> str:
    """Says that there is no such setting, and which ones may have been meant, or what an earlier one is called now."""
    if successor := renamed.successor(name):
        return f"there is no setting {name!r} any more; {successor}."
    known = list(flatten(Config()))
    last = {setting.rpartition(".")[2]: setting for setting in known}
    close = difflib.get_close_matches(name, known, 3, 0.7)
    close += [last[end] for end in difflib.get_close_matches(name.rpartition(".")[2], last, 2, 0.7)]
    hint = f"is it {' or '.join(dict.fromkeys(close))}?" if close else "docs/settings.md lists what there is."
    return f"there is no setting {name!r}; {hint}"


def differences(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """Lines "name: saved → now" for every setting that differs from a saved `flatten`ed config of any version."""
    return [f"{name}: {then!r} → {now!r}" for name, (then, now) in _compared(config, saved).items()]


def conflicts(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """The `differences` that make another run of it: all but its length and what it reports on the way."""
    return [
        f"{name}: {then!r} → {now!r}"
        for name, (then, now) in _compared(config, saved).items()
        if not _is_resumable(name)
    ]


def _compared(config: Config, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (saved, now)} of what differs, in order."""
    now, then = json.loads(json.dumps(flatten(config))), renamed.translate(saved)
    absent = "(absent)"
    return {
        name: (then.get(name, absent), now.get(name, absent))
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    }


def _is_resumable(name: str) -> bool:
    """Whether a run may go on in its workdir with another value: by its field, or by a section that it is in."""
    return any(fields.info(one).resumable for one in _fields_to(name))


def _fields_to(name: str) -> list[dataclasses.Field[Any]]:
    """The sections that a dotted name goes through and the setting itself; [] if there is none of that name."""
    of: type | None = Config
    parts, found = name.split("."), []
    while parts:
        one = None if of is None else {one.name: one for one in dataclasses.fields(of)}.get(parts.pop(0))
        if one is None:
            return []
        found.append(one)
        of = fields.info(one).of
        if fields.info(one).is_table and parts:
            parts.pop(0)
    return found if of is None else []
