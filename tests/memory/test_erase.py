"""Erasure: no byte of an erased text is left in any file of the store."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memos_engine.errors import MemoryNotFoundError, StoreLockedError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_db import StoreDB
from memos_engine.memory.store_vectors import unit_vector

Add = Callable[..., MemCube]


def everything(directory: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def test_the_text_is_gone_and_the_tombstone_stays(store: MemoryStore, alice: Principal, add: Add) -> None:
    vector = np.random.default_rng(0).normal(size=32)
    marks = [b"CANARY-BODY", b"CANARY-TAG", b"CANARY-TOKEN", b"CANARY-KV", unit_vector(vector).tobytes()]
    cube = add(
        store,
        alice,
        "CANARY-BODY " * 2000,
        tags=["CANARY-TAG"],
        idempotency_key="CANARY-TOKEN",
        vector=vector,
    )
    other = add(store, alice, "a memory that saw nothing")
    ref = store.put_kv(alice, cube.id, 1, "i", b"CANARY-KV" * 100, 5)
    seen = store.put_kv(alice, other.id, 1, "j", b"built beside CANARY-KV", 5, context_ids=[cube.id])
    present = everything(store.directory)
    assert [mark in present for mark in marks] == [True, True, False, True, True]
    refs = store.erase(alice, cube.id)
    assert set(refs) == {ref, seen}
    left = everything(store.directory)
    assert [mark in left for mark in marks] == [False] * 5
    entries = store.history(alice, cube.id)
    assert [(e.event, e.state, e.text) for e in entries] == [
        ("added", LifecycleState.GENERATED, None),
        ("erased", LifecycleState.EXPIRED, None),
    ]
    assert store.list(alice) == [other]
    assert store.kv_identities(alice, other.id) == []
    for verb in (store.get, store.archive, store.delete, store.erase):
        with pytest.raises(MemoryNotFoundError):
            verb(alice, cube.id)
    store.audit_verify()


@pytest.mark.parametrize("seed", [0])
def test_no_deleted_row_leaves_a_trace(tmp_path: Path, seed: int) -> None:
    """Pages that SQLite splits and merges keep copies of moved cells, which zeroed deletes do not reach."""
    rng = random.Random(seed)
    db = StoreDB(tmp_path)
    with db.write() as conn:
        conn.execute("CREATE TABLE t (a TEXT, b INTEGER, body TEXT, PRIMARY KEY (a, b)) STRICT")
    marks: dict[str, str] = {}
    gone: set[str] = set()
    for _ in range(15):
        with db.write() as conn:
            for _ in range(100):
                key = f"{len(marks):06d}"
                marks[key] = f"CANARY-{key}-{rng.getrandbits(64):016x}"
                body = marks[key] + "x" * rng.choice([0, 10, 100, 900, 3000, 9000])
                conn.execute("INSERT INTO t VALUES (?, 1, ?)", (key, body))
                if rng.random() < 0.4:
                    gone.add(rng.choice(sorted(marks.keys() - gone)))
                    conn.executemany("DELETE FROM t WHERE a = ?", [(dead,) for dead in gone])
    assert db.shrink()
    left = everything(tmp_path)
    assert [mark for key, mark in marks.items() if (mark.encode() in left) == (key in gone)] == []
    db.close()


def test_no_word_stays_in_full_text_search(store: MemoryStore, alice: Principal, add: Add) -> None:
    """Neither the erased text's words nor its session, nor what they were as context of those that follow."""
    for n in range(30):
        add(store, alice, f"neighbour {n}", session="talk")
    cube = add(store, alice, "zqxcanary vvkzebras went quietly", session="zqxsession")
    follower = add(store, alice, "and they came back", session="zqxsession2")
    words = MemOperator(store)
    assert [c.cube for c in words.recall(alice, "zqxcanary")] == [cube]
    marks = [b"zqxcan", b"vvkzebra", b"zqxsession"]
    assert all(mark in everything(store.directory) for mark in marks)
    store.erase(alice, cube.id)
    left = everything(store.directory)
    assert [mark in left for mark in marks] == [False, False, True]
    store.erase(alice, follower.id)
    assert b"zqxsession" not in everything(store.directory)
    assert words.recall(alice, "zqxcanary vvkzebras") == []
    assert len(words.recall(alice, "neighbour", k=50)) == 30


def test_many_can_be_erased_at_once(reopen: Callable[..., MemoryStore], alice: Principal, add: Add) -> None:
    store = reopen()
    cubes = [add(store, alice, f"CANARY-{n:03d}" + "x" * n * 50) for n in range(20)]
    for cube in cubes[::2]:
        store.erase(alice, cube.id, rewrite=False)
    assert store.finish_erasures() == 10
    assert store.finish_erasures() == 0
    left = everything(store.directory)
    assert [f"CANARY-{n:03d}".encode() in left for n in range(20)] == [False, True] * 10
    store.close()
    assert reopen().list(alice) == cubes[1::2]


@pytest.mark.parametrize("state", ["archived", "deleted", "activated"])
def test_it_works_in_every_state(store: MemoryStore, alice: Principal, add: Add, state: str) -> None:
    cube = add(store, alice, "CANARY")
    match state:
        case "archived":
            store.archive(alice, cube.id)
        case "deleted":
            store.delete(alice, cube.id)
        case _:
            store.record_use(alice, [cube.id])
    store.erase(alice, cube.id)
    assert b"CANARY" not in everything(store.directory)
    assert store.history(alice, cube.id)[-1].event == "erased"


def test_a_reader_of_old_pages_delays_it_and_the_next_opening_finishes(
    reopen: Callable[..., MemoryStore], alice: Principal, add: Add
) -> None:
    store = reopen()
    cube = add(store, alice, "CANARY")
    reader = sqlite3.connect(store.directory / "memory.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM cube_body").fetchall()
    with pytest.raises(StoreLockedError, match="close that process"):
        store.erase(alice, cube.id)
    assert store.history(alice, cube.id)[-1].text is None
    with pytest.raises(MemoryNotFoundError):
        store.get(alice, cube.id)
    reader.close()
    store.close()
    again = reopen()
    assert b"CANARY" not in everything(again.directory)
    with pytest.raises(MemoryNotFoundError, match="already"):
        again.erase(alice, cube.id)


def test_asking_again_finishes_a_delayed_erasure(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "CANARY")
    store.erase(alice, cube.id, rewrite=False)
    store.erase(alice, cube.id)
    assert b"CANARY" not in everything(store.directory)
