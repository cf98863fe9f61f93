"""Makes small talk: sentences that no question asks about. One grammar per split; they share no sentence.

Slots never hold a value of the pools of `_synthetic_world`, so small talk cannot contradict a fact.
"""

from __future__ import annotations

import random
import re

from ._synthetic_wording import articles, listed, sentence

# Patterns that begin with "I" (or speak of "my") need a speaker; the others suit a report, too.
_PERSONAL: dict[str, tuple[str, ...]] = {
    "train": (
        "last night I slept {quality}",
        "I saw a {film} film {time}, and the end was {view}",
        "I could not find my {thing} {time}",
        "I am {mood} today",
        "I waited for the {transport} {wait}",
        "I had {meal} {time}, and it was {taste}",
        "my {thing} is {state} again",
        "I should buy a new {thing}",
        "I like it when the weather is {weather}",
        "I forgot my {thing} on the {transport} {time}",
        "I read a {film} book {time}",
    ),
    "test": (
        "I listened to a {film} radio play {time}",
        "I lost my {thing} and found it {place}",
        "my {relative} was {mood} {time}",
        "I went for a walk {place} {time} and saw a {thing}",
        "I would love to own a {thing}",
        "my {relative} told a {film} joke {time}",
        "I nearly missed the {transport} {time}",
        "I tried {meal} with my {relative}, and it was {taste}",
    ),
}
_IMPERSONAL: dict[str, tuple[str, ...]] = {
    "train": (
        "the weather was {weather} {time}",
        "the {transport} was {late} {time}",
        "it was {weather} and {weather2} {time}",
        "{meal} was {taste} {time}",
        "there was a {film} film on television {time}",
        "the match {time} ended {result}",
        "the local team {played} {time}",
        "somebody left a {thing} on the {transport}",
        "the queue at the {shop} was long {time}",
        "nobody was at the {shop} {time}",
        "the {shop} was closed {time}",
        "the music at the {shop} was {view}",
        "the {transport} was full of people {time}",
        "the sky looked {weather} above the {shop}",
        "what a {weather} day",
    ),
    "test": (
        "a {weather} wind blew {time}",
        "children played {place} {time}",
        "people say the winter will be {weather}",
        "traffic {place} was {late} {time}",
        "the {transport} had a new driver {time}",
        "a {thing} was lying {place} {time}",
        "the radio news {time} was rather {opinion}",
        "the home side {played} {time}",
        "the crowd {place} was {mood}",
        "nobody stayed {place} because it was {weather}",
        "{meal} tasted {taste} {time}",
    ),
}
_SLOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "time": listed(
            "today, this evening, at noon, in the morning, after work, around lunch, in the afternoon, before dinner, "
            "after dark"
        ),
        "quality": listed("well, badly, like a stone, for nine hours, too little, on the sofa"),
        "film": listed("funny, sad, boring, strange, long, romantic, scary, short, clever old, slow"),
        "view": listed("great, awful, too loud, not bad, a surprise, hard to forget, a bit odd, quite good"),
        "taste": listed("great, awful, too salty, not bad, too cold, fine, a bit dry, quite good"),
        "thing": listed("umbrella, scarf, wallet, glove, notebook, pencil, backpack, jacket, hat, water bottle, lamp"),
        "mood": listed("tired, cheerful, sleepy, nervous, hungry, in a good mood, lazy, full of energy"),
        "transport": listed("bus, tram, train, metro, night bus, ferry, airport bus"),
        "wait": listed("for ten minutes, for half an hour, in the rain, with cold feet, for ages, without luck"),
        "meal": listed("soup, toast, a sandwich, porridge, a salad, a fried egg, leftover rice, a bowl of cereal"),
        "state": listed("wet, lost, torn, dusty, at the office, under the bed, broken"),
        "weather": listed("sunny, rainy, windy, foggy, cloudy, stormy, warm, chilly, grey"),
        "weather2": listed("humid, dark, muddy, slippery, bright"),
        "late": listed("late, early, on time, cancelled, crowded, slow, very clean, noisy"),
        "result": listed("in a draw, one to nil, two all, after extra time, without a goal, in the rain"),
        "played": listed("won, lost, played well, played badly, scored twice, had bad luck, was unlucky"),
        "shop": listed(
            "bakery, post office, supermarket, bank, chemist's shop, bookshop, station, cinema, hairdresser"
        ),
    },
    "test": {
        "time": listed(
            "earlier today, late at night, at sunrise, during the break, an hour ago, at dusk, on the way home, after "
            "school"
        ),
        "film": listed("clever, gloomy, silly, mysterious, touching, dull, bold"),
        "opinion": listed("lovely, terrible, confusing, long, plain, pleasant, disappointing"),
        "taste": listed("lovely, terrible, better than expected, rather plain, pleasant, disappointing, far too sweet"),
        "thing": listed("basket, candle, blanket, kite, ladder, cushion, suitcase, mirror, kettle, rope"),
        "mood": listed("calm, excited, grumpy, relaxed, worried, playful, thirsty, bored"),
        "transport": listed("shuttle, coach, express train, taxi, school bus, boat"),
        "relative": listed("aunt, uncle, neighbour, cousin, grandmother, flatmate, hairdresser"),
        "meal": listed(
            "stew, a pasta bake, a bagel, muesli, a plate of beans, an avocado, a roast potato, a fruit plate"
        ),
        "weather": listed("freezing, mild, gusty, drizzly, dry, icy, snowy, damp"),
        "late": listed("delayed, smooth, unusually quiet, worse than ever, quicker than before, hectic"),
        "place": listed(
            "near the park, by the river, at the market, on the square, behind the school, at the playground, in the "
            "old street, outside the theatre, at the corner"
        ),
        "played": listed(
            "was beaten, came from behind, kept a clean sheet, missed a penalty, celebrated a win, trained in the mud"
        ),
    },
}
_SLOT = re.compile(r"\{(\w+)\}")


def small_talk(rng: random.Random, split: str, *, personal: bool) -> str:
    """Draws one sentence; with `personal`, it may be about the speaker."""
    patterns = _IMPERSONAL[split] + (_PERSONAL[split] if personal else ())
    slots = _SLOTS[split]
    text = _SLOT.sub(lambda match: rng.choice(slots[match[1]]), rng.choice(patterns))
    return sentence(articles(text))
