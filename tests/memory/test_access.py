"""What others may do with a memory, and what no grant can take from its owner."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

from memos_engine.errors import AccessError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore

Add = Callable[..., MemCube]
S = LifecycleState


@pytest.fixture
def carol() -> Principal:
    return Principal("acme", "carol")


def test_visibility(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    private = add(store, alice, "mine")
    shown = add(store, alice, "for all to read", visibility="read_only")
    shared = add(store, alice, "for all to write", visibility="shared")
    rival = Principal("rival", "bob")
    assert store.list(bob) == [shown, shared]
    assert store.list(bob, own=True) == store.list(rival) == []
    assert store.update(bob, shared.id, "written by bob").owner == alice
    with pytest.raises(AccessError, match="may read"):
        store.update(bob, shown.id, "x")
    for cube, who in ((private, bob), (shown, rival)):
        with pytest.raises(MemoryNotFoundError):
            store.get(who, cube.id)
    with pytest.raises(AccessError, match="only the owner"):
        store.erase(bob, shared.id)
    store.delete(bob, shared.id)
    with pytest.raises(MemoryNotFoundError, match="there is no memory"):
        store.history(bob, shared.id)
    assert store.history(alice, shared.id)[-1].event == "deleted"


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("everybody", [False, True])
def test_a_grant_opens_and_its_end_closes(
    store: MemoryStore,
    alice: Principal,
    bob: Principal,
    add: Add,
    clock: Any,
    everything: bool,
    everybody: bool,
) -> None:
    cube, other = add(store, alice, "one"), add(store, alice, "other")
    which, whom = (None if everything else cube.id), (None if everybody else bob)
    grant = store.grant(alice, "read", cube_id=which, to=whom, expires_at=clock.now + timedelta(hours=1))
    seen = [cube, other] if everything else [cube]
    assert store.list(bob) == seen
    assert store.get(bob, cube.id, as_of=cube.created_at) == cube
    assert store.grants(alice) == [grant]
    assert store.grants(bob) == []
    assert grant.to_dict()["action"] == "read"
    with pytest.raises(AccessError):
        store.archive(bob, cube.id)
    clock.jump(hours=2)
    assert store.list(bob) == []
    assert store.grants(alice) == []
    again = store.grant(alice, "write", cube_id=which, to=whom)
    assert store.archive(bob, cube.id).state is S.ARCHIVED
    assert store.restore(bob, cube.id).state is S.ACTIVATED
    assert store.revoke(alice, again.id).revoked_at is not None
    with pytest.raises(MemoryNotFoundError):
        store.get(bob, cube.id)
    with pytest.raises(MemoryNotFoundError):
        store.get(bob, cube.id, as_of=cube.created_at)  # the past is read with today's grants
    with pytest.raises(MemoryNotFoundError):
        store.revoke(alice, again.id)


def test_denial_wins_and_never_hits_the_owner(
    store: MemoryStore, alice: Principal, bob: Principal, carol: Principal, add: Add
) -> None:
    cube = add(store, alice, "x", visibility="shared")
    store.grant(alice, "write", cube_id=cube.id, to=bob)
    store.grant(alice, "write", to=bob, effect="deny")
    with pytest.raises(AccessError):
        store.update(bob, cube.id, "y")
    assert store.get(bob, cube.id) == cube
    denial = store.grant(alice, "read", cube_id=cube.id, effect="deny")
    for who in (bob, carol):
        with pytest.raises(MemoryNotFoundError):
            store.get(who, cube.id)
    assert store.update(alice, cube.id, "z").version == 2
    store.revoke(alice, denial.id)
    assert store.update(carol, cube.id, "carol's").version == 3


def test_who_may_share_gives_no_more_than_they_have(
    store: MemoryStore, alice: Principal, bob: Principal, carol: Principal, add: Add
) -> None:
    cube = add(store, alice, "x")
    store.grant(alice, "share", cube_id=cube.id, to=bob)
    assert store.get(bob, cube.id) == cube
    passed = store.grant(bob, "read", cube_id=cube.id, to=carol)
    assert passed.owner == alice
    assert store.get(carol, cube.id) == cube
    for action in ("write",):
        with pytest.raises(AccessError):
            store.grant(bob, action, cube_id=cube.id, to=carol)
    with pytest.raises(AccessError):
        store.grant(bob, "read", cube_id=cube.id, to=carol, effect="deny")
    with pytest.raises(AccessError):
        store.grant(carol, "read", cube_id=cube.id, to=bob)
    with pytest.raises(AccessError):
        store.govern(carol, cube.id, visibility="shared")
    assert store.grants(bob) == [passed]
    with pytest.raises(AccessError, match="write"):
        store.govern(bob, cube.id, visibility="shared")
    assert store.govern(bob, cube.id, visibility="read_only").visibility == "read_only"
    assert store.govern(bob, cube.id, visibility="private").visibility == "private"
    store.revoke(bob, passed.id)
    with pytest.raises(MemoryNotFoundError):
        store.get(carol, cube.id)
    store.grant(bob, "read", to=carol)  # all of bob's own, not of alice's
    with pytest.raises(MemoryNotFoundError):
        store.get(carol, cube.id)


@pytest.mark.parametrize(
    "options",
    [
        {"action": "delete"},
        {"effect": "maybe"},
        {"to": Principal("rival", "bob")},
        {"to": Principal("acme", "alice", "branch")},
        {"expires_at": datetime(2020, 1, 1)},
    ],
)
def test_bad_grants_are_refused(
    store: MemoryStore, alice: Principal, add: Add, options: dict[str, Any], clock: Any
) -> None:
    add(store, alice, "x")
    with pytest.raises(MemoryInputError):
        store.grant(alice, **{"action": "read", **options})
    with pytest.raises(MemoryInputError, match="future"):
        store.grant(alice, "read", expires_at=clock.now - timedelta(days=1))
    assert store.grants(alice) == []


def test_grants_and_refusals_are_audited(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    cube = add(store, alice, "x", visibility="read_only")
    before = store.audit_verify()
    grant = store.grant(alice, "write", cube_id=cube.id, to=bob)
    store.revoke(alice, grant.id)
    with pytest.raises(AccessError):
        store.delete(bob, cube.id)
    assert store.audit_verify() == before + 3
    with store._db.read() as conn:
        rows = conn.execute("SELECT event FROM audit ORDER BY seq DESC LIMIT 3").fetchall()
    for row, word in zip(rows, ("access_refused", "revoked", "granted"), strict=True):
        assert word in row[0]


def test_readers_can_use_but_not_spoil(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    cube = add(store, alice, "x", visibility="read_only")
    assert store.record_use(bob, [cube.id]) == 1
    before = store.vectors(alice, "toy")[1]
    assert store.put_vectors(bob, "toy", [cube], np.ones((1, 32), np.float32)) == 1
    assert (store.vectors(alice, "toy")[1] == before).all()
    assert store.put_vectors(bob, "new", [cube], np.ones((1, 4), np.float32)) == 1
    store.put_kv(bob, cube.id, 1, "bobs", b"record", 1)
    assert store.find_kv(bob, cube.id, "bobs") is not None
    store.govern(alice, cube.id, visibility="private")
    assert store.find_kv(bob, cube.id, "bobs") is None
    with pytest.raises(MemoryNotFoundError):
        store.put_kv(bob, cube.id, 1, "bobs", b"record", 1)


def test_erasing_follows_derivations_to_others_when_asked(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    source = add(store, alice, "CANARY", visibility="read_only")
    theirs = add(store, bob, "a summary of CANARY", derived_from=[source.id])
    further = add(store, bob, "of the summary of CANARY", derived_from=[theirs.id])
    assert [(e.source, e.target) for e in store.lineage(alice, source.id)] == []  # she does not see bob's
    store.erase(alice, source.id)
    assert [c.source_gone_at is not None for c in store.list(bob)] == [True, True]
    again = add(store, alice, "CANARY", visibility="read_only")
    theirs = store.update(bob, theirs.id, "CANARY again", derived_from=[again.id])
    store.erase(alice, again.id, cascade=True)
    assert store.list(bob) == []
    data = b"".join(p.read_bytes() for p in store.directory.rglob("*") if p.is_file())
    assert b"CANARY" not in data
    assert store.history(bob, further.id)[-1].event == "erased"
    store.audit_verify()
