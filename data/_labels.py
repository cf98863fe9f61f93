"""Builds streams that teach a labeling by examples: sentences are shown with the numbers of their labels.

What a number stands for is never said. Chunks are asked about sentences that they show, streams about others. Knows
nothing of files.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _styles, _text, _windows

_NUM_PARTS = 5  # One part of all sentences is the test split; one part of a split is not shown in a stream.
_NOUNS = ("Sentence", "Label")
_REQUEST = "Answer with \\boxed{n}, where n is the number of the label."
_FRAME_WORDS = 3  # both nouns and the number


class Example(NamedTuple):
    """A sentence with its label."""

    text: str
    label: str
    unit: str  # What is never divided, neither by the split nor into shown and asked: its abstract, or itself.
    place: int = 0  # in its unit


def source(
    name: str, examples: Iterable[Example], spec: StreamSpec, *, nouns: Sequence[str] = _NOUNS, in_units: bool = False
) -> StreamSource:
    """Returns streams of examples, each drawn from the whole split by a seed of its own.

    Labels are numbered from 0 by name, all that occur in the folder. The split of a unit depends on a hash of its name
    alone. A sentence that comes twice counts once (case and white space aside). `left_out` counts those with two labels
    (once for each) or more words than a chunk. With `num_streams` 0 there are as many streams as would show the split
    once: the words of all its pairs over chunks_per_stream × chunk_words, rounded up.

    Args:
        nouns: What sentence and label are called.
        in_units: Whether to `_gather` whole units; else to `_spread` single examples.

    Raises:
        ValueError: fewer than two labels of the split come in two units: one to show, one to ask about.
    """
    pool, numbers, left_out = _of_split(name, examples, spec)
    groups = collections.defaultdict(list)
    for example in pool:
        groups[example.unit if in_units else example.label].append(example)
    groups = list(groups.values())
    choices = tuple(map(str, numbers.values()))
    instruction = f"Which label has this {nouns[0].lower()}? {_REQUEST}"  # Memories are searched without it.

    def ask(example: Example, steps: tuple[int, ...] = (), prefix: str = "") -> Question:
        answers, kind = (choices[numbers[example.label]],), prefix + example.label
        return Question(f"{nouns[0]}: {example.text}", answers, "boxed", steps, kind, choices, instruction)

    def make(stream: int) -> _windows.Text:
        rng = random.Random(f"{spec.seed}/{name}/{spec.split}/{stream}")
        chunks = _gather(groups, spec, rng) if in_units else _spread(groups, pool, spec=spec, rng=rng)
        shown = list(itertools.chain(*chunks))
        units, labels = {example.unit for example in shown}, {example.label for example in shown}
        others = (e for e in _in_random_order(pool, rng) if e.unit not in units and e.label in labels)
        texts = ["\n\n".join(f"{nouns[0]}: {e.text}\n{nouns[1]}: {numbers[e.label]}" for e in c) for c in chunks]
        if spec.style == "memalpha":
            texts = [_styles.examples(text, step, rng) for step, text in enumerate(texts)]
        return _windows.Text(
            name=f"{stream:05d}",
            chunks=tuple(texts),
            questions=tuple(map(ask, itertools.islice(others, spec.questions_per_stream))),
            chunk_questions=tuple(tuple(ask(e, (step,), "shown:") for e in c) for step, c in enumerate(chunks)),
        )

    fill = math.ceil(sum(map(_num_words, pool)) / (spec.chunks_per_stream * spec.chunk_words))
    return _windows.Made(spec.num_streams or fill, make, _windows.Origin(name, "TTL", spec), left_out=left_out)


def _of_split(
    name: str, examples: Iterable[Example], spec: StreamSpec
) -> tuple[list[Example], dict[str, int], collections.Counter[str]]:
    """Returns the examples of the split, the numbers of all labels, and the counts of what is left out."""
    examples = [e._replace(text=_text.one_line(e.text), label=_text.one_line(e.label)) for e in examples]
    unique: dict[tuple[bytes, str], Example] = {}
    # In the order of hashes, for that of the files must not matter.
    for example in sorted(examples, key=lambda e: (_digest(e.unit), e.place, e.text)):
        unique.setdefault((_digest(example.text), example.label), example)
    num_labels = collections.Counter(digest for digest, _ in unique)
    numbers = {label: number for number, label in enumerate(sorted({label for _, label in unique}))}

    pool, left_out = [], collections.Counter()
    for (digest, _), example in unique.items():
        split = "train" if int.from_bytes(_digest(example.unit)[:8], "big") % _NUM_PARTS else "test"
        if spec.split not in (split, "all"):
            continue
        if num_labels[digest] > 1:
            left_out["two labels"] += 1
        elif _num_words(example) > spec.chunk_words:
            left_out["longer than a chunk"] += 1
        else:
            pool.append(example)
    num_units = collections.Counter(label for label, _ in {(example.label, example.unit) for example in pool})
    num_usable = sum(number > 1 for number in num_units.values())
    if num_usable < 2:
        raise ValueError(
            f"Split {spec.split!r} of source {name!r} needs two labels with two sentences each (of two abstracts, if "
            f"there are any), and has {num_usable} in {len(pool)} sentences; left out: {dict(left_out) or 'none'}. Add "
            "sentences to data.source_dir, raise data.chunk_words, or use another split."
        )
    return pool, numbers, left_out


def _digest(text: str) -> bytes:
    """Returns a hash that case and white space do not change."""
    return hashlib.sha256(_text.one_line(text.casefold()).encode()).digest()


def _num_words(example: Example) -> int:
    return _text.num_words(example.text) + _FRAME_WORDS


def _spread(
    by_label: Sequence[Sequence[Example]], pool: Sequence[Example], *, spec: StreamSpec, rng: random.Random
) -> list[list[Example]]:
    """Fills the chunks with an example of each label, then evenly with any.

    The first ones go into chunk 1, and where it is full, on into the next; a label that fits nowhere is not shown. Each
    further one goes where most room is.
    """
    chunks: list[list[Example]] = [[] for _ in range(spec.chunks_per_stream)]
    room = [spec.chunk_words] * len(chunks)
    most = len(pool) - math.ceil(len(pool) / _NUM_PARTS)
    first = [rng.choice(examples) for examples in by_label]
    rng.shuffle(first)
    shown = set()
    for n, example in enumerate(itertools.chain(first, _in_random_order(pool, rng))):
        fits = [step for step, words in enumerate(room) if _num_words(example) <= words]
        if len(shown) == most or (n >= len(first) and not fits):
            break
        if fits and example not in shown:
            step = fits[0] if n < len(first) else max(fits, key=room.__getitem__)
            chunks[step].append(example)
            room[step] -= _num_words(example)
            shown.add(example)
    return [chunk for chunk in chunks if chunk]


def _gather(by_unit: Sequence[Sequence[Example]], spec: StreamSpec, rng: random.Random) -> list[list[Example]]:
    """Fills the chunks in turn, each up to `_styles.target`, with whole units, which the end of a chunk may cut."""
    chunks: list[list[Example]] = []
    room = 0
    most = len(by_unit) - math.ceil(len(by_unit) / _NUM_PARTS)
    for example in itertools.chain.from_iterable(itertools.islice(_in_random_order(by_unit, rng), most)):
        if not chunks or _num_words(example) > room:
            if len(chunks) == spec.chunks_per_stream:
                break
            chunks.append([])
            room = _styles.target(spec.style, spec.chunk_words, rng)
        chunks[-1].append(example)
        room -= _num_words(example)
    return chunks


def _in_random_order(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """Yields each item once, and draws no more than is asked for: there may be millions."""
    # Fisher and Yates's shuffle, whose swaps are kept in a dict, as most of the items are never reached.
    # https://en.wikipedia.org/wiki/Fisher-Yates_shuffle
    moved: dict[int, int] = {}
    for i in range(len(items)):
        j = rng.randrange(i, len(items))
        yield items[moved.get(j, j)]
        moved[j] = moved.get(i, i)
