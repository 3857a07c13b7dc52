"""What a version consists of, written within the caller's transaction: metadata, words, fact, derivations."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, replace

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import Fact, MemCube, Provenance, time_from_text, time_to_text
from memos_engine.memory.fact import gist_of
from memos_engine.memory.governance import Principal, StoreKeys
from memos_engine.memory.store_fts import insert_passage
from memos_engine.memory.store_rows import append_audit, caller
from memos_engine.memory.store_times import insert_times
from memos_engine.memory.values import is_number

DERIVATIONS = ("derived_from", "merged_from", "branch_of")
"""Edges along which a text's words travel."""


@dataclass(frozen=True, slots=True)
class Content:
    """The words of a version and what describes them."""

    text: str
    tags: tuple[str, ...]
    origin: str
    semantic_type: str
    fact: Fact | None
    provenance: Provenance | None
    session: str | None = None  # of a first version; the later ones have the same
    since: str | None = None  # when it holds from, in search; None: as its fact says, else from now on


def insert_version(
    conn: sqlite3.Connection,
    keys: StoreKeys,
    owner: Principal,
    cube_id: str,
    version: int,
    parent: int | None,
    content: Content,
    now: str,
) -> None:
    """Rows of a new version and its words for search; the projection's gist follows. The projection's
    version is the caller's."""
    key = (cube_id, version)
    fingerprint = keys.body_hmac(content.text)
    gist = keys.gist_hmac(owner, gist_of(content.text))
    conn.execute(
        "INSERT INTO cube_version (cube_id, version, parent, at, origin, semantic_type, body_hmac, key_id, "
        "gist) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, parent, now, content.origin, content.semantic_type, fingerprint, keys.id, gist),
    )
    conn.execute("INSERT INTO cube_body VALUES (?, ?, ?, ?)", (*key, content.text, json.dumps(content.tags)))
    conn.execute("UPDATE cube SET gist = ?, closed_at = NULL WHERE id = ?", (gist, cube_id))
    fact = content.fact
    starts = time_to_text(fact.valid_from) if fact is not None and fact.valid_from else None
    since = content.since or starts or now
    insert_passage(conn, owner, cube_id, version, content.text, since, content.session)
    insert_times(conn, cube_id, version, parent, content.text, (starts if parent is None else None) or now)
    if fact is not None:
        ends = time_to_text(fact.valid_to) if fact.valid_to else None
        conn.execute(
            "INSERT INTO fact VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*key, fact.subject, fact.attribute, fact.key, starts, ends),
        )
    if content.provenance is not None:
        data = json.dumps(content.provenance.to_dict())
        conn.execute("INSERT INTO cube_source VALUES (?, ?, ?)", (*key, data))


def content_of(conn: sqlite3.Connection, cube_id: str, version: int) -> Content:
    """What a version holds, as it was written. Raises `MemoryInputError` where there is no such version."""
    row = conn.execute(
        "SELECT b.body, b.tags, v.origin, v.semantic_type, f.subject, f.attribute, f.valid_from, "
        "f.valid_to, f.cube_id, s.data, w.valid_from FROM cube_version v JOIN cube_body b ON b.cube_id = "
        "v.cube_id AND b.version = v.version LEFT JOIN fact f ON f.cube_id = v.cube_id AND f.version = "
        "v.version LEFT JOIN cube_source s ON s.cube_id = v.cube_id AND s.version = v.version LEFT JOIN "
        "passage w ON w.cube_id = v.cube_id AND w.version = v.version WHERE v.cube_id = ? AND v.version = ?",
        (cube_id, version if is_number(version) else 0),
    ).fetchone()
    if row is None:
        raise MemoryInputError(
            f"memory {cube_id!r} has no version {version!r} with a text; history shows which there are."
        )
    times = [time_from_text(text) if text else None for text in row[6:8]]
    return Content(
        row[0],
        tuple(json.loads(row[1])),
        row[2],
        row[3],
        Fact(row[4], row[5], *times) if row[8] else None,
        Provenance.from_dict(json.loads(row[9])) if row[9] else None,
        since=row[10],
    )


def carry_forms(conn: sqlite3.Connection, cube_id: str, old: int, new: int) -> None:
    """A version of the same text has the vectors of the other one, and takes over its KV."""
    key = {"id": cube_id, "old": old, "new": new}
    conn.execute(
        "INSERT INTO vector SELECT cube_id, :new, model_id, dim, vec FROM vector WHERE cube_id = :id AND "
        "version = :old",
        key,
    )
    conn.execute("UPDATE kv_artifact SET version = :new WHERE cube_id = :id AND version = :old", key)


def dated(fact: Fact | None, now: str) -> Fact | None:
    """The fact with a beginning: now, unless it says another one. Raises `MemoryInputError`."""
    if fact is None or fact.key is None or fact.valid_from is not None:
        return fact
    if fact.valid_to is not None and time_to_text(fact.valid_to) <= now:
        raise MemoryInputError(
            f"a fact that ended at {fact.valid_to.isoformat()} needs the time it began; add valid_from."
        )
    return replace(fact, valid_from=time_from_text(now))


def link(
    conn: sqlite3.Connection, source: tuple[str, int], kind: str, target: tuple[str, int], now: str
) -> None:
    """An edge between two versions. Raises `MemoryInputError` for a derivation that would be its own "
    "source."""
    if kind in DERIVATIONS:
        names = ", ".join(f"'{name}'" for name in DERIVATIONS)
        cyclic = conn.execute(
            "WITH RECURSIVE up (id) AS (SELECT :target UNION SELECT e.target FROM edge e JOIN up ON "
            f"e.source = up.id WHERE e.kind IN ({names})) SELECT 1 FROM up WHERE id = :source",
            {"source": source[0], "target": target[0]},
        ).fetchone()
        if cyclic:
            raise MemoryInputError(
                f"memory {source[0]!r} cannot be {kind} {target[0]!r}: that one comes from it; leave one of "
                "the two derivations out."
            )
    conn.execute(
        "INSERT OR IGNORE INTO edge (source, source_version, kind, target, target_version, at) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (*source, kind, *target, now),
    )


def reached(conn: sqlite3.Connection, cube_id: str, kinds: Iterable[str]) -> list[str]:
    """Memories that come from this one over edges of these kinds, itself left out."""
    names = ", ".join(f"'{name}'" for name in kinds)
    rows = conn.execute(
        "WITH RECURSIVE down (id) AS (SELECT :id UNION SELECT e.source FROM edge e JOIN down ON e.target = "
        f"down.id WHERE e.kind IN ({names})) SELECT id FROM down WHERE id <> :id ORDER BY id",
        {"id": cube_id},
    )
    return [row[0] for row in rows]


def flag_derived(conn: sqlite3.Connection, principal: Principal, cube_id: str, now: str) -> None:
    """Mark the living memories that were made from one that is gone; their owners decide what becomes "
    "of them."""
    for derived in reached(conn, cube_id, ("derived_from", "merged_from")):
        changed = conn.execute(
            "UPDATE cube SET source_gone_at = ? WHERE id = ? AND source_gone_at IS NULL AND state <> "
            "'expired'",
            (now, derived),
        ).rowcount
        if changed:
            append_audit(conn, now, {"event": "source_gone", "cube_id": derived, **caller(principal)})


def unflag_derived(conn: sqlite3.Connection, cube_id: str) -> None:
    """The opposite, after a memory came back: only for those whose sources are all there."""
    for derived in reached(conn, cube_id, ("derived_from", "merged_from")):
        conn.execute(
            "UPDATE cube SET source_gone_at = NULL WHERE id = :id AND NOT EXISTS (WITH RECURSIVE up (id) AS "
            "(SELECT :id UNION SELECT e.target FROM edge e JOIN up ON e.source = up.id WHERE e.kind IN "
            "('derived_from', 'merged_from')) SELECT 1 FROM up JOIN cube s ON s.id = up.id "
            "WHERE s.state = 'expired')",
            {"id": derived},
        )


def flag_alike(conn: sqlite3.Connection, cube: MemCube, now: str) -> None:
    """An edge to the owner's oldest living memory of the same words: duplicates are shown, never dropped."""
    row = conn.execute(
        "SELECT o.id, o.version FROM cube c JOIN cube o ON o.owner = c.owner AND o.gist = c.gist WHERE "
        "c.id = ? AND o.id <> c.id AND o.state <> 'expired' AND o.gist IS NOT NULL ORDER BY o.id LIMIT 1",
        (cube.id,),
    ).fetchone()
    if row is not None:
        link(conn, (cube.id, cube.version), "resembles", (row[0], row[1]), now)
