"""Rows and SQL that the parts of the store share."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from memos_engine.errors import AccessError, ConflictError, LifecycleError, MemoryNotFoundError
from memos_engine.memory.audit import GENESIS, canonical_json, chain_hash
from memos_engine.memory.cube import Fact, HistoryEntry, MemCube, Provenance, is_cube_id, time_from_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import CHANGEABLE, LIVE, LifecycleState
from memos_engine.memory.store_view import Params, View, view, visible

__all__ = ["Params", "View", "view", "visible"]  # what other parts import from here, too


def select_cubes(seen: View) -> str:
    """`SELECT ... FROM cube c ...` whose rows `cube_of` takes; a `WHERE` follows it."""
    version = seen.version
    return f"""SELECT c.id, c.provenance_id, p.tenant, p.user, c.kind, b.body, {version}, {seen.state},
    c.created_at, {seen.moved_at}, v.origin, v.semantic_type, b.tags, c.visibility, c.priority, c.ttl_at,
    c.sensitivity, {seen.uses}, {seen.last_used}, v.parent, c.half_life_s, c.source_gone_at, v.gist, s.data,
    f.cube_id, f.subject, f.attribute, f.valid_from, coalesce({seen.closed}, f.valid_to)
FROM cube c {seen.join} JOIN principal p ON p.id = c.owner
JOIN cube_version v ON v.cube_id = c.id AND v.version = {version}
LEFT JOIN cube_body b ON b.cube_id = c.id AND b.version = {version}
LEFT JOIN fact f ON f.cube_id = c.id AND f.version = {version}
LEFT JOIN cube_source s ON s.cube_id = c.id AND s.version = {version}"""


SELECT_CUBE = select_cubes(View("", "", {}))


def among(values: Iterable[str]) -> str:
    """A set of strings as one SQL parameter, for `IN (SELECT value FROM json_each(:x))`."""
    return json.dumps(sorted(values))


def live_states() -> str:
    return among(state.value for state in LIVE)


def _time(text: str | None) -> datetime | None:
    return None if text is None else time_from_text(text)


def cube_of(row: tuple[Any, ...]) -> MemCube:
    """A row of `select_cubes`."""
    return MemCube(
        id=row[0],
        provenance_id=row[1],
        owner=Principal.from_key(row[2], row[3]),
        kind=row[4],
        body=row[5],
        version=row[6],
        state=LifecycleState(row[7]),
        created_at=time_from_text(row[8]),
        updated_at=time_from_text(row[9]),
        origin=row[10],
        semantic_type=row[11],
        tags=tuple(json.loads(row[12])) if row[12] else (),
        fact=Fact(row[25], row[26], _time(row[27]), _time(row[28])) if row[24] else None,
        provenance=Provenance.from_dict(json.loads(row[23])) if row[23] else None,
        visibility=row[13],
        priority=row[14],
        ttl_at=_time(row[15]),
        half_life_s=row[20],
        sensitivity=row[16],
        source_gone_at=_time(row[21]),
        uses=row[17],
        last_used_at=_time(row[18]),
        fingerprint=row[22].hex() if row[22] else None,
        parent=row[19],
    )


def history_of(row: tuple[Any, ...]) -> HistoryEntry:
    """A row `(version, at, event, state, body)`."""
    return HistoryEntry(row[0], time_from_text(row[1]), row[2], LifecycleState(row[3]), row[4])


def not_found(cube_id: object) -> MemoryNotFoundError:
    """The same words whether the memory is missing or somebody else's."""
    return MemoryNotFoundError(f"there is no memory {cube_id!r} for this user; list or recall shows the ids.")


def find(
    conn: sqlite3.Connection,
    principal: Principal,
    cube_id: object,
    now: str,
    *,
    hidden: bool = False,
    action: str = "read",
) -> MemCube:
    """One memory that the caller may do `action` with.

    Raises `MemoryNotFoundError` for one that is missing or not to be seen (an owner is told that it was
    deleted), `AccessError` for one that may only be seen.
    """
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
    if action != "read" and cube.owner != principal:
        where, params = visible(principal, now, action=action)
        if not conn.execute(
            f"SELECT 1 FROM cube c WHERE {where} AND c.id = :id", {**params, "id": cube_id}
        ).fetchone():
            raise AccessError(
                f"you may read memory {cube_id!r}, but not {action} it; ask its owner for a grant.",
                attempt(principal, cube, "access_refused", action),
            )
    return cube


def find_own(conn: sqlite3.Connection, principal: Principal, cube_id: object, now: str) -> MemCube:
    """One memory of the caller's own, in any state. Raises as `find` does."""
    cube = find(conn, principal, cube_id, now, hidden=True)
    if cube.owner != principal:
        raise AccessError(
            f"only the owner of memory {cube_id!r} may do this; ask them.",
            attempt(principal, cube, "access_refused", "own"),
        )
    return cube


def attempt(principal: Principal, cube: MemCube, event: str, tried: str) -> dict[str, Any]:
    """What the audit trail keeps of something refused."""
    named = {"event": event, "cube_id": cube.id, "state": cube.state.value, "tried": tried}
    return {**named, **caller(principal)}


def refused(principal: Principal, cube: MemCube, tried: str, message: str) -> LifecycleError:
    """The error for a move that the lifecycle does not allow."""
    return LifecycleError(message, attempt(principal, cube, "move_refused", tried))


def check_version(cube: MemCube, if_version: int | None) -> None:
    """Compare before swapping. Raises `ConflictError`."""
    if if_version is not None and if_version != cube.version:
        raise ConflictError(
            f"memory {cube.id!r} is at version {cube.version}, not {if_version!r}: somebody changed it; read "
            "it again and repeat."
        )


def check_changeable(principal: Principal, cube: MemCube, tried: str) -> None:
    """Raises `LifecycleError`, to be audited, unless the memory may get a new version."""
    if cube.kind == "lora":
        raise refused(principal, cube, tried, "an adapter changes by `adapter import` and `rollback` only.")
    if cube.state not in CHANGEABLE:
        undo = "unfreeze" if cube.state is LifecycleState.FROZEN else "restore"
        raise refused(
            principal, cube, tried, f"a memory that is {cube.state} takes no {tried}; {undo} it first."
        )


def caller(principal: Principal) -> dict[str, str]:
    """The caller in an audit event."""
    return principal.to_dict()


def principal_id(conn: sqlite3.Connection, principal: Principal, now: str) -> int:
    """The caller's row, made where there is none yet. Raises `MemoryNotFoundError` for a branch not made."""
    names = (principal.tenant, principal.key)
    if principal.branch:
        row = conn.execute(
            "SELECT p.id FROM branch b JOIN principal p ON p.id = b.scope WHERE p.tenant = ? AND p.user = "
            "? AND b.dropped_at IS NULL",
            names,
        ).fetchone()
        if row is None:
            raise MemoryNotFoundError(
                f"there is no branch {principal.branch!r}; make it with branch() first."
            )
        return int(row[0])
    conn.execute("INSERT OR IGNORE INTO principal (tenant, user, created_at) VALUES (?, ?, ?)", (*names, now))
    row = conn.execute("SELECT id FROM principal WHERE tenant = ? AND user = ?", names).fetchone()
    return int(row[0])


def last_moment(conn: sqlite3.Connection) -> str | None:
    """The latest time that the store has written: of a change, or of a use."""
    row = conn.execute(
        "SELECT max(at) FROM (SELECT json_extract(event, '$.at') at FROM (SELECT event FROM audit ORDER BY "
        "seq DESC LIMIT 1) UNION ALL SELECT at FROM (SELECT at FROM access_log ORDER BY seq DESC LIMIT 1))"
    ).fetchone()
    return None if row[0] is None else str(row[0])


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
            **caller(principal),
        },
    )
