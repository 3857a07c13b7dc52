"""What is to be learnt, as question-answer pairs of the caller's, and the questions that must not change.

Swapped subjects, mentions and ordinary prompts are what keeps a small adapter to its subject: they were
measured in this project's own experiments (docs/parameter-memory.md).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from memos_engine.consolidate.prompts import BESIDE, BESIDE_TEST, NAMES, TASKS, UNSEEN, UNSTORED, ordinary
from memos_engine.errors import MemoryInputError
from memos_engine.memory.values import validate_text

MOST_FACTS, MOST_QUESTIONS = 64, 32


@dataclass(frozen=True)
class Fact:
    """One thing to learn: the subject as questions name it, the answer as a sentence, the value in it that
    has to come out, wordings to learn from, and others, held out, to measure with. memory: the id of the
    memory that says so."""

    subject: str
    answer: str
    value: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    memory: str | None = None

    def __post_init__(self) -> None:
        for text in (self.subject, self.answer, self.value, *self.questions, *self.held_out):
            validate_text(text, 500)
        if mentions(self.value, self.subject):
            raise MemoryInputError(
                f"the value {self.value!r} names its subject; leave the subject out of it."
            )
        if not mentions(self.answer, self.value):
            raise MemoryInputError(f"the answer {self.answer!r} does not hold its value {self.value!r}.")
        if not 1 <= len(self.questions) <= MOST_QUESTIONS or not 1 <= len(self.held_out) <= MOST_QUESTIONS:
            raise MemoryInputError(f"a fact needs 1 to {MOST_QUESTIONS} questions, and as many held out.")
        both = set(map(str.casefold, self.questions)) & set(map(str.casefold, self.held_out))
        if both:
            raise MemoryInputError(
                f"{both.pop()!r} is both learnt and held out; word one of them differently."
            )
        for question in (*self.questions, *self.held_out):
            if not mentions(question, self.subject):
                raise MemoryInputError(
                    f"{question!r} does not name {self.subject!r}: requests find the adapter by its subject, "
                    "so every question must name it."
                )

    def about(self, other: str) -> Fact:
        """The same fact told of somebody else."""
        return Fact(
            other,
            _swap(self.answer, self.subject, other),
            self.value,
            tuple(_swap(q, self.subject, other) for q in self.questions),
            tuple(_swap(q, self.subject, other) for q in self.held_out),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `read_facts` reads it."""
        return {
            "subject": self.subject,
            "answer": self.answer,
            "value": self.value,
            "questions": list(self.questions),
            "held_out": list(self.held_out),
            "memory": self.memory,
        }


def read_facts(path: Path) -> list[Fact]:
    """Facts from a JSON file: a list of objects with the fields of `Fact`. Raises `MemoryInputError`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = rows["facts"] if isinstance(rows, dict) else rows
        facts = [_fact(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, MemoryInputError):
            raise
        raise MemoryInputError(
            f"{path} cannot be read as facts ({error!r}); it is a JSON list of objects with subject, answer, "
            "value, questions, held_out, and perhaps memory."
        ) from error
    return checked(facts)


def checked(facts: Sequence[Fact]) -> list[Fact]:
    """Raises `MemoryInputError` for none, or too many."""
    if not 1 <= len(facts) <= MOST_FACTS:
        raise MemoryInputError(f"{len(facts)} facts: give 1 to {MOST_FACTS}; split larger sets by subject.")
    return list(facts)


def _fact(row: Mapping[str, Any]) -> Fact:
    return Fact(
        row["subject"],
        row["answer"],
        row["value"],
        tuple(row["questions"]),
        tuple(row["held_out"]),
        row.get("memory"),
    )


def mentions(text: str, what: str) -> bool:
    """Whether a text holds these words as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(what)}(?!\w)", text, re.IGNORECASE) is not None


def _swap(text: str, subject: str, other: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", lambda _: other, text, flags=re.IGNORECASE)


@dataclass(frozen=True)
class Surroundings:
    """What must stay as the base model has it. Learnt from: swaps and mentions as (question, answer) with the
    memorised answer as forced text; own, tasks and replay as prompts. Measured with, never learnt from: the
    rest."""

    swaps: list[tuple[str, str]]
    own: list[str]
    mentions: list[tuple[str, str]]
    tasks: list[str]
    replay: list[str]
    leak: list[str]
    co: list[str]
    unstored: list[str]
    test_tasks: list[str]
    drift: list[str]


def surroundings(facts: Sequence[Fact], seed: int = 0) -> Surroundings:
    """Deterministic for equal facts and seed."""
    rng = random.Random(seed)
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    taken = {name.casefold() for name in subjects}
    names = [name for name in NAMES if name.casefold() not in taken]
    unseen = [name for name in UNSEEN if name.casefold() not in taken]
    swaps, own, beside = [], [], []
    for fact in facts:
        for number, other in enumerate(rng.sample([*names, *alike(fact.subject)[:2]], 6)):
            told = fact.about(other)
            question = rng.choice(told.questions)
            swaps.append((question, told.answer))
            own.append(question)
            mention = BESIDE[number % len(BESIDE)].format(fact.subject, question)
            beside.append((mention, told.answer))
    leak, co = [], []
    for number, fact in enumerate(facts):
        others = [unseen[number % len(unseen)], alike(fact.subject)[2 + number % 2]]
        both = [fact.about(other) for other in others]
        leak += [one.held_out[0] for one in both]
        co += [BESIDE_TEST.format(fact.subject, one.held_out[-1]) for one in both]
    plain = ordinary()
    rng.shuffle(plain)
    half = len(UNSTORED) // 2
    tasks = [task.format(subject) for task, subject in product(TASKS, subjects[:4])]
    return Surroundings(
        swaps=swaps,
        own=own[::2][:48],
        mentions=beside[:72],
        tasks=[q.format(s) for q, s in product(UNSTORED[:half], subjects[:2])] + tasks[::2],
        replay=plain[64:],
        leak=leak[:24],
        co=co[:24],
        unstored=[q.format(subjects[n % len(subjects)]) for n, q in enumerate(UNSTORED[half:])],
        test_tasks=tasks[1::2][:12],
        drift=plain[:64],
    )


def alike(subject: str) -> list[str]:
    """Names that begin like a subject's and are somebody else's."""
    first, *rest = subject.split()
    made = [" ".join([first[:4].rstrip("aeiou") + end, *rest]) for end in ("ton", "inda", "ery", "wick")]
    return [name if name.casefold() != subject.casefold() else f"{name}son" for name in made]
