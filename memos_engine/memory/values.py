"""What a memory may be made of: texts, tags, labels, times and ids, checked where they enter."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from datetime import datetime, timezone

from memos_engine.errors import MemoryInputError

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


def is_number(value: object) -> bool:
    """Whether this can be a version or a row number: SQLite takes no longer integers."""
    return type(value) is int and 0 < value < 2**63


def time_to_text(moment: datetime) -> str:
    """ISO 8601 in UTC, always 32 characters, so that texts sort as times do. Raises `MemoryInputError`."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise MemoryInputError(f"a time must be a datetime with a time zone, not {moment!r}.")
    return _utc(moment).isoformat(timespec="microseconds")


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError as error:
        raise MemoryInputError(
            f"the time {moment.isoformat()} is outside of the years 1 to 9999 in UTC; use a nearer one."
        ) from error


def time_from_text(text: str) -> datetime:
    """The inverse of `time_to_text`. Raises `MemoryInputError`."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise MemoryInputError(f"{text!r} is not an ISO 8601 time.") from error
    if moment.tzinfo is None:
        raise MemoryInputError(f"the time {text!r} has no zone; add +00:00.")
    return _utc(moment)


def moment_text(moment: datetime | str) -> str:
    """A point in time as `time_to_text` writes it, from an aware datetime or an ISO 8601 text.

    A text without a zone is in UTC, a date alone is its first instant. Raises `MemoryInputError`.
    """
    if isinstance(moment, datetime):
        return time_to_text(moment)
    text = moment[:-1] + "+00:00" if isinstance(moment, str) and moment[-1:] in ("Z", "z") else moment
    try:
        parsed = datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise MemoryInputError(
            f"{moment!r} is no point in time; write it like 2026-11-01 or 2026-11-01T12:30:00+00:00."
        ) from error
    return time_to_text(parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=timezone.utc))


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
