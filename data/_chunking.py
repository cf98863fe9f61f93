"""Where a text is cut into chunks: after so many words, at sentence ends, or where it turns to something else.

    fixed      every chunk has `chunk_words` words, the last one fewer
    sentence   the longest chunks that end with a paragraph, line or sentence, and have at most `chunk_words` words
    adaptive   chunks end where the text turns, and are shorter where it says more; `chunk_words` is their length on
               average, and no chunk is longer than 1.5 times that

Adaptive chunks are chosen one after the other, looking ahead no further than the longest chunk, so that they can be cut
from a text that is still growing. A chunk ends at the unit (a sentence, a turn of a dialogue) with the highest

    depth(u) - ((load(u) - target) / target)²

depth is TextTiling's (Hearst 1997): how far the similarity of the words before and after u lies below the peaks on both
sides. load is what the chunk says up to u, in bytes after compression: what was said before, or is said twice, adds
little. target is the load of `chunk_words` average words so far, more or less what earlier chunks were too short or
too long by, so that a text is cut into as many chunks as in the other ways.
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
    groups = group([text[slice(*unit)] for unit in units], chunk_words, chunking, _paragraphs(text, units))
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
    units: Sequence[str], chunk_words: int, chunking: str, borders: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Groups consecutive units (sentences, turns), none of which is ever cut.

    Args:
        units: None longer than `chunk_words` words.
        borders: Units before which something new begins (a paragraph, a session). "sentence" prefers to cut there in
            the last quarter of a chunk, "adaptive" wherever it may cut.

    Returns:
        The first unit of each group, and the one after its last.
    """
    lengths = [_text.num_words(unit) for unit in units]
    borders = frozenset(borders)
    if chunking == "adaptive":
        return _adaptive(units, lengths, chunk_words, borders)
    groups, first, used = [], 0, 0
    for i, length in enumerate(lengths):
        if used + length > chunk_words and i > first:
            end = _last_border(lengths, first, i, borders, chunk_words) if chunking == "sentence" else i
            groups.append((first, end))
            first, used = end, sum(lengths[end:i])
        used += length
    return [*groups, (first, len(units))] if units else []


def _last_border(lengths, first, end, borders, chunk_words):
    """The last known border of a full chunk that leaves at most a quarter of it empty; or else its end."""
    left_over = 0
    for i in range(end, first, -1):
        if i in borders:
            return i
        left_over += lengths[i - 1]
        if left_over > chunk_words / 4:
            break
    return end


def _adaptive(units, lengths, chunk_words, borders):
    depths = _depths(units)
    loads = _loads(units)
    groups, first = [], 0
    words_so_far = load_so_far = 0
    while first < len(units):
        count = len(groups)
        # What the chunks so far were too short or too long by is made up for in the next one.
        wanted = min(max((count + 1) * chunk_words - words_so_far, _SHORTEST * chunk_words), LONGEST * chunk_words)
        ahead_words, ahead_load, end = 0, 0, first
        while end < len(units) and (end == first or ahead_words + lengths[end] <= LONGEST * chunk_words):
            ahead_words += lengths[end]
            ahead_load += loads[end]
            end += 1
        if end == len(units) and ahead_words <= max(wanted, chunk_words):
            groups.append((first, end))
            break
        # Of an average word: over what was cut, and what is looked at now.
        per_word = (load_so_far + ahead_load) / max(words_so_far + ahead_words, 1)
        target = max(wanted * per_word, 1e-9)
        best, best_score, words, load = end, -math.inf, 0, 0
        for i in range(first, end):
            words += lengths[i]
            load += loads[i]
            border = i + 1
            if words < _SHORTEST * wanted and border < end:
                continue
            depth = depths[border] if border < len(units) else 1.0
            score = depth + _BORDER * (border in borders) - ((load - target) / target) ** 2
            if score > best_score:
                best, best_score = border, score
        words_so_far += sum(lengths[first:best])
        load_so_far += sum(loads[first:best])
        groups.append((first, best))
        first = best
    return groups


def _depths(units: Sequence[str]) -> list[float]:
    """Returns for each unit how much of a turn there is before it, in [0, 2]; 0 for the first."""
    words = [re.findall(r"\w{4,}", unit.lower()) for unit in units]
    similarities = [1.0] + [_similarity(words, i) for i in range(1, len(units))]
    depths = [0.0] * len(units)
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
    """Cosine of the word counts on both sides of a border."""
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
        size = len(packer.compress(unit.encode() + b"\n") + packer.flush(zlib.Z_SYNC_FLUSH))
        loads.append(max(size - min(overhead, 5), 1))
    return loads
