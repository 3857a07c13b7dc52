"""What a check of a whole store found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """Something damaged. `what` says also what to do; `mendable`: it is a copy of what the store has
    elsewhere, so that a repair drops it or builds it anew; `mended`: that was done."""

    what: str
    mendable: bool = False
    mended: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a store: how many `unit` were looked at, what is wrong with them, what is only to be
    known."""

    name: str
    looked_at: int
    unit: str
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, or not any longer."""
        return all(problem.mended for problem in self.problems)


@dataclass(frozen=True, slots=True)
class Checkup:
    """The parts of a store, in the order in which they were checked."""

    parts: tuple[Part, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, or not any longer."""
        return all(part.sound for part in self.parts)

    @property
    def mendable(self) -> bool:
        """Whether a repair would help with something."""
        return any(
            problem.mendable and not problem.mended for part in self.parts for problem in part.problems
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "sound": self.sound,
            "mendable": self.mendable,
            "parts": [{**asdict(part), "sound": part.sound} for part in self.parts],
        }


def summary(names: Sequence[str], most: int = 5) -> str:
    """A list for a message, which stays short however many there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
