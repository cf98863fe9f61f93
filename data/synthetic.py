"""Makes up seeded synthetic streams as they are asked for: people, places and projects over many days.

Facts are stated, changed, withdrawn and drowned in small talk; labeled examples follow a hidden rule; events
add up to a story. Stream i depends on (seed, split, i) only. The test split has names, values and wordings of
its own. How it is made: `_synthetic_story` decides what happens, `_synthetic_text` tells it in the words of
`_synthetic_words_*` and `_synthetic_talk`, `_synthetic_questions` asks.
"""

from __future__ import annotations

import dataclasses
import operator
import random

from finemem_jax.types import Chunk, Stream, StreamSource, StreamSpec

from . import _synthetic_questions as questions
from . import _synthetic_story as story_
from . import _synthetic_text as text

_MIN_CHUNK_WORDS = 30  # a heading, a speaker and one fact with a long wording


def load(spec: StreamSpec) -> StreamSource:
    """Returns `spec.num_streams` streams, each made when it is read.

    Raises:
        ValueError: the split is neither "train" nor "test", no number of streams is given, or a size is too small.
    """
    if spec.split not in ("train", "test"):
        raise ValueError(
            f"the synthetic source's split must be 'train' or 'test', got {spec.split!r}; it has no end, so there "
            "is no 'all' of it."
        )
    if spec.num_streams < 1:
        raise ValueError(
            f"data.num_{spec.split} must be at least 1 for the synthetic source, got {spec.num_streams}: "
            "a generator has no end of its own and needs a count."
        )
    least = {
        "chunks_per_stream": 1,
        "chunk_words": _MIN_CHUNK_WORDS,
        "questions_per_chunk": 0,
        "questions_per_stream": 0,
    }
    for field, minimum in least.items():
        value = getattr(spec, field)
        if value < minimum:
            raise ValueError(f"data.{field} must be at least {minimum} for synthetic streams, got {value}.")
    return SyntheticStreams(spec)


@dataclasses.dataclass(frozen=True)
class SyntheticStreams:
    """Gives random access to the streams of one spec."""

    spec: StreamSpec

    def __len__(self) -> int:
        return self.spec.num_streams

    def __getitem__(self, index: int) -> Stream:
        spec, index = self.spec, self._checked(index)
        story = self.story(index)
        said: set[str] = set()
        chunks = []
        for step in range(spec.chunks_per_stream):
            rng = self._rng(index, f"text {step}")
            told = text.tell(rng, story, step, chunk_words=spec.chunk_words, used=said)
            rng = self._rng(index, f"chunk questions {step}")
            asked = questions.chunk_questions(rng, story, step, limit=spec.questions_per_chunk)
            chunks.append(Chunk(told, asked))
        rng = self._rng(index, "global questions")
        asked = questions.global_questions(rng, story, spec.questions_per_stream)
        return Stream(f"{spec.split}-{index:06d}", "synthetic", tuple(chunks), asked, story.competency)

    def story(self, index: int) -> story_.Story:
        """Returns what happens in stream `index`: the ground truth behind its text and questions."""
        rng, spec = self._rng(self._checked(index), "story"), self.spec
        return story_.write(rng, spec.split, num_chunks=spec.chunks_per_stream, chunk_words=spec.chunk_words)

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"stream {index} of {len(self)}")
        return index

    def _rng(self, index: int, purpose: str) -> random.Random:
        """Returns a generator for one purpose of one stream, which another one's draws do not change."""
        # A string seeds by its bytes; hash() would differ between processes.
        return random.Random(f"synthetic/{self.spec.seed}/{self.spec.split}/{index}/{purpose}")
