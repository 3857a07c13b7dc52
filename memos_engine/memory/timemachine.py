"""The Time Machine's results: what differs between two versions, what a rollback did, which branches "
"are there."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memos_engine.memory.fact import Fact
from memos_engine.memory.values import time_to_text


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """How a memory changed from version `before` to version `after`; `lines` is a unified diff of its "
    "text."""

    cube_id: str
    before: int
    after: int
    lines: tuple[str, ...]
    tags_added: tuple[str, ...]
    tags_removed: tuple[str, ...]
    fact_before: Fact | None
    fact_after: Fact | None

    @property
    def same(self) -> bool:
        """Whether nothing but the version's number changed."""
        return not (self.lines or self.tags_added or self.tags_removed) and (
            self.fact_before == self.fact_after
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "cube_id": self.cube_id,
            "before": self.before,
            "after": self.after,
            "lines": list(self.lines),
            "tags_added": list(self.tags_added),
            "tags_removed": list(self.tags_removed),
            "fact_before": self.fact_before.to_dict() if self.fact_before else None,
            "fact_after": self.fact_after.to_dict() if self.fact_after else None,
        }


def changed_lines(before: str, after: str) -> tuple[str, ...]:
    """A unified diff without its header; nothing for equal texts."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
    return tuple(lines)[2:]


@dataclass(frozen=True, slots=True)
class Rollback:
    """Ids of memories that `rollback_to` changed.

    `restored` have the content and state of the moment again, `put_away` were added later and are archived,
    `ended` were deleted then and are again.
    """

    moment: datetime
    restored: tuple[str, ...]
    put_away: tuple[str, ...]
    ended: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "moment": time_to_text(self.moment),
            "restored": list(self.restored),
            "put_away": list(self.put_away),
            "ended": list(self.ended),
        }


@dataclass(frozen=True, slots=True)
class Branch:
    """A what-if scope of a user: the caller `Principal(tenant, user, name)` works in it."""

    name: str
    at: datetime
    dropped_at: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "name": self.name,
            "at": time_to_text(self.at),
            "dropped_at": time_to_text(self.dropped_at) if self.dropped_at else None,
        }
