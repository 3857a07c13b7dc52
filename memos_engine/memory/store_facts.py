"""Contradictions: a fact ends others of the same owner, subject and attribute, and nothing else.

Nothing is rewritten: a row appended to `fact_closing` says from when on a fact no longer holds, so that
reads of the past see it as it was then. The projection's `closed_at` is the last such row.
"""

from __future__ import annotations

import sqlite3

from memos_engine.memory.cube import MemCube, time_to_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store_rows import record_event
from memos_engine.memory.store_versions import link
from memos_engine.memory.store_view import visible


def close_fact(conn: sqlite3.Connection, cube_id: str, version: int, until: str | None, now: str) -> None:
    """From now on the fact holds until `until` (None: as long as it says itself)."""
    conn.execute(
        "INSERT INTO fact_closing (cube_id, version, at, valid_to) VALUES (?, ?, ?, ?)",
        (cube_id, version, now, until),
    )
    conn.execute(
        "UPDATE cube SET closed_at = ?, updated_at = ? WHERE id = ? AND version = ?",
        (until, now, cube_id, version),
    )


def settle(conn: sqlite3.Connection, principal: Principal, cube: MemCube, now: str) -> None:
    """Make room for a new version's fact: end those that it contradicts.

    The later beginning wins, so that what is learned late about an earlier time is itself ended by what is
    known already; of equal beginnings the one written last wins. An interval within another one ends
    nothing. A frozen memory is not touched, the contradiction shows as an edge.
    """
    fact = cube.fact
    if fact is None or fact.key is None or fact.valid_from is None:
        return
    starts = time_to_text(fact.valid_from)
    ends = time_to_text(fact.valid_to) if fact.valid_to else None
    here = (cube.id, cube.version)
    next_start: str | None = None
    for other, version, state, since, own_end, closed in _rivals(conn, principal, cube, starts, now):
        until = closed or own_end
        if until is not None and until <= since:
            continue  # never held: one with the same beginning took its place
        if since > starts:
            if ends is None or since < ends:
                next_start = min(next_start or since, since)
            continue
        overlaps = until is None or until > starts
        within = ends is not None and (until is None or until > ends)
        if not overlaps or within:
            continue
        if state == LifecycleState.FROZEN.value:
            link(conn, here, "contradicts", (other, version), now)
            continue
        close_fact(conn, other, version, starts, now)
        record_event(conn, principal, other, version, "closed", LifecycleState(state), now)
        link(conn, here, "supersedes", (other, version), now)
    if next_start is not None:
        close_fact(conn, *here, next_start, now)


def _rivals(
    conn: sqlite3.Connection, principal: Principal, cube: MemCube, starts: str, now: str
) -> list[tuple[str, int, str, str, str | None, str | None]]:
    """The owner's other living facts of the same key that begin or hold after `starts`.

    Only those that the caller may write: others neither end by, nor bound, what somebody with a grant for one
    memory says in it.
    """
    assert cube.fact is not None
    where, params = visible(principal, now, action="write")
    return conn.execute(
        "SELECT c.id, c.version, c.state, f.valid_from, f.valid_to, c.closed_at FROM fact f JOIN cube c ON "
        "c.id = f.cube_id AND c.version = f.version WHERE f.key = :key AND c.id <> :id AND c.owner = "
        f"(SELECT owner FROM cube WHERE id = :id) AND {where} AND (f.valid_from > :starts OR "
        "coalesce(c.closed_at, f.valid_to, 'never') > :starts) ORDER BY c.id",
        {**params, "key": cube.fact.key, "id": cube.id, "starts": starts},
    ).fetchall()


def last_closing(conn: sqlite3.Connection, cube_id: str, version: int, by: str | None = None) -> str | None:
    """Until when, as known now or by a moment, a version's fact holds; None: as it says itself."""
    row = conn.execute(
        "SELECT valid_to FROM fact_closing WHERE cube_id = :id AND version = :version AND (:by IS NULL OR "
        "at <= :by) ORDER BY seq DESC LIMIT 1",
        {"id": cube_id, "version": version, "by": by},
    ).fetchone()
    return None if row is None else row[0]


def carry_closing(conn: sqlite3.Connection, cube: MemCube, version: int, now: str) -> None:
    """A new version of an ended fact has ended, too."""
    closed = last_closing(conn, cube.id, cube.version)
    if closed is not None:
        close_fact(conn, cube.id, version, closed, now)
