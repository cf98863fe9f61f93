"""Builds streams from MQuAKE-CF: numbered facts, of which a later one overrides an earlier one (fact consolidation).

Reads the official list and one case a line. A cloze ("The capital of X is") stands for subject and relation.
Knows nothing of the real world: what a case calls true is what is said first.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable
from typing import NamedTuple

from finemem_jax.reading import scoring
from finemem_jax.types import Question, StreamSource, StreamSpec

from . import _files, _styles, _text, _windows

NAME = "mquake"
_KEYS = ("case_id", "requested_rewrite", "questions", "single_hops", "new_single_hops", "new_answer")
_RULE = "Go by the numbered facts alone; where two contradict each other, the one with the larger number holds."
_SHORTEST_ALIAS = 3  # In letters: not "IT" (Italy) or "de" (German).
_MOST_MISSES = 10  # so many cases find no room before a stream counts as full


class _Fact(NamedTuple):
    cloze: str
    answers: tuple[str, ...]  # the first one completes the cloze
    question: str

    @property
    def text(self) -> str:
        """Writes the fact as a sentence."""
        return f"{self.cloze} {self.answers[0]}".removesuffix(".") + "."


class _Case(NamedTuple):
    edits: tuple[tuple[_Fact, _Fact], ...]  # the second fact overrides the first
    others: tuple[_Fact, ...]  # which no edit changes
    chain: tuple[_Fact, ...]  # from which the answer follows
    questions: tuple[str, ...]  # ways to ask for it
    answers: tuple[str, ...]
    old_answer: str

    def says(self) -> list[tuple[tuple[str, bool], str]]:
        """Returns what it says of a cloze at first (False) and, where a question needs it, in the end (True)."""
        first, last = zip(*self.edits, strict=True)
        facts = [(False, fact) for fact in first + self.others] + [(True, fact) for fact in last + self.chain]
        return [((fact.cloze, is_last), fact.text) for is_last, fact in facts]

    def is_clear(self) -> bool:
        """Says whether no overridden answer counts as right ("American English", where it is "English" now)."""
        changes = ((old.answers[0], new.answers) for old, new in self.edits)
        return not any(scoring.substring(old, new) for old, new in (*changes, (self.old_answer, self.answers)))


_Plan = tuple[list[_Case], dict[str, float]]  # The cases of a stream, and where their facts stand.


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams of numbered facts of several cases, mixed; an overridden fact stands in an earlier chunk.

    A chunk is asked what it states itself, a stream the edited facts ("single_hop") and what follows from several
    ("multi_hop"). Its cases agree on what holds in the end. Those that edit the same fact are in one split.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, line and field).
    """
    _windows.check(spec)
    cases = _read(spec.source_dir)
    group_of = _windows.groups_of({name: [old.cloze for old, _ in case.edits] for name, case in cases.items()})
    chosen = set(_windows.names_of_split(set(group_of.values()), spec.split, NAME))
    left_out: collections.Counter[str] = collections.Counter()
    plans = _deal([cases[name] for name in sorted(cases) if group_of[name] in chosen], spec, left_out=left_out)
    if not plans:
        raise ValueError(
            f"Source {NAME!r}, split {spec.split!r}: no case fits a stream ({dict(+left_out)}); raise data.chunk_words."
        )
    origin = _windows.Origin(NAME, "CR", spec)
    return _windows.Made(len(plans), lambda n: _make(n, *plans[n], spec=spec), origin, left_out=+left_out)


def _read(source_dir: str) -> dict[str, _Case]:
    """Returns the cases by id and first question; one that comes twice counts once."""
    cases: dict[str, _Case] = {}
    for record in _files.read(source_dir, [_KEYS], "MQuAKE-CF"):
        case_id, questions = record.fields.get("case_id"), _texts(record, "questions")
        if not isinstance(case_id, int | str):
            raise record.error("case_id", "a number or a text")
        hops, chain = (
            [_Fact(_line(hop, "cloze"), _answers(hop, "answer"), _line(hop, "question")) for hop in record.records(key)]
            for key in ("single_hops", "new_single_hops")
        )
        known = {fact.text: fact for fact in hops + chain}
        edits = tuple(_read_edit(edit, known) for edit in record.records("requested_rewrite"))
        if not questions or not edits:
            raise record.error("requested_rewrite" if questions else "questions", "a list that is not empty")
        others = tuple(fact for fact in known.values() if fact.cloze not in {old.cloze for old, _ in edits})
        read = _Case(edits, others, tuple(chain), questions, _answers(record, "new_answer"), record.text("answer"))
        cases.setdefault(f"{case_id}: {questions[0]}", read)  # each edition of MQuAKE counts from 1
    return cases


def _read_edit(edit: _files.Record, known: dict[str, _Fact]) -> tuple[_Fact, _Fact]:
    """Returns the overridden fact and the new one; as in `known`, where they have more answers, if they are there."""
    if "{}" not in edit.text("prompt"):
        raise edit.error("prompt", "a text with '{}' for the subject")
    cloze, question = _line(edit, "prompt").replace("{}", _line(edit, "subject")), _line(edit, "question")

    def read(target: str) -> _Fact:
        fact = _Fact(cloze, (_line(edit.record(target), "str"),), question)
        return known.get(fact.text, fact)

    return read("target_true"), read("target_new")


def _line(record: _files.Record, key: str) -> str:
    return _text.one_line(record.text(key))


def _texts(record: _files.Record, key: str) -> tuple[str, ...]:
    if not all(isinstance(text, str) for text in record.items(key)):
        raise record.error(key, "a list of texts")
    return tuple(record.items(key))


def _answers(record: _files.Record, key: str) -> tuple[str, ...]:
    """Returns an answer and its aliases, but for those so short that they stand in many a wrong answer."""
    aliases = (alias for alias in _texts(record, f"{key}_alias") if len(alias) >= _SHORTEST_ALIAS)
    return tuple(dict.fromkeys((_line(record, key), *aliases)))


def _deal(cases: list[_Case], spec: StreamSpec, *, left_out: collections.Counter[str]) -> list[_Plan]:
    """Deals the cases to streams in a seeded order; one that finds no room or is contradicted waits for the next."""
    rng = random.Random(f"{spec.seed}/order")
    plans: list[_Plan] = []
    waiting = [case for case in rng.sample(cases, len(cases)) if case.is_clear()]
    left_out["an overridden answer counts"] += len(cases) - len(waiting)
    while waiting:
        room = [_styles.target(spec.style, spec.chunk_words, rng) for _ in range(spec.chunks_per_stream)]
        members: list[_Case] = []
        still_waiting: list[_Case] = []
        positions: dict[str, float] = {}
        said: dict[tuple[str, bool], str] = {}  # What the stream says of each cloze, at first and in the end.
        misses = 0
        for case in waiting:
            joined = dict(said)
            agrees = all(joined.setdefault(key, text) == text for key, text in case.says())
            placed = _place(case, room, positions, rng=rng) if agrees and misses < _MOST_MISSES else None
            if placed:
                (room, positions), said = placed, joined
                members.append(case)
            elif members:
                still_waiting.append(case)
                misses += agrees
            else:
                left_out["facts too long for a stream" if agrees else "facts contradict each other"] += 1
        plans += [(members, positions)] if members else []
        waiting = still_waiting
    return plans


def _place(
    case: _Case, room: list[int], positions: dict[str, float], *, rng: random.Random
) -> tuple[list[int], dict[str, float]] | None:
    """Adds the positions (chunk + place in it) of a case's facts; returns the room left and all positions, or None."""
    # An edited fact needs a later chunk for the new one, unless the stream has but one chunk.
    room, positions, gap = list(room), dict(positions), min(1, len(room) - 1)

    def put(fact: _Fact, least: float = 0, spare: int = 0) -> bool:
        """Puts a fact at `least` or later, with at least `spare` chunks after it that have room as well."""
        words = _text.num_words(fact.text) + 1  # with its number
        free = [chunk for chunk in range(int(least), len(room)) if room[chunk] >= words]
        if fact.text not in positions and len(free) > spare:
            chunk = min(rng.sample(free, 1 + spare))
            positions[fact.text] = rng.uniform(max(least, chunk), chunk + 1)
            room[chunk] -= words
        return fact.text in positions

    for old, new in case.edits:
        if not put(old, spare=gap) or not put(new, int(positions[old.text]) + 1 if gap else positions[old.text]):
            return None
    return (room, positions) if all(put(fact) for fact in case.others) else None


def _make(number: int, cases: list[_Case], positions: dict[str, float], *, spec: StreamSpec) -> _windows.Text:
    """Writes out a stream: its facts numbered in the order of their positions, and the questions about them."""
    rng = random.Random(f"{spec.seed}/{number}/questions")
    used = sorted({int(position) for position in positions.values()})
    step_of = {text: used.index(int(position)) for text, position in positions.items()}
    facts = {fact.text: fact for case in cases for fact in (*sum(case.edits, ()), *case.others)}
    new_of = {old.text: new.text for case in cases for old, new in case.edits}

    def ask(question: str, answers: tuple[str, ...], texts: Iterable[str], *, kind: str) -> Question:
        steps = tuple(sorted({step_of[text] for text in texts}))
        return Question(question, answers, "substring", steps, kind, instruction=_RULE)

    lines: list[list[str]] = [[] for _ in used]
    own: list[list[Question]] = [[] for _ in used]  # Of each chunk: what it states, unless it overrides that itself.
    singles: list[Question] = []
    for n, text in enumerate(sorted(positions, key=positions.__getitem__), start=1):
        step, fact = step_of[text], facts[text]
        lines[step].append(f"{n}. {text}")
        if text in new_of.values():
            singles.append(ask(fact.question, fact.answers, [text], kind="single_hop"))
        elif text not in new_of or step_of[new_of[text]] > step:
            own[step].append(ask(fact.question, fact.answers, [text], kind="original"))
    most = max((spec.questions_per_stream + 1) // 2, spec.questions_per_stream - len(singles))
    chains = [
        ask(rng.choice(case.questions), case.answers, [fact.text for fact in case.chain], kind="multi_hop")
        for case in rng.sample(cases, min(most, len(cases)))
    ]
    chunks = ["\n".join(texts) for texts in lines]
    if spec.style == "memalpha":
        chunks = [_styles.passage(chunk, step, rng) for step, chunk in enumerate(chunks)]
    return _windows.Text(f"{number:05d}", tuple(chunks), (*singles, *chains), {}, tuple(map(tuple, own)))
