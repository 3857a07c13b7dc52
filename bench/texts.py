"""Deterministic prose of any length, so that benchmarks need no data set."""

from __future__ import annotations

import random

_PEOPLE = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Edith",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Leo",
]
_THINGS = ["bicycle", "piano", "garden", "boat", "lamp", "kettle", "ladder", "telescope", "blanket", "clock"]
_PLACES = ["Lisbon", "Oslo", "Prague", "Toronto", "Nairobi", "Kyoto", "Lima", "Dublin", "Vienna", "Hanoi"]
_COLOURS = ["red", "green", "blue", "yellow", "black", "white", "brown", "grey"]
_JOBS = ["teacher", "carpenter", "doctor", "pilot", "baker", "painter", "farmer", "lawyer"]


def facts(seed: int, sentences: int) -> str:
    """Sentences about invented people; the same seed gives the same text."""
    rng = random.Random(seed)
    lines = []
    for _ in range(sentences):
        name, place, job = rng.choice(_PEOPLE), rng.choice(_PLACES), rng.choice(_JOBS)
        colour, thing, year = rng.choice(_COLOURS), rng.choice(_THINGS), rng.randint(1950, 2020)
        lines.append(
            rng.choice(
                [
                    f"{name} moved to {place} in {year} and works there as a {job}.",
                    f"The {colour} {thing} of {name} was bought in {place} in {year}.",
                    f"{name} gave the {thing} to a {job} from {place}, who painted it {colour}.",
                    f"Since {year} {name} has kept a {colour} {thing} in a house near {place}.",
                ]
            )
        )
    return " ".join(lines)


def questions(rng: random.Random, count: int) -> list[str]:
    """Questions about the invented people, each about another one of them or another of their things."""
    forms = [
        "Where does {name} live, and what is the work of {name} there?",
        "Which {thing} did {name} buy in {place}, and when?",
        "Who painted the {thing} of {name} {colour}?",
        "What has {name} kept in a house near {place}?",
    ]
    out = []
    for i in range(count):
        out.append(
            forms[i % len(forms)].format(
                name=_PEOPLE[(i * 5) % len(_PEOPLE)],
                thing=rng.choice(_THINGS),
                place=rng.choice(_PLACES),
                colour=rng.choice(_COLOURS),
            )
        )
    return out
