"""MemCube: a memory with descriptive, governance and behavioural metadata (arXiv 2507.03724, section 4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.fact import Fact, Provenance
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.values import (
    MAX_TAG_CHARS,
    MAX_TAGS,
    MAX_TEXT_CHARS,
    ORIGINS,
    CubeIds,
    is_cube_id,
    time_from_text,
    time_to_text,
    validate_label,
    validate_origin,
    validate_tags,
    validate_text,
)

__all__ = [
    "KINDS",
    "MAX_TAGS",
    "MAX_TAG_CHARS",
    "MAX_TEXT_CHARS",
    "ORIGINS",
    "VISIBILITIES",
    "CubeIds",
    "Fact",
    "HistoryEntry",
    "MemCube",
    "Provenance",
    "is_cube_id",
    "time_from_text",
    "time_to_text",
    "validate_label",
    "validate_origin",
    "validate_tags",
    "validate_text",
    "validate_visibility",
]

KINDS = ("text", "kv", "lora")
VISIBILITIES = ("private", "shared", "read_only")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


def validate_visibility(value: object) -> str:
    """One of `VISIBILITIES`. Raises `MemoryInputError`."""
    if value not in VISIBILITIES:
        raise MemoryInputError(f"visibility must be one of {', '.join(VISIBILITIES)}, not {value!r}.")
    return str(value)


@dataclass(frozen=True, slots=True)
class MemCube:
    """One memory. Times are in UTC; `body` is None once its text has been erased.

    `version` counts contents, not moves: archiving and restoring keep it; `parent` is the version that this
    one was made from. `fact.valid_to` is also set by a later memory that contradicts this one. Numbers of
    `uses` are exact, `priority` is higher for more important memories, `ttl_at` is when the memory expires
    by itself, `half_life_s` (seconds) how fast it fades without use. `source_gone_at`: since when a memory
    that this one was derived from is deleted. `fingerprint` (32 hex digits) is keyed and equal for texts of
    the same words.
    """

    id: str
    provenance_id: str
    owner: Principal
    kind: str
    body: str | None
    version: int
    state: LifecycleState
    # descriptive
    created_at: datetime
    updated_at: datetime
    origin: str = "user_input"
    semantic_type: str = "fact"
    tags: tuple[str, ...] = ()
    fact: Fact | None = None
    provenance: Provenance | None = None
    # governance
    visibility: str = "private"
    priority: int = 0
    ttl_at: datetime | None = None
    half_life_s: float | None = None
    sensitivity: str = "normal"
    source_gone_at: datetime | None = None
    # behavioural
    uses: int = 0
    last_used_at: datetime | None = None
    fingerprint: str | None = None
    parent: int | None = None

    def strength(self, now: datetime) -> float:
        """How much of the memory is left at `now`, 1 to 0: halved by every half-life without use or "
        "change."""
        if self.half_life_s is None:
            return 1.0
        idle = (now - max(self.updated_at, self.last_used_at or self.updated_at)).total_seconds()
        return float(0.5 ** (max(idle, 0.0) / self.half_life_s))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, grouped as in the paper; times are ISO 8601 in UTC. `cube_schema()` describes it."""
        data: dict[str, Any] = {name: _plain(getattr(self, name)) for name in TOP}
        for group, names in GROUPS.items():
            data[group] = {name: _plain(getattr(self, name)) for name in names}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemCube:
        """The inverse of `to_dict`. Raises `MemoryInputError` for anything else."""
        try:
            found = {name: data[name] for name in TOP}
            for group, names in GROUPS.items():
                found.update({name: data[group][name] for name in names})
            return cls(**{name: _CHECKS[name](value) for name, value in found.items()})
        except MemoryInputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryInputError(f"this is no MemCube as made by to_dict(): {error!r}.") from error


TOP = ("id", "provenance_id", "owner", "kind", "body", "version", "state")
GROUPS = {
    "descriptive": ("created_at", "updated_at", "origin", "semantic_type", "tags", "fact", "provenance"),
    "governance": ("visibility", "priority", "ttl_at", "half_life_s", "sensitivity", "source_gone_at"),
    "behavioural": ("uses", "last_used_at", "fingerprint", "parent"),
}


def _plain(value: Any) -> Any:
    if isinstance(value, (Principal, Fact, Provenance)):
        return value.to_dict()
    if isinstance(value, datetime):
        return time_to_text(value)
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _integer(what: str, low: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value < 2**63:
            raise MemoryInputError(f"{what} must be an integer of {low} to 2**63 - 1, not {value!r}.")
        return value

    return check


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise MemoryInputError(f"half_life_s must be a number of seconds above 0, not {value!r}.")
    return float(value)


def _is(sound: Callable[[Any], Any], what: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not sound(value):
            raise MemoryInputError(f"{value!r} is no {what}.")
        return value

    return check


validate_half_life = _optional(_seconds)
validate_priority = _integer("priority", -(2**63))
_time = _optional(time_from_text)
_id = _is(is_cube_id, "memory id")
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "id": _id,
    "provenance_id": _id,
    "owner": lambda value: Principal(**value),
    "kind": _is(lambda kind: kind in KINDS, f"kind ({', '.join(KINDS)})"),
    "body": _optional(validate_text),
    "version": _integer("version", 1),
    "state": LifecycleState,
    "created_at": time_from_text,
    "updated_at": time_from_text,
    "origin": validate_origin,
    "semantic_type": lambda value: validate_label("semantic_type", value),
    "tags": validate_tags,
    "fact": _optional(Fact.from_dict),
    "provenance": _optional(Provenance.from_dict),
    "visibility": validate_visibility,
    "priority": validate_priority,
    "ttl_at": _time,
    "half_life_s": validate_half_life,
    "sensitivity": lambda value: validate_label("sensitivity", value),
    "source_gone_at": _time,
    "uses": _integer("uses", 0),
    "last_used_at": _time,
    "fingerprint": _optional(_is(_FINGERPRINT.fullmatch, "fingerprint of 32 hex digits")),
    "parent": _optional(_integer("parent", 1)),
}


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One event in a memory's life, with the state after it; `text` is None once erased."""

    version: int
    at: datetime
    event: str
    state: LifecycleState
    text: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; the time is ISO 8601 in UTC."""
        return {
            "version": self.version,
            "at": time_to_text(self.at),
            "event": self.event,
            "state": self.state.value,
            "text": self.text,
        }
