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
