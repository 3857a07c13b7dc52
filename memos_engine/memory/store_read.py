"""The store's verbs that look, at the present or at any moment before."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable
from datetime import datetime

from memos_engine.errors import MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import HistoryEntry, MemCube, is_cube_id
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_rows import among, cube_of, find, history_of, not_found, select_cubes

Moment = datetime | str  # aware, or ISO 8601 (UTC where it names no zone)
Cubes = list[MemCube]  # inside of the class, `list` is a verb
History = list[HistoryEntry]
MIN_START = 8
_START = re.compile(r"[0-9a-f-]{1,36}")


class ReadVerbs(StoreBase):
    """Reading. `as_of` is a moment on the store's clock (when something was known), `valid_at` one on the
    clock of facts (when it was true); both are aware datetimes or ISO 8601 texts.

    The past is read with today's permissions, visibility, priority and time to live, and no erased memory is
    in it. A moment to come shows what will be left then if nothing changes.
    """

    def get(self, principal: Principal, cube_id: str, *, as_of: Moment | None = None) -> MemCube:
        """One memory, live or archived. Raises `MemoryNotFoundError`, `MemoryInputError`."""
        if as_of is None:
            with self._db.read() as conn:
                return find(conn, principal, cube_id, self._now())
        seen = self._view(principal, as_of)
        with self._db.read() as conn:
            row = conn.execute(
                f"{select_cubes(seen)} WHERE {seen.where} AND c.id = :id",
                {**seen.params, "id": cube_id if is_cube_id(cube_id) else ""},
            ).fetchone()
        if row is None:
            raise not_found(cube_id)
        return cube_of(row)

    def find_id(self, principal: Principal, given: str) -> str:
        """The full id that `given` begins: one of at least 8 characters that only one memory of those that
        the caller may see has. A full id is returned as it is.

        Raises `MemoryInputError` for a beginning that is too short or that several have,
        `MemoryNotFoundError`.
        """
        start = given.strip().lower() if isinstance(given, str) else ""
        if is_cube_id(start):
            return start
        if not _START.fullmatch(start):
            raise not_found(given)
        if len(start) < MIN_START:
            raise MemoryInputError(
                f"{given!r} is too short for an id; give at least its first {MIN_START} characters."
            )
        seen = self._view(principal, hidden=True)
        with self._db.read() as conn:
            rows = conn.execute(
                f"SELECT c.id FROM cube c WHERE {seen.where} AND c.id >= :start AND c.id < :end ORDER BY "
                "c.id LIMIT 4",
                {**seen.params, "start": start, "end": start + "~"},
            ).fetchall()
        if not rows:
            raise not_found(given)
        if len(rows) > 1:
            some = ", ".join(row[0] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
            raise MemoryInputError(f"several memories begin with {given!r} ({some}); give more of the id.")
        return str(rows[0][0])

    def get_many(self, principal: Principal, ids: Iterable[str]) -> dict[str, MemCube]:
        """Those of `ids` that the caller may see and that are live, by id."""
        found: dict[str, MemCube] = {}
        with self._db.read() as conn:
            now = self._now()
            for cube_id in dict.fromkeys(ids):
                with contextlib.suppress(MemoryNotFoundError):
                    cube = find(conn, principal, cube_id, now)
                    if cube.state in LIVE:
                        found[cube_id] = cube
        return found

    def list(
        self,
        principal: Principal,
        *,
        states: Collection[LifecycleState] = LIVE,
        as_of: Moment | None = None,
        valid_at: Moment | None = None,
        own: bool = False,
        limit: int | None = None,
    ) -> Cubes:
        """The memories that the caller sees in these states, by creation, the oldest `limit` of them; `own`:
        without those of others. Adapters are not among them (see `adapters`).

        Deleted ones show only in `history`. With `valid_at` only those that hold at that time. Raises
        `MemoryInputError`.
        """
        seen = self._view(principal, as_of, valid_at, own=own)
        wanted = among(LifecycleState(state).value for state in states)
        with self._db.read() as conn:
            rows = conn.execute(
                f"{select_cubes(seen)} WHERE {seen.where} AND c.kind <> 'lora' AND {seen.state} IN (SELECT "
                "value FROM json_each(:states)) ORDER BY c.id LIMIT :limit",
                {**seen.params, "states": wanted, "limit": -1 if limit is None else limit},
            ).fetchall()
        return [cube_of(row) for row in rows]

    def history(self, principal: Principal, cube_id: str, *, as_of: Moment | None = None) -> History:
        """Every event in a memory's life (until `as_of`), oldest first, for its owner even once deleted.

        Raises `MemoryNotFoundError`, `MemoryInputError`.
        """
        seen = self._view(principal, hidden=True)
        until = self._view(principal, as_of).params.get("as_of") if as_of is not None else None
        with self._db.read() as conn:
            rows = conn.execute(
                "SELECT e.version, e.at, e.event, e.state, b.body FROM cube_event e JOIN cube c ON c.id = "
                "e.cube_id LEFT JOIN cube_body b ON b.cube_id = e.cube_id AND b.version = e.version WHERE "
                f"{seen.where} AND e.cube_id = :id AND (:until IS NULL OR e.at <= :until) ORDER BY e.seq",
                {**seen.params, "id": cube_id if is_cube_id(cube_id) else "", "until": until},
            ).fetchall()
        if not rows:
            raise not_found(cube_id)
        return [history_of(row) for row in rows]
