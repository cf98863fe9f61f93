"""Builds streams from long stories and their summaries: a stream is a whole story, which all its questions need.

Reads SQuALITY, one story a line ({"metadata": {"passage_id"}, "document", "questions": [{"question_text",
"question_number", "responses": [{"response_text"}]}]}), and BookSum as its copies on the Hub have it, as JSON lines:
{"chapter" or "text", "summary_text" or "summary", "bid" or "book_id" or "title"}, where "summary" may be a list.
Knows nothing of tables (.csv, .parquet).
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import random
import re

from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _chunking, _files, _styles, _windows

NAME = "squality"
_SUMMARIZE = "What happens in this text? Give a summary."
_TEXTS, _SUMMARIES = ("chapter", "text"), ("summary_text", "summary")
_LAYOUTS = [("document", "questions"), *itertools.product(_TEXTS, _SUMMARIES)]
_TOO_LONG = "longer than data.chunks_per_stream"

# For each text the answers to each of its questions, the first of which asks for the plot.
_Book = dict[str, dict[str, list[str]]]


def load(spec: StreamSpec) -> StreamSource:
    """Returns one stream for each story or chapter, cut as `spec.chunking` says, by default at sentence ends.

    No part of a story answers its questions, so a story that needs more than `spec.chunks_per_stream` chunks is left
    out rather than cut; `left_out` counts its questions. Chapters of one book are of one split.

    In Mem-alpha's style a chunk is an event of reading with its date, and the question about the plot names the dates.

    Raises:
        ValueError: the spec cannot be served, no story is short enough, or a file is missing or broken (with file,
            line and field).
    """
    _windows.check(spec)
    books = _read(spec.source_dir)
    texts, sizes, left_out = [], [], collections.Counter()
    for name in _windows.names_of_split(books, spec.split, NAME):
        for document, answers_to in books[name].items():
            text = _cut(f"{name}/{_digest(document)}", document, answers_to, spec=spec)
            left_out.update(text.left_out)
            sizes.append(len(text.chunks))
            if len(text.chunks) > spec.chunks_per_stream:
                left_out[_TOO_LONG] += len(text.questions)
            elif text.questions:
                texts.append(text)
    if not texts:
        raise _none_fits(spec, sizes)
    random.Random(f"{spec.seed}/order").shuffle(texts)
    return _windows.Made(len(texts), texts.__getitem__, _windows.Origin(NAME, "LRU", spec), left_out=left_out)


def _none_fits(spec: StreamSpec, sizes: list[int]) -> ValueError:
    """Returns the error to raise where no text can be a stream; `sizes` are those of all texts, in chunks."""
    short = min(sizes) <= spec.chunks_per_stream
    return ValueError(
        f"Source {NAME!r}, split {spec.split!r}: none of the {len(sizes)} texts in data.source_dir has a question with "
        f"an answer and at most data.chunks_per_stream={spec.chunks_per_stream} chunks of "
        f"data.chunk_words={spec.chunk_words} words. "
        + ("Add texts with answered questions." if short else "A text is never cut, as its questions need all of it. ")
        + ("" if short else f"Set data.chunks_per_stream to {min(sizes)} for the shortest, to {max(sizes)} for all; ")
        + ("" if short else "or raise data.chunk_words.")
    )


def _cut(name: str, document: str, answers_to: dict[str, list[str]], *, spec: StreamSpec) -> _windows.Text:
    """Cuts a story into chunks, and makes its questions; the first one asks for the plot."""
    chunks = [document[slice(*span)] for span in _chunking.cut(document, spec.chunk_words, spec.chunking)]
    plot = next(iter(answers_to), "")
    about_plot = plot
    if spec.style == "memalpha":
        dates = _styles.reading_dates(len(chunks), random.Random(f"{spec.seed}/{name}/dates"))
        chunks = [_styles.reading(chunk, date) for chunk, date in zip(chunks, dates, strict=True)]
        about_plot = f"Give a summary of what the user has read in the book from {dates[0]} to {dates[-1]}."
    questions = [
        Question(about_plot, tuple(answers), "rouge_l", kind="plot")
        if text == plot
        else Question(text, tuple(answers), "rouge_l", kind="detail")
        for text, answers in answers_to.items()
        if answers
    ]
    unanswered = len(answers_to) - len(questions)
    return _windows.Text(name, tuple(chunks), tuple(questions), {"no answer": unanswered} if unanswered else {})


def _read(source_dir: str) -> dict[str, _Book]:
    """Returns the texts of each book.

    A text that comes twice is kept once, where it stood first, with the answers of both: BookSum has a record for each
    summary of a chapter.
    """
    books: dict[str, _Book] = collections.defaultdict(dict)
    name_of: dict[str, str] = {}
    for record in _files.read(source_dir, _LAYOUTS, "SQuALITY or BookSum"):
        is_story = "document" in record.fields
        document = _one_line_each(record.text("document" if is_story else _of(record, _TEXTS)))
        own_name = _passage(record) if is_story else _book(record)
        name = name_of.setdefault(document, own_name or _digest(document))
        answers_to = books[name].setdefault(document, {})
        for question, answers in _responses(record) if is_story else [(_SUMMARIZE, _summaries(record))]:
            known = answers_to.setdefault(question, [])
            known += [answer for answer in dict.fromkeys(answers) if answer not in known]
    return books


def _of(record: _files.Record, keys: tuple[str, ...]) -> str:
    """Returns the first of some fields that a record has; else the last of them."""
    return next((key for key in keys if key in record.fields), keys[-1])


def _passage(record: _files.Record) -> str:
    """Returns the name of a story of SQuALITY, "" if it has none."""
    metadata = record.record("metadata") if "metadata" in record.fields else record
    return _name(metadata, "passage_id")


def _book(record: _files.Record) -> str:
    """Returns the name of the book that a chapter of BookSum is of, "" if it has none."""
    # On the Hub, "bid" is the number of the book, and "book_id" names the chapter too.
    return _name(record, _of(record, ("bid", "book_id", "book_title", "title")))


def _name(record: _files.Record, key: str) -> str:
    value = record.fields.get(key)
    if value is not None and (not isinstance(value, str | int | float) or isinstance(value, bool)):
        raise record.error(key, "a text or a number")
    return "" if value is None else str(value).strip()


def _responses(record: _files.Record) -> list[tuple[str, list[str]]]:
    """Reads SQuALITY's questions in the order of their numbers, each with its answers."""
    questions = record.records("questions")
    for i, question in enumerate(questions):
        if not isinstance(question.fields.get("question_number", i), int):
            raise question.error("question_number", "a whole number")
    numbers = [question.fields.get("question_number", i) for i, question in enumerate(questions)]
    found = []
    for i in sorted(range(len(questions)), key=lambda i: numbers[i]):  # the first asks for the plot
        responses = questions[i].records("responses") if "responses" in questions[i].fields else []
        answers = [response.text("response_text", may_be_empty=True) for response in responses]
        found.append((questions[i].text("question_text"), [answer for answer in answers if answer]))
    return found


def _summaries(record: _files.Record) -> list[str]:
    """Reads BookSum's summaries of a chapter: one text, or a list of texts or objects."""
    key = _of(record, _SUMMARIES)
    value = record.fields[key]
    items = value if isinstance(value, list) else [] if value is None else [value]
    # In a list, each summary is an object: {"source", "text", …}.
    found = [item.get("text") or "" if isinstance(item, dict) else item for item in items]
    for i, summary in enumerate(found):
        if not isinstance(summary, str):
            raise record.error(f"{key}[{i}]" if items is value else key, "a text, or a list of texts", items[i])
    return [summary.strip() for summary in found if summary.strip()]


def _one_line_each(text: str) -> str:
    """Gives each paragraph one line; Gutenberg breaks lines within them and has blank lines between them."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
