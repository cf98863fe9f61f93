"""Frames the text of a chunk in the way of Mem-alpha's streams, in words of our own, or leaves it as it is.

A stream of Mem-alpha is something that a user tells an assistant day by day: passages and examples in a dated dialogue,
the parts of a book in a dated reading log. Knows nothing of files or questions.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence

from . import _text

# "plain" leaves texts as they are; "memalpha" gathers short ones up to random lengths, and frames every chunk.
STYLES = ("plain", "memalpha")
_FIRST_DAY = datetime.date(2024, 1, 1)
_SMALLEST_SHARE = 0.05  # Mem-alpha draws the length of a chunk between 100 and 2,048 tokens.

_PASSAGE_OPENERS = (
    "Here is something I read today. Please keep what it says:",
    "I want you to remember this text, I will ask about it later:",
    "This came up while I was reading. Note the facts in it:",
    "Have a look at this and keep it in mind:",
    "Some background that I shall need again:",
    "Let me share a passage with you. Details matter here:",
    "Next piece. Please take in who did what, where and when:",
    "I found the following. Store what could be asked about it:",
    "Could you read this for me and remember it?",
    "More material for my notes:",
)
_EXAMPLE_OPENERS = (
    "Here are examples with their labels. Learn how they are told apart:",
    "Some more labelled examples. Work out what each number stands for:",
    "Please study how these were labelled, I will ask you to label others:",
    "These belong to the same task as before. Remember the pattern:",
    "A few cases that were labelled by hand:",
    "Take note of the label of each of these:",
    "More examples for the classification that we are working on:",
    "Look at these and keep in mind which label goes with what:",
)
_REPLIES = (
    "Thank you, I have read it and will remember it.",
    "Got it. Ask me about it whenever you like.",
    "Noted. I have kept the important points.",
    "I have taken this in.",
    "Understood, I will keep this in mind.",
    "Thanks, that is stored with the rest.",
    "All right, I went through it carefully.",
    "Done reading. I am ready for the next one.",
)


def day(number: int) -> str:
    """Returns the date of a stream's chunk number `number` (from 0), e.g. "2024-01-01"."""
    return (_FIRST_DAY + datetime.timedelta(days=number)).isoformat()


def passage(text: str, number: int, rng: random.Random) -> str:
    """Frames a text as a dialogue on day `number`: the user shows it, the assistant acknowledges."""
    return _dialogue(text, number, opener=rng.choice(_PASSAGE_OPENERS), reply=rng.choice(_REPLIES))


def examples(text: str, number: int, rng: random.Random) -> str:
    """Frames labeled examples likewise."""
    return _dialogue(text, number, opener=rng.choice(_EXAMPLE_OPENERS), reply=rng.choice(_REPLIES))


def _dialogue(text: str, number: int, *, opener: str, reply: str) -> str:
    return f"[Dialogue between User and Assistant on {day(number)} 00:00]\n<User> {opener}\n{text}\n<Assistant> {reply}"


def reading(text: str, date: datetime.date) -> str:
    """Frames a part of a book as an event of reading."""
    return (
        f"[Event on {date.isoformat()}] The user reads on in the book and asks to remember its details and to keep a "
        f"summary of all that has happened so far. What was read:\n{text}"
    )


def reading_dates(number: int, rng: random.Random) -> list[datetime.date]:
    """Draws the dates of the parts of a book: each one to three days after the last."""
    dates = [_FIRST_DAY]
    while len(dates) < number:
        dates.append(dates[-1] + datetime.timedelta(days=rng.randint(1, 3)))
    return dates[:number]


def target(style: str, chunk_words: int, rng: random.Random) -> int:
    """Returns how many words a chunk of gathered texts shall have: all, or in Mem-alpha's style a draw up to that."""
    if style == "plain":
        return chunk_words
    return rng.randint(max(1, round(_SMALLEST_SHARE * chunk_words)), chunk_words)


def gather(texts: Sequence[str], next_target: Callable[[], int]) -> list[list[int]]:
    """Groups consecutive texts: each group is filled up to a target length in words, and has one text at least.

    Args:
        next_target: Called for the target of each group.

    Returns:
        The indices in `texts` of each group.
    """
    groups: list[list[int]] = []
    left = 0
    for index, text in enumerate(texts):
        words = _text.num_words(text)
        if not groups or words > left:
            groups.append([])
            left = next_target()
        groups[-1].append(index)
        left -= words
    return groups
