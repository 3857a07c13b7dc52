"""MemCube: a memory with descriptive, governance and behavioural metadata (arXiv 2507.03724, section 4)."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState

MAX_TEXT_CHARS = 1_000_000
MAX_TAGS = 64
MAX_TAG_CHARS = 128
KINDS = ("text", "kv", "lora")
ORIGINS = ("user_input", "inference", "retrieval", "fine_tuning")
_LABEL = re.compile(r"[a-z][a-z0-9_]{0,31}")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def validate_text(text: object, max_chars: int = MAX_TEXT_CHARS) -> str:
    """`text` itself, when it can be a memory or a query; else `MemoryInputError` saying what to change."""
    if not isinstance(text, str):
        raise MemoryInputError(f"text must be a str, not {type(text).__name__}; decode or convert it first.")
    if not text or text.isspace():
        raise MemoryInputError("the text is empty; give at least one character that is not white space.")
    if len(text) > max_chars:
        raise MemoryInputError(
            f"the text has {len(text):,} characters, the limit is {max_chars:,}; split it into smaller texts."
        )
    if "\0" in text:
        raise MemoryInputError(f"the text has a NUL character at index {text.index(chr(0))}; remove it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MemoryInputError(
            f"the text has a lone surrogate at index {error.start}, so it is not valid Unicode; decode its "
            "source with errors='replace'."
        ) from None
    return text


def validate_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags without repetitions, in order. Raises `MemoryInputError`."""
    if isinstance(tags, (str, bytes)):
        raise MemoryInputError(f"tags must be a list of strings, not one {type(tags).__name__}.")
    unique = tuple(dict.fromkeys(validate_text(tag, MAX_TAG_CHARS) for tag in tags))
    if len(unique) > MAX_TAGS:
        raise MemoryInputError(f"a memory can have {MAX_TAGS} tags, not {len(unique)}; give fewer.")
    return unique


def validate_label(what: str, value: object) -> str:
    """A short lower-case word such as `fact`. It survives erasure, so free text is refused."""
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise MemoryInputError(
            f"{what} must be a word of at most 32 lower-case letters, digits and underscores, not {value!r}."
        )
    return value


def validate_origin(value: object) -> str:
    """One of `ORIGINS`. Raises `MemoryInputError`."""
    if value not in ORIGINS:
        raise MemoryInputError(f"origin must be one of {', '.join(ORIGINS)}, not {value!r}.")
    return str(value)


def is_cube_id(value: object) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def time_to_text(moment: datetime) -> str:
    """ISO 8601 in UTC, always 32 characters, so that texts sort as times do. Raises `MemoryInputError`."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise MemoryInputError(f"a time must be a datetime with a time zone, not {moment!r}.")
    return moment.astimezone(timezone.utc).isoformat(timespec="microseconds")


def time_from_text(text: str) -> datetime:
    """The inverse of `time_to_text`. Raises `MemoryInputError`."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise MemoryInputError(f"{text!r} is not an ISO 8601 time.") from error
    if moment.tzinfo is None:
        raise MemoryInputError(f"the time {text!r} has no zone; add +00:00.")
    return moment.astimezone(timezone.utc)


class CubeIds:
    """UUIDs of version 7: they sort by creation, also within a millisecond and when the clock steps back."""

    def __init__(self, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random_bytes
        self._lock = threading.Lock()
        self._last = 0  # (milliseconds << 12) | counter

    def new(self, now: datetime) -> str:
        with self._lock:
            ticks = int(now.timestamp() * 1000) << 12
            self._last = max(ticks, self._last + 1)
            last = self._last
        low = int.from_bytes(self._random(8), "big") & ((1 << 62) - 1) | (0b10 << 62)
        digits = f"{last >> 12:012x}7{last & 0xFFF:03x}{low:016x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@dataclass(frozen=True, slots=True)
class MemCube:
    """One memory. Times are in UTC; `body` is None once its text has been erased.

    `version` counts contents, not moves: archiving and restoring keep it. Numbers of `uses` are exact,
    `priority` is higher for more important memories, `ttl_at` is when the memory expires by itself.
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
    # governance
    visibility: str = "private"
    priority: int = 0
    ttl_at: datetime | None = None
    sensitivity: str = "normal"
    # behavioural
    uses: int = 0
    last_used_at: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, grouped as in the paper; times are ISO 8601 in UTC."""
        return {
            "id": self.id,
            "provenance_id": self.provenance_id,
            "owner": {"tenant": self.owner.tenant, "user": self.owner.user},
            "kind": self.kind,
            "body": self.body,
            "version": self.version,
            "state": self.state.value,
            "descriptive": {
                "created_at": time_to_text(self.created_at),
                "updated_at": time_to_text(self.updated_at),
                "origin": self.origin,
                "semantic_type": self.semantic_type,
                "tags": list(self.tags),
            },
            "governance": {
                "visibility": self.visibility,
                "priority": self.priority,
                "ttl_at": time_to_text(self.ttl_at) if self.ttl_at else None,
                "sensitivity": self.sensitivity,
            },
            "behavioural": {
                "uses": self.uses,
                "last_used_at": time_to_text(self.last_used_at) if self.last_used_at else None,
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemCube:
        """The inverse of `to_dict`. Raises `MemoryInputError` for anything else."""
        try:
            described, governed, behaved = data["descriptive"], data["governance"], data["behavioural"]
            cube = cls(
                id=data["id"],
                provenance_id=data["provenance_id"],
                owner=Principal(**data["owner"]),
                kind=data["kind"],
                body=None if data["body"] is None else validate_text(data["body"]),
                version=data["version"],
                state=LifecycleState(data["state"]),
                created_at=time_from_text(described["created_at"]),
                updated_at=time_from_text(described["updated_at"]),
                origin=validate_origin(described["origin"]),
                semantic_type=validate_label("semantic_type", described["semantic_type"]),
                tags=validate_tags(described["tags"]),
                visibility=validate_label("visibility", governed["visibility"]),
                priority=governed["priority"],
                ttl_at=None if governed["ttl_at"] is None else time_from_text(governed["ttl_at"]),
                sensitivity=validate_label("sensitivity", governed["sensitivity"]),
                uses=behaved["uses"],
                last_used_at=(
                    None if behaved["last_used_at"] is None else time_from_text(behaved["last_used_at"])
                ),
            )
        except MemoryInputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryInputError(f"this is no MemCube as made by to_dict(): {error!r}.") from error
        numbers = (cube.version, cube.uses, cube.priority)
        if any(type(n) is not int for n in numbers) or cube.version < 1 or cube.uses < 0:
            raise MemoryInputError(
                "version, uses and priority of a MemCube must be integers, version at least 1."
            )
        if not (is_cube_id(cube.id) and is_cube_id(cube.provenance_id)) or cube.kind not in KINDS:
            raise MemoryInputError(
                f"{cube.id!r} is no memory id, or {cube.kind!r} is none of {', '.join(KINDS)}."
            )
        return cube


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
