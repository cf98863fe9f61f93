"""Builds the report's page, its style, and the small pieces of HTML that it is put together from.

The page loads nothing from outside and runs no script; `text` escapes whatever a model or a
data set wrote.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any


def page(title: str, body: str) -> str:
    """Returns a whole page.

    Args:
        title: Plain text.
        body: HTML.
    """
    return _PAGE.format(title=text(title), style=_STYLE, body=body)


def section(title: str, content: str) -> str:
    """Puts HTML under a heading."""
    return f"<section><h2>{text(title)}</h2>{content}</section>"


def note(words: str) -> str:
    """Makes a remark that must not be overlooked."""
    return f"<p class=note>{text(words)}</p>"


def about(words: str) -> str:
    """Explains how to read what stands beside it."""
    return f"<p class=about>{text(words)}</p>"


def chip(words: str, kind: str) -> str:
    """Frames a few words, in the color that the style gives their kind."""
    return f"<span class='chip {text(kind)}'>{text(words)}</span>"


def folded(summary: str, content: str) -> str:
    """Hides HTML until its summary is clicked."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def texts_table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Makes a table of plain texts; kind "numbers" aligns all columns but the first to the right."""
    return table(header, [[text(cell) for cell in row] for row in rows], kind)


def table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Makes a table of HTML cells under plain headings; `kind` names its style."""
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def signed(value: float, largest: float) -> str:
    """Shows a number above or below 0 with a bar, from the middle to the right or to the left.

    Args:
        largest: The size at which a bar is full; the same for all that is to be compared.
    """
    direction = "up" if value > 0 else "down" if value < 0 else "zero"
    share = 50 * min(abs(value) / largest, 1) if largest > 0 and math.isfinite(value) else 0
    return (
        f"<span class='signed {direction}'><span class=bar><i style='width:{share:.1f}%'></i></span>"
        f"<b>{number(value, sign=True) if value else '0'}</b></span>"
    )


def number(value: float, sign: bool = False) -> str:
    """Formats a number with the digits that matter; – if it is not finite.

    Args:
        sign: Write a + before what is not negative.
    """
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:{'+' if sign else ''}.{digits}f}"


def text(value: Any) -> str:
    """Plain text as HTML."""
    return html.escape(str(value))


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
  --line0: #1f5fa8; --line1: #c8501a; --line2: #14805e; --line3: #a8478a; --line4: #97710a; --line5: #62666f;
  --line6: #7a4fb5; --line7: #b02a4e; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181c; --ink: #e4e4e0; --soft: #9a9fa9; --rule: #363a42; --shade: #1f2227;
  --good: #5cc790; --bad: #f0856c; --warn: #dcb254;
  --line0: #6cabee; --line1: #f58f5c; --line2: #4bc69c; --line3: #df8fc6; --line4: #d9b64e; --line5: #a9aeb8;
  --line6: #b79aee; --line7: #ee7f9b; } }
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
.answers th:last-child, .answers td:last-child { text-align: right; padding-right: 0; white-space: nowrap; }
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
.columns { display: grid; grid-template-columns: 2fr 3fr; gap: 0 2.2rem; }
.columns > div { min-width: 0; overflow-wrap: anywhere; } .columns ul { font-size: .9rem; }
@media (max-width: 46rem) { .columns { grid-template-columns: 1fr; } }
blockquote { margin: 0; white-space: pre-wrap; font-family: Charter, Georgia, "Noto Serif", "DejaVu Serif", serif; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8125rem; margin: .4rem 0;
  padding: .6rem .8rem; max-height: 30rem; overflow-y: auto; background: var(--paper); border-radius: 4px; }
code { font-size: .8125rem; overflow-wrap: anywhere; }
ul { list-style: none; margin: 0; padding: 0; } li { margin: .3rem 0; }
article > header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1.5rem; }
.operations { width: 100%; font-size: .9rem; overflow-wrap: anywhere; }
.operations td:first-child { color: var(--soft); padding-right: .6rem; white-space: nowrap; }
.operations td:nth-child(2) { width: 99%; }
.operations td:nth-child(n+3), .operations th:nth-child(n+3) { text-align: right; padding: .35rem 0 .35rem .8rem; }
.columns details summary { font-size: .8125rem; color: var(--soft); }
.chip { font-size: .75rem; font-weight: 600; padding: .05rem .45rem; border: 1px solid; border-radius: 1rem;
  white-space: nowrap; color: var(--warn); }
.applied, .good, .signed.up b { color: var(--good); }
.malformed, .bad, .signed.down b { color: var(--bad); }
.type { font-size: .8125rem; font-weight: 600; color: var(--line3); }
del { color: var(--soft); text-decoration-thickness: 1px; }
.signed { white-space: nowrap; font-variant-numeric: tabular-nums; }
.signed b { display: inline-block; min-width: 3.3rem; font-weight: 500; font-size: .8125rem; text-align: right; }
.signed.zero b { color: var(--soft); }
.bar { display: inline-block; position: relative; width: 3.6rem; height: .7rem; vertical-align: -.05rem;
  background: linear-gradient(var(--soft), var(--soft)) center / 1px 100% no-repeat, var(--rule); border-radius: 2px; }
.bar i { position: absolute; top: 0; bottom: 0; }
.up .bar i { left: 50%; background: var(--good); border-radius: 0 2px 2px 0; }
.down .bar i { right: 50%; background: var(--bad); border-radius: 2px 0 0 2px; }
.measure { font-size: .875rem; color: var(--soft); white-space: nowrap; }
"""
