from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError, StoreError
from memos_engine.memory.audit import GENESIS, canonical_json, chain_hash, verify_chain
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

Row = tuple[int, str, str]


def chain(events: list[str]) -> list[Row]:
    rows: list[Row] = []
    for seq, event in enumerate(events, 1):
        rows.append((seq, event, chain_hash(rows[-1][2] if rows else GENESIS, event)))
    return rows


def test_the_hash_is_the_documented_one() -> None:
    assert chain_hash(GENESIS, "{}") == hashlib.sha256(bytes(32) + b"{}").hexdigest()
    assert canonical_json({"b": "é", "a": [1, None]}) == '{"a":[1,null],"b":"\\u00e9"}'
    for bad in ({"x": b""}, {"x": float("inf")}):
        with pytest.raises(MemoryInputError):
            canonical_json(bad)


events = st.lists(st.integers(0, 99).map(lambda n: json.dumps({"n": n})), min_size=1, max_size=8)


@given(events)
def test_a_whole_chain_verifies(texts: list[str]) -> None:
    assert verify_chain(chain(texts), len(texts)) == len(texts)
    assert verify_chain([], 0) == 0


@given(events, st.data())
def test_every_single_change_is_found_at_its_row(texts: list[str], data: st.DataObject) -> None:
    rows = chain(texts)
    at = data.draw(st.integers(0, len(rows) - 1))
    seq, event, digest = rows[at]
    change = data.draw(st.sampled_from(["event", "hash", "remove", "renumber"]))
    if change == "event":
        rows[at] = (seq, event.replace("n", "m"), digest)
    elif change == "hash":
        rows[at] = (seq, event, ("1" if digest[0] == "0" else "0") + digest[1:])
    elif change == "remove":
        del rows[at]
    else:
        rows[at] = (seq + 100, event, digest)
    with pytest.raises(StoreError, match=f"row {seq} "):
        verify_chain(rows, len(texts))


@pytest.mark.parametrize(
    ("tamper", "row"),
    [
        ("UPDATE audit SET event = replace(event, 'bob', 'eve') WHERE seq = 3", 3),
        ("UPDATE audit SET hash = (SELECT hash FROM audit WHERE seq = 2) WHERE seq = 3", 3),
        ("DELETE FROM audit WHERE seq = 2", 2),
        ("DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)", 4),
        ("DELETE FROM audit", 1),
        ("INSERT INTO audit VALUES (9, '{}', printf('%064d', 0))", 5),
    ],
)
def test_tampering_with_the_file_is_found(
    store: MemoryStore,
    alice: Principal,
    bob: Principal,
    add: Callable[..., MemCube],
    tamper: str,
    row: int,
    reopen: Callable[..., MemoryStore],
) -> None:
    for who in (alice, bob, alice):
        add(store, who, "x")
    assert store.audit_verify() == 4
    store.close()
    conn = sqlite3.connect(store.directory / "memory.db")
    conn.execute("DROP TRIGGER audit_no_update")
    conn.execute("DROP TRIGGER audit_no_delete")
    conn.execute(tamper)
    conn.commit()
    conn.close()
    with pytest.raises(StoreError, match=f"audit row {row} "):
        reopen().audit_verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET event = '{}'",
        "DELETE FROM audit",
        "UPDATE cube_version SET at = ''",
        "DELETE FROM cube_version",
        "UPDATE cube_event SET event = 'x'",
        "DELETE FROM cube_event",
        "UPDATE cube_body SET body = 'x'",
        "DELETE FROM cube_body",
        "DELETE FROM cube",
        "UPDATE cube SET state = 'zombie'",
        "UPDATE cube SET version = 2",
        "INSERT INTO erasure VALUES ('nobody', '', '[]', NULL)",
        "INSERT OR REPLACE INTO audit SELECT seq, '{}', hash FROM audit",
    ],
)
def test_the_schema_itself_refuses_changes_to_the_past(
    store: MemoryStore, alice: Principal, add: Callable[..., MemCube], statement: str
) -> None:
    cube = add(store, alice, "x")
    with pytest.raises(StoreError), store._db.write() as conn:
        conn.execute(statement)
    assert store.get(alice, cube.id) == cube
    store.audit_verify()


def test_an_erasure_is_final_for_the_schema_too(
    store: MemoryStore, alice: Principal, add: Callable[..., MemCube]
) -> None:
    cube = add(store, alice, "x")
    store.erase(alice, cube.id)
    for statement in (
        "DELETE FROM erasure",
        "UPDATE erasure SET at = ''",
        f"INSERT INTO cube_body VALUES ('{cube.id}', 1, 'back', '[]')",
        f"INSERT INTO vector VALUES ('{cube.id}', 1, 'toy', 32, zeroblob(128))",
    ):
        with pytest.raises(StoreError, match="eras"), store._db.write() as conn:
            conn.execute(statement)


def test_no_text_reaches_the_audit_trail(
    store: MemoryStore, alice: Principal, add: Callable[..., MemCube]
) -> None:
    cube = add(store, alice, "CANARY", tags=["CANARY"], idempotency_key="CANARY")
    store.put_kv(alice, cube.id, 1, "i", b"record", 1)
    store.record_use(alice, [cube.id])
    store.archive(alice, cube.id)
    store.erase(alice, cube.id)
    with store._db.read() as conn:
        assert not conn.execute("SELECT 1 FROM audit WHERE event LIKE '%CANARY%'").fetchall()
        events = [json.loads(row[0]) for row in conn.execute("SELECT event FROM audit ORDER BY seq")]
    names = ["store_created", "added", "kv_stored", "activated", "archived", "erased"]
    assert [event["event"] for event in events] == names
    assert all(
        event["user"] == "alice" for event in events if event["event"] in ("added", "archived", "erased")
    )
