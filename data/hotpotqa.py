"""Builds streams from HotpotQA: the articles that questions need, and the questions, most of them over two articles.

Reads the official list ({"_id", "supporting_facts": [[title, number], ...], "context": [[title, [sentences]], ...]}),
one question a line with the articles joined ({"id", "gold_titles", "context": [{"title", "text"}, ...]}), and the
columns of the Hub ({"supporting_facts": {"title": [...]}, "context": {"title": [...], "sentences": [...]}}).

Distractors are not used. Knows nothing of supporting sentences: a question needs its articles as wholes.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Mapping
from typing import Any

from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _files, _styles, _text, _windows

NAME = "hotpotqa"
_KEYS = ("question", "answer", "type", "level", "context")
_LONG_ANSWER_WORDS = 5  # Mem-alpha drops answers of 5 tokens or more.


@dataclasses.dataclass(frozen=True)
class _Qa:
    question: str
    answer: str
    type: str
    titles: tuple[str, ...]  # of the supporting articles


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams of supporting articles, filled up with the questions of the split in a seeded order.

    An article that several questions of a stream need stands in it once. A question needs all chunks that hold its
    articles. In style "memalpha" questions with answers of five words or more are left out. Questions that share an
    article are in the same split.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, line and field).
    """
    _windows.check(spec)
    qas, articles = _read(spec.source_dir)
    texts_of = {name: [articles[title] for title in qa.titles if title in articles] for name, qa in qas.items()}
    group_of = _windows.groups_of({name: [*qa.titles, *texts_of[name]] for name, qa in qas.items()})
    chosen = set(_windows.names_of_split(set(group_of.values()), spec.split, NAME))
    usable, left_out = [], collections.Counter()
    for name in sorted(name for name in qas if group_of[name] in chosen):
        if len(texts_of[name]) < len(qas[name].titles):
            left_out["supporting article missing"] += 1
        elif spec.style == "memalpha" and _text.num_words(qas[name].answer) >= _LONG_ANSWER_WORDS:
            left_out["long answer"] += 1
        else:
            usable.append(qas[name])
    pieces = {title: _cut(title, articles[title], spec.chunk_words) for qa in usable for title in qa.titles}
    plans = _deal(usable, pieces, spec, left_out=left_out)
    if not plans:
        raise ValueError(
            f"Source {NAME!r}, split {spec.split!r}: no stream has a question, left out: {dict(left_out)}. Add "
            "questions with their articles to data.source_dir, or raise data.chunk_words and data.chunks_per_stream."
        )

    def make(number: int) -> _windows.Text:
        rng = random.Random(f"{spec.seed}/{number}/frames")
        return _make(f"{number:05d}", plans[number], pieces, rng=rng if spec.style == "memalpha" else None)

    return _windows.Made(len(plans), make, _windows.Origin(NAME, "AR", spec), left_out=left_out)


def _read(source_dir: str) -> tuple[dict[str, _Qa], dict[str, str]]:
    """Returns the questions by id, and the supporting articles by title.

    A question that comes twice counts once. Of two versions of an article the longer one is taken.
    """
    qas: dict[str, _Qa] = {}
    articles: dict[str, str] = {}
    for record in _files.read(source_dir, [_KEYS], "HotpotQA"):
        titles_key = "gold_titles" if "gold_titles" in record.fields else "supporting_facts"
        titles = [_title(record, f"{titles_key}[{i}]", row) for i, row in enumerate(_rows(record, titles_key, "title"))]
        if not titles:
            raise record.error(titles_key, "at least one supporting article")
        qa = _Qa(record.text("question"), record.text("answer"), record.text("type"), tuple(dict.fromkeys(titles)))
        qas.setdefault(record.text("_id" if "_id" in record.fields else "id"), qa)
        columns = ("title", "sentences") if isinstance(record.fields.get("context"), dict) else ("title", "text")
        for i, row in enumerate(_rows(record, "context", *columns)):
            title, text = _title(record, f"context[{i}]", row), row[1] if len(row) == 2 else None
            if isinstance(text, list) and all(isinstance(sentence, str) for sentence in text):
                text = " ".join(sentence.strip() for sentence in text)
            if not isinstance(text, str):
                raise record.error(f"context[{i}]", "a title with a text or a list of sentences", row)
            if title in qa.titles and text.strip():
                versions = (articles.get(title, ""), text.strip())
                articles[title] = max(versions, key=lambda version: (len(version), version))
    return qas, articles


def _rows(record: _files.Record, key: str, *columns: str) -> list[Any]:
    """Returns the rows of a table, which may be a list of rows, of objects or of single values, or columns by name."""
    if isinstance(record.fields.get(key), dict):
        table = record.record(key)
        return list(itertools.zip_longest(*(table.items(column) for column in columns)))
    rows = [[row.get(column) for column in columns] if isinstance(row, dict) else row for row in record.items(key)]
    return [row if isinstance(row, list) else [row] for row in rows]


def _title(record: _files.Record, key: str, row: Any) -> str:
    title = row[0] if row else None
    if not isinstance(title, str) or not title.strip():
        raise record.error(key, "a title that is not blank", title)
    return _text.one_line(title)


def _cut(title: str, text: str, chunk_words: int) -> list[str]:
    """Cuts an article, its title included, into pieces that fit a chunk."""
    whole = f"Title: {title}\n{text}"
    return [whole[slice(*span)] for span in _text.pieces(whole, chunk_words)]


class _Plan:
    """Collects what a stream is to hold: chunks with a target length in words each, and questions."""

    def __init__(self, targets: list[int]):
        """Begins with empty chunks of these target lengths."""
        self.targets = targets
        self.qas: list[_Qa] = []
        self.titles: list[str] = []
        self._begun, self._room = 0, 0  # chunks that hold something; words left in the last of them

    def add(self, qa: _Qa, pieces: Mapping[str, list[str]]) -> bool:
        """Adds a question if its articles find room, and says whether; chunks fill up as in `_styles.gather`."""
        begun, room = self._begun, self._room
        titles = [title for title in qa.titles if title not in self.titles]
        for piece in itertools.chain(*(pieces[title] for title in titles)):
            words = _text.num_words(piece)
            if not begun or words > room:
                if begun == len(self.targets):
                    return False
                room = self.targets[begun]
                begun += 1
            room -= words
        self._begun, self._room = begun, room
        self.qas.append(qa)
        self.titles += titles
        return True


def _deal(
    qas: list[_Qa], pieces: Mapping[str, list[str]], spec: StreamSpec, *, left_out: collections.Counter[str]
) -> list[_Plan]:
    """Deals the questions to streams in a seeded order; one whose articles find no room begins the next stream."""
    rng = random.Random(f"{spec.seed}/order")
    plans = [_Plan([])]
    for qa in rng.sample(qas, len(qas)):
        if not plans[-1].add(qa, pieces):
            targets = [_styles.target(spec.style, spec.chunk_words, rng) for _ in range(spec.chunks_per_stream)]
            plans.append(_Plan(targets))
            if not plans[-1].add(qa, pieces):
                left_out["articles longer than a stream"] += 1
    return [plan for plan in plans if plan.qas]


def _make(name: str, plan: _Plan, pieces: Mapping[str, list[str]], *, rng: random.Random | None) -> _windows.Text:
    """Writes out a planned stream; with `rng`, its chunks are framed in Mem-alpha's style."""
    owners, texts = zip(*((title, piece) for title in plan.titles for piece in pieces[title]), strict=True)
    chunks, steps_of = [], collections.defaultdict(list)
    for step, group in enumerate(_styles.gather(texts, iter(plan.targets).__next__)):
        chunk = "\n\n".join(texts[i] for i in group)
        chunks.append(_styles.passage(chunk, step, rng) if rng else chunk)
        for i in group:
            steps_of[owners[i]].append(step)
    questions = []
    for qa in plan.qas:
        steps = sorted({step for title in qa.titles for step in steps_of[title]})
        questions.append(Question(qa.question, (qa.answer,), "substring", tuple(steps), kind=qa.type))
    return _windows.Text(name, tuple(chunks), tuple(questions))
