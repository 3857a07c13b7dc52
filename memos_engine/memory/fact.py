"""What a memory says about the world, and where it came from: the user's words, so both can be erased."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.values import time_from_text, time_to_text, validate_text

MAX_NAME_CHARS = 256
MAX_NOTE_CHARS = 1000
MAX_LINKS = 32


def folded(text: str) -> str:
    """`text` without differences of case, width and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def gist_of(text: str) -> str:
    """The words of a text, once each and sorted: equal for texts that differ in order, case or "
    "punctuation."""
    plain = folded(text)
    words = {word for word in re.findall(r"\w+|[^\w\s]", plain) if not _is_punctuation(word)}
    return " ".join(sorted(words)) or plain


def _is_punctuation(word: str) -> bool:
    return len(word) == 1 and unicodedata.category(word)[0] in "PC"


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement about one `attribute` of one `subject`, true from `valid_from` until before `valid_to`.

    Both names or none: without them there is only the time in which a memory is valid. Two facts of one
    owner with the same names contradict each other (case and spacing do not matter). `valid_from` None
    becomes the moment of storing; `valid_to` None is no known end. Raises `MemoryInputError`.
    """

    subject: str | None = None
    attribute: str | None = None
    valid_from: datetime | None = None
    valid_to: datetime | None = None

    def __post_init__(self) -> None:
        if (self.subject is None) != (self.attribute is None):
            raise MemoryInputError("a fact needs both subject and attribute, or neither; add the other one.")
        for name in (self.subject, self.attribute):
            if name is not None:
                validate_text(name, MAX_NAME_CHARS)
        starts, ends = self.valid_from, self.valid_to
        for moment in (starts, ends):
            if moment is not None:
                time_to_text(moment)
        if starts is not None and ends is not None and ends < starts:
            raise MemoryInputError(
                f"valid_to {ends.isoformat()} lies before valid_from {starts.isoformat()}; swap or fix them."
            )

    @property
    def key(self) -> str | None:
        """What facts that contradict each other have in common."""
        if self.subject is None or self.attribute is None:
            return None
        return json.dumps([folded(self.subject), folded(self.attribute)], ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; times are ISO 8601 in UTC."""
        return {
            "subject": self.subject,
            "attribute": self.attribute,
            "valid_from": time_to_text(self.valid_from) if self.valid_from else None,
            "valid_to": time_to_text(self.valid_to) if self.valid_to else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fact:
        """The inverse of `to_dict`. Raises `MemoryInputError`, `KeyError`, `TypeError`."""
        starts, ends = data["valid_from"], data["valid_to"]
        return cls(
            subject=data["subject"],
            attribute=data["attribute"],
            valid_from=None if starts is None else time_from_text(starts),
            valid_to=None if ends is None else time_from_text(ends),
        )


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a version came from: the event that triggered it, the context, the model that wrote it, links.

    `watermark` marks texts whose spread is to be traced. Each note has up to 1,000 characters. Raises
    `MemoryInputError`.
    """

    trigger: str | None = None
    context: str | None = None
    model: str | None = None
    watermark: str | None = None
    links: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.links, tuple) or len(self.links) > MAX_LINKS:
            raise MemoryInputError(f"links must be a tuple of at most {MAX_LINKS} texts.")
        for note in (self.trigger, self.context, self.model, self.watermark, *self.links):
            if note is not None:
                validate_text(note, MAX_NOTE_CHARS)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            field.name: list(self.links) if field.name == "links" else getattr(self, field.name)
            for field in fields(self)
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        """The inverse of `to_dict`. Raises `MemoryInputError`, `TypeError`, `KeyError`."""
        return cls(**{**data, "links": tuple(data["links"])})
