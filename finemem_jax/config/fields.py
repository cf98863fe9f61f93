"""Defines what a setting is, a dataclass's field with default, meaning, unit and range, and checks values by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")
_INFO = "info"
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a setting beside its name and default.

    Attributes:
        doc: What it means, in one sentence.
        unit: What it counts, e.g. "tokens"; "" for plain numbers and texts.
        paper: The value in the paper, or in another one that is named; "" where none states it.
        at_least, above, at_most, below: The range of a number; None for no limit.
        choices: All that it may be; () for anything.
        why: What a value out of range would break, to complete "must be at least 2".
        renamed: {an earlier name of a choice: what it is called now}.
        resumable: Whether a run may go on in its workdir with another value.
        rules: The credit rules that an argument of `credit.rule_args` is for.
        of: Of a section its dataclass, None of a setting.
        is_table: Whether the section is there several times, by names of the user's.
    """

    doc: str
    unit: str = ""
    paper: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    why: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resumable: bool = False
    rules: tuple[str, ...] = ()
    of: type | None = None
    is_table: bool = False

    def range(self) -> str:
        """The range in words, to follow "must": "be at least 0", "lie in (0, 1]"; "" if there is none."""
        open_low, open_high = self.above is not None, self.below is not None
        low = self.above if open_low else self.at_least
        high = self.below if open_high else self.at_most
        if low is not None and high is not None:
            return f"lie in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        return "" if low is None else f"be {'above' if open_low else 'at least'} {low}"

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range; NaN never does where there is one."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def field(default: T, doc: str, **about: Any) -> T:
    """A setting: a field of a section.

    Args:
        default: Its default; the setting's values have this type.
        doc: What it means, in one sentence.
        about: More of what `Info` knows.
    """
    return cast(T, dataclasses.field(default=default, metadata={_INFO: Info(doc, **about)}))


def section(of: type[T], doc: str, **about: Any) -> T:
    """A group of settings inside another section or the whole config."""
    return cast(T, dataclasses.field(default_factory=of, metadata={_INFO: Info(doc, of=of, **about)}))


def table(of: type[T], doc: str, *names: str) -> Mapping[str, T]:
    """A group of settings that is there once for each of some names, to which code may add more."""
    entries: Any = dataclasses.field(
        default_factory=lambda: {name: of() for name in names}, metadata={_INFO: Info(doc, of=of, is_table=True)}
    )
    return entries


def info(of: dataclasses.Field[Any]) -> Info:
    """What is known of a field."""
    return of.metadata[_INFO]


def infos(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Info]]:
    """The fields of a section with what is known of them, in order."""
    return ((one, info(one)) for one in dataclasses.fields(cls))


def check(name: str, value: Any, one: dataclasses.Field[Any]) -> Any:
    """A value as the field's type has it, if it can be a value of the field.

    Raises:
        ValueError: another type, out of range, or none of the choices; naming the field, what it must be, its value.
    """
    about, kind = info(one), type(one.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {value!r}.")
    if not about.holds(value):
        raise ValueError(f"{name} must {about.range()}{about.why}, got {value}.")
    if about.choices and value not in about.choices:
        hint = f", which is called {about.renamed[value]!r} now" if value in about.renamed else ""
        raise ValueError(f"{name} must be one of {', '.join(map(str, about.choices))}; got {value!r}{hint}.")
    return value


def from_text(name: str, text: str, one: dataclasses.Field[Any]) -> Any:
    """A value that is written as a text, checked.

    Raises:
        ValueError: as `check` does.
    """
    kind = type(one.default)
    try:
        value = {"true": True, "false": False}[text.strip().lower()] if kind is bool else kind(text.strip())
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {text!r}.") from error
    return check(name, value, one)


def arguments(setting: str, text: str, fields: Mapping[str, dataclasses.Field[Any]], of: str = "") -> dict[str, Any]:
    """Reads a setting that sets several fields in one text: "name=value,name=value".

    Args:
        setting: Its name, for messages.
        fields: What can be set, by name.
        of: What these belong to, for messages, e.g. "credit.rule='full'".

    Raises:
        ValueError: another form, a name twice or one that is not among them, or a value that cannot be.
    """
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in fields or not equals or name in found:
            known = ", ".join(f"{one.name}={one.default}" for one in fields.values())
            wanted = f'be "name=value,name=value", with some of {known}' if fields else "be empty"
            problem = f"{name!r} twice" if name in found else repr(part)
            raise ValueError(f"{setting} must {wanted}{of and ' for '}{of}; got {problem}.")
        found[name] = from_text(f"{setting}: {name}", value, fields[name])
    return found
