"""Builds streams from a folder of your own: texts (.txt, .md, .jsonl, .json) and chats, with or without questions.

A .txt or .md is one text. In .json and .jsonl, each record with a "text" is one, and each conversation (`_chats` says
in which forms); lines that are single turns are one conversation. A text's questions stand in its record's "questions",
or a line each in NAME.questions.jsonl beside NAME.txt: {"question", "answer" or "answers", "metric"}.
Knows nothing of styles: it shows texts as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import random
import re

from finemem_jax.reading import scoring
from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _chats, _chunking, _files, _growing, _text, _windows

NAME = "texts"
_SUFFIXES = (".txt", ".md", ".jsonl", ".json")
_QUESTIONS = ".questions.jsonl"
_FORMATS = f"texts or chats ({', '.join(_SUFFIXES)})"
_LONGEST_WORD = 10_000  # in characters; what is longer is no text but, say, a picture written in letters
_BLOCK = 1_000_000  # characters; cutting takes about thirty times a block's size in memory


@dataclasses.dataclass
class _Own:
    """A text of the user's, plain or the turns of a chat, with its questions."""

    name: str
    where: str
    content: str | list[_chats.Turn]
    questions: list[Question]


follow, Waiting = _growing.follow, _growing.Waiting  # What --mode=follow reads with.


def load(spec: StreamSpec) -> StreamSource:
    """Returns windows of `spec.chunks_per_stream` chunks of each text, also those without any question.

    Texts are cut as `spec.chunking` says: by default at the ends of paragraphs and sentences. Chats are cut between
    turns, which stand under their date, into chunks of at most `spec.chunk_words` words. A question is asked of the one
    chunk that holds its first answer. If several do or none does, it is asked at the end of the text's last stream.
    The split depends on the texts, not on the names of their files.

    Raises:
        ValueError: the spec cannot be served, there is no text, or a file is broken (with file and line).
    """
    _windows.check(spec)
    texts = _read(spec.source_dir)
    names = _windows.names_of_split(texts, spec.split, NAME)
    by_text = [_windows_of(texts[name], spec) for name in names]
    windows = _windows.interleave(by_text, random.Random(f"{spec.seed}/order"))
    return _windows.Made(len(windows), windows.__getitem__, _windows.Origin(NAME, "", spec))


def _windows_of(own: _Own, spec: StreamSpec) -> list[_windows.Text]:
    """Cuts a text into streams, and asks each question of the stream, and of the chunk, that holds its answer."""
    chunks = _chunks(own, spec)
    length = spec.chunks_per_stream
    starts = range(0, len(chunks), length)
    asked: dict[int, list[Question]] = {start: [] for start in starts}
    plain = [_comparable(chunk) for chunk in chunks] if own.questions else []
    for question in own.questions:
        answer = re.compile(rf"(?<!\w){re.escape(_comparable(question.answers[0]))}(?!\w)")
        steps = [step for step, chunk in enumerate(plain) if answer.search(chunk)]
        start = steps[0] // length * length if len(steps) == 1 else starts[-1]
        placed = (steps[0] - start,) if len(steps) == 1 else ()
        asked[start].append(dataclasses.replace(question, gold_steps=placed))
    parts = {start: tuple(chunks[start : start + length]) for start in starts}
    return [_windows.Text(f"{own.name}/{start:04d}", parts[start], tuple(asked[start])) for start in starts]


def _comparable(text: str) -> str:
    return _text.one_line(text.lower())


def _chunks(own: _Own, spec: StreamSpec) -> list[str]:
    """Cuts a text as `spec.chunking` says, a chat between its turns."""
    if isinstance(own.content, str):
        # Blocks end between words, of which none is long.
        blocks = re.findall(rf"(?s)\S.{{0,{_BLOCK}}}(?!\S)", own.content)
        spans = ((block, _chunking.cut(block, spec.chunk_words, spec.chunking)) for block in blocks)
        return [block[start:end] for block, found in spans for start, end in found]
    turns = ((date and f"Date: {date}", speaker and f"{speaker}:", said) for date, speaker, said in own.content)
    lines = _chats.cut(turns, spec.chunk_words, own.where)
    return [_chats.shown(chunk) for chunk in _chats.pack(lines, spec.chunk_words)]


def _read(source_dir: str) -> dict[str, _Own]:
    """Returns the texts by a digest of what they say; one that comes twice is kept once, with the questions of both."""
    found = _files.find(source_dir, _SUFFIXES, _FORMATS)
    paths = [path for path in found if not path.name.lower().endswith(_QUESTIONS)]
    beside = {path.with_suffix("").with_suffix(""): path for path in found if path not in set(paths)}
    texts: dict[str, _Own] = {}
    names: set[str] = set()
    for path in paths:
        read = _plain if path.suffix.lower() in (".txt", ".md") else _json
        of_file = [own for own in read(path) if own.content]
        if asked := beside.pop(path.with_suffix(""), None):
            if len(of_file) != 1:
                unclear = f"{path.name} holds {len(of_file)} texts, so it is not clear which one is asked about"
                raise ValueError(f'{asked}: {unclear}. Put questions into the field "questions" of its records.')
            of_file[0].questions += _questions_file(asked)
        for own in of_file:
            _check_words(own)
            known = texts.setdefault(hashlib.sha256(json.dumps(own.content).encode()).hexdigest(), own)
            if known is not own:
                known.questions += [question for question in own.questions if question not in known.questions]
                continue
            place = own.where.replace(str(path), path.relative_to(source_dir).as_posix())
            own.name = own.name or place
            own.name += f" ({place})" if own.name in names else ""
            names.add(own.name)
    for asked in beside.values():
        raise ValueError(f"{asked}: the text that is asked about is not beside it. Give it the name of the text.")
    if not texts:
        raise _files.none_found(source_dir, _FORMATS, len(paths))
    return texts


def _plain(path: pathlib.Path) -> list[_Own]:
    """Reads a .txt or .md: a text, or a chat that WhatsApp exported."""
    size, most = path.stat().st_size, _files.MAX_LINE_BYTES
    if size > most:
        raise _refusal(f"{path}: {size:,} bytes, more than the {most:,} that are read. Cut it into several files")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _refusal(f"{path}, byte {error.start}: not UTF-8. Convert the file to UTF-8") from error
    if "\0" in text:
        raise _refusal(f"{path}, byte {raw.index(0)}: a zero, which no text has. Save it as plain text in UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return [_Own("", str(path), _chats.whatsapp(text) or text, [])]


def _refusal(problem: str) -> ValueError:
    return ValueError(f"{problem}, or move it out of data.source_dir if it is no text.")


def _json(path: pathlib.Path) -> list[_Own]:
    """Reads a .json or .jsonl: a text or a chat a record, or turns of one chat; nothing if it is of another format."""
    texts, turns = [], []
    with contextlib.closing(_files.values(path, ("text",))) as values:
        for number, (value, where) in enumerate(values):
            record = _files.Record(value if isinstance(value, dict) else {}, where)
            content = _chats.conversation(record)
            if content is not None:
                name, content = content
            elif _chats.is_turn(record):
                turns.append(_chats.turn(record))
                continue
            elif "text" in record.fields:
                name = next((str(record.fields[key]) for key in ("id", "title") if record.fields.get(key)), "")
                content = record.text("text", may_be_empty=True)
            elif number == 0:
                return []  # another format
            else:
                raise ValueError(f"{where}: expected a text or a chat, as before it. Correct the record, or remove it.")
            questions = record.records("questions") if "questions" in record.fields else []
            texts.append(_Own(name, where, content, [_question(question) for question in questions]))
    return [*texts, _Own("", str(path), [turn for turn in turns if turn.text], [])]


def _check_words(own: _Own) -> None:
    """Raises ValueError for a text in which so much stands without a space that it is no text."""
    for text in [own.content] if isinstance(own.content, str) else [turn.text for turn in own.content]:
        if len(text) > _LONGEST_WORD and (word := re.search(rf"(?<!\S)\S{{{_LONGEST_WORD + 1}}}", text)):
            shown = f"{own.where}: {word[0][:20]!r}… has no space for more than {_LONGEST_WORD:,} characters"
            raise ValueError(f"{shown}, and chunks are cut at spaces. Put some in, or take it out if it is no text.")


def _questions_file(path: pathlib.Path) -> list[Question]:
    with contextlib.closing(_files.values(path, ("question",))) as values:
        return [_question(_files.Record(value if isinstance(value, dict) else {}, where)) for value, where in values]


def _question(record: _files.Record) -> Question:
    """Reads a question of the user's, and checks that it has an answer and a known metric."""
    key = "answers" if "answers" in record.fields else "answer"
    answers = record.fields.get(key)
    answers = answers if isinstance(answers, list) else [answers]
    usable = [str(answer).strip() for answer in answers if type(answer) in (str, int, float)]
    if not usable or len(usable) < len(answers) or "" in usable:
        raise record.error(key, "a text, or a list of texts, none of them blank")
    metric = record.text("metric") if "metric" in record.fields else "substring"
    if metric not in (known := (*scoring.METRICS, *scoring.JUDGED)):
        raise record.error("metric", f"one of {', '.join(known)}")
    return Question(record.text("question"), tuple(dict.fromkeys(usable)), metric)
