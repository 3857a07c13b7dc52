"""Rows of adapters: reading them with their sources, and what ends them, within the caller's transaction."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from typing import Any

from memos_engine.errors import MemoryNotFoundError
from memos_engine.memory.adapters import AdapterVersion
from memos_engine.memory.cube import time_from_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store_rows import append_audit, caller, record_event
from memos_engine.memory.vault import BlobRef

SOURCE_GONE = "a memory that it was made from is gone"
SELECT_ADAPTER = """SELECT a.cube_id, a.version, b.body, p.tenant, p.user, a.digest, a.model, a.rank,
    a.nbytes, a.kv_floor, a.how, a.at, a.version = c.version AND a.promoted_at IS NOT NULL, a.promoted_at,
    a.revoked_at, a.revoked_why, f.sha256, f.size, f.checksum, f.report
FROM adapter_version a JOIN cube c ON c.id = a.cube_id JOIN principal p ON p.id = c.owner
LEFT JOIN cube_body b ON b.cube_id = a.cube_id AND b.version = a.version
LEFT JOIN adapter_payload f ON f.cube_id = a.cube_id AND f.version = a.version
WHERE p.tenant = :tenant AND p.user = :user"""
_SOURCES = (
    "SELECT s.id, e.target_version, s.version, s.state = 'expired' OR coalesce(s.ttl_at <= :now, 0) FROM "
    "edge e JOIN cube s ON s.id = e.target WHERE e.source = :id AND e.source_version = :version AND e.kind = "
    "'derived_from' ORDER BY s.id"
)
_ROOT_GONE = (
    "WITH RECURSIVE up (id) AS (SELECT target FROM edge WHERE source = :id AND source_version = :version AND "
    "kind = 'derived_from' UNION SELECT e.target FROM edge e JOIN up ON e.source = up.id WHERE e.kind IN "
    "('derived_from', 'merged_from')) SELECT 1 FROM up JOIN cube s ON s.id = up.id WHERE s.state = 'expired' "
    "OR s.ttl_at <= :now"
)


def revoke(
    conn: sqlite3.Connection, principal: Principal, cube_id: str, why: str, now: str
) -> tuple[list[BlobRef], list[str]]:
    """Within the caller's transaction, end every adapter version that is this memory's or was made from it,
    and those of the same content: another name makes no other adapter.

    Returns the files that may be named by nobody now, and adapters of which no version is left; those are
    expired, where they were not the memory itself.
    """
    rows = conn.execute(
        "SELECT a.cube_id, a.version, f.sha256, f.size, f.checksum FROM adapter_version a JOIN cube c ON "
        "c.id = a.cube_id LEFT JOIN adapter_payload f ON f.cube_id = a.cube_id AND f.version = a.version "
        "WHERE a.revoked_at IS NULL AND (a.cube_id = :id OR EXISTS (SELECT 1 FROM edge e JOIN "
        "adapter_version o ON o.cube_id = e.source AND o.version = e.source_version JOIN cube x ON x.id = "
        "o.cube_id WHERE e.target = :id AND e.kind = 'derived_from' AND o.digest = a.digest AND x.owner = "
        "c.owner)) ORDER BY a.cube_id, a.version",
        {"id": cube_id},
    ).fetchall()
    refs = []
    for one, version, *ref in rows:
        key = (one, version)
        conn.execute(
            "UPDATE adapter_version SET revoked_at = ?, revoked_why = ? WHERE cube_id = ? AND version = ?",
            (now, why if one == cube_id else SOURCE_GONE, *key),
        )
        conn.execute("DELETE FROM adapter_payload WHERE cube_id = ? AND version = ?", key)
        event = {"event": "adapter_revoked", "cube_id": one, "version": version, "because_of": cube_id}
        append_audit(conn, now, {**event, **caller(principal)})
        if ref[0] is not None:
            refs.append(BlobRef(*ref))
    ended = []
    for one in dict.fromkeys(row[0] for row in rows if row[0] != cube_id):
        if _settle(conn, principal, one, now):
            ended.append(one)
    return refs, ended


def _settle(conn: sqlite3.Connection, principal: Principal, cube_id: str, now: str) -> bool:
    """After a revocation: the pointer goes to the latest version that is left; True where none is left at
    all."""
    version, state, revoked = conn.execute(
        "SELECT c.version, c.state, a.revoked_at FROM cube c JOIN adapter_version a ON a.cube_id = c.id AND "
        "a.version = c.version WHERE c.id = ?",
        (cube_id,),
    ).fetchone()
    if revoked is None:
        return False
    others = usable(conn, cube_id, version)
    left = conn.execute(
        "SELECT 1 FROM adapter_version WHERE cube_id = ? AND revoked_at IS NULL", (cube_id,)
    ).fetchone()
    target = others[0] if others else version
    after = LifecycleState(state) if left else LifecycleState.EXPIRED
    conn.execute(
        "UPDATE cube SET version = ?, state = ?, updated_at = ? WHERE id = ?",
        (target, after.value, now, cube_id),
    )
    record_event(conn, principal, cube_id, target, "revoked", after, now)
    return left is None


def usable(conn: sqlite3.Connection, cube_id: str, current: int) -> list[int]:
    """Versions that were promoted and not revoked, the last one in use first, without the current one."""
    rows = conn.execute(
        "SELECT a.version FROM adapter_version a WHERE a.cube_id = ? AND a.version <> ? AND a.promoted_at IS "
        "NOT NULL AND a.revoked_at IS NULL ORDER BY (SELECT max(e.seq) FROM cube_event e WHERE e.cube_id = "
        "a.cube_id AND e.version = a.version) DESC",
        (cube_id, current),
    )
    return [int(row[0]) for row in rows]


def adapter_row(
    conn: sqlite3.Connection, principal: Principal, cube_id: str, version: int, now: str
) -> AdapterVersion:
    row = conn.execute(
        f"{SELECT_ADAPTER} AND a.cube_id = :id AND a.version = :version",
        {"tenant": principal.tenant, "user": principal.key, "id": cube_id, "version": version},
    ).fetchone()
    if row is None:
        raise MemoryNotFoundError(
            f"adapter {cube_id!r} has no version {version!r}; `adapter show` lists them."
        )
    return with_sources(conn, version_of(row), now)


def sources_of(conn: sqlite3.Connection, cube_id: str, version: int, now: str) -> list[tuple[Any, ...]]:
    return conn.execute(_SOURCES, {"id": cube_id, "version": version, "now": now}).fetchall()


def with_sources(conn: sqlite3.Connection, found: AdapterVersion, now: str) -> AdapterVersion:
    rows = sources_of(conn, found.cube_id, found.version, now)
    stale = ""
    if conn.execute(_ROOT_GONE, {"id": found.cube_id, "version": found.version, "now": now}).fetchone():
        stale = "a memory that it comes from is gone"
    elif any(then != present for _, then, present, _ in rows):
        stale = "a memory that it was made from has a newer version"
    return replace(found, sources=tuple((row[0], row[1]) for row in rows), stale=stale)


def version_of(row: tuple[Any, ...]) -> AdapterVersion:
    """A row of `SELECT_ADAPTER`."""
    moments = [None if text is None else time_from_text(text) for text in row[13:15]]
    return AdapterVersion(
        cube_id=row[0],
        version=row[1],
        name=row[2],
        owner=Principal.from_key(row[3], row[4]),
        digest=row[5],
        model=row[6],
        rank=row[7],
        nbytes=row[8],
        kv_floor=row[9],
        how=row[10],
        at=time_from_text(row[11]),
        current=bool(row[12]) and row[14] is None,
        promoted_at=moments[0],
        revoked_at=moments[1],
        revoked_why=row[15],
        blob=None if row[16] is None else BlobRef(row[16], row[17], row[18]),
        report={} if row[19] is None else json.loads(row[19]),
    )
