"""Reading the audit trail (the paper's LogQuery): who did what when, to which memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.audit import GENESIS
from memos_engine.memory.cube import time_from_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_view import visible
from memos_engine.memory.values import is_number, moment_text

_NAMED = ("$.cube_id", "$.source", "$.target", "$.grant.cube_id")
_IDS = ", ".join(f"(json_extract(a.event, '{path}'))" for path in _NAMED)

# Making and dropping a branch is what its user does outside of it.
_ABOUT_BRANCHES = ("branched", "branch_dropped")
_SCOPE = (
    f"CASE WHEN json_extract(a.event, '$.event') IN {_ABOUT_BRANCHES} AND json_extract(a.event, '$.cube_id') "
    "IS NULL THEN '' ELSE coalesce(json_extract(a.event, '$.branch'), '') END"
)


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event of the trail. `details` is all that was written of it, its name, time and caller included.

    `seq` is its place in the trail, None in a user's own log: it would count what others did.
    """

    seq: int | None
    at: datetime
    event: str
    details: Mapping[str, Any]

    @property
    def user(self) -> str:
        """Whose event it is, `user` or `user/branch`; empty for those of the store itself."""
        user, branch = (str(self.details.get(name, "")) for name in ("user", "branch"))
        outside = self.event in _ABOUT_BRANCHES and not self.cube_id
        return f"{user}/{branch}" if branch and not outside else user

    @property
    def cube_id(self) -> str:
        """The memory it is about; empty for those that are about none or several."""
        grant = self.details.get("grant")
        found = grant.get("cube_id") if isinstance(grant, dict) else self.details.get("cube_id")
        return str(found or "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; the time is ISO 8601 in UTC."""
        place = {} if self.seq is None else {"seq": self.seq}
        return {**place, **self.details}


class LogVerbs(StoreBase):
    """The audit trail."""

    def audit_log(
        self,
        principal: Principal | None,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        event: str | None = None,
        cube_id: str | None = None,
        limit: int | None = None,
    ) -> list[AuditEvent]:
        """Events of the caller, oldest first; with None those of everybody, for the store's operator.

        Of the caller's, those about memories that the caller may not see any longer are left out. `since` and
        `until` (both included) are moments on the store's clock, `event` a name, `cube_id` a memory that the
        event is about, `limit` keeps the last so many. Raises `MemoryInputError`.
        """
        if limit is not None and not (is_number(limit) and limit > 0):
            raise MemoryInputError(f"limit must be a whole number above 0, not {limit!r}.")
        params: dict[str, Any] = {
            "since": None if since is None else moment_text(since),
            "until": None if until is None else moment_text(until),
            "event": event,
            "id": cube_id,
            "limit": -1 if limit is None else limit,
        }
        mine = ""
        if principal is not None:
            where, caller = visible(principal, self._now(), hidden=True)
            params.update(caller, branch=principal.branch, name=principal.user)
            mine = (
                "json_extract(a.event, '$.tenant') = :tenant AND json_extract(a.event, '$.user') = :name AND "
                f"{_SCOPE} = :branch AND NOT EXISTS (SELECT 1 FROM "
                f"(VALUES {_IDS}) n WHERE n.column1 IS NOT NULL AND NOT EXISTS (SELECT 1 FROM cube c WHERE "
                f"c.id = n.column1 AND {where})) AND "
            )
        with self._db.read() as conn:
            rows = conn.execute(
                f"SELECT a.seq, a.event FROM audit a WHERE {mine} (:since IS NULL OR json_extract(a.event, "
                "'$.at') >= :since) AND (:until IS NULL OR json_extract(a.event, '$.at') <= :until) AND "
                "(:event IS NULL OR json_extract(a.event, '$.event') = :event) AND (:id IS NULL OR :id IN "
                f"(SELECT n.column1 FROM (VALUES {_IDS}) n)) ORDER BY a.seq DESC LIMIT :limit",
                params,
            ).fetchall()
        return [_event(seq if principal is None else None, text) for seq, text in reversed(rows)]

    def audit_head(self) -> tuple[int, str]:
        """Number and hash (64 hex digits) of the last event. A copy of it kept elsewhere shows whether the
        trail was written anew as a whole, which the chain alone cannot."""
        with self._db.read() as conn:
            row = conn.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
        return (0, GENESIS) if row is None else (int(row[0]), str(row[1]))


def _event(seq: int | None, text: str) -> AuditEvent:
    details = json.loads(text)
    return AuditEvent(seq, time_from_text(details["at"]), details["event"], details)
