"""Reads the questions that a model proposes from its reply, and refuses what can be refused without asking anybody."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import json_repair

from finemem_jax.clients import chat
from finemem_jax.reading import scoring
from finemem_jax.types import Malformed


class Proposal(NamedTuple):
    """A question that the generator proposes, and its answer."""

    question: str
    answer: str


# Longer pieces are not repaired, nor those with more opening brackets: repair is not linear in either. One whole
# proposal has two brackets at most, and few hundred characters.
_MAX_REPAIR_CHARS = 2_000
_MAX_REPAIR_BRACKETS = 16
_SHOWN_CHARS = 200  # Of a malformed piece.

# Numbers stay as they are spelt: 3.50 is no 3.5.
_JSON = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)


def parse(reply: str) -> list[Proposal | Malformed]:
    """Reads what a generator's reply proposes, in its order.

    Proposals are JSON objects, wherever they stand: one a line, in a list, in code fences, behind numbers, spread over
    lines. Broken ones are mended if they can be, but none that was cut off in its answer. Other lines that hold words
    are malformed. Words in <think></think> are no part of the reply.
    """
    text = chat.after_thinking(reply)
    if text is None:
        return [_malformed(reply, "thinking that never ends")]
    found: list[Proposal | Malformed] = []
    position = 0
    while position < len(text):
        brace, line_end = text.find("{", position), _line_end(text, position)
        if not position <= brace < line_end:
            line = text[position:line_end]
            if re.search(r"\w", line) and not line.lstrip().startswith("```"):
                found.append(_malformed(line, "no JSON object"))
            position = line_end + 1
            continue
        value, end = _object_at(text, brace)
        if value is None:
            found.append(_malformed(text[brace:end], "not JSON"))
        else:
            found += _proposals(value, text[brace:end])
        position, line_end = end, _line_end(text, end)
        if "{" not in text[position:line_end]:  # A comma, a bracket, a remark.
            position = line_end + 1
    return found


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _object_at(text: str, start: int) -> tuple[dict[str, Any] | None, int]:
    """Reads the object that starts with a brace, None if there is none to be made of it; returns where it ends, too."""
    try:
        return _JSON.raw_decode(text, start)
    except (ValueError, RecursionError):
        # Up to its closing brace, unless another object begins before.
        closing, opening = text.find("}", start), text.find("{", start + 1)
        is_closed = closing >= 0 and (opening < 0 or closing < opening)
        end = closing + 1 if is_closed else _line_end(text, start)
        return _repaired(text[start:end]), end


def _repaired(piece: str) -> dict[str, Any] | None:
    if len(piece) > _MAX_REPAIR_CHARS or sum(map(piece.count, "{[(")) > _MAX_REPAIR_BRACKETS:
        return None
    # One that was cut off in its answer would be completed to another answer: "New" for "New York".
    if not piece.rstrip().endswith(("}", '"')):
        return None
    try:
        value = json_repair.loads(piece, skip_json_loads=True)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # What a parser of arbitrary text can run into (see `operations`); the line is then malformed, no more.
        return None
    return value if isinstance(value, dict) else None


def _proposals(value: dict[str, Any], written: str) -> Iterator[Proposal | Malformed]:
    """Yields what an object proposes that was written so."""
    # Repair reads numbers as numbers.
    fields = {key.strip().lower(): str(field) if type(field) in (int, float) else field for key, field in value.items()}
    missing = [name for name in Proposal._fields if name not in fields]
    nested = [item for field in fields.values() if isinstance(field, list) for item in field if isinstance(item, dict)]
    if missing and nested:  # {"questions": [{…}, …]}
        for item in nested:
            yield from _proposals(item, written)
    elif missing:
        yield _malformed(written, f"missing {' and '.join(missing)}")
    elif not all(isinstance(fields[name], str) for name in Proposal._fields):
        yield _malformed(written, "not texts")
    else:
        proposal = Proposal(*(" ".join(fields[name].split()) for name in Proposal._fields))
        if not (scoring.normalize(proposal.question) and proposal.answer):
            yield _malformed(written, "nothing in it")
        elif any(map(_has_no_utf8, proposal)):
            yield _malformed(written, "half a surrogate pair")
        else:
            yield proposal


def _malformed(text: str, reason: str) -> Malformed:
    text = text.strip()
    return Malformed(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + " …", reason)


def _has_no_utf8(text: str) -> bool:
    return text.encode("utf-8", "replace").decode("utf-8") != text


# --------------------------------------------------------------------------------------
# Filters that need no model
# --------------------------------------------------------------------------------------

_TEXT = r"(?:text|passage|paragraph|excerpt|snippet|chunk)s?"
_WORK = r"(?:article|story|document|conversation|dialogue|section|context|narrative|transcript|chapter)s?"
_REFERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:the|this|that|these) (?:\w+ )?{_TEXT}\b",
        rf"\b(?:according to|based on|in|from|by|does) (?:the|this) (?:(?:given|above|following|provided) )?{_WORK}\b",
        rf"\b(?:given|above|following|provided) {_WORK}\b",
        r"\b(?:mentioned|described|discussed|stated|listed|given) (?:above|below|here|earlier)\b",
        r"\b(?:does|did|is|was|has) the (?:author|narrator|speaker|writer)\b(?! of\b)",
    )
)


def text_flaw(proposal: Proposal, text: str, max_answer_words: int) -> str:
    """Names the first of `REASONS` for which a proposal about a chunk is refused by its words; "" for none."""
    if len(proposal.answer.split()) > max_answer_words:
        return "too_long"
    if not scoring.supports(text, proposal.answer):
        return "unsupported"
    if scoring.supports(proposal.question, proposal.answer):
        return "gives_away"
    if any(pattern.search(proposal.question) for pattern in _REFERS):
        return "refers_to_text"
    return ""


# Words that make no other question of one with another answer: "In which city …" and "In what city …".
_FUNCTION_WORDS = frozenset((
    "what", "which", "who", "whom", "whose", "where", "when", "how", "why", "is", "are", "was", "were", "be", "been",
    "do", "does", "did", "has", "have", "had", "of", "in", "on", "at", "to", "by", "for", "from", "with", "as", "and",
    "or", "that", "this", "there", "it", "its", "his", "her", "their",
))  # fmt: skip


class Worded(NamedTuple):
    """A question as it is compared with others: its words, and its answers."""

    words: collections.Counter[str]
    answers: frozenset[str]

    @classmethod
    def of(cls, question: str, answers: Iterable[str]) -> Worded:
        """Of a question as it is written."""
        words = collections.Counter(scoring.normalize(question).split())
        return cls(words, frozenset(map(scoring.normalize, answers)))


def near_duplicates(first: tuple[str, str], second: tuple[str, str], threshold: float) -> bool:
    """Tells whether two questions, each with its answer, are too much alike to be asked both.

    The F1 of their words (`scoring.token_f1`) must reach the threshold. With different answers, that is not enough: if
    each has a word that the other lacks, function words aside, they ask for different things ("Where does Ana live?",
    "Where does Omar live?").
    """
    return alike(Worded.of(first[0], first[1:]), Worded.of(second[0], second[1:]), threshold)


def alike(first: Worded, second: Worded, threshold: float) -> bool:
    """Does what `near_duplicates` does."""
    overlap = (first.words & second.words).total()
    if 2 * overlap < threshold * (first.words.total() + second.words.total()):
        return False
    if first.answers & second.answers:
        return True
    return not all((a.words - b.words).keys() - _FUNCTION_WORDS for a, b in ((first, second), (second, first)))


class AskedBefore:
    """Questions that others must not resemble: thousands of them, looked up by their rarest words."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._all: list[Worded] = []
        self._holders: dict[str, list[int]] = {}

    def add(self, worded: Worded) -> None:
        for word in worded.words:
            self._holders.setdefault(word, []).append(len(self._all))
        self._all.append(worded)

    def holds_like(self, worded: Worded) -> bool:
        """Tells whether one of them is like this one."""
        # F1 = 2 o / (p + g) >= d and o <= g ask for an overlap o >= d p / (2 - d): once fewer words than that are left
        # to look up, no further question can be like it.
        needed = self._threshold * worded.words.total() / (2 - self._threshold)
        left, near = worded.words.total(), set()
        for word, times in sorted(worded.words.items(), key=lambda item: len(self._holders.get(item[0], ()))):
            if left < needed - 1e-9:
                break
            near.update(self._holders.get(word, ()))
            left -= times
        return any(alike(worded, self._all[i], self._threshold) for i in near)
