"""Makes up what happens in a stream, before any word is chosen: people, projects, and the events of each chunk.

The story is the ground truth. Questions are asked of it, and texts tell it; it knows of neither.
"""

from __future__ import annotations

import dataclasses
import random

from ._synthetic_world import ATTRIBUTES, CATEGORIES, CHAINS, POOLS

# What the next event of a chunk is, by competency; "change" and "drop" fall back to "state" where nothing can change.
_MIXES = {
    "AR": {"state": 0.82, "change": 0.13, "drop": 0.05},
    "CR": {"state": 0.3, "change": 0.55, "drop": 0.15},
    "TTL": {"label": 0.75, "state": 0.2, "change": 0.05},
    "LRU": {"chain": 0.5, "state": 0.35, "change": 0.15},
}
_WEIGHTS = {"AR": 0.35, "CR": 0.35, "TTL": 0.15, "LRU": 0.15}
_WORDS_PER_EVENT = 23
_MAX_CHAIN = 6  # a summary of more keywords than that is no short answer


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that a chunk tells.

    Attributes:
        kind: "state", "change", "drop", "chain" or "label".
        step: The chunk, 0-based.
        day: The day that the chunk's heading names.
        subject: Name of the person or project; of a label, the category.
        attribute: A key of ATTRIBUTES or CHAINS, or "label".
        value: What holds from now on; what was withdrawn, if kind is "drop".
        old: The value before, if kind is "change".
        message: The labeled message.
    """

    kind: str
    step: int
    day: int
    subject: str
    attribute: str
    value: str
    old: str = ""
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Story:
    """All that happens in one stream.

    Attributes:
        split: "train" or "test", whose names and values it has.
        competency: The main theme, as in `Stream.competency`.
        people: First name to pronoun, "she" or "he".
        surnames: First name to surname.
        projects: Names of the projects.
        species: First name to kind of pet.
        days: The days that each chunk covers; none is in two chunks.
        events: The events of each chunk; empty for small talk.
        labels: The hidden rule: category to number.
    """

    split: str
    competency: str
    people: dict[str, str]
    surnames: dict[str, str]
    projects: tuple[str, ...]
    species: dict[str, str]
    days: tuple[tuple[int, ...], ...]
    events: tuple[tuple[Event, ...], ...]
    labels: dict[str, str]

    def histories(self) -> dict[tuple[str, str], list[Event]]:
        """Returns the events of each (subject, attribute), in order; attribute "label" holds the examples."""
        found: dict[tuple[str, str], list[Event]] = {}
        for events in self.events:
            for event in events:
                found.setdefault((event.subject, event.attribute), []).append(event)
        return found


def write(rng: random.Random, split: str, *, num_chunks: int, chunk_words: int) -> Story:
    """Makes up a story; `rng` is consumed."""
    choices = [name for name in _WEIGHTS if num_chunks > 1 or name != "CR"]
    competency = rng.choices(choices, [_WEIGHTS[name] for name in choices])[0]
    return _Writer(rng, split, competency, num_chunks=num_chunks, chunk_words=chunk_words).story()


class _Writer:
    """Keeps the state of the world while a story is written."""

    def __init__(self, rng: random.Random, split: str, competency: str, *, num_chunks: int, chunk_words: int):
        """Draws the people, the projects, the days and the hidden rule; how many there are depends on the sizes."""
        self.rng, self.pools, self.competency, self.split = rng, POOLS[split], competency, split
        self.num_chunks, self.per_chunk = num_chunks, chunk_words / _WORDS_PER_EVENT
        total = num_chunks * self.per_chunk
        num_people = min(2 + int(total / 10) + rng.randint(0, 1), 10)
        names = [(name, pronoun) for pronoun in ("she", "he") for name in self.pools[pronoun]]
        self.people = dict(rng.sample(names, num_people))
        self.surnames = dict(zip(self.people, rng.sample(self.pools["surname"], num_people), strict=True))
        self.species = {name: rng.choice(self.pools["species"]) for name in self.people}
        num_projects = min(1 + int(total / 25), 4)
        self.projects = tuple(f"Project {name}" for name in rng.sample(self.pools["project"], num_projects))
        self.days = self._days(chunk_words)
        self.history: dict[tuple[str, str], list[Event]] = {}
        self.labels, self.messages = self._label_rule()
        self.chains = self._chain_heads()

    def story(self) -> Story:
        """Writes the chunks in order."""
        quiet = self._quiet_steps()
        events = []
        for step in range(self.num_chunks):
            events.append(() if step in quiet else tuple(self._chunk(step)))
        return Story(
            split=self.split,
            competency=self.competency,
            people=self.people,
            surnames=self.surnames,
            projects=self.projects,
            species=self.species,
            days=self.days,
            events=tuple(events),
            labels=self.labels,
        )

    def _days(self, chunk_words: int) -> tuple[tuple[int, ...], ...]:
        """Draws the days of each chunk: up to four in a long one, none in two chunks."""
        most = max(1, min(chunk_words // 50, 4))
        day, days = 0, []
        for _ in range(self.num_chunks):
            count = self.rng.randint(1, most)
            if self.competency == "LRU" and chunk_words >= 50:
                count = max(count, 2)
            covered = []
            for _ in range(count):
                day += self.rng.randint(1, 3)
                covered.append(day)
            days.append(tuple(covered))
        return tuple(days)

    def _label_rule(self) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Draws the hidden rule, category to number, and the order in which the messages of each category come."""
        count = min(2 + int(self.num_chunks * self.per_chunk / 12), len(CATEGORIES[self.split]))
        chosen = self.rng.sample(sorted(CATEGORIES[self.split]), count)
        numbers = self.rng.sample(range(1, 100), count)
        rule = {category: str(number) for category, number in zip(chosen, numbers, strict=True)}
        messages = {c: self.rng.sample(CATEGORIES[self.split][c], len(CATEGORIES[self.split][c])) for c in chosen}
        return rule, messages

    def _chain_heads(self) -> list[tuple[str, str]]:
        """Draws who has a long story of which kind, as (subject, attribute)."""
        heads = [
            (name, chain) for chain, of in CHAINS.items() for name in (self.people if of == "person" else self.projects)
        ]
        return self.rng.sample(heads, min(max(1, self.num_chunks // 5), len(heads)))

    def _quiet_steps(self) -> set[int]:
        """Draws the chunks of nothing but small talk; never the first nor the last."""
        if self.num_chunks < 3:
            return set()
        inner = range(1, self.num_chunks - 1)
        if self.num_chunks == 3 and self.rng.random() >= 0.6:
            return set()
        return {step for step in inner if self.rng.random() < 0.12}

    def _chunk(self, step: int) -> list[Event]:
        """Writes the events of a chunk, in the order of their days."""
        count = max(1, int(self.per_chunk + self.rng.uniform(-0.6, 0.7)))
        make = {"change": self._change, "drop": self._drop, "label": self._label, "chain": self._chain}
        events: list[Event] = []
        for number in range(count):
            mix = self._mix(step, number)
            kind = self.rng.choices(list(mix), list(mix.values()))[0]
            event = make.get(kind, self._state)(step, events) or self._state(step, events) or self._change(step, events)
            if event is None:
                break  # all is said; a long chunk is filled with small talk
            events.append(event)
            self.history.setdefault((event.subject, event.attribute), []).append(event)
        return sorted(events, key=lambda event: event.day)

    def _mix(self, step: int, number: int) -> dict[str, float]:
        """Returns how likely each kind is for event `number` of a chunk; some kinds are certain, to suit the theme."""
        theme = {"TTL": "label", "LRU": "chain"}.get(self.competency)
        if theme and number == 0:
            return {theme: 1.0}
        # What is to change must be stated first.
        if step == 0 and (self.competency == "CR" or (theme and number == 1)):
            return {"state": 1.0}
        if self.competency == "CR" and step == self.num_chunks - 1 and number == 0:
            return {"change": 1.0}
        return _MIXES[self.competency]

    def _event(self, kind: str, step: int, key: tuple[str, str], *, value: str, **more: str) -> Event:
        """Makes an event of (subject, attribute) on one of the chunk's days."""
        return Event(kind, step, self.rng.choice(self.days[step]), *key, value, **more)

    def _unused(self, attribute: str) -> list[str]:
        """Returns the values of an attribute that nobody has or had."""
        taken = {event.value for (_, name), events in self.history.items() if name == attribute for event in events}
        return [value for value in self.pools[attribute] if value not in taken]

    def _state(self, step: int, told: list[Event]) -> Event | None:
        """Says something of which nothing was said so far."""
        owners = {"person": list(self.people), "project": list(self.projects)}
        free = [
            (name, attribute)
            for attribute, about in ATTRIBUTES.items()
            for name in owners[about.of]
            if (name, attribute) not in self.history and (self.competency != "CR" or about.changes)
        ]
        if not free:
            return None
        key = self.rng.choice(free)
        if key[1] == "lead":
            return self._event("state", step, key, value=self.rng.choice(list(self.people)))
        holders = [value for value in self._current(key[1]) if ATTRIBUTES[key[1]].shared]
        values = holders if holders and self.rng.random() < 0.3 else self._unused(key[1])
        return self._event("state", step, key, value=self.rng.choice(values)) if values else None

    def _current(self, attribute: str) -> list[str]:
        """Returns the values of an attribute that somebody has now."""
        return [
            events[-1].value
            for (_, name), events in self.history.items()
            if name == attribute and events[-1].kind != "drop"
        ]

    def _alive(self, step: int, *, drops: bool) -> list[tuple[str, str]]:
        """Returns the facts of earlier chunks that may change now; one chunk says one thing of each fact."""
        return [
            key
            for key, events in self.history.items()
            if key[1] in ATTRIBUTES
            and (ATTRIBUTES[key[1]].drops if drops else ATTRIBUTES[key[1]].changes)
            and events[-1].kind != "drop"
            and events[-1].step < step
        ]

    def _change(self, step: int, told: list[Event]) -> Event | None:
        """Replaces the value of a fact of an earlier chunk."""
        for key in self._shuffled(self._alive(step, drops=False)):
            past = {event.value for event in self.history[key]}
            values = [v for v in (list(self.people) if key[1] == "lead" else self._unused(key[1])) if v not in past]
            if values:
                value, old = self.rng.choice(values), self.history[key][-1].value
                return self._event("change", step, key, value=value, old=old)
        return None

    def _drop(self, step: int, told: list[Event]) -> Event | None:
        """Withdraws a fact of an earlier chunk."""
        keys = self._alive(step, drops=True)
        if not keys:
            return self._change(step, told)
        key = self.rng.choice(keys)
        return self._event("drop", step, key, value=self.history[key][-1].value)

    def _label(self, step: int, told: list[Event]) -> Event | None:
        """Shows a message with its label."""
        # The examples are spread over the stream, and one of each category is kept back for the global questions.
        given = sum(len(self.history.get((category, "label"), [])) for category in self.labels)
        left = sum(map(len, self.messages.values()))
        if given > (given + left) * (step + 1) / self.num_chunks:
            return None
        free = [category for category, messages in self.messages.items() if len(messages) > 1]
        if not free:
            return None
        shown = [event.subject for event in told]
        fresh = [category for category in free if category not in shown] or free
        category = self.rng.choice(fresh)
        message = f"{category} {self.messages[category].pop()}"
        return self._event("label", step, (category, "label"), value=self.labels[category], message=message)

    def _chain(self, step: int, told: list[Event]) -> Event | None:
        """Goes on with a long story."""
        # Entries of one chain in one chunk lie on different days, in the order told.
        for key in self._shuffled(self.chains):
            past = self.history.get(key, [])
            last = past[-1].day if past else 0
            days = [day for day in self.days[step] if day > last]
            expected = (len(past) + 1) / _MAX_CHAIN * self.num_chunks
            early = len(past) > 1 and expected > step + 1 + self.num_chunks / 3
            values = self._unused(key[1])
            if days and values and len(past) < _MAX_CHAIN and not early:
                event = self._event("chain", step, key, value=self.rng.choice(values))
                return dataclasses.replace(event, day=days[0])
        return None

    def _shuffled(self, keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return self.rng.sample(keys, len(keys))
