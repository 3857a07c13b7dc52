"""Bad input, full disks and locked directories, for the verbs of the control plane."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from memos_engine.errors import (
    ConflictError,
    MemoryInputError,
    MemoryNotFoundError,
    StoreError,
    StoreFullError,
)
from memos_engine.memory.cube import Fact, MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore, NewMemory

Add = Callable[..., MemCube]
STRANGE = [
    "\U0001f9e0" * 1000,
    "‏שלום‎ مرحبا",
    "a\u0301\u0323" * 50,
    "'); DROP TABLE cube; --",
    '{"json": [1, "two"]}',
    'NEAR(x y) AND * OR "',
    "x" * 1_000_000,
]


def dump(store: MemoryStore) -> list[str]:
    with store._db.read() as conn:
        tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'"
        names = [name for (name,) in conn.execute(tables)]
        return [repr(row) for name in names for row in conn.execute(f"SELECT * FROM {name}")]


@pytest.mark.parametrize("text", STRANGE)
def test_strange_texts_pass_through_every_verb(store: MemoryStore, alice: Principal, text: str) -> None:
    name = text[:200]
    cube = store.add(alice, text, tags=[text[:100]], fact=Fact(name, name))
    assert store.get(alice, cube.id).body == text
    assert store.update(alice, cube.id, text, mode="merge").body == text
    copy = store.list(store.branch(alice, "copy"))[0]
    assert (copy.body, copy.tags) == (text, (text[:100],))
    assert store.diff(alice, cube.id, 1, 2).same
    assert store.rollback(alice, cube.id, 1).body == text
    newer = store.add(alice, "newer", fact=Fact(name.upper(), name))
    ended = store.get(alice, cube.id).fact
    assert ended is not None
    assert newer.fact is not None
    assert ended.valid_to == newer.fact.valid_from
    store.audit_verify()


def test_facts_at_the_ends_of_time(store: MemoryStore, alice: Principal) -> None:
    first = datetime.min.replace(tzinfo=timezone.utc)
    last = datetime.max.replace(tzinfo=timezone.utc)
    old = store.add(alice, "since ever", fact=Fact("s", "a", first))
    new = store.add(alice, "at the very end", fact=Fact("s", "a", last))
    assert [store.get(alice, c.id).fact for c in (old, new)] == [Fact("s", "a", first, last), new.fact]
    assert store.list(alice, valid_at=last) == [new]
    store.add(alice, "x", ttl_at=last)
    store.sweep()
    for moment in (first, last):
        zone = timezone(timedelta(hours=14 if moment == first else -14))
        with pytest.raises(MemoryInputError, match="years 1 to 9999"):
            Fact("s", "a", moment.replace(tzinfo=zone))


@pytest.mark.parametrize("cube_id", ["", "x", None, 7, "' OR 1=1 --", "\ud800", "%"])
def test_nonsense_ids_are_missing(store: MemoryStore, alice: Principal, cube_id: Any) -> None:
    cube = store.add(alice, "x")
    verbs: list[Callable[[], object]] = [
        lambda: store.update(alice, cube_id, "y"),
        lambda: store.get(alice, cube_id, as_of=cube.created_at),
        lambda: store.rollback(alice, cube_id, 1),
        lambda: store.diff(alice, cube_id, 1, 1),
        lambda: store.freeze(alice, cube_id),
        lambda: store.unfreeze(alice, cube_id),
        lambda: store.govern(alice, cube_id, priority=1),
        lambda: store.lineage(alice, cube_id),
        lambda: store.link(alice, cube.id, "mentions", cube_id),
        lambda: store.add(alice, "y", derived_from=[cube_id]),
        lambda: store.update(alice, cube.id, "y", merged_from=[cube_id]),
        lambda: store.revoke(alice, cube_id),
    ]
    for verb in verbs:
        with pytest.raises(MemoryNotFoundError):
            verb()
    if cube_id is not None:
        with pytest.raises(MemoryNotFoundError):
            store.grant(alice, "read", cube_id=cube_id)
    assert store.get(alice, cube.id) == cube
    assert len(store.list(alice)) == 1


@pytest.mark.parametrize("number", [2**70, -(2**70), 2**63, 1.5, "1", None])
def test_nonsense_numbers_are_refused(store: MemoryStore, alice: Principal, number: Any) -> None:
    cube = store.add(alice, "x")
    verbs: list[Callable[[], object]] = [
        lambda: store.rollback(alice, cube.id, number),
        lambda: store.diff(alice, cube.id, 1, number),
        lambda: store.add(alice, "y", priority=number),
        lambda: store.govern(alice, cube.id, priority=number),
    ]
    for verb in verbs:
        with pytest.raises(MemoryInputError):
            verb()
    with pytest.raises(MemoryNotFoundError):
        store.revoke(alice, number)
    with pytest.raises(ConflictError):
        store.update(alice, cube.id, "y", if_version=-1 if number is None else number)
    assert store.list(alice) == [cube]


VERBS: dict[str, Callable[[MemoryStore, Principal, str], object]] = {
    "update": lambda store, who, one: store.update(who, one, "y" * 40_000, fact=Fact("s", "a")),
    "add_many": lambda store, who, _: store.add_many(who, [NewMemory("y" * 9000) for _ in range(5)]),
    "branch": lambda store, who, _: store.branch(who, "copy"),
    "rollback": lambda store, who, one: store.rollback(who, one, 1),
    "rollback_to": lambda store, who, one: store.rollback_to(who, store.history(who, one)[0].at),
}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_point_of_a_full_disk(store: MemoryStore, alice: Principal, verb: str) -> None:
    """The limit is raised page by page until the verb fits: whichever statement fails, all is undone."""
    cube = store.add(alice, "z" * 40_000, fact=Fact("s", "b"))
    store.add(alice, "w" * 9000, fact=Fact("s", "a"))
    store.update(alice, cube.id, "short")
    before = dump(store)
    with store._db.read() as conn:
        pages = conn.execute("PRAGMA page_count").fetchone()[0]
    refused = 0
    for extra in range(0, 80, 3):
        with store._db.read() as conn:
            conn.execute(f"PRAGMA max_page_count = {pages + extra}")
        try:
            VERBS[verb](store, alice, cube.id)
        except StoreFullError:
            refused += 1
            assert dump(store) == before
        else:
            break
    assert refused > 0
    assert dump(store) != before
    store.audit_verify()


def test_a_read_only_store_refuses_every_change(store: MemoryStore, alice: Principal) -> None:
    cube = store.add(alice, "x")
    with store._db.read() as conn:
        conn.execute("PRAGMA query_only = ON")
    for verb in VERBS.values():
        with pytest.raises(StoreError, match="writable"):
            verb(store, alice, cube.id)
    assert store.list(alice) == [cube]
    assert store.list(alice, as_of=cube.created_at) == [cube]
