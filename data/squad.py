"""Builds streams from SQuAD articles: a chunk is a paragraph, its questions are those that people asked about it.

Reads the official file ({"version", "data": [article, ...]}) and one article a line, in which answers may be plain
texts: {"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import re

from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _files, _styles, _text, _windows

NAME = "squad"
_KEYS = ("title", "paragraphs")
_LONGEST_ANSWER = 4  # In words; in style "memalpha".


@dataclasses.dataclass
class _Paragraph:
    context: str
    qas: dict[str, _Qa]  # by id


@dataclasses.dataclass(frozen=True)
class _Qa:
    question: str
    answers: tuple[str, ...]
    start: int | None  # where answers[0] stands in the context, if the file says so


def load(spec: StreamSpec) -> StreamSource:
    """Returns windows of consecutive paragraphs of one article.

    A paragraph longer than `spec.chunk_words` becomes several chunks, cut at sentence ends; short ones are not
    merged, so that a chunk keeps to one topic. Global questions prefer those that no chunk asks.

    In style "memalpha" paragraphs are gathered up to lengths drawn at random, each chunk is framed as a dialogue, and
    questions with answers of five words or more are left out (Mem-alpha counts tokens).

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, line and field).
    """
    _windows.check(spec)
    articles = _read(spec.source_dir)
    names = _windows.names_of_split(articles, spec.split, NAME)
    texts = [_cut(name, articles[name], spec.chunk_words) for name in names]
    if spec.style == "memalpha":
        texts = [_as_memalpha(text, spec) for text in texts]
    return _windows.Windows(texts, _windows.Origin(NAME, "AR", spec))


def _read(source_dir: str) -> dict[str, list[_Paragraph]]:
    """Returns the paragraphs of each article by its title.

    A paragraph that comes twice is kept once, where it stood first, with the questions of both. That holds across
    articles too: otherwise one text could get into both splits.
    """
    articles: dict[str, list[_Paragraph]] = collections.defaultdict(list)
    paragraphs: dict[str, _Paragraph] = {}
    for record in _files.read(source_dir, [_KEYS], "SQuAD"):
        title = record.text("title")
        for fields in record.records("paragraphs"):
            context = fields.text("context")
            if context not in paragraphs:
                paragraphs[context] = _Paragraph(context, {})
                articles[title].append(paragraphs[context])
            for qa in fields.records("qas"):
                question = qa.text("question")
                qa_id = qa.text("id") if "id" in qa.fields else question
                paragraphs[context].qas.setdefault(qa_id, _read_qa(qa, question, fields.fields["context"]))
    return articles


def _read_qa(qa: _files.Record, question: str, context: str) -> _Qa:
    """Reads the answers to a question, and where the first stands in the (unstripped) context."""
    answers, start = [], None
    for i, answer in enumerate(qa.items("answers")):
        if isinstance(answer, dict):
            official = _files.Record(answer, qa.where, f"{qa.path}answers[{i}].")
            text, offset = official.text("text"), answer.get("answer_start")
            # The offset counts from the unstripped context. A wrong one is worth no error: the answer is searched then.
            if i == 0 and isinstance(offset, int) and context.startswith(text, max(offset, 0)):
                start = offset - (len(context) - len(context.lstrip()))
        elif isinstance(answer, str) and answer.strip():
            text = answer.strip()
        else:
            raise qa.error(f"answers[{i}]", "a text that is not blank, or an object with 'text'", answer)
        answers.append(text)
    return _Qa(question, tuple(dict.fromkeys(answers)), start)


def _cut(name: str, paragraphs: list[_Paragraph], chunk_words: int) -> _windows.Text:
    """Cuts an article into chunks and places its questions."""
    chunks, questions, left_out = [], [], collections.Counter()
    for paragraph in paragraphs:
        spans = _text.pieces(paragraph.context, chunk_words)
        for qa in paragraph.qas.values():
            piece = _locate(qa, paragraph.context, spans) if qa.answers else None
            if piece is None:
                left_out["answer in no single chunk" if qa.answers else "no answer"] += 1
                continue
            steps = (len(chunks) + piece,)
            questions.append(Question(qa.question, qa.answers, "substring", steps, kind="paragraph"))
        chunks += [paragraph.context[slice(*span)] for span in spans]
    return _windows.Text(name, tuple(chunks), tuple(questions), left_out)


def _as_memalpha(text: _windows.Text, spec: StreamSpec) -> _windows.Text:
    """Gathers an article's chunks, and frames them."""
    rng = random.Random(f"{spec.seed}/{NAME}/{text.name}")
    groups = _styles.gather(text.chunks, lambda: _styles.target(spec.style, spec.chunk_words, rng))
    group_of = {step: number for number, group in enumerate(groups) for step in group}
    chunks = ("\n\n".join(text.chunks[step] for step in group) for group in groups)
    short = [question for question in text.questions if _text.num_words(question.answers[0]) <= _LONGEST_ANSWER]
    left_out = collections.Counter(text.left_out)
    if len(short) < len(text.questions):
        left_out["long answer"] += len(text.questions) - len(short)
    return _windows.Text(
        text.name,
        tuple(
            # A stream is a window, and its days begin anew.
            _styles.passage(chunk, number % spec.chunks_per_stream, rng)
            for number, chunk in enumerate(chunks)
        ),
        tuple(dataclasses.replace(question, gold_steps=(group_of[question.gold_steps[0]],)) for question in short),
        left_out,
    )


def _locate(qa: _Qa, context: str, spans: list[tuple[int, int]]) -> int | None:
    """Returns the piece of a paragraph in which the first answer stands, None if in none.

    In several? The file's offset decides; without it whole words come before parts of words ("10" in "2010"), then
    the piece that shares most words with the question.
    """
    answer = qa.answers[0]
    if qa.start is not None:
        end = qa.start + len(answer)
        return next((i for i, span in enumerate(spans) if span[0] <= qa.start and end <= span[1]), None)
    pieces = [context[slice(*span)].lower() for span in spans]
    holders = [i for i, piece in enumerate(pieces) if answer.lower() in piece]
    if len(holders) < 2:
        return holders[0] if holders else None
    whole = re.compile(rf"(?<!\w){re.escape(answer.lower())}(?!\w)")
    holders = [i for i in holders if whole.search(pieces[i])] or holders
    asked = _content_words(qa.question.lower())
    return max(holders, key=lambda i: len(asked & _content_words(pieces[i])))  # of equals, the first


def _content_words(text: str) -> set[str]:
    """Returns the words of at least four letters: shorter ones seldom say what a text is about."""
    return set(re.findall(r"\w{4,}", text))
