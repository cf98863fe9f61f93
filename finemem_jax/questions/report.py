"""Reports what became of the questions that were proposed, in numbers and examples, and as a page to read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Prices
from finemem_jax.questions.costs import Tokens
from finemem_jax.questions.options import QuestionOptions

# Why proposals are not kept, in the order in which it is found out. Each counts under one reason, the first.
REASONS = {
    "malformed": "no JSON object with a question and an answer",
    "too_long": "the answer has too many words",
    "unsupported": "a word of the answer does not stand in the chunk",
    "gives_away": "the question holds the answer",
    "refers_to_text": "the question speaks of a text that the reader will not see",
    "duplicate": "nearly a question that the stream asks already, or the same proposal again",
    "closed_book": "the verifier can answer it without the chunk",
    "unanswerable": "the verifier cannot answer it from the chunk",
    "surplus": "the chunk had its questions, or the reply more proposals than were asked for; not looked at further",
}
KEPT = "kept"


@dataclasses.dataclass(frozen=True)
class Example:
    """One proposal in a report. `reply` is what the verifier said last, "" if it was not asked."""

    stream_id: str
    step: int
    question: str
    answer: str
    reply: str


@dataclasses.dataclass
class Report:
    """What became of the proposals; proposed = kept + all that were rejected.

    Attributes:
        streams, chunks: Those that are done; of the chunks, `full` have `keep` questions, `partial` fewer,
            `empty` none.
        existing: Questions that the chunks had before and kept.
        rejected: By reason, a key of `REASONS`.
        chats: How often each model was asked.
        examples: Some of those kept and of those rejected for each reason; spread over streams.
    """

    options: QuestionOptions
    prices: Prices
    streams: int = 0
    chunks: int = 0
    full: int = 0
    partial: int = 0
    empty: int = 0
    existing: int = 0
    proposed: int = 0
    kept: int = 0
    rejected: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    chats: dict[str, int] = dataclasses.field(default_factory=lambda: {"generator": 0, "verifier": 0})
    tokens: Tokens = dataclasses.field(default_factory=Tokens)
    examples: dict[str, list[Example]] = dataclasses.field(default_factory=dict)

    @property
    def acceptance(self) -> float:
        """Kept ÷ proposed; 0 if nothing was."""
        return self.kept / max(self.proposed, 1)

    @property
    def money(self) -> float:
        return self.tokens.money(self.prices)


def markdown(report: Report, split: str) -> str:
    """Writes the report as a page to read."""
    options, tokens, prices = report.options, report.tokens, report.prices
    asked = []
    for name, chats in report.chats.items():
        used, price = ([vars(of)[f"{name}_{kind}"] for kind in ("prompt", "new")] for of in (tokens, prices))
        asked.append([name, f"{chats:,}", *(f"{value:,}" for value in used), *(f"{value:g}" for value in price)])
    fates = {KEPT: (report.kept, "")} | {name: (report.rejected[name], meaning) for name, meaning in REASONS.items()}
    sizes = (f"with {options.keep} questions", report.full), ("with fewer", report.partial), ("with none", report.empty)
    lines = [
        f"# Chunk questions: {split}",
        "",
        f"{report.kept:,} questions kept of {report.proposed:,} proposed ({report.acceptance:.1%}), for "
        f"{report.chunks:,} chunks of {report.streams:,} streams.",
        *([f"{report.existing:,} that were there before stay."] if options.keep_existing else []),
        "",
        *_table(["chunks", "number"], [[name, f"{number:,}"] for name, number in sizes]),
        "",
        "## What became of the proposals",
        "",
        "Each counts under the first reason that was found.",
        "",
        *_table(
            ["", "number", "share", "meaning"],
            [
                [name, f"{number:,}", f"{number / max(report.proposed, 1):.1%}", meaning]
                for name, (number, meaning) in fates.items()
            ],
        ),
        "",
        "## What it took",
        "",
        *_table(["worker", "chats", "tokens in", "tokens out", "price in", "price out"], asked),
        "",
        f"{tokens.total:,} tokens, money {report.money:,.2f} (prices are for a million tokens). Replies from a file of "
        "answers are counted like others.",
        "",
        "## Examples",
    ]
    for fate in fates:
        if examples := report.examples.get(fate):
            rows = [[f"{e.stream_id}, chunk {e.step + 1}", e.question, e.answer, e.reply] for e in examples]
            lines += ["", f"### {fate}", "", *_table(["stream", "question", "answer", "verifier"], rows)]
    settings = [[f"questions.{name}", str(value)] for name, value in config_lib.flatten(options).items()]
    lines += ["", "## Settings", "", *_table(["setting", "value"], settings)]
    return plain("\n".join(lines) + "\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in (header, ["---"] * len(header), *rows)]


_MARKS = re.compile(r"([\\|<>`*_\[\]#])")


def _cell(text: str) -> str:
    # What a model wrote must not pass for markup, nor end its row.
    return text if text == "---" else _MARKS.sub(r"\\\1", " ".join(text.split()))


def plain(text: str) -> str:
    """Replaces what has no UTF-8 form in a text."""
    return text.encode("utf-8", "replace").decode("utf-8")
