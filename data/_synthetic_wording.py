"""Defines the form of a wording table, what each split must say of each attribute, and fills templates in.

A template is lower-case text with these marks:
    {S} "I" or the name    {Ss} "my" or "Alma's"    {he} "I" or "she"    {my} "my" or "her"
    {v} the value    {old} the value before    {when} a time in the past
    [live|lives] the verb after "I" and after a name
"a" becomes "an" where the word filled in asks for it.
"""

from __future__ import annotations

import dataclasses
import re

from . import _text


@dataclasses.dataclass(frozen=True)
class Wording:
    """Holds the templates of one attribute; those after `ask` speak of people and projects by name only.

    Attributes:
        state: Says that the subject has value {v}.
        change: Says that {v} replaces {old}.
        drop: Withdraws {v}.
        ask: Asks for the value; the one without "{Ss}" also takes a description for the subject.
        dropped: Asks which value was withdrawn.
        still: Asks for yes or no about {v}.
        first: Asks which of {a} and {b} came first.
        times: Asks how many changes there were.
        many: Asks how many subjects have {v}.
        who: Describes the subject by {v}.
        summary: Asks for all entries of a chain.
        length: Asks for the number of entries of a chain.
    """

    state: tuple[str, ...]
    ask: tuple[str, ...]
    change: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    many: tuple[str, ...] = ()
    who: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()
    length: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Frames:
    """Holds what stands around the facts: openers, endings, headings and greetings of each genre.

    Attributes:
        when: Past times for {when}.
        openers: Stand before any sentence.
        change_openers: Stand before a change or a withdrawal.
        hearsay: Stand before a sentence about somebody else, in speech.
        endings: Stand after a spoken sentence, before the full stop.
        greetings, closings, subjects: Of e-mails.
        diary, report, channel: Headings; {S} is the writer.
        label_state, label_ask, label_ask_new: Labelled examples, with {m} the message and {v} the label.
    """

    when: tuple[str, ...]
    openers: tuple[str, ...]
    change_openers: tuple[str, ...]
    hearsay: tuple[str, ...]
    endings: tuple[str, ...]
    greetings: tuple[str, ...]
    closings: tuple[str, ...]
    subjects: tuple[str, ...]
    diary: tuple[str, ...]
    report: tuple[str, ...]
    channel: tuple[str, ...]
    label_state: tuple[str, ...]
    label_ask: tuple[str, ...]
    label_ask_new: tuple[str, ...]


_VERB = re.compile(r"\[([^|\]]*)\|([^\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO]|um|un(?!i))")
_PRONOUNS = {"she": "her", "he": "his"}


def listed(text: str) -> tuple[str, ...]:
    """Returns the entries of a list that is written with commas between them."""
    return tuple(_text.one_line(text).split(", "))


def fill(template: str, subject: str, pronoun: str = "", *, first_person: bool = False, **slots: str) -> str:
    """Replaces the marks of a template; the first letter is left as it is."""
    text = _VERB.sub(r"\1" if first_person else r"\2", template)
    if first_person:
        return articles(text.format(S="I", Ss="my", he="I", my="my", **slots))
    return articles(text.format(S=subject, Ss=f"{subject}'s", he=pronoun, my=_PRONOUNS.get(pronoun, "its"), **slots))


def articles(text: str) -> str:
    """Makes "a" an "an" before a vowel; "u" counts in "umbrella", not in "ukulele"."""
    return _ARTICLE.sub(r"\1n ", text)


def sentence(text: str) -> str:
    """Gives a text a capital first letter and a full stop at its end, unless it has an end mark."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."
