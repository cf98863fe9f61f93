"""Asks questions of a story: some that one chunk answers alone, and some that need the whole stream."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from finemem_jax.types import Question

from ._synthetic_story import Event, Story
from ._synthetic_text import FRAMES, WORDINGS
from ._synthetic_wording import fill
from ._synthetic_world import ATTRIBUTES, CATEGORIES, CHAINS

# Which kinds of global questions a stream prefers, by competency; each list is also the order of the first ones.
_KINDS = {
    "AR": {"plain": 4, "multi_chunk": 4, "latest_value": 1, "count": 1, "order": 1, "withdrawn": 1, "still_true": 1},
    "CR": {"latest_value": 6, "withdrawn": 3, "still_true": 1, "count": 1, "order": 2, "multi_chunk": 1, "plain": 1},
    "TTL": {"label": 6, "plain": 1, "multi_chunk": 1, "latest_value": 1},
    "LRU": {"summary": 4, "order": 3, "count": 2, "plain": 1, "multi_chunk": 1, "latest_value": 1},
}

_YES_NO = ("yes", "no")


def chunk_questions(rng: random.Random, story: Story, step: int, *, limit: int) -> tuple[Question, ...]:
    """Draws questions that chunk `step` answers verbatim; none for small talk."""
    questions = [_about(rng, story, event) for event in story.events[step]]
    return tuple(rng.sample(questions, min(limit, len(questions))))


def _about(rng: random.Random, story: Story, event: Event) -> Question:
    """Asks what one event says."""
    frames = FRAMES[story.split]
    if event.kind == "label":
        text = rng.choice(frames.label_ask).format(m=event.message)
        return Question(text, (event.value,), "number", (event.step,), "label", _numbers(story))
    wording = WORDINGS[story.split][event.attribute]
    text = _fill(story, rng.choice(wording.dropped if event.kind == "drop" else wording.ask), event, d=str(event.day))
    kind = {"state": "plain", "change": "latest_value", "drop": "withdrawn", "chain": "plain"}[event.kind]
    return Question(text, (event.value,), "substring", (event.step,), kind)


def _fill(story: Story, template: str, event: Event, *, subject: str = "", **slots: str) -> str:
    """Fills a question in with an event; `subject` stands for the event's subject."""
    slots = {"v": event.value, "species": story.species.get(event.subject, "pet"), **slots}
    pronoun = story.people.get(event.subject, "")
    text = fill(template, subject or event.subject, pronoun, first_person=False, **slots)
    return text[0].upper() + text[1:]


def global_questions(rng: random.Random, story: Story, limit: int) -> tuple[Question, ...]:
    """Draws up to `limit` different questions, of kinds that suit the stream's competency."""
    by_kind: dict[str, list[Question]] = {}
    for question in _candidates(rng, story):
        by_kind.setdefault(question.kind, []).append(question)
    for questions in by_kind.values():
        rng.shuffle(questions)
    weights = _KINDS[story.competency]
    chosen: list[Question] = []
    while len(chosen) < limit:
        # Kinds outside the preferred ones have weight 0 and come last, once those are used up.
        kinds = [kind for kind in weights if by_kind.get(kind)] or [kind for kind in by_kind if by_kind[kind]]
        if not kinds:
            break
        kind = kinds[0] if not chosen else rng.choices(kinds, [weights.get(kind, 1) for kind in kinds])[0]
        chosen.append(by_kind[kind].pop())
    return tuple(rng.sample(chosen, len(chosen)))


def _candidates(rng: random.Random, story: Story) -> Iterator[Question]:
    """Yields all questions that the whole story answers."""
    histories = story.histories()
    for (_, attribute), events in histories.items():
        if attribute == "label":
            yield from _labels(rng, story, events)
        elif attribute in CHAINS:
            yield from _chain(rng, story, events)
        else:
            yield from _fact(rng, story, events)
            yield from _joins(rng, story, events)
    yield from _head_counts(rng, story)


def _numbers(story: Story) -> tuple[str, ...]:
    """Returns the labels that there are."""
    return tuple(sorted(story.labels.values(), key=int))


def _labels(rng: random.Random, story: Story, events: list[Event]) -> Iterator[Question]:
    """Asks for the label of messages that were not shown, of the same category as those that were."""
    category = events[0].subject
    shown = {event.message for event in events}
    unseen = [m for m in (f"{category} {end}" for end in CATEGORIES[story.split][category]) if m not in shown]
    for message in rng.sample(unseen, min(3, len(unseen))):
        text = rng.choice(FRAMES[story.split].label_ask_new).format(m=message)
        yield Question(text, (events[0].value,), "number", _steps(events), "label", _numbers(story))


def _chain(rng: random.Random, story: Story, events: list[Event]) -> Iterator[Question]:
    """Asks for all entries of a long story, for their number and their order."""
    wording = WORDINGS[story.split][events[0].attribute]
    yield _about(rng, story, rng.choice(events))
    if len(events) < 2:
        return
    keywords = ", ".join(event.value for event in events)
    text = _fill(story, rng.choice(wording.summary), events[0])
    yield Question(text, (keywords,), "keyword_recall", _steps(events), "summary")
    yield Question(
        _fill(story, rng.choice(wording.length), events[0]), (str(len(events)),), "number", _steps(events), "count"
    )
    yield _order(rng, story, events)


def _order(rng: random.Random, story: Story, events: list[Event]) -> Question:
    """Asks which of two events of one attribute came first."""
    first, second = sorted(rng.sample(events, 2), key=lambda event: event.day)
    a, b = rng.sample((first.value, second.value), 2)
    text = _fill(story, rng.choice(WORDINGS[story.split][first.attribute].first), first, a=a, b=b)
    return Question(text, (first.value,), "substring", _steps((first, second)), "order", (a, b))


def _fact(rng: random.Random, story: Story, events: list[Event]) -> Iterator[Question]:
    """Asks what holds in the end, what no longer does, and how often it changed."""
    wording, last = WORDINGS[story.split][events[0].attribute], events[-1]
    changes = [event for event in events if event.kind == "change"]
    if last.kind == "drop":
        steps = _steps((events[-2], last))
        yield Question(_fill(story, rng.choice(wording.still), last), ("no",), "exact", steps, "withdrawn", _YES_NO)
        if not changes:  # otherwise the value before the change was given up, too
            text = _fill(story, rng.choice(wording.dropped), last)
            yield Question(text, (last.value,), "substring", (last.step,), "withdrawn")
    else:
        kind = "latest_value" if changes else "plain"
        yield Question(_fill(story, rng.choice(wording.ask), last), (last.value,), "substring", (last.step,), kind)
        if wording.still:
            yield Question(
                _fill(story, rng.choice(wording.still), last), ("yes",), "exact", (last.step,), "still_true", _YES_NO
            )
    if changes:
        if wording.still:
            change = changes[-1]
            text = _fill(story, rng.choice(wording.still), change, v=change.old)
            yield Question(text, ("no",), "exact", (change.step,), "withdrawn", _YES_NO)
        text = _fill(story, rng.choice(wording.times), last)
        yield Question(text, (str(len(changes)),), "number", _steps(changes), "count")
        yield _order(rng, story, [events[0], *changes])


def _joins(rng: random.Random, story: Story, history: list[Event]) -> Iterator[Question]:
    """Names a subject by a fact of one chunk, and asks for a fact of another one."""
    wording, histories, bridge = WORDINGS[story.split], story.histories(), history[0]
    subject, attribute = bridge.subject, bridge.attribute
    # The describing fact never changed, and nobody else ever had its value: the description fits one person.
    if not wording[attribute].who or len(history) > 1:
        return
    others = [e for (name, what), es in histories.items() if what == attribute and name != subject for e in es]
    if attribute != "lead" and bridge.value in {event.value for event in others}:
        return
    person = bridge.value if attribute == "lead" else subject
    description = _fill(story, rng.choice(wording[attribute].who), bridge)
    description = description[0].lower() + description[1:]
    for (name, asked), events in histories.items():
        last = events[-1]
        if name != person or asked not in ATTRIBUTES or asked == attribute or last.kind == "drop":
            continue
        if last.step == bridge.step:
            continue
        template = rng.choice([text for text in wording[asked].ask if "{Ss}" not in text])
        text = _fill(story, template, last, subject=description)
        yield Question(text, (last.value,), "substring", _steps((bridge, last)), "multi_chunk")


def _head_counts(rng: random.Random, story: Story) -> Iterator[Question]:
    """Asks how many people live in Turin, where at least two do."""
    for attribute, about in ATTRIBUTES.items():
        holders: dict[str, list[Event]] = {}
        for (_, what), events in story.histories().items():
            if what == attribute and about.shared and events[-1].kind != "drop":
                holders.setdefault(events[-1].value, []).append(events[-1])
        for events in holders.values():
            if len(events) > 1:
                text = _fill(story, rng.choice(WORDINGS[story.split][attribute].many), events[0])
                yield Question(text, (str(len(events)),), "number", _steps(events), "count")


def _steps(events: Iterable[Event]) -> tuple[int, ...]:
    return tuple(sorted({event.step for event in events}))
