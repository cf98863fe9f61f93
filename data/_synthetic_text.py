"""Tells the events of a story: picks a genre, a speaker and a wording, and fills the chunk up with small talk."""

from __future__ import annotations

import dataclasses
import random

from . import _synthetic_words_test, _synthetic_words_train
from ._synthetic_story import Event, Story
from ._synthetic_talk import small_talk
from ._synthetic_wording import Frames, Wording, fill, sentence
from ._synthetic_world import ATTRIBUTES, CHAINS, WEEKDAYS

WORDINGS: dict[str, dict[str, Wording]] = {
    "train": _synthetic_words_train.WORDINGS,
    "test": _synthetic_words_test.WORDINGS,
}
FRAMES: dict[str, Frames] = {"train": _synthetic_words_train.FRAMES, "test": _synthetic_words_test.FRAMES}

_GENRES = {"dialogue": 0.35, "diary": 0.2, "email": 0.15, "chat": 0.2, "report": 0.1}
_EMAIL_WORDS = 55  # shorter chunks have no room for header, greeting and closing
_TRIES = 30


@dataclasses.dataclass(frozen=True)
class _Line:
    """One sentence of a chunk, the day it belongs to and who says it ("" in a report)."""

    day: int
    speaker: str
    text: str


def stamp(day: int) -> str:
    return f"Day {day}, {WEEKDAYS[(day - 1) % 7]}"


def tell(rng: random.Random, split: str, story: Story, step: int, chunk_words: int, used: set[str]) -> str:
    """Returns the text of chunk `step`, at most `chunk_words` words unless its facts alone need more.

    Args:
        rng: Consumed.
        split: Whose wordings are used.
        story: What happens.
        step: The chunk, 0-based.
        chunk_words: The budget, in whitespace-separated words.
        used: The small talk of earlier chunks, which is not repeated; gets this chunk's.
    """
    events, days = story.events[step], story.days[step]
    attempts = []
    for attempt in range(_TRIES):
        plain = attempt >= _TRIES // 2
        page = _Page(rng, split, story, days, "dialogue" if plain else _genre(rng, chunk_words))
        if not page.fits(events):
            page = _Page(rng, split, story, days, "chat" if page.bystanders(events) else "report")
        lines = [page.fact(event, plain) for event in events]
        attempts.append((len(page.render(lines).split()), page, lines))
        if attempts[-1][0] <= chunk_words * (0.95 if events else 1):
            break
    words, page, lines = min(attempts, key=lambda each: each[0]) if attempts[-1][0] > chunk_words else attempts[-1]
    goal = chunk_words * rng.uniform(0.8, 1.0)
    failures, starts = 0, []
    while words < goal and failures < 20:
        text = small_talk(rng, split, personal=page.genre != "report")
        longer = page.insert(lines, text)
        count = len(page.render(longer).split())
        start = text.split()[:2]
        if text in used or start in starts[-5:] or count > chunk_words:
            failures += 1
            continue
        used.add(text)
        starts.append(start)
        lines, words = longer, count
    return page.render(lines)


def _genre(rng: random.Random, chunk_words: int) -> str:
    weights = {name: w for name, w in _GENRES.items() if name != "email" or chunk_words >= _EMAIL_WORDS}
    return rng.choices(list(weights), list(weights.values()))[0]


class _Page:
    """One genre with its writer; turns events into lines and lines into text."""

    def __init__(self, rng: random.Random, split: str, story: Story, days: tuple[int, ...], genre: str):
        self.rng, self.split, self.story, self.days, self.genre = rng, split, story, days, genre
        self.words, self.frames = WORDINGS[split], FRAMES[split]
        people = list(story.people)
        self.writer, self.reader = rng.sample(people, 2)
        self.heading = rng.choice(
            {"diary": self.frames.diary, "report": self.frames.report}.get(genre, self.frames.channel)
        )
        self.greeting, self.closing = rng.choice(self.frames.greetings), rng.choice(self.frames.closings)
        self.topic = rng.choice(self.frames.subjects)

    def fact(self, event: Event, plain: bool) -> _Line:
        """Returns the sentence for one event; `plain` leaves out what decorates it."""
        rng, frames = self.rng, self.frames
        if event.kind == "label":
            text = rng.choice(frames.label_state).format(m=event.message, v=event.value)
            return _Line(event.day, self._speaker(event), sentence(text))
        speaker = self._speaker(event)
        own = speaker == event.subject
        wording = self.words[event.attribute]
        templates = {"change": wording.change, "drop": wording.drop}.get(event.kind, wording.state)
        text = fill(
            min(rng.sample(templates, 3), key=len) if plain else rng.choice(templates),
            event.subject,
            self.story.people.get(event.subject, ""),
            first_person=own,
            v=event.value,
            old=event.old,
            when=rng.choice(frames.when),
            species=self.story.species.get(event.subject, ""),
        )
        roll = rng.random()
        spoken = self.genre in ("dialogue", "chat", "email")
        if not plain and spoken and not own and roll < 0.2:
            text = f"{rng.choice(frames.hearsay)} {text}"
        elif not plain and roll < 0.55 and self.genre != "report":
            openers = (
                frames.change_openers if event.kind in ("change", "drop") and rng.random() < 0.7 else frames.openers
            )
            text = f"{rng.choice(openers)} {text}"
        if not plain and spoken and rng.random() < 0.15:
            text += rng.choice(frames.endings)
        return _Line(event.day, speaker, sentence(text))

    def _speaker(self, event: Event) -> str:
        """A person speaks of himself as "I"; nobody is named by himself as the value of a fact ("Alma leads …")."""
        if self.genre == "report":
            return ""
        if self.genre in ("diary", "email"):
            return self.writer
        if event.subject in self.story.people and self.rng.random() < 0.6:
            return event.subject
        return self.rng.choice([name for name in self.story.people if name not in (event.value, event.old)])

    def bystanders(self, events: tuple[Event, ...]) -> set[str]:
        """Returns the people who are no event's value: who can tell all of them without naming themselves."""
        return set(self.story.people) - {event.value for event in events} - {event.old for event in events}

    def fits(self, events: tuple[Event, ...]) -> bool:
        """Whether a diary or an e-mail need not name its writer, nor an e-mail tell its reader about the reader."""
        bystanders = self.bystanders(events)
        if self.genre == "email" and (
            self.reader not in bystanders or self.reader in {event.subject for event in events}
        ):
            return False
        return self.writer in bystanders if self.genre in ("diary", "email") else bool(bystanders)

    def insert(self, lines: list[_Line], text: str) -> list[_Line]:
        """Returns the lines with one sentence of small talk at a random place."""
        place = self.rng.randint(0, len(lines))
        near = lines[max(place - 1, 0)] if lines else None
        # Quiet days get talk, too, so that each day of the chunk is likely to be seen.
        day = near.day if near and self.rng.random() < 0.8 else self.rng.choice(self.days)
        speaker = ""
        if self.genre in ("diary", "email"):
            speaker = self.writer
        elif self.genre != "report":
            speaker = near.speaker if near and self.rng.random() < 0.5 else self.rng.choice(list(self.story.people))
        return sorted([*lines[:place], _Line(day, speaker, text), *lines[place:]], key=lambda line: line.day)

    def render(self, lines: list[_Line]) -> str:
        days = sorted({line.day for line in lines}) or [self.days[0]]
        return "\n".join(self._block(day, [line for line in lines if line.day == day]) for day in days)

    def _block(self, day: int, lines: list[_Line]) -> str:
        turns: list[tuple[str, list[str]]] = []
        for line in lines:
            if not turns or turns[-1][0] != line.speaker:
                turns.append((line.speaker, []))
            turns[-1][1].append(line.text)
        head, body = f"[{stamp(day)}]", " ".join(line.text for line in lines)
        if self.genre == "dialogue":
            return f"{head} " + "\n".join(f"{speaker}: {' '.join(texts)}" for speaker, texts in turns)
        if self.genre == "chat":
            return f"[{stamp(day)}, {self.heading}]\n" + "\n".join(
                f"<{name}> {' '.join(texts)}" for name, texts in turns
            )
        if self.genre == "email":
            full = f"{self.writer} {self.story.surnames[self.writer]}"
            greeting, closing = self.greeting.format(to=self.reader), self.closing.format(S=self.writer)
            return f"{head} E-mail from {full}\nSubject: {self.topic}\n{greeting}\n{body}\n{closing}"
        return f"{head} {self.heading.format(S=self.writer)} {body}"


def templates(split: str) -> list[str]:
    """Returns every template of a split, small talk aside; the tests compare those of train and test."""
    tables = [*WORDINGS[split].values(), FRAMES[split]]
    return [text for table in tables for field in dataclasses.fields(table) for text in getattr(table, field.name)]


assert set(WORDINGS["train"]) == set(WORDINGS["test"]) == {*ATTRIBUTES, *CHAINS}
