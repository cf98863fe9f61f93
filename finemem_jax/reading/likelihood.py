"""Computes how likely the frozen model finds the gold answers, given the evidence. Nothing is generated.

With prompt x of a question and its evidence, and gold answer y of L tokens (the end of the turn is one of them):

    ℓ = (1/L) Σ_i log π(y_i | x, y_<i)          p = exp ℓ
    c = π(y | x) / Σ_{y' in choices} π(y' | x)    where the possible answers are known
    e = 1[argmax π(· | x, y_<i) = y_i for all i]

e is what greedy decoding would answer: by induction over i, it gives y exactly where every argmax matches. All of it
comes from one forward pass over the prompt and its gold answers, which share the prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from finemem_jax.models.kv_cache import Packed
from finemem_jax.models.tokenizer import EncodedChat, Tokenizer
from finemem_jax.reading.reader import LikelihoodQuery, Query
from finemem_jax.runtime import compilation
from finemem_jax.sampling.decode import Targets
from finemem_jax.sampling.engine import Engine, SharedPrefix, targets_in
from finemem_jax.types import Likelihood

# ℓ of a gold answer that is blank, which no answer matches (nats).
LEAST_LOG_PROB = -100.0
# Rows have 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … times so many tokens: padding takes as long as text.
_UNIT = 16


@dataclasses.dataclass
class LikelihoodStats:
    """Counts since the last `Likelihoods.take_stats`.

    Attributes:
        claims: Queries handed in.
        tokens, padded_tokens: That were computed, and the same with the padding of rows and lengths.
    """

    claims: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Row:
    """A query in token ids: the prompt after its shared prefix, then every answer with an end of its own."""

    request_id: int
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    num_golds: int
    num_choices: int

    @property
    def length(self) -> int:
        # What follows an answer's last token is its end, which nothing needs to see.
        return len(self.prompt) + sum(map(len, self.answers))


class Likelihoods:
    """A worker that computes likelihoods, rows of like length together.

    Attributes:
        stats: See `take_stats`.
        poll: Called before anything is computed. Where it returns True, nothing is; it may raise.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Tokenizer,
        prompt: Callable[[Query], EncodedChat],
        *,
        tokens_together: int,
        max_length: int,
    ):
        """Computes nothing yet.

        Args:
            engine: The frozen model's; its weights must not change.
            prompt: What the model is asked.
            tokens_together: How many are computed in a call.
            max_length: The longest prompt with all its answers that the model takes, in tokens.
        """
        self._engine, self._tokens, self._prompt = engine, tokens, prompt
        self._together, self._max_length = tokens_together, max_length
        self.stats = LikelihoodStats()
        self.poll: Callable[[], bool | None] = lambda: None
        self._last_id = 0
        self._shared_prefixes: dict[tuple[int, ...], SharedPrefix] = {}
        self._waiting: dict[tuple[int, ...], dict[int, _Row]] = {}
        self._done: list[tuple[int, Likelihood]] = []

    def warm_up(self, shared_prefix: int, longest: int, say: Callable[[int, int], None]) -> None:
        """Compiles all that queries of a size can need.

        Args:
            shared_prefix: Tokens of the longest shared prefix.
            longest: Tokens beyond it, of prompt and answers.
            say: See `Engine.warm_up`.
        """
        lengths = sorted({_length(length) for length in compilation.buckets_up_to(longest, _UNIT)})
        self._engine.warm_up_teacher(shared_prefix, [(self._rows(length), length) for length in lengths], say)

    def take_stats(self) -> LikelihoodStats:
        """Returns the counts since the last call."""
        stats, self.stats = self.stats, LikelihoodStats()
        return stats

    # ---------------------------------------------------------------------------------- queries

    def submit(self, asked: LikelihoodQuery) -> int:
        """Hands a query in; returns its request_id.

        Raises:
            ValueError: prompt and answers are longer than the model takes.
        """
        self._last_id += 1
        self.stats.claims += 1
        golds, choices = (_distinct(texts) for texts in (asked.golds, asked.choices))
        if not golds:
            self._done.append((self._last_id, Likelihood(LEAST_LOG_PROB, False, 0.0 if choices else None)))
            return self._last_id
        others = [text for text in choices if text not in golds]
        prompt = self._prompt(asked.query)
        cut = prompt.cuts[0]
        # The ids of prompt and answers are put together: those of the joined text can be others.
        answers = tuple(tuple(self._tokens.encode(text)) for text in (*golds, *others))
        row = _Row(self._last_id, prompt.ids[cut:], answers, len(golds), len(choices))
        if cut + row.length > self._max_length:
            raise ValueError(
                f"The question {asked.query.question[:60]!r} with its evidence and answers has {cut + row.length} "
                f"tokens, and the model takes {self._max_length}; lower memory.top_k, or ask without likelihoods."
            )
        self._waiting.setdefault(prompt.ids[:cut], {})[self._last_id] = row
        return self._last_id

    def collect(self, wait: bool = True) -> list[tuple[int, Likelihood]]:
        """Computes some of what was handed in; returns what is done, as (request_id, likelihood).

        Args:
            wait: False: compute nothing.
        """
        if wait and not self._done and self._waiting and not self.poll():
            began = time.perf_counter()
            self._done += self._compute_some()
            self.stats.seconds += time.perf_counter() - began
        done, self._done = self._done, []
        return done

    def cancel(self, request_id: int) -> bool:
        """Takes a query back. Returns whether it was still to be collected."""
        for ids, rows in self._waiting.items():
            if rows.pop(request_id, None):
                if not rows:
                    del self._waiting[ids]
                return True
        before = len(self._done)
        self._done = [pair for pair in self._done if pair[0] != request_id]
        return len(self._done) < before

    # ---------------------------------------------------------------------------------- computing

    def _rows(self, length: int) -> int:
        shards = self._engine.data_shards
        return max(self._together // length // shards, 1) * shards

    def _compute_some(self) -> list[tuple[int, Likelihood]]:
        # The longest first: what is left over at the end pads short rows.
        shared_prefix_ids = next(iter(self._waiting))
        waiting = sorted(self._waiting[shared_prefix_ids].values(), key=lambda row: (-row.length, row.request_id))
        length = _length(waiting[0].length)
        taken = waiting[: self._rows(length)]
        found = self._compute(self._shared_prefix(shared_prefix_ids), taken, length)
        for row in taken:
            del self._waiting[shared_prefix_ids][row.request_id]
        if not self._waiting[shared_prefix_ids]:
            del self._waiting[shared_prefix_ids]
        return found

    def _shared_prefix(self, ids: tuple[int, ...]) -> SharedPrefix:
        if ids not in self._shared_prefixes:
            self._shared_prefixes[ids] = self._engine.shared_prefix(ids)
        return self._shared_prefixes[ids]

    def _compute(self, shared_prefix: SharedPrefix, taken: Sequence[_Row], length: int) -> list[tuple[int, Likelihood]]:
        """Computes the likelihoods of some rows in one call; a row's answers are segments that share its prompt."""
        shape = self._rows(length), length
        tokens, segment_ids, positions = np.zeros((3, *shape), np.int32)
        segment_ids -= 1  # Padding: a segment that nobody sees.
        wanted: list[tuple[int, int, int]] = []
        for number, row in enumerate(taken):
            size = len(row.prompt)
            tokens[number, :size] = row.prompt
            segment_ids[number, :size], positions[number, :size] = 0, np.arange(size)
            end = size
            for segment, answer in enumerate(row.answers, 1):
                start, end = end, end + len(answer)
                tokens[number, start:end] = answer
                segment_ids[number, start:end] = segment
                positions[number, start:end] = size + np.arange(len(answer))
                # An answer's first token follows the prompt, its others one another, and its end its last one.
                befores = (size - 1, *range(start, end))
                wanted += [(number, before, target) for before, target in zip(befores, (*answer, -1), strict=True)]
        rows, places, ids = asked = np.zeros((3, targets_in(shape)), np.int32)
        asked[:, : len(wanted)] = np.transpose(wanted)
        log_probs, is_top = self._engine.teacher_force(
            shared_prefix, Packed(tokens, segment_ids, positions), Targets(rows, places, ids, np.int32(len(wanted)))
        )
        self.stats.tokens += sum(row.length for row in taken)
        self.stats.padded_tokens += tokens.size
        return list(_likelihoods(taken, log_probs, is_top))


def _likelihoods(taken: Sequence[_Row], log_probs: np.ndarray, is_top: np.ndarray) -> Iterator[tuple[int, Likelihood]]:
    """Takes the rows' likelihoods from those of their answers' tokens, which stand row after row."""
    at = 0
    for row in taken:
        end = at + sum(len(answer) + 1 for answer in row.answers)
        yield row.request_id, _likelihood(row, log_probs[at:end], is_top[at:end])
        at = end


def _length(longest: int) -> int:
    """Gives the length of rows of which the longest has so many tokens."""
    return compilation.bucket(max(longest, 2 * _UNIT), _UNIT)


def _likelihood(row: _Row, log_probs: np.ndarray, is_top: np.ndarray) -> Likelihood:
    """Sums over the tokens of each answer, which stand one answer after the other, their ends included."""
    ends = np.cumsum([0, *(len(answer) + 1 for answer in row.answers)])
    sums, means, tops = [], [], []
    for start, end in itertools.pairwise(ends):
        sums.append(float(log_probs[start:end].sum(dtype=np.float64)))
        means.append(sums[-1] / int(end - start))
        tops.append(bool(is_top[start:end].all()))
    closed = None
    if row.num_choices:
        # Relative to the likeliest, lest all of them vanish.
        masses = [math.exp(value - max(sums)) for value in sums]
        closed = sum(masses[: row.num_golds]) / sum(masses)
    # Not above 0, where rounding may have put a certain answer.
    return Likelihood(min(max(means[: row.num_golds]), 0.0), any(tops[: row.num_golds]), closed)


def _distinct(texts: Iterable[str]) -> list[str]:
    """Returns texts without outer white space, which readers' answers lose too; each once, and no blank ones."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text]
