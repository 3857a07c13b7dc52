"""New versions: what an update keeps and replaces, compare-and-swap, repeated calls, many at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from memos_engine.errors import (
    ConflictError,
    LifecycleError,
    MemoryInputError,
    MemoryNotFoundError,
    StoreError,
)
from memos_engine.memory.cube import Fact, MemCube, Provenance
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore, NewMemory

Add = Callable[..., MemCube]
S = LifecycleState


def rows(store: MemoryStore, sql: str) -> list[Any]:
    with store._db.read() as conn:
        return conn.execute(sql).fetchall()


def test_an_update_is_a_new_version_and_the_old_one_stays(
    store: MemoryStore, alice: Principal, add: Add
) -> None:
    cube = add(store, alice, "lives in Paris", tags=["home"])
    store.put_kv(alice, cube.id, 1, "i", b"record", 3)
    new = store.update(alice, cube.id, "lives in Rome", vector=[0.0] * 31 + [1.0], model_id="toy")
    assert (new.body, new.version, new.parent, new.state) == ("lives in Rome", 2, 1, S.MERGED)
    assert (new.tags, new.created_at, new.provenance_id) == (("home",), cube.created_at, cube.provenance_id)
    assert new.updated_at > cube.updated_at
    assert new == store.get(alice, cube.id) == store.list(alice)[0]
    assert store.find_kv(alice, cube.id, "i") is None
    assert store.vectors(alice, "toy")[1][0, 31] == 1
    with pytest.raises(MemoryInputError, match="version 2"):
        store.put_kv(alice, cube.id, 1, "i", b"record", 3)
    entries = store.history(alice, cube.id)
    assert [(e.version, e.event, e.text) for e in entries] == [
        (1, "added", "lives in Paris"),
        (2, "updated", "lives in Rome"),
    ]
    store.audit_verify()


def test_a_confirmation_keeps_vectors_and_kv(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "a fact")
    ref = store.put_kv(alice, cube.id, 1, "i", b"record", 3)
    before = store.vectors(alice, "toy")[1]
    new = store.update(alice, cube.id, "a fact", mode="merge", tags=["confirmed"])
    assert (new.version, new.body, new.tags) == (2, "a fact", ("confirmed",))
    assert store.find_kv(alice, cube.id, "i") == ref
    assert (store.vectors(alice, "toy")[1] == before).all()


def test_without_an_embedding_a_version_waits_for_one(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "one")
    new = store.update(alice, cube.id, "two")
    assert store.vectors(alice, "toy")[0] == []
    assert store.without_vector(alice, "toy", 5) == [new]
    assert store.add(alice, "three").version == 1
    for half in ({"vector": [1.0]}, {"model_id": "m"}):
        with pytest.raises(MemoryInputError, match="both"):
            store.update(alice, cube.id, "x", **half)


@pytest.mark.parametrize(
    ("mode", "text", "tags", "expected"),
    [
        ("overwrite", "c", ["z"], ("c", ("z",))),
        ("overwrite", "c", None, ("c", ("x",))),
        ("append", "b\nc", ["x", "y"], ("a\nb\nb\nc", ("x", "y"))),
        ("merge", "b\nc", ["y"], ("a\nb\nc", ("x", "y"))),
        ("merge", "a\nb", None, ("a\nb", ("x",))),
    ],
)
def test_modes(
    store: MemoryStore, alice: Principal, add: Add, mode: str, text: str, tags: Any, expected: Any
) -> None:
    cube = add(store, alice, "a\nb", tags=["x"])
    new = store.update(alice, cube.id, text, mode=mode, tags=tags)
    assert (new.body, new.tags) == expected
    assert (new.version, new.state) == (2, S.MERGED)


def test_compare_and_swap(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "a")
    assert store.update(alice, cube.id, "b", if_version=1).version == 2
    with pytest.raises(ConflictError, match="version 2, not 1"):
        store.update(alice, cube.id, "c", if_version=1)
    assert store.get(alice, cube.id).body == "b"
    assert store.update(alice, cube.id, "c", if_version=2).version == 3


@pytest.mark.parametrize(("how", "advice"), [("freeze", "unfreeze"), ("archive", "restore")])
def test_frozen_and_archived_memories_take_no_update(
    store: MemoryStore, alice: Principal, add: Add, how: str, advice: str
) -> None:
    cube = add(store, alice, "a")
    getattr(store, how)(alice, cube.id)
    before = store.audit_verify()
    with pytest.raises(LifecycleError, match=advice):
        store.update(alice, cube.id, "b")
    assert store.audit_verify() == before + 1
    (last,) = rows(store, "SELECT event FROM audit ORDER BY seq DESC LIMIT 1")
    assert "move_refused" in last[0]
    assert store.get(alice, cube.id).version == 1
    getattr(store, advice)(alice, cube.id)
    assert store.update(alice, cube.id, "b").version == 2


def test_freezing_keeps_the_state_before(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "a")
    assert store.freeze(alice, cube.id).state is S.FROZEN
    assert [c.id for c in store.list(alice)] == [cube.id]
    assert store.record_use(alice, [cube.id]) == 1
    for verb in (store.freeze, store.archive, store.delete, store.restore):
        with pytest.raises(LifecycleError):
            verb(alice, cube.id)
    assert store.unfreeze(alice, cube.id).state is S.GENERATED
    with pytest.raises(LifecycleError, match="frozen"):
        store.unfreeze(alice, cube.id)


def test_a_repeated_update_happens_once(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "a")
    first = store.update(alice, cube.id, "b", mode="append", idempotency_key="k")
    assert store.update(alice, cube.id, "b", mode="append", idempotency_key="k") == first
    with pytest.raises(ConflictError, match="another call"):
        store.update(alice, cube.id, "c", mode="append", idempotency_key="k")
    store.delete(alice, cube.id)
    with pytest.raises(ConflictError, match="deleted"):
        store.update(alice, cube.id, "b", mode="append", idempotency_key="k")


@pytest.mark.parametrize(
    "options",
    [
        {"text": ""},
        {"text": "a\0b"},
        {"mode": "prepend"},
        {"tags": "one"},
        {"semantic_type": "Free text"},
        {"origin": "hearsay"},
        {"derived_from": "an id"},
        {"mode": "append", "text": "x" * 1_000_000},
        {"fact": Fact("a", "b", valid_to=datetime(2020, 1, 1, tzinfo=timezone.utc))},
    ],
)
def test_a_bad_update_changes_nothing(
    store: MemoryStore, alice: Principal, add: Add, options: dict[str, Any]
) -> None:
    cube = add(store, alice, "a")
    before = store.stats()
    with pytest.raises(MemoryInputError):
        store.update(alice, cube.id, **{"text": "b", **options})
    assert store.get(alice, cube.id) == cube
    assert store.stats() == before


def test_many_are_added_whole_or_not_at_all(store: MemoryStore, alice: Principal, bob: Principal) -> None:
    made = store.add_many(alice, [NewMemory(f"m {n}", tags=[str(n)]) for n in range(5)])
    assert [c.body for c in made] == [f"m {n}" for n in range(5)]
    assert len({c.created_at for c in made}) == 1
    assert store.list(alice) == made
    assert store.add_many(alice, []) == []
    before = store.stats()
    with pytest.raises(MemoryNotFoundError):
        store.add_many(bob, [NewMemory("fine"), NewMemory("not", derived_from=[made[0].id])])
    assert store.stats() == before
    assert store.list(bob) == []
    twice = [NewMemory("same", idempotency_key="k"), NewMemory("same", idempotency_key="k")]
    one, two = store.add_many(bob, twice)
    assert one.id == two.id


def test_every_setting_comes_back(
    reopen: Callable[..., MemoryStore], store: MemoryStore, alice: Principal, clock: Any
) -> None:
    cube = store.add(
        alice,
        "x",
        visibility="read_only",
        priority=-3,
        sensitivity="health",
        half_life_s=60,
        ttl_at=clock.now + timedelta(days=1),
        fact=Fact("Alice", "home", clock.now, clock.now + timedelta(hours=3)),
        provenance=Provenance("a message", "kitchen", "smollm2", "mark", ("https://example.org/1",)),
    )
    store.close()
    again = reopen()
    assert again.get(alice, cube.id) == cube == MemCube.from_dict(cube.to_dict())
    assert (cube.visibility, cube.priority, cube.half_life_s) == ("read_only", -3, 60)
    new = again.update(alice, cube.id, "y", provenance=Provenance("correction"))
    assert new.fact == cube.fact
    assert new.provenance == Provenance("correction")
    assert again.update(alice, cube.id, "z", fact=None).fact is None
    changed = again.govern(alice, cube.id, visibility="private", priority=9, half_life_s=1.5)
    assert (changed.visibility, changed.priority, changed.half_life_s) == ("private", 9, 1.5)
    assert changed.sensitivity == "health"
    for bad in (
        {},
        {"visibility": "public"},
        {"priority": 1.5},
        {"half_life_s": 0},
        {"half_life_s": float("nan")},
        {"ttl_at": clock.now - timedelta(days=9)},
    ):
        with pytest.raises(MemoryInputError):
            again.govern(alice, cube.id, **bad)  # type: ignore[arg-type]


def test_texts_of_the_same_words_are_marked_never_dropped(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    first = add(store, alice, "Alice likes tea.")
    add(store, bob, "alice likes tea")
    second = add(store, alice, "tea: Alice LIKES")
    other = add(store, alice, "Alice likes coffee.")
    pizza, burger = add(store, alice, "I \u2665 \U0001f355!"), add(store, alice, "I \u2665 \U0001f354!")
    assert pizza.fingerprint != burger.fingerprint
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert [(e.kind, e.source, e.target) for e in store.lineage(alice, first.id)] == [
        ("resembles", second.id, first.id)
    ]
    assert store.lineage(alice, other.id) == []
    assert len(store.list(alice)) == 5


def test_derivations(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    a, b = add(store, alice, "a"), add(store, alice, "b")
    c = add(store, alice, "c", derived_from=[a.id, b.id, a.id])
    edges = store.lineage(alice, c.id)
    assert [(e.source, e.kind, e.target) for e in edges] == [
        (c.id, "derived_from", a.id),
        (c.id, "derived_from", b.id),
    ]
    assert edges[0].to_dict()["source_version"] == 1
    store.link(alice, a.id, "mentions", b.id)
    for source, target in ((a.id, c.id), (a.id, a.id)):
        with pytest.raises(MemoryInputError):
            store.link(alice, source, "derived_from", target)
    with pytest.raises(MemoryInputError, match="comes from it"):
        store.update(alice, a.id, "a2", derived_from=[c.id])
    with pytest.raises(MemoryInputError):
        store.link(alice, a.id, "branch_of", b.id)
    with pytest.raises(MemoryNotFoundError):
        add(store, bob, "theft", derived_from=[a.id])
    assert store.get(alice, a.id).version == 1
    with pytest.raises(StoreError, match="immutable"), store._db.write() as conn:
        conn.execute("UPDATE edge SET kind = 'mentions'")


def test_memories_merged_into_one_are_put_away(store: MemoryStore, alice: Principal, add: Add) -> None:
    a, b = add(store, alice, "likes tea"), add(store, alice, "likes green tea")
    merged = store.update(alice, a.id, "likes tea, best green", merged_from=[b.id])
    assert [c.id for c in store.list(alice)] == [a.id]
    assert store.get(alice, b.id).state is S.ARCHIVED
    assert [(e.kind, e.target) for e in store.lineage(alice, a.id)] == [("merged_from", b.id)]
    with pytest.raises(MemoryInputError, match="comes from it"):
        store.update(alice, a.id, "again", merged_from=[a.id])
    assert store.get(alice, a.id) == merged


def test_what_is_derived_from_a_deleted_memory_says_so(
    store: MemoryStore, alice: Principal, add: Add
) -> None:
    a = add(store, alice, "a")
    b = add(store, alice, "b", derived_from=[a.id])
    c = add(store, alice, "c", derived_from=[b.id])
    store.delete(alice, a.id)
    assert store.get(alice, b.id).source_gone_at is not None
    assert store.get(alice, c.id).source_gone_at is not None
    assert len(store.list(alice)) == 2


def test_the_stores_time_never_goes_back(store: MemoryStore, alice: Principal, add: Add, clock: Any) -> None:
    first = add(store, alice, "before")
    clock.jump(days=-400)
    second = add(store, alice, "after")
    assert second.created_at == first.created_at + timedelta(microseconds=1)
    assert second.id > first.id
    store.record_use(alice, [first.id])
    third = add(store, alice, "later still")
    used = store.get(alice, first.id).last_used_at
    assert used is not None
    assert first.created_at < used < third.created_at
    clock.now = datetime.max.replace(tzinfo=timezone.utc) - timedelta(microseconds=999)
    clock.jump(microseconds=-1000)  # the next look at it is the last microsecond
    last = []
    for n in range(2):
        last.append(add(store, alice, f"end of time {n}"))
        clock.jump(days=-1)
    last.append(add(store, alice, "no microsecond left"))
    assert last[0].created_at <= last[1].created_at <= last[2].created_at
    moments = [row[0] for row in rows(store, "SELECT at FROM cube_event ORDER BY seq")]
    assert moments == sorted(moments)
    store.audit_verify()


def test_another_process_with_a_slow_clock_is_later_all_the_same(
    reopen: Callable[..., MemoryStore], alice: Principal, add: Add, clock: Any
) -> None:
    first = add(reopen(), alice, "a")
    slow = reopen(clock=lambda: datetime(1, 1, 1, tzinfo=timezone.utc))
    assert add(slow, alice, "b").created_at > first.created_at
