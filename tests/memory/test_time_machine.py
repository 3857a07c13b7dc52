"""Reads of the past, differences, going back, what-if branches."""

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
)
from memos_engine.memory.cube import Fact, MemCube, time_to_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore

Add = Callable[..., MemCube]
S = LifecycleState


def everything(store: MemoryStore) -> bytes:
    return b"\n".join(p.read_bytes() for p in sorted(store.directory.rglob("*")) if p.is_file())


def test_every_read_takes_a_moment(store: MemoryStore, alice: Principal, add: Add) -> None:
    first = add(store, alice, "one", tags=["t"])
    other = add(store, alice, "other")
    store.record_use(alice, [first.id, first.id])
    second = store.update(alice, first.id, "two", tags=["u"])
    store.archive(alice, first.id)
    store.delete(alice, other.id)
    then = second.created_at - timedelta(milliseconds=1)
    assert store.list(alice, as_of=then) == []
    assert store.get(alice, first.id, as_of=first.created_at) == first
    assert store.list(alice, as_of=other.created_at) == [first, other]
    assert store.get(alice, first.id, as_of=second.updated_at) == second
    assert store.list(alice, as_of=time_to_text(second.updated_at)) == [second, other]
    events = store.history(alice, first.id)
    assert [e.event for e in store.history(alice, first.id, as_of=second.updated_at)] == [
        e.event for e in events[:-1]
    ]
    used = store.get(alice, first.id, as_of=events[1].at)
    assert (used.uses, used.state, used.body) == (2, S.ACTIVATED, "one")
    with pytest.raises(MemoryNotFoundError):
        store.get(alice, other.id)
    with pytest.raises(MemoryNotFoundError):
        store.get(alice, first.id, as_of="2025-12-31")
    with pytest.raises(MemoryNotFoundError):
        store.history(alice, first.id, as_of="0001-01-01")
    ids, matrix = store.vectors(alice, "toy", as_of=first.created_at)
    assert (ids, matrix.shape) == ([first.id], (1, 32))


@pytest.mark.parametrize("moment", ["yesterday", "", 7, datetime(2026, 1, 1), "2026-13-01", b"2026-01-01"])
def test_what_is_no_moment_is_refused(store: MemoryStore, alice: Principal, moment: Any) -> None:
    cube = store.add(alice, "x")
    reads: list[Callable[[], object]] = [
        lambda: store.list(alice, as_of=moment),
        lambda: store.list(alice, valid_at=moment),
        lambda: store.get(alice, cube.id, as_of=moment),
        lambda: store.history(alice, cube.id, as_of=moment),
        lambda: store.vectors(alice, "m", as_of=moment),
        lambda: store.rollback_to(alice, moment),
    ]
    for read in reads:
        with pytest.raises(MemoryInputError):
            read()


def test_moments_at_the_ends_of_time(store: MemoryStore, alice: Principal) -> None:
    cube = store.add(alice, "x")
    assert store.list(alice, as_of="0001-01-01") == []
    assert store.list(alice, as_of="9999-12-31T23:59:59.999999Z") == [cube]
    for moment in (datetime.min, datetime.max):
        zone = timezone(timedelta(hours=14 if moment is datetime.min else -14))
        with pytest.raises(MemoryInputError, match="years 1 to 9999"):
            store.list(alice, as_of=moment.replace(tzinfo=zone))
    old = Fact("war", "dates", datetime.min.replace(tzinfo=timezone.utc), None)
    ancient = store.add(alice, "long ago", fact=old)
    assert store.list(alice, valid_at="0001-01-01") == [cube, ancient]


def test_an_erased_memory_is_in_no_past(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "x")
    store.update(alice, cube.id, "y")
    store.erase(alice, cube.id)
    assert store.list(alice, as_of=cube.created_at, states=set(S)) == []
    with pytest.raises(MemoryNotFoundError):
        store.get(alice, cube.id, as_of=cube.created_at)
    assert store.rollback_to(alice, cube.created_at).restored == ()
    with pytest.raises(MemoryInputError):
        store.diff(alice, cube.id, 1, 2)
    assert all(entry.text is None for entry in store.history(alice, cube.id))


def test_the_time_to_live_holds_in_the_past(
    store: MemoryStore, alice: Principal, add: Add, clock: Any
) -> None:
    cube = add(store, alice, "x", ttl_at=clock.now + timedelta(hours=1))
    clock.jump(hours=3)
    assert store.list(alice, as_of=cube.created_at) == [cube]
    assert store.list(alice, as_of=cube.created_at + timedelta(hours=2)) == []
    store.rollback_to(alice, cube.created_at)
    assert store.list(alice) == []


def test_diff(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    cube = add(store, alice, "a\nb", tags=["x", "y"])
    new = store.update(alice, cube.id, "a\nc", tags=["y", "z"], fact=Fact("s", "k"))
    diff = store.diff(alice, cube.id, 1, 2)
    assert diff.lines[-2:] == ("-b", "+c")
    assert (diff.tags_added, diff.tags_removed) == (("z",), ("x",))
    assert (diff.fact_before, diff.fact_after) == (None, new.fact)
    assert diff == store.diff(alice, cube.id, cube.created_at, time_to_text(new.updated_at))
    assert diff.to_dict()["after"] == 2
    assert store.diff(alice, cube.id, 2, 2).same
    assert not diff.same
    for bad in (3, 0, -1, "2020-01-01"):
        with pytest.raises(MemoryInputError):
            store.diff(alice, cube.id, 1, bad)
    with pytest.raises(MemoryNotFoundError):
        store.diff(bob, cube.id, 1, 2)


def test_rollback_appends_a_version_with_its_vectors_and_kv(
    store: MemoryStore, alice: Principal, add: Add
) -> None:
    cube = add(store, alice, "one", tags=["t"])
    ref = store.put_kv(alice, cube.id, 1, "i", b"record", 1)
    before = store.vectors(alice, "toy")[1]
    store.update(alice, cube.id, "two", tags=[])
    assert store.vectors(alice, "toy")[0] == []
    back = store.rollback(alice, cube.id, 1)
    assert (back.version, back.parent, back.body, back.tags) == (3, 1, "one", ("t",))
    assert back.state is S.ACTIVATED
    assert (store.vectors(alice, "toy")[1] == before).all()
    assert store.find_kv(alice, cube.id, "i") == ref
    assert store.history(alice, cube.id)[-1].event == "rolled_back"
    for bad in (3, 9, 0, "1", None):
        with pytest.raises(MemoryInputError):
            store.rollback(alice, cube.id, bad)  # type: ignore[arg-type]
    with pytest.raises(ConflictError):
        store.rollback(alice, cube.id, 2, if_version=1)
    store.archive(alice, cube.id)
    assert store.rollback(alice, cube.id, 2).state is S.ACTIVATED
    store.freeze(alice, cube.id)
    with pytest.raises(LifecycleError, match="unfreeze"):
        store.rollback(alice, cube.id, 1)


def test_all_go_back_together(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    changed, deleted, archived, same = (add(store, alice, text) for text in "abcd")
    gone = add(store, alice, "deleted before")
    store.delete(alice, gone.id)
    ref = store.put_kv(alice, changed.id, 1, "i", b"record", 1)
    derived = add(store, alice, "from b", derived_from=[deleted.id])
    bobs = add(store, bob, "bob's")
    moment = bobs.created_at
    before = store.list(alice), store.vectors(alice, "toy")
    store.update(alice, changed.id, "a2")
    store.delete(alice, deleted.id)
    store.archive(alice, archived.id)
    later = add(store, alice, "later")
    store.update(bob, bobs.id, "bob's 2")
    assert store.get(alice, derived.id).source_gone_at is not None
    done = store.rollback_to(alice, moment)
    assert set(done.restored) == {changed.id, deleted.id, archived.id}
    assert (done.put_away, done.ended, done.moment) == ((later.id,), (), moment)
    assert done.to_dict()["put_away"] == [later.id]
    after = store.list(alice), store.vectors(alice, "toy")
    assert [(c.id, c.body, c.state) for c in after[0]] == [(c.id, c.body, c.state) for c in before[0]]
    assert after[1][0] == before[1][0]
    assert (after[1][1] == before[1][1]).all()
    assert store.find_kv(alice, changed.id, "i") == ref
    assert store.get(alice, derived.id).source_gone_at is None
    assert store.get(alice, later.id).state is S.ARCHIVED
    assert store.get(bob, bobs.id).body == "bob's 2"
    assert store.get(alice, same.id) == same
    undone = store.rollback_to(alice, store.history(alice, later.id)[0].at)
    assert store.get(alice, changed.id).body == "a2"
    assert store.get(alice, later.id).state is S.GENERATED
    assert deleted.id in undone.ended
    with pytest.raises(MemoryInputError, match="to come"):
        store.rollback_to(alice, "9999-01-01")
    store.audit_verify()


def test_a_branch_is_a_world_of_its_own(
    reopen: Callable[..., MemoryStore], store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    a = add(store, alice, "a", tags=["t"], fact=Fact("s", "k"), visibility="shared")
    put_away = add(store, alice, "archived")
    store.archive(alice, put_away.id)
    add(store, bob, "open to all", visibility="shared")
    ref = store.put_kv(alice, a.id, 1, "i", b"record", 1)
    what_if = store.branch(alice, "what_if")
    assert what_if == Principal("acme", "alice", "what_if")
    (copy,) = store.list(what_if)
    assert copy.id != a.id
    assert (copy.body, copy.tags, copy.fact, copy.provenance_id) == ("a", ("t",), a.fact, a.provenance_id)
    assert (copy.visibility, copy.owner) == ("private", what_if)
    assert store.find_kv(what_if, copy.id, "i") == ref
    assert store.vectors(what_if, "toy")[0] == [copy.id]
    store.update(what_if, copy.id, "a, if only", fact=Fact("s", "k"))
    store.add(what_if, "written there")
    assert store.get(alice, a.id) == a
    assert len(store.list(alice)) == 2
    for mine, theirs in ((alice, copy.id), (what_if, a.id), (bob, copy.id)):
        with pytest.raises(MemoryNotFoundError):
            store.get(mine, theirs)
    assert [(e.kind, e.target) for e in store.lineage(alice, a.id)] == []
    with pytest.raises(MemoryInputError):
        store.grant(what_if, "read", to=bob)
    with pytest.raises(MemoryInputError):
        store.govern(what_if, copy.id, visibility="shared")
    with pytest.raises(MemoryInputError):
        store.add(what_if, "x", visibility="shared")
    with pytest.raises(ConflictError):
        store.branch(alice, "what_if")
    for bad in ("", "With Spaces", "x" * 33):
        with pytest.raises(MemoryInputError):
            store.branch(alice, bad)
    with pytest.raises(MemoryInputError):
        store.branch(what_if, "deeper")
    with pytest.raises(MemoryNotFoundError, match="branch"):
        store.add(Principal("acme", "alice", "nowhere"), "x")
    assert store.known_users() == [alice, bob]
    store.close()
    again = reopen()
    assert len(again.list(what_if)) == 2
    assert [b.name for b in again.branches(alice)] == ["what_if"]
    assert again.drop_branch(alice, "what_if") == 2
    assert again.list(what_if) == []
    assert again.branches(alice)[0].dropped_at is not None
    assert again.branches(alice)[0].to_dict()["name"] == "what_if"
    assert again.list(alice)[0] == a
    assert again.find_kv(alice, a.id, "i") == ref
    for name in ("what_if", "never", ""):
        with pytest.raises(MemoryNotFoundError):
            again.drop_branch(alice, name)
    with pytest.raises(MemoryNotFoundError):
        again.add(what_if, "too late")
    again.audit_verify()


def test_erasing_the_original_erases_the_copies(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "CANARY one", tags=["CANARY tag"], fact=Fact("CANARY subject", "CANARY key"))
    ref = store.put_kv(alice, cube.id, 1, "i", b"CANARY kv", 1)
    kept = add(store, alice, "kept")
    one, two = store.branch(alice, "one"), store.branch(alice, "two")
    store.update(one, store.list(one)[0].id, "CANARY in a branch")
    store.drop_branch(alice, "two")
    assert store.erase(alice, cube.id) == (ref,)
    assert b"CANARY" not in everything(store)
    assert [c.body for c in store.list(one)] == ["kept"]
    assert store.list(two, as_of=kept.created_at) == []
    assert store.list(alice) == [kept]
    store.audit_verify()
