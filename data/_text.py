"""Cuts text into pieces of at most so many words, at sentence ends where there are any. Knows nothing of streams."""

from __future__ import annotations

import re

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
# "J. Smith" has no sentence end. Other abbreviations pass for one, which is harmless: no word is lost.
_ABBREVIATION = re.compile(r"\W*(?:[A-Z]|No|Dr|Mr|Mrs|Ms|St|U\.S)\.$")
_NUMBER = re.compile(r"\d+\.")  # At the start of a line it numbers what follows.
_SENTENCE_START = re.compile(r"\[|[\"'“‘(]*[^\Wa-z_]")


def num_words(text: str) -> int:
    """Counts words as every budget here does: separated by white space."""
    return len(text.split())


def one_line(text: str) -> str:
    """Puts a text on one line: every run of white space becomes a single space."""
    return " ".join(text.split())


def pieces(text: str, max_words: int) -> list[tuple[int, int]]:
    """Cuts a text into the longest pieces that end with a sentence and have at most `max_words` words.

    A sentence longer than that is cut between words. No word is lost or cut.

    Returns:
        Start and end (exclusive) of each piece in `text`, without the white space around it.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    found = []
    first = 0
    while first < len(words):
        last = min(first + max_words, len(words))  # exclusive
        if last < len(words):
            ends = (i for i in range(last, first, -1) if _ends_sentence(text, words[i - 1], words[i]))
            last = next(ends, last)
        found.append((words[first][0], words[last - 1][1]))
        first = last
    return found


def sentences(text: str, max_words: int) -> list[tuple[int, int]]:
    """Cuts a text into its sentences; one of more than `max_words` words is cut between words.

    Returns:
        Start and end (exclusive) of each, without the white space around it.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    found, first = [], 0
    for i in range(len(words)):
        last = i + 1 == len(words)
        if last or i + 1 - first == max_words or _ends_sentence(text, words[i], words[i + 1]):
            found.append((words[first][0], words[i][1]))
            first = i + 1
    return found


def _ends_sentence(text: str, word: tuple[int, int], following: tuple[int, int]) -> bool:
    """Says whether a sentence ends with `word`, judged by it and by the word after it (both as spans)."""
    this, after = text[slice(*word)], text[slice(*following)]
    if _NUMBER.fullmatch(this) and (word[0] == 0 or text[word[0] - 1] == "\n"):
        return False
    return bool(_SENTENCE_END.search(this) and not _ABBREVIATION.match(this) and _SENTENCE_START.match(after))
