"""Rows and SQL that the parts of the store share; above all the one predicate through which rows are seen."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from memos_engine.errors import MemoryInputError, MemoryNotFoundError
from memos_engine.memory.audit import GENESIS, canonical_json, chain_hash
from memos_engine.memory.cube import HistoryEntry, MemCube, is_cube_id, time_from_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState

Params = dict[str, Any]

SELECT_CUBE = """SELECT c.id, c.provenance_id, p.tenant, p.user, c.kind, b.body, c.version, c.state,
    c.created_at, c.updated_at, c.origin, c.semantic_type, b.tags, c.visibility, c.priority, c.ttl_at,
    c.sensitivity, c.uses, c.last_used_at
FROM cube c JOIN principal p ON p.id = c.owner
LEFT JOIN cube_body b ON b.cube_id = c.id AND b.version = c.version"""


def visible(principal: Principal, now: str, *, hidden: bool = False) -> tuple[str, Params]:
    """The only way to rows: a condition on `cube c` that holds for what this caller may see at `now`.

    Nothing is visible by default; a memory is visible to its owner. `hidden` also shows those that are
    deleted or past their time to live, which only history and erasure may look at.
    """
    if not isinstance(principal, Principal):
        raise MemoryInputError(
            f"the caller must be a Principal(tenant, user), not {type(principal).__name__}."
        )
    sql = "(c.owner = (SELECT id FROM principal WHERE tenant = :tenant AND user = :user))"
    params: Params = {"tenant": principal.tenant, "user": principal.user}
    if not hidden:
        sql = f"({sql} AND c.state <> 'expired' AND (c.ttl_at IS NULL OR c.ttl_at > :now))"
        params["now"] = now
    return sql, params


def among(values: Iterable[str]) -> str:
    """A set of strings as one SQL parameter, for `IN (SELECT value FROM json_each(:x))`."""
    return json.dumps(sorted(values))


def live_states() -> str:
    return among(state.value for state in LIVE)


def cube_of(row: tuple[Any, ...]) -> MemCube:
    """A row of `SELECT_CUBE`."""
    return MemCube(
        id=row[0],
        provenance_id=row[1],
        owner=Principal(row[2], row[3]),
        kind=row[4],
        body=row[5],
        version=row[6],
        state=LifecycleState(row[7]),
        created_at=time_from_text(row[8]),
        updated_at=time_from_text(row[9]),
        origin=row[10],
        semantic_type=row[11],
        tags=tuple(json.loads(row[12])) if row[12] else (),
        visibility=row[13],
        priority=row[14],
        ttl_at=time_from_text(row[15]) if row[15] else None,
        sensitivity=row[16],
        uses=row[17],
        last_used_at=time_from_text(row[18]) if row[18] else None,
    )


def history_of(row: tuple[Any, ...]) -> HistoryEntry:
    """A row `(version, at, event, state, body)`."""
    return HistoryEntry(row[0], time_from_text(row[1]), row[2], LifecycleState(row[3]), row[4])


def not_found(cube_id: object) -> MemoryNotFoundError:
    """The same words whether the memory is missing or somebody else's."""
    return MemoryNotFoundError(f"there is no memory {cube_id!r} for this user; list or recall shows the ids.")


def find(
    conn: sqlite3.Connection, principal: Principal, cube_id: object, now: str, *, hidden: bool = False
) -> MemCube:
    """One visible memory, else `MemoryNotFoundError`; an owner is told that it was deleted."""
    where, params = visible(principal, now, hidden=True)
    row = None
    if is_cube_id(cube_id):
        row = conn.execute(
            f"{SELECT_CUBE} WHERE {where} AND c.id = :id", {**params, "id": cube_id}
        ).fetchone()
    if row is None:
        raise not_found(cube_id)
    cube = cube_of(row)
    gone = cube.state is LifecycleState.EXPIRED or (row[15] is not None and row[15] <= now)
    if gone and not hidden:
        raise MemoryNotFoundError(
            f"memory {cube_id!r} was deleted or has expired; history shows what it was, erase destroys its "
            "text."
        )
    return cube


def append_audit(conn: sqlite3.Connection, at: str, event: Mapping[str, Any]) -> None:
    """One more link in the chain, within the caller's transaction. Events never hold a memory's text."""
    last = conn.execute("SELECT hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    text = canonical_json({**event, "at": at})
    conn.execute(
        "INSERT INTO audit (event, hash) VALUES (?, ?)",
        (text, chain_hash(last[0] if last else GENESIS, text)),
    )


def record_move(
    conn: sqlite3.Connection, principal: Principal, cube: MemCube, event: str, state: LifecycleState, at: str
) -> None:
    """Projection, history and audit of one move, within the caller's transaction."""
    conn.execute("UPDATE cube SET state = ?, updated_at = ? WHERE id = ?", (state.value, at, cube.id))
    record_event(conn, principal, cube.id, cube.version, event, state, at)


def record_event(
    conn: sqlite3.Connection,
    principal: Principal,
    cube_id: str,
    version: int,
    event: str,
    state: LifecycleState,
    at: str,
) -> None:
    """History and audit of one event, within the caller's transaction."""
    conn.execute(
        "INSERT INTO cube_event (cube_id, version, at, event, state) VALUES (?, ?, ?, ?, ?)",
        (cube_id, version, at, event, state.value),
    )
    append_audit(
        conn,
        at,
        {
            "event": event,
            "cube_id": cube_id,
            "version": version,
            "state": state.value,
            "tenant": principal.tenant,
            "user": principal.user,
        },
    )
