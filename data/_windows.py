"""Makes streams of long texts that are cut into chunks: the split, the windows, and the draw of the questions.

A text is an article, a conversation, a book. Knows nothing of files.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from finemem_jax.reading import dataset_metrics
from finemem_jax.types import Chunk, Question, Stream, StreamSpec

from . import _chunking, _styles

_TEST_FRACTION = 0.2
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What all streams of a builder have in common.

    Attributes:
        source: `Stream.source`, as a rule the builder's name.
        competency: `Stream.competency`.
        spec: How the builder was asked.
    """

    source: str
    competency: str
    spec: StreamSpec


@dataclasses.dataclass(frozen=True)
class Text:
    """A whole text: its chunks in order and the questions about it.

    Attributes:
        name: Unique within the source.
        chunks: The texts of the chunks.
        questions: `gold_steps` holds indices into `chunks`, ascending; of `Windows` at least one.
        left_out: How many questions could not be used, by reason.
        chunk_questions: For each chunk further questions, which are asked of that chunk alone; () for none.
    """

    name: str
    chunks: tuple[str, ...]
    questions: tuple[Question, ...]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chunk_questions: tuple[tuple[Question, ...], ...] = ()


def check(spec: StreamSpec) -> None:
    """Raises ValueError for a spec that no source could serve."""
    if spec.split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {spec.split!r}; use one of these.")
    choices = {"style": _styles.STYLES, "chunking": _chunking.CHUNKINGS, "rules": dataset_metrics.RULES}
    for field, known in choices.items():
        if getattr(spec, field) not in known:
            raise ValueError(f"data.{field} must be one of {', '.join(known)}, got {getattr(spec, field)!r}.")
    least = {
        "num_streams": 0,
        "chunks_per_stream": 1,
        "chunk_words": 1,
        "questions_per_chunk": 0,
        "questions_per_stream": 0,
    }
    for field, smallest in least.items():
        if getattr(spec, field) < smallest:
            raise ValueError(
                f"data.{field} must be at least {smallest}, got {getattr(spec, field)}; raise it to {smallest} or more."
            )


def names_of_split(names: Collection[str], split: str, source: str) -> list[str]:
    """Returns the names of the texts that belong to a split, sorted.

    The names are ordered by their SHA-256, and the first fifth (rounded up) is the test split: the same texts
    on every machine, for every seed, and one on either side as soon as there are two. Other texts in the folder
    shift the border, so a held-out set is better kept in a folder of its own.

    Raises:
        ValueError: the split is empty.
    """
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    num_test = math.ceil(_TEST_FRACTION * len(by_hash))
    chosen = {"test": by_hash[:num_test], "train": by_hash[num_test:], "all": by_hash}[split]
    if not chosen:
        other = "train" if split == "test" else "test"
        raise ValueError(
            f"Split {split!r} of source {source!r} is empty: data.source_dir holds {len(by_hash)} text(s), and a text "
            f"is never shared by two splits. Add texts to data.source_dir, or use split {other!r}."
        )
    return sorted(chosen)


def interleave(groups: Iterable[Iterable[Item]], rng: random.Random) -> list[Item]:
    """Shuffles groups and their items, and takes one item of each group in turn: few items then cover many groups."""
    turns = [list(group) for group in groups]
    for items in (*turns, turns):
        rng.shuffle(items)
    return [item for turn in itertools.zip_longest(*turns) for item in turn if item is not None]


class Windows:
    """Cuts texts into streams, windows of consecutive chunks; a `StreamSource`.

    Windows do not overlap; the last one of a text may be shorter. One without any question is skipped. The
    order is seeded and takes one window of each text in turn, so that few streams still cover many texts.
    Questions are drawn when a stream is asked for, from a seed that depends on the stream alone.

    Attributes:
        left_out: How many questions of these texts can never be asked, by reason.
    """

    def __init__(self, texts: Sequence[Text], origin: Origin):
        """Cuts the texts; raises ValueError if no window of any has a question."""
        self._origin, spec = origin, origin.spec
        self.left_out: collections.Counter[str] = collections.Counter()
        for text in texts:
            self.left_out.update(text.left_out)
        windows = interleave(map(self._windows_of, texts), random.Random(f"{spec.seed}/order"))
        if not windows:
            raise ValueError(
                f"Source {origin.source!r}, split {spec.split!r}: no stream has a question. Add texts with answered "
                "questions to data.source_dir, or raise data.chunk_words and data.chunks_per_stream."
            )
        self._windows = windows[: spec.num_streams or None]
        _log(origin, len(self._windows), self.left_out)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Stream:
        text, start, questions = self._windows[index]
        chunks = text.chunks[start : start + self._origin.spec.chunks_per_stream]
        return draw_stream(Text(f"{text.name}/{start:04d}", chunks, questions), self._origin)

    def _windows_of(self, text: Text) -> list[tuple[Text, int, tuple[Question, ...]]]:
        """Returns (text, first chunk, the questions that this window can answer) for each window with a question."""
        length = self._origin.spec.chunks_per_stream
        questions_of = collections.defaultdict(list)
        for question in text.questions:
            start = question.gold_steps[0] // length * length
            if question.gold_steps[-1] < start + length:
                steps = tuple(step - start for step in question.gold_steps)
                questions_of[start].append(dataclasses.replace(question, gold_steps=steps))
            else:
                self.left_out["evidence in two streams"] += 1
        return [(text, start, tuple(questions_of[start])) for start in sorted(questions_of)]


class Made:
    """Makes streams one by one when they are asked for, each from a seed of its own; a `StreamSource`.

    For sources that are no long texts but pools: of examples, of articles, of facts. A text here is one stream.

    Attributes:
        left_out: How many questions can never be asked, by reason.
    """

    def __init__(
        self, count: int, make: Callable[[int], Text], origin: Origin, *, left_out: Mapping[str, int] | None = None
    ):
        """Makes nothing yet.

        Args:
            count: How many streams can be made; `StreamSpec.num_streams` may ask for fewer.
            make: Makes stream number n, the same one for the same n; its seed is the builder's business.
            origin: What the streams have in common.
            left_out: How many questions can never be asked, by reason.
        """
        self._make, self._origin = make, origin
        self._count = min(count, origin.spec.num_streams or count)
        self.left_out: collections.Counter[str] = collections.Counter(left_out)
        _log(origin, self._count, self.left_out)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Stream:
        if not 0 <= index < self._count:
            raise IndexError(f"stream {index} of {self._count}")
        return draw_stream(self._make(index), self._origin)


def _log(origin: Origin, num_streams: int, left_out: Mapping[str, int]) -> None:
    message = "Source %s, split %s: %d streams; questions left out: %s."
    values = (origin.source, origin.spec.split, num_streams, dict(left_out) or "none")
    logging.getLogger(__name__).info(message, *values)


def draw_stream(text: Text, origin: Origin) -> Stream:
    """Makes a stream of a whole text, and draws its questions, from a seed that depends on its name alone.

    A chunk is asked the questions that it alone answers, and its own (`Text.chunk_questions`). Of the others, those
    over several chunks or of no certain one come first, then those that no chunk is asked.
    """
    spec = origin.spec
    rng = random.Random(f"{spec.seed}/{text.name}")
    questions, numbers = text.questions, range(len(text.questions))
    of_chunk = [
        _draw(rng, [[n for n in numbers if questions[n].gold_steps == (step,)]], spec.questions_per_chunk)
        for step in range(len(text.chunks))
    ]
    asked = set(itertools.chain(*of_chunk))
    over_chunks = [n for n in numbers if len(questions[n].gold_steps) != 1]
    fresh = [n for n in numbers if len(questions[n].gold_steps) == 1 and n not in asked]
    of_stream = _draw(rng, [over_chunks, fresh, sorted(asked)], spec.questions_per_stream)
    chunks = []
    for step, (chunk, drawn) in enumerate(zip(text.chunks, of_chunk, strict=True)):
        own = text.chunk_questions[step] if text.chunk_questions else ()
        extra = _draw(rng, [range(len(own))], spec.questions_per_chunk - len(drawn))
        chunks.append(Chunk(chunk, (*(questions[n] for n in drawn), *(own[n] for n in extra))))
    return Stream(
        stream_id=text.name,
        source=origin.source,
        chunks=tuple(chunks),
        questions=tuple(questions[n] for n in of_stream),
        competency=origin.competency,
    )


def _draw(rng: random.Random, preferences: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Draws at most `limit` numbers, from a later list only when the earlier ones are used up; returns them sorted."""
    drawn: list[int] = []
    for numbers in preferences:
        drawn += rng.sample(numbers, min(len(numbers), limit - len(drawn)))
    return sorted(drawn)


def groups_of(keys_of: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Puts units that share a key, directly or through others, into one group; returns each unit's group."""
    # The connected components of a graph in which two units that share a key are neighbors; a group is called by the
    # first of its units.
    holders = collections.defaultdict(list)
    for unit, keys in keys_of.items():
        for key in keys:
            holders[key].append(unit)
    group_of: dict[str, str] = {}
    for first in sorted(keys_of):
        found = [first]
        while found:
            unit = found.pop()
            if unit not in group_of:
                group_of[unit] = first
                for key in keys_of[unit]:
                    found += holders.pop(key, ())
    return group_of
