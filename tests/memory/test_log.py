"""Reading the audit trail, finding memories by the beginning of their id, trying a rollback."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from memos_engine.errors import AccessError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

Add = Callable[..., MemCube]


def names(store: MemoryStore, who: Principal | None, **filters: object) -> list[str]:
    return [event.event for event in store.audit_log(who, **filters)]


def test_a_user_reads_their_own_events(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    mine, shared, other = add(store, alice, "a"), add(store, bob, "b"), add(store, bob, "c")
    seen = store.grant(bob, "read", cube_id=shared.id, to=alice)
    with pytest.raises(AccessError):
        store.update(alice, shared.id, "x")
    store.link(alice, mine.id, "mentions", shared.id)
    scope = store.branch(alice, "what_if")
    assert names(store, alice) == ["added", "access_refused", "linked", "branched"]
    assert names(store, bob) == ["added", "added", "granted"]
    assert names(store, scope) == ["branched"]
    assert [e.user for e in store.audit_log(None)][-2:] == ["alice/what_if", "alice"]
    assert len(store.audit_log(None)) == store.audit_verify() == store.audit_head()[0]
    # What may not be seen any longer is not named to anybody but its owner and the operator.
    store.revoke(bob, seen.id)
    assert names(store, alice) == ["added", "branched"]
    assert all(event.seq is None for event in store.audit_log(alice))
    assert not [
        e for e in store.audit_log(alice) if shared.id in str(e.details) or other.id in str(e.details)
    ]
    assert store.audit_log(Principal("other", "alice")) == []


def test_a_source_that_goes_tells_nobody_of_what_others_made_of_it(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    source = add(store, alice, "source", visibility="read_only")
    secret = add(store, bob, "made of it", derived_from=[source.id])
    store.delete(alice, source.id)
    assert secret.id in str(store.audit_log(None))
    assert secret.id not in str(store.audit_log(alice))


def test_filters(store: MemoryStore, alice: Principal, add: Add) -> None:
    one, two = add(store, alice, "one"), add(store, alice, "two")
    store.archive(alice, one.id)
    store.grant(alice, "read", cube_id=one.id)
    store.link(alice, two.id, "mentions", one.id)
    assert names(store, alice, cube_id=one.id) == ["added", "archived", "granted", "linked"]
    assert names(store, alice, cube_id=two.id) == ["added", "linked"]
    assert names(store, alice, event="added") == ["added", "added"]
    assert names(store, alice, limit=2) == ["granted", "linked"]
    assert names(store, alice, since=two.created_at, until=two.created_at) == ["added"]
    assert names(store, None, until=one.created_at) == ["store_created", "added"]
    granted = store.audit_log(alice, event="granted")[0]
    assert granted.cube_id == one.id
    assert granted.to_dict()["grant"]["action"] == "read"
    assert "seq" not in granted.to_dict()
    for bad in ({"limit": 0}, {"limit": "x"}, {"since": "yesterday"}):
        with pytest.raises(MemoryInputError):
            store.audit_log(alice, **bad)


def test_an_id_is_found_by_its_beginning(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add, clock: object
) -> None:
    one = add(store, alice, "one")
    assert store.find_id(alice, one.id[:8]) == one.id
    assert store.find_id(alice, f" {one.id[:13].upper()} ") == one.id
    others = [add(store, alice, str(n)) for n in range(4)]
    with pytest.raises(MemoryInputError, match=r"several memories .*, \.\.\.\)"):
        store.find_id(alice, one.id[:8])
    assert store.find_id(alice, one.id[:-1]) == one.id
    assert store.find_id(alice, others[0].id) == others[0].id
    store.delete(alice, one.id)
    assert store.find_id(alice, one.id[:-1]) == one.id  # for its history
    for bad in (one.id[:7], "0"):
        with pytest.raises(MemoryInputError, match="at least its first 8"):
            store.find_id(alice, bad)
    for missing in ("nobody", "", "ffffffff", "%", one.id + "0", 7):
        with pytest.raises(MemoryNotFoundError):
            store.find_id(alice, missing)
    # Others' memories neither show nor make anything ambiguous.
    clock.jump(hours=1)
    hers = add(store, alice, "hers")
    add(store, bob, "his")
    assert store.find_id(alice, hers.id[:8]) == hers.id
    with pytest.raises(MemoryNotFoundError):
        store.find_id(Principal("acme", "eve"), hers.id[:8])


def test_trying_a_rollback_says_what_it_would_do_and_does_nothing(
    store: MemoryStore, alice: Principal, add: Add, clock: object
) -> None:
    rng, moments = random.Random(1), []
    for n in range(60):
        moments.append(clock.now)
        live = store.list(alice)
        verb = rng.choice(["add", "update", "archive", "delete", "rollback"])
        if verb == "add" or len(live) < 3:
            cube = add(store, alice, f"text {n}")
            store.put_kv(alice, cube.id, 1, f"i{n}", f"kv {n}".encode(), 1)
        elif verb == "update":
            store.update(alice, rng.choice(live).id, f"new {n}")
        elif verb == "rollback":
            when = rng.choice(moments)
            before = [store.list(alice), store.audit_head(), store.stats()["kv_records"]]
            would = store.rollback_to(alice, when, dry_run=True)
            assert [store.list(alice), store.audit_head(), store.stats()["kv_records"]] == before
            assert store.rollback_to(alice, when) == would
        else:
            getattr(store, verb)(alice, rng.choice(live).id)
    assert store.check().sound
