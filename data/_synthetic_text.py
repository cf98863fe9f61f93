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
    """Returns how a day is written, e.g. "Day 8, Monday"."""
    return f"Day {day}, {WEEKDAYS[(day - 1) % 7]}"


def tell(rng: random.Random, story: Story, step: int, *, chunk_words: int, used: set[str]) -> str:
    """Writes the text of chunk `step`, at most `chunk_words` words unless its facts alone need more.

    Args:
        rng: Consumed.
        story: What happens.
        step: The chunk, 0-based.
        chunk_words: The budget, in whitespace-separated words.
        used: The small talk of earlier chunks, which is not repeated; gets this chunk's.
    """
    page, lines = _facts(rng, story, step, chunk_words=chunk_words)
    words = len(page.render(lines).split())
    # Small talk fills the chunk up. Sentences that were used, or begin as a recent one does, are drawn again.
    goal = chunk_words * rng.uniform(0.8, 1.0)
    failures, starts = 0, []
    while words < goal and failures < 20:
        text = small_talk(rng, story.split, personal=page.genre != "report")
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


def _facts(rng: random.Random, story: Story, step: int, *, chunk_words: int) -> tuple[_Page, list[_Line]]:
    """Draws a genre and words for the events of a chunk, again and again until they fit; or else the shortest."""
    events = story.events[step]
    attempts: list[tuple[int, _Page, list[_Line]]] = []
    for attempt in range(_TRIES):
        plain = attempt >= _TRIES // 2
        page = _Page(rng, story, step, genre="dialogue" if plain else _genre(rng, chunk_words))
        if not page.fits(events):
            page = _Page(rng, story, step, genre="chat" if page.bystanders(events) else "report")
        lines = [page.fact(event, plain=plain) for event in events]
        attempts.append((len(page.render(lines).split()), page, lines))
        if attempts[-1][0] <= chunk_words * (0.95 if events else 1):
            break
    fits = attempts[-1][0] <= chunk_words
    _, page, lines = attempts[-1] if fits else min(attempts, key=lambda each: each[0])
    return page, lines


def _genre(rng: random.Random, chunk_words: int) -> str:
    """Draws a genre that a chunk has room for."""
    weights = {name: w for name, w in _GENRES.items() if name != "email" or chunk_words >= _EMAIL_WORDS}
    return rng.choices(list(weights), list(weights.values()))[0]


class _Page:
    """Turns events into lines and lines into text, in one genre and with one writer."""

    def __init__(self, rng: random.Random, story: Story, step: int, *, genre: str):
        """Draws writer, reader and what else all of the page shares."""
        self.rng, self.story, self.days, self.genre = rng, story, story.days[step], genre
        self.words, self.frames = WORDINGS[story.split], FRAMES[story.split]
        people = list(story.people)
        self.writer, self.reader = rng.sample(people, 2)
        self.heading = rng.choice(
            {"diary": self.frames.diary, "report": self.frames.report}.get(genre, self.frames.channel)
        )
        self.greeting, self.closing = rng.choice(self.frames.greetings), rng.choice(self.frames.closings)
        self.topic = rng.choice(self.frames.subjects)

    def fact(self, event: Event, *, plain: bool) -> _Line:
        """Writes the sentence for one event; `plain` leaves out what decorates it."""
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
        return _Line(event.day, speaker, sentence(text if plain else self._decorated(event, text, own=own, roll=roll)))

    def _decorated(self, event: Event, text: str, *, own: bool, roll: float) -> str:
        """Puts an opener before a sentence, or hearsay, and something behind it; as `roll`, in [0, 1), decides."""
        rng, frames = self.rng, self.frames
        spoken = self.genre in ("dialogue", "chat", "email")
        if spoken and not own and roll < 0.2:
            text = f"{rng.choice(frames.hearsay)} {text}"
        elif roll < 0.55 and self.genre != "report":
            changes = event.kind in ("change", "drop") and rng.random() < 0.7
            text = f"{rng.choice(frames.change_openers if changes else frames.openers)} {text}"
        if spoken and rng.random() < 0.15:
            text += rng.choice(frames.endings)
        return text

    def _speaker(self, event: Event) -> str:
        """Draws who says it: often the subject, as "I"; never who is the value of the fact ("Alma leads …")."""
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
        """Says whether no writer need name himself, nor tell the reader of an e-mail about the reader."""
        bystanders = self.bystanders(events)
        if self.genre == "email" and (
            self.reader not in bystanders or self.reader in {event.subject for event in events}
        ):
            return False
        return self.writer in bystanders if self.genre in ("diary", "email") else bool(bystanders)

    def insert(self, lines: list[_Line], text: str) -> list[_Line]:
        """Puts one sentence of small talk at a random place between the lines."""
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
        """Writes the lines out, under a heading for each day."""
        days = sorted({line.day for line in lines}) or [self.days[0]]
        return "\n".join(self._block(day, [line for line in lines if line.day == day]) for day in days)

    def _block(self, day: int, lines: list[_Line]) -> str:
        """Writes out one day in the form of the genre."""
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
