"""Cuts a text into chunks: after so many words, at sentence ends, or where it turns to something else.

    fixed      every chunk has `chunk_words` words, the last one fewer
    sentence   the longest chunks that end with a paragraph, line or sentence, and have at most `chunk_words` words
    adaptive   chunks end where the text turns, and are shorter where it says more; `chunk_words` is their length on
               average, and no chunk is longer than 1.5 times that

Adaptive chunks are chosen one after the other, looking ahead no further than the longest chunk, so that they can be cut
from a text that is still growing. A chunk ends at the unit (a sentence, a turn of a dialogue) with the highest

    depth(u) - ((load(u) - target) / target)²

depth is TextTiling's (Hearst 1997, https://aclanthology.org/J97-1003): how far the similarity of the words before and
after u lies below the peaks on both sides. load is what the chunk says up to u, in bytes after compression: what was
said before, or is said twice, adds little. target is the load of `chunk_words` average words so far, more or less what
earlier chunks were too short or too long by, so that a text is cut into as many chunks as in the other ways.
"""

from __future__ import annotations

import collections
import math
import re
import zlib
from collections.abc import Collection, Sequence

from . import _text

CHUNKINGS = ("fixed", "sentence", "adaptive")
LONGEST = 1.5  # Of adaptive chunks, in average lengths.
_SHORTEST = 0.5
_LONGEST_UNIT = 0.25
_WINDOW_WORDS = 60  # Compared on either side of a border.
_BORDER = 1.0  # Added to the depth of a border that the caller knows of.


def cut(text: str, chunk_words: int, chunking: str) -> list[tuple[int, int]]:
    """Cuts a running text. No word is lost or cut.

    Returns:
        Start and end (exclusive) of each chunk in `text`, without the white space around it.
    """
    if chunking == "fixed":
        words = [match.span() for match in re.finditer(r"\S+", text)]
        starts = range(0, len(words), chunk_words)
        return [(words[i][0], words[min(i + chunk_words, len(words)) - 1][1]) for i in starts]
    # A unit must not fill most of a chunk, or there is nothing to choose.
    longest = chunk_words if chunking == "sentence" else max(1, round(_LONGEST_UNIT * chunk_words))
    units = sentences(text, longest)
    groups = group([text[a:b] for a, b in units], chunk_words, chunking, borders=_paragraphs(text, units))
    return [(units[first][0], units[last - 1][1]) for first, last in groups]


def sentences(text: str, max_words: int) -> list[tuple[int, int]]:
    """Cuts a text into sentences and lines; one of more than `max_words` words is cut between words."""
    spans = []
    for line in re.finditer(r"[^\n]*\S[^\n]*", text):
        start = line.start()
        spans += [(start + a, start + b) for a, b in _text.sentences(line[0], max_words)]
    return spans


def _paragraphs(text: str, units: Sequence[tuple[int, int]]) -> set[int]:
    """Returns the units before which there is a blank line."""
    gaps = ((i, text[units[i - 1][1] : units[i][0]]) for i in range(1, len(units)))
    return {i for i, gap in gaps if gap.count("\n") > 1}


def group(
    units: Sequence[str], chunk_words: int, chunking: str, *, borders: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Groups consecutive units (sentences, turns), none of which is ever cut.

    Args:
        units: None longer than `chunk_words` words.
        chunk_words: Of a group at most; if "adaptive", on average.
        chunking: One of `CHUNKINGS`.
        borders: Units before which something new begins (a paragraph, a session). "sentence" prefers to cut there in
            the last quarter of a chunk, "adaptive" wherever it may cut.

    Returns:
        The first unit of each group, and the one after its last.
    """
    lengths = [_text.num_words(unit) for unit in units]
    borders = frozenset(borders)
    if chunking == "adaptive":
        return _Adaptive(units, lengths, chunk_words, borders=borders).groups()
    groups, first, used = [], 0, 0
    for i, length in enumerate(lengths):
        if used + length > chunk_words and i > first:
            end = i
            if chunking == "sentence":
                end = _last_border(lengths, range(first, i), borders=borders, most_left_over=chunk_words / 4)
            groups.append((first, end))
            first, used = end, sum(lengths[end:i])
        used += length
    return [*groups, (first, len(units))] if units else []


def _last_border(lengths: Sequence[int], chunk: range, *, borders: Collection[int], most_left_over: float) -> int:
    """Returns the last known border of a full chunk that leaves at most so many words of it empty; or else its end."""
    left_over = 0
    for i in range(chunk.stop, chunk.start, -1):
        if i in borders:
            return i
        left_over += lengths[i - 1]
        if left_over > most_left_over:
            break
    return chunk.stop


class _Adaptive:
    """Groups units where the text turns; the module's docstring has the rule."""

    def __init__(self, units: Sequence[str], lengths: list[int], chunk_words: int, *, borders: Collection[int]):
        """Rates every border between units: how much the text turns there, and how much each unit adds."""
        self._lengths, self._chunk_words, self._borders = lengths, chunk_words, borders
        self._depths, self._loads = _depths(units), _loads(units)

    def groups(self) -> list[tuple[int, int]]:
        """Returns the first unit of each group, and the one after its last."""
        groups: list[tuple[int, int]] = []
        first, words, load = 0, 0, 0  # What is cut so far.
        shortest, longest = _SHORTEST * self._chunk_words, LONGEST * self._chunk_words
        while first < len(self._lengths):
            # What the chunks so far were too short or too long by is made up for in the next one.
            wanted = min(max((len(groups) + 1) * self._chunk_words - words, shortest), longest)
            end = self._reach(first, longest)
            ahead_words, ahead_load = sum(self._lengths[first:end]), sum(self._loads[first:end])
            if end == len(self._lengths) and ahead_words <= max(wanted, self._chunk_words):
                return [*groups, (first, end)]
            # Of an average word: over what was cut, and what is looked at now.
            load_per_word = (load + ahead_load) / max(words + ahead_words, 1)
            best = self._best_border(range(first, end), wanted, max(wanted * load_per_word, 1e-9))
            words += sum(self._lengths[first:best])
            load += sum(self._loads[first:best])
            groups.append((first, best))
            first = best
        return groups

    def _reach(self, first: int, longest: float) -> int:
        """Returns the unit after the last one that a chunk may still hold; it holds at least one."""
        words, end = self._lengths[first], first + 1
        while end < len(self._lengths) and words + self._lengths[end] <= longest:
            words += self._lengths[end]
            end += 1
        return end

    def _best_border(self, units: range, wanted: float, target: float) -> int:
        """Returns the border with the highest score: a turn of the text, not far from the target load."""
        best, best_score, words, load = units.stop, -math.inf, 0, 0
        for unit in units:
            words += self._lengths[unit]
            load += self._loads[unit]
            border = unit + 1
            if words < _SHORTEST * wanted and border < units.stop:
                continue
            depth = self._depths[border] if border < len(self._lengths) else 1.0
            score = depth + _BORDER * (border in self._borders) - ((load - target) / target) ** 2
            if score > best_score:
                best, best_score = border, score
        return best


def _depths(units: Sequence[str]) -> list[float]:
    """Returns for each unit how much of a turn there is before it, in [0, 2]; 0 for the first."""
    words = [re.findall(r"\w{4,}", unit.lower()) for unit in units]
    similarities = [1.0] + [_similarity(words, i) for i in range(1, len(units))]
    depths = [0.0] * len(units)
    # From the valley at i up to the peak on each side; the deeper the valley, the more of a turn.
    for i in range(1, len(units)):
        left = right = similarities[i]
        j = i - 1
        while j >= 1 and similarities[j] >= left:
            left, j = similarities[j], j - 1
        j = i + 1
        while j < len(units) and similarities[j] >= right:
            right, j = similarities[j], j + 1
        depths[i] = left + right - 2 * similarities[i]
    return depths


def _similarity(words: Sequence[Sequence[str]], border: int) -> float:
    """Returns the cosine of the word counts on both sides of a border."""
    before, after = collections.Counter(), collections.Counter()
    i = border
    while i > 0 and before.total() < _WINDOW_WORDS:
        i -= 1
        before.update(words[i])
    i = border
    while i < len(words) and after.total() < _WINDOW_WORDS:
        after.update(words[i])
        i += 1
    product = sum(count * after[word] for word, count in before.items())
    norm = math.sqrt(sum(c * c for c in before.values()) * sum(c * c for c in after.values()))
    return product / norm if norm else 0.0


def _loads(units: Sequence[str]) -> list[int]:
    """Returns how many bytes each unit adds to the compressed text; a repetition of the last 32 KB adds little."""
    packer = zlib.compressobj(9)
    overhead = len(packer.compress(b"") + packer.flush(zlib.Z_SYNC_FLUSH))
    loads = []
    for unit in units:
        # A flush puts out all that came in so far, with some bytes of its own, which every unit would pay alike.
        size = len(packer.compress(unit.encode() + b"\n") + packer.flush(zlib.Z_SYNC_FLUSH))
        loads.append(max(size - min(overhead, 5), 1))
    return loads
