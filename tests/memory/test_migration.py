"""A store that was written with the first schema goes on with today's."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace

from memos_engine.memory.governance import Principal
from memos_engine.memory.migrations import STEPS
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_db import StoreDB

COLUMNS = {
    "meta": "*",
    "principal": "*",
    "embedder": "*",
    "cube": "id, provenance_id, owner, kind, version, state, created_at, updated_at, origin, semantic_type",
    "cube_version": "cube_id, version, at, origin, semantic_type, body_hmac, key_id",
    "cube_body": "*",
    "vector": "*",
    "cube_event": "*",
    "audit": "*",
}


def test_a_store_of_the_first_schema_goes_on(reopen: Callable[..., MemoryStore], alice: Principal) -> None:
    store = reopen()
    cube = store.add(alice, "from before", tags=["t"], vector=[1.0, 0.0], model_id="m")
    place = store.directory
    store.close()
    now = sqlite3.connect(place / "memory.db")
    rows = {name: now.execute(f"SELECT {c} FROM {name}").fetchall() for name, c in COLUMNS.items()}
    now.close()
    for path in place.glob("memory.db*"):
        path.unlink()
    for folder in ("vault", "index"):
        (place / folder).rmdir()
    first = StoreDB(place, steps=STEPS[:1])
    with first.write() as conn:
        for name, values in rows.items():
            columns = "" if COLUMNS[name] == "*" else f"({COLUMNS[name]})"
            marks = ", ".join("?" * len(values[0]))
            conn.executemany(f"INSERT INTO {name} {columns} VALUES ({marks})", values)
    first.close()
    again = reopen()
    assert again.list(alice) == [replace(cube, fingerprint=None)]
    assert again.update(alice, cube.id, "from today").parent == 1
    assert again.list(alice, as_of=cube.created_at)[0].body == "from before"
    assert again.vectors(alice, "m", as_of=cube.created_at)[0] == [cube.id]
    assert again.audit_verify() == 3
