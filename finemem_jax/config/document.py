"""Writes the settings page of the docs from the sections: python -m finemem_jax.config.document > docs/settings.md"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

from finemem_jax.config import fields, rules
from finemem_jax.config.renamed import SUCCESSORS
from finemem_jax.config.sections import Config, Prices

_INTRODUCTION = """\
# Settings

This page is written by `python -m finemem_jax.config.document > docs/settings.md` from
[`config/sections.py`](../finemem_jax/config/sections.py), where each setting is defined. On the command line a setting
is `--config.SECTION.NAME=VALUE`; a misspelt one is refused. Settings marked ↻ may change when a run goes on in its
workdir; with another value of any other it is another run (`train.continue_workdir=True` goes on all the same). The
last column is what the paper states, or another one that is named.
"""
_HEADER = "| setting | default | meaning | values | paper |\n|---|---|---|---|---|\n"


def page() -> str:
    """The whole page, in Markdown."""
    whole = [one for one, about in fields.infos(Config) if about.of is None]
    parts = [_INTRODUCTION, "## Of the whole run\n", _HEADER + "".join(map(_row, whole))]
    for name, of, is_resumable in _sections(Config, "", False):
        settings = [one for one, about in fields.infos(of) if about.of is None]
        parts += [f"## {name}\n", f"{inspect.getdoc(of)}\n", _HEADER + "".join(_row(o, is_resumable) for o in settings)]
    arguments = dataclasses.fields(rules.RuleArgs)
    parts += ["## credit.rule_args\n", f"{inspect.getdoc(rules.RuleArgs)}\n", _HEADER + "".join(map(_row, arguments))]
    parts += ["## questions.prices\n", f"{inspect.getdoc(Prices)}\n"]
    parts += [_HEADER + "".join(map(_row, dataclasses.fields(Prices)))]
    parts += ["## Names of earlier versions\n", "| earlier | now |\n|---|---|\n" + _earlier()]
    return "\n".join(parts)


def _sections(of: type, prefix: str, is_resumable: bool) -> Iterator[tuple[str, type, bool]]:
    """(name, class, whether all of it may change on resume) of every section, those inside others after them."""
    for one, about in fields.infos(of):
        if about.of is not None:
            name = f"{prefix}{one.name}" + ".NAME" * about.is_table
            yield name, about.of, is_resumable or about.resumable
            yield from _sections(about.of, f"{name}.", is_resumable or about.resumable)


def _row(one: dataclasses.Field, is_resumable: bool = False) -> str:
    about = fields.info(one)
    choices = ", ".join(f"`{value}`" if value != "" else '""' for value in about.choices)
    values = choices or about.range().removeprefix("be ").removeprefix("lie ")
    unit = f" ({about.unit})" if about.unit else ""
    of = f" Of {', '.join(about.rules)}." if about.rules else ""
    mark = " ↻" if is_resumable or about.resumable else ""
    default = '""' if one.default == "" else f"`{one.default}`"
    cells = (f"`{one.name}`{mark}", default, f"{about.doc}{of}{unit}", values, about.paper)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _earlier() -> str:
    servers = "| `reader.endpoint.*` and its like | entries of `servers`, which roles name |\n"
    return servers + "".join(f"| `{old}` | {now} |\n" for old, now in SUCCESSORS.items())


if __name__ == "__main__":
    print(page(), end="")
