"""Builds streams of speeches with needles: sentences of our own that state invented facts, which are then asked for.

Reads speeches (plain text in UTF-8 or cp1252) from .txt files, also from those inside .zip archives, such as NLTK's
state_union.zip. Knows nothing of what the speeches say.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import pathlib
import random
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence

from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _files, _styles, _text, _windows

NAME = "needle"
_SUFFIXES = (".txt", ".zip")
_FORMATS = "speeches (plain text in .txt files, or in those inside .zip)"
# So begin labeled sentences, which also come as .txt: TREC ("DESC:manner How ...") and PubMed-RCT ("###24293578").
_LABELLED = re.compile(rb"\s*(?:[A-Z]+:\w+ \S|###\d)")
_NEEDLES_PER_CHUNK = (0, 1, 1, 2)  # drawn from; a chunk without any has nothing to remember
# What the answer is, the needle, the question.
_TEMPLATES = (
    ("code", "The access code of the {name} archive is {value}.", "What is the access code of the {name} archive?"),
    ("code", "Locker {value} belongs to the {name} rowing club.", "Which locker belongs to the {name} rowing club?"),
    (
        "town",
        "The {name} expedition set out from the town of {value}.",
        "Where did the {name} expedition set out?",
    ),
    ("town", "The {name} bell was cast in the town of {value}.", "In which town was the {name} bell cast?"),
    ("date", "The {name} charter was signed on {value}.", "On what date was the {name} charter signed?"),
    ("date", "The {name} observatory was opened on {value}.", "On what date was the {name} observatory opened?"),
    ("color", "The doors of the {name} library are painted {value}.", "What colour are the {name} library's doors?"),
    ("color", "The flag of the {name} regatta is {value}.", "What colour is the flag of the {name} regatta?"),
)
_LONGEST_NEEDLE = max(len(needle.split()) for _, needle, _ in _TEMPLATES) + 2  # a date has three words
_MONTHS = ("January", "February", "April", "June", "July", "August", "October", "December")
# Stems and endings make the names of things and towns, shades and colors make colors.
_WORDS: dict[str, tuple[str, ...]] = {
    "train": (
        "Varn Quell Dorm Hask Brin Tolv Marr Osk Fenn Grath Lusk Pell Sarn Wend Yarr Corv Ebb Nolt",
        "holt mere wick stead grove dale fold minster lund croft haven tarn",
        "pale dark dusty bright smoky",
        "teal ochre crimson indigo ivory maroon turquoise lilac",
    ),
    "test": (
        "Zeph Kord Ulm Jask Thrim Bael Rusk Ivar Dren Omb Vell Skarn Aldr Pryn Hoth Lorv Ketch Meld",
        "burgh ness thorpe combe shaw bridge gate moor cliffe ford ridge well",
        "faded deep soft glossy milky",
        "amber violet scarlet beige olive magenta copper lavender",
    ),
}
_WORDS["all"] = tuple(map(" ".join, zip(*_WORDS.values(), strict=True)))


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams of the speeches of a split, one after the other, with a needle in a chunk on average.

    A needle stands before, between or after the sentences of its chunk. No name and no value occurs twice in a stream,
    or in its speeches. The needles of train and test share no name, town or color.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken.
    """
    _windows.check(spec)
    if spec.chunk_words <= _LONGEST_NEEDLE:
        least = _LONGEST_NEEDLE + 1
        raise ValueError(f"data.chunk_words must be at least {least} (a needle and a word), got {spec.chunk_words}.")
    speeches = _read(spec.source_dir)
    names = set(_windows.names_of_split(speeches, spec.split, NAME))
    filler = "\n\n".join(speech for name, speech in speeches.items() if name in names)
    parts = list(enumerate(_text.pieces(filler, spec.chunks_per_stream * spec.chunk_words)))
    random.Random(f"{spec.seed}/order").shuffle(parts)

    def make(stream: int) -> _windows.Text:
        number, span = parts[stream]
        return _make(f"{number:05d}", filler[slice(*span)], spec)

    return _windows.Made(len(parts), make, _windows.Origin(NAME, "AR", spec))


def _read(source_dir: str) -> dict[str, str]:
    """Returns the speeches in the order of their files, each under its words in one line, so that copies count once."""
    speeches: dict[str, str] = {}
    paths = _files.find(source_dir, _SUFFIXES, _FORMATS)
    for path in paths:
        for where, content in _contents(path):
            if content.strip() and not _LABELLED.match(content):
                text = _decode(content, where)
                speeches.setdefault(_text.one_line(text), text.strip())
    if not speeches:
        raise _files.none_found(source_dir, _FORMATS, len(paths))
    return speeches


def _contents(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields where it stands and the content of each text file: the file itself, or those in the archive."""
    if path.suffix.lower() != ".zip":
        yield str(path), path.read_bytes()
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                is_hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
                if name.lower().endswith(".txt") and not is_hidden:
                    yield f"{path}/{name}", archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path}: the zip file is truncated, damaged or encrypted ({error}). Fetch or pack it anew, or move the "
            "file out of data.source_dir if it is no data."
        ) from error


def _decode(content: bytes, where: str) -> str:
    """Decodes a text that may be in UTF-8 or in cp1252; nearly all bytes are some text in the latter."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:  # UTF-16 has them
            return text
    raise ValueError(
        f"{where}: neither UTF-8 nor cp1252. Convert the file to UTF-8, or move it out of data.source_dir if no data."
    )


def _make(name: str, filler: str, spec: StreamSpec) -> _windows.Text:
    """Fills the chunks of a stream with sentences of `filler`, and puts needles between them."""
    rng = random.Random(f"{spec.seed}/{name}/needles")
    filler += " "  # A needle may follow.
    # Every chunk has room for a sentence and a needle; a longer sentence is cut.
    starts = [start for start, _ in _text.sentences(filler, spec.chunk_words - _LONGEST_NEEDLE)]
    ends = (*starts[1:], None)
    sentences = collections.deque(filler[start:end] for start, end in zip(starts, ends, strict=True))
    fewest_chunks = math.ceil(_text.num_words(filler) / spec.chunk_words)
    sure = rng.randrange(min(spec.chunks_per_stream, fewest_chunks))  # this chunk has a needle
    needles = _needles(filler, _WORDS[spec.split], rng)
    chunks, questions = [], []
    while sentences and len(chunks) < spec.chunks_per_stream:
        step = len(chunks)
        most = (spec.chunk_words - _text.num_words(sentences[0])) // _LONGEST_NEEDLE
        count = min(most, max(rng.choice(_NEEDLES_PER_CHUNK), step == sure))
        texts, target = [], _styles.target(spec.style, spec.chunk_words, rng)
        drawn = list(itertools.islice(needles, count))
        used = sum(_text.num_words(needle) for needle, _ in drawn)
        while sentences and used + _text.num_words(sentences[0]) <= (target if texts else spec.chunk_words):
            texts.append(sentences.popleft())
            used += _text.num_words(texts[-1])
        for needle, question in drawn:
            texts.insert(rng.randint(0, len(texts)), f"{needle} ")
            questions.append(dataclasses.replace(question, gold_steps=(step,)))
        chunk = "".join(texts).strip()
        chunks.append(_styles.passage(chunk, step, rng) if spec.style == "memalpha" else chunk)
    return _windows.Text(name, tuple(chunks), tuple(questions))


def _needles(filler: str, words: Sequence[str], rng: random.Random) -> Iterator[tuple[str, Question]]:
    """Yields needles of which no name or value stands in the filler, until the names run out."""
    known = set(re.findall(r"\w+", filler.lower()))

    def fresh(values: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
        # All words of a value, wherever they stand: stricter than needed, but fast.
        values = [
            forms for forms in dict.fromkeys(values) if not known.issuperset(re.findall(r"\w+", forms[0].lower()))
        ]
        return rng.sample(values, len(values))

    stems, endings, shades, colors = (part.split() for part in words)
    names = fresh((stem + ending,) for stem in stems for ending in endings)
    dates = [(rng.randint(1, 28), rng.choice(_MONTHS), rng.randint(1850, 1999)) for _ in names]
    values_of = {
        "code": fresh((str(code),) for code in rng.sample(range(10_000, 100_000), 2 * len(names))),
        "town": names,
        "date": fresh((f"{day} {month} {year}", f"{month} {day}, {year}") for day, month, year in dates),
        "color": fresh((f"{shade} {color}",) for shade in shades for color in colors),
    }
    while len(names) > 1:
        kind, needle, question = rng.choice([template for template in _TEMPLATES if values_of[template[0]]])
        (name,), answers = names.pop(), values_of[kind].pop()
        asked = Question(question.format(name=name), answers, "substring", kind="needle")
        yield needle.format(name=name, value=answers[0]), asked
