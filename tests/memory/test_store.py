"""The verbs of the store, one user at a time and two users side by side."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos_engine.errors import (
    ConflictError,
    LifecycleError,
    MemoryInputError,
    MemoryNotFoundError,
    PayloadError,
    StoreError,
)
from memos_engine.memory.cube import MemCube, is_cube_id
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore

Add = Callable[..., MemCube]
S = LifecycleState


def test_a_memory_comes_back_whole(store: MemoryStore, alice: Principal, add: Add) -> None:
    text = "Mein Hund heißt \U0001f436 Biscuit.\n\tÜber alles; '); DROP TABLE cube;--"
    cube = add(store, alice, text, tags=["pets", "日本"], semantic_type="preference", origin="retrieval")
    assert store.get(alice, cube.id) == cube == store.list(alice)[0]
    assert (cube.body, cube.tags, cube.owner, cube.version) == (text, ("pets", "日本"), alice, 1)
    assert (cube.semantic_type, cube.origin, cube.state) == ("preference", "retrieval", S.GENERATED)
    assert cube.created_at == cube.updated_at
    assert is_cube_id(cube.id)
    assert cube.visibility == "private"
    assert cube.uses == 0


def test_it_survives_reopening(
    reopen: Callable[..., MemoryStore], store: MemoryStore, alice: Principal, add: Add
) -> None:
    cubes = [add(store, alice, f"fact {i}") for i in range(5)]
    identity = store.store_id, store.keys
    store.close()
    again = reopen()
    assert again.list(alice) == cubes
    assert (again.store_id, again.keys) == identity


@pytest.mark.parametrize(
    "options",
    [
        {"text": ""},
        {"text": "a\0b"},
        {"vector": [[1.0]]},
        {"vector": []},
        {"vector": [np.nan, 1]},
        {"vector": ["a"]},
        {"vector": [1.0] * 31},
        {"tags": "one"},
        {"semantic_type": "Free text about me"},
        {"origin": "hearsay"},
        {"idempotency_key": ""},
        {"model_id": ""},
        {"ttl_at": datetime(2020, 1, 1, tzinfo=timezone.utc)},
        {"ttl_at": datetime(2030, 1, 1)},
        {"principal": "alice"},
    ],
)
def test_bad_input_is_refused_and_stores_nothing(
    store: MemoryStore, alice: Principal, add: Add, options: dict[str, Any]
) -> None:
    add(store, alice, "the first fixes the width of the embedding")
    before = store.stats()
    options = {"text": "fine", "principal": alice, **options}
    with pytest.raises(MemoryInputError):
        add(store, options.pop("principal"), options.pop("text"), **options)
    after = store.stats()
    assert {k: v for k, v in after.items() if k != "database_bytes"} == {
        k: v for k, v in before.items() if k != "database_bytes"
    }


def test_idempotency(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    first = add(store, alice, "once", idempotency_key="k")
    assert add(store, alice, "once", idempotency_key="k") == first
    assert add(store, bob, "once", idempotency_key="k").id != first.id
    assert add(store, alice, "once").id != first.id
    with pytest.raises(ConflictError):
        add(store, alice, "another text", idempotency_key="k")
    store.delete(alice, first.id)
    with pytest.raises(ConflictError):
        add(store, alice, "once", idempotency_key="k")


def test_vectors_are_those_of_live_memories(store: MemoryStore, alice: Principal, add: Add) -> None:
    ids, matrix = store.vectors(alice, "toy")
    assert (ids, matrix.shape, matrix.dtype) == ([], (0, 0), np.float32)
    a, b, c = (add(store, alice, text, vector=[3, 4, 0]) for text in "abc")
    add(store, alice, "of another model", vector=[1.0, 0], model_id="other")
    zero = add(store, alice, "d", vector=[0, 0, 0])
    store.archive(alice, b.id)
    store.delete(alice, c.id)
    ids, matrix = store.vectors(alice, "toy")
    assert ids == [a.id, zero.id]
    np.testing.assert_allclose(matrix, [[0.6, 0.8, 0], [0, 0, 0]], rtol=1e-6)
    assert store.vectors(alice, "other")[1].shape == (1, 2)
    missing = store.without_vector(alice, "other", 10)
    assert [cube.id for cube in missing] == [a.id, zero.id]
    store.delete(alice, zero.id)
    assert store.put_vectors(alice, "other", missing, np.eye(2, dtype=np.float32)) == 1
    assert store.without_vector(alice, "other", 10) == []
    with pytest.raises(MemoryInputError):
        store.put_vectors(alice, "other", missing, np.eye(3, dtype=np.float32))


def test_archive_restore_delete(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "x")
    assert store.archive(alice, cube.id).state is S.ARCHIVED
    assert store.list(alice) == []
    assert [c.id for c in store.list(alice, states={S.ARCHIVED})] == [cube.id]
    assert store.get(alice, cube.id).state is S.ARCHIVED
    assert store.get_many(alice, [cube.id]) == {}
    with pytest.raises(LifecycleError, match="activated, expired"):
        store.archive(alice, cube.id)
    assert store.restore(alice, cube.id).state is S.ACTIVATED
    with pytest.raises(LifecycleError, match="archived"):
        store.restore(alice, cube.id)
    assert store.delete(alice, cube.id) == ()
    for verb in (store.get, store.archive, store.restore, store.delete, store.kv_identities):
        with pytest.raises(MemoryNotFoundError, match="deleted"):
            verb(alice, cube.id)
    assert store.list(alice, states=set(S)) == []
    entries = store.history(alice, cube.id)
    assert [(e.event, e.state) for e in entries] == [
        ("added", S.GENERATED),
        ("archived", S.ARCHIVED),
        ("restored", S.ACTIVATED),
        ("deleted", S.EXPIRED),
    ]
    assert all(e.text == "x" and e.version == 1 for e in entries)
    assert [e.at for e in entries] == sorted({e.at for e in entries})


def test_refused_moves_are_audited(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "x")
    before = store.audit_verify()
    with pytest.raises(LifecycleError):
        store.restore(alice, cube.id)
    assert store.audit_verify() == before + 1


def test_use_activates_once_and_counts(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    a, b, c = (add(store, alice, text) for text in "abc")
    gone = add(store, alice, "d")
    store.delete(alice, gone.id)
    store.archive(alice, c.id)
    assert store.record_use(alice, [a.id, b.id, a.id, c.id, gone.id, "nonsense"]) == 4
    assert store.record_use(bob, [a.id]) == 0
    assert store.record_use(alice, []) == 0
    one, two, three = (store.get(alice, cube.id) for cube in (a, b, c))
    assert (one.uses, one.state) == (2, S.ACTIVATED)
    assert (two.uses, two.state) == (1, S.ACTIVATED)
    assert (three.uses, three.state) == (1, S.ARCHIVED)  # what its owner put away stays away
    assert one.last_used_at is not None
    assert [e.event for e in store.history(alice, a.id)] == ["added", "activated"]
    store.record_use(alice, [a.id])
    assert len(store.history(alice, a.id)) == 2


def test_a_memory_past_its_time_is_gone(
    store: MemoryStore, alice: Principal, add: Add, clock: Any, toy: Any
) -> None:
    cube = add(store, alice, "x", ttl_at=clock.now + timedelta(hours=1))
    assert store.list(alice) == [cube]
    clock.jump(hours=2)
    assert store.list(alice, states=set(S)) == []
    assert store.vectors(alice, "toy")[0] == []
    assert store.without_vector(alice, "other", 5) == []
    assert store.record_use(alice, [cube.id]) == 0
    with pytest.raises(MemoryNotFoundError):
        store.get(alice, cube.id)
    assert len(store.history(alice, cube.id)) == 1
    store.erase(alice, cube.id)


def test_kv_rows_and_files(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "x")
    assert store.find_kv(alice, cube.id, "id1") is None
    ref = store.put_kv(alice, cube.id, 1, "id1", b"record 1", 7)
    assert store.find_kv(alice, cube.id, "id1") == ref
    other = store.put_kv(alice, cube.id, 1, "id2", store.vault.write(b"record 2"), 7)
    assert store.kv_identities(alice, cube.id) == ["id1", "id2"]
    assert bytes(store.vault.read(other)) == b"record 2"
    assert store.stats()["kv_bytes"] == 16
    rebuilt = store.put_kv(alice, cube.id, 1, "id1", b"record 1 anew", 7)
    assert store.find_kv(alice, cube.id, "id1") == rebuilt
    assert not store.vault.holds(ref)
    assert store.drop_kv("id2", "checksum") == 1
    assert store.drop_kv("id2", "checksum") == 0
    assert not store.vault.holds(other)
    assert store.delete(alice, cube.id) == (rebuilt,)
    assert not store.vault.holds(rebuilt)
    store.audit_verify()


def test_bad_kv_is_refused_and_leaves_no_file(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "x")
    for arguments in (("no such id", 1, "i", b"1", 1), (cube.id, 2, "i", b"2", 1)):
        with pytest.raises((MemoryNotFoundError, MemoryInputError)):
            store.put_kv(alice, *arguments)
    for arguments in ((cube.id, 1, "", b"3", 1), (cube.id, 1, "a b", b"4", 1), (cube.id, 1, "i", b"5", -1)):
        with pytest.raises(MemoryInputError):
            store.put_kv(alice, *arguments)
    unwritten = store.vault.write(b"6")
    store.vault.delete(unwritten)
    with pytest.raises(PayloadError):
        store.put_kv(alice, cube.id, 1, "i", unwritten, 1)
    assert [p for p in store.vault.directory.rglob("*") if p.is_file()] == []
    assert store.stats()["kv_records"] == 0


def test_two_memories_of_the_same_words_share_a_file_until_both_go(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    a, b = add(store, alice, "same"), add(store, bob, "same")
    ref = store.put_kv(alice, a.id, 1, "same", b"record", 3)
    assert store.put_kv(bob, b.id, 1, "same", b"record", 3) == ref
    assert store.delete(alice, a.id) == ()  # nothing for the caller to let go of: bob's names it
    assert store.find_kv(bob, b.id, "same") == ref
    assert bytes(store.vault.read(ref)) == b"record"
    assert store.delete(bob, b.id) == (ref,)
    assert not store.vault.holds(ref)


def test_a_record_goes_with_every_memory_it_saw(store: MemoryStore, alice: Principal, add: Add) -> None:
    a, seen = add(store, alice, "a"), add(store, alice, "seen while a's record was built")
    ref = store.put_kv(alice, a.id, 1, "i", b"record", 3, context_ids=[seen.id])
    plain = store.put_kv(alice, a.id, 1, "j", b"plain", 3)
    assert store.delete(alice, seen.id) == (ref,)
    assert store.find_kv(alice, a.id, "i") is None
    assert store.find_kv(alice, a.id, "j") == plain
    with pytest.raises(MemoryNotFoundError):
        store.put_kv(alice, a.id, 1, "i", b"record", 3, context_ids=[seen.id])


def test_the_scrub_drops_damaged_files(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "x")
    good, bad = (store.put_kv(alice, cube.id, 1, str(i), bytes([i]) * 9, 3) for i in range(2))
    assert store.scrub() == 2
    store.vault.path(bad).write_bytes(b"?" * 9)
    assert store.scrub() == 1
    assert store.kv_identities(alice, cube.id) == ["0"]
    assert not store.vault.holds(bad)
    assert store.vault.holds(good)
    store.vault.write(b"orphan")
    assert store.collect() == 0
    assert store.collect(grace_s=0) == 1
    assert store.scrub() == 1


def test_users_never_see_each_other(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    others = [bob, Principal("rival", "alice"), Principal("acme", "ALICE"), Principal("acme", "nobody")]
    cube = add(store, alice, "secret", idempotency_key="k")
    store.put_kv(alice, cube.id, 1, "i", b"record", 1)
    missing = cube.id[:-1] + ("0" if cube.id[-1] != "0" else "1")
    for other in others:
        assert store.list(other, states=set(S)) == []
        assert store.vectors(other, "toy")[0] == []
        assert store.without_vector(other, "unseen", 9) == []
        assert store.get_many(other, [cube.id]) == {}
        assert store.find_kv(other, cube.id, "i") is None
        assert store.record_use(other, [cube.id]) == 0
        assert store.put_vectors(other, "toy", [cube], np.ones((1, 32), np.float32)) == 0
        verbs = [
            store.get,
            store.archive,
            store.restore,
            store.delete,
            store.erase,
            store.history,
            store.kv_identities,
            lambda who, which: store.put_kv(who, which, 1, "j", b"evil", 1),
        ]
        for verb in verbs:
            messages = []
            for cube_id in (cube.id, missing):
                with pytest.raises(MemoryNotFoundError) as caught:
                    verb(other, cube_id)
                messages.append(str(caught.value).replace(cube_id, "ID"))
            assert messages[0] == messages[1]  # another's memory is exactly like a missing one
        mine = add(store, other, "mine")
        with pytest.raises(MemoryNotFoundError):
            store.put_kv(other, mine.id, 1, "j", b"evil", 1, context_ids=[cube.id])
    assert store.get(alice, cube.id) == cube
    assert store.known_users() == sorted([alice, *others])


@pytest.mark.parametrize("cube_id", ["", "x", None, 7, "' OR 1=1 --", "\ud800", "%"])
def test_nonsense_ids_are_missing(store: MemoryStore, alice: Principal, add: Add, cube_id: Any) -> None:
    add(store, alice, "x")
    for verb in (store.get, store.archive, store.delete, store.erase, store.history):
        with pytest.raises(MemoryNotFoundError):
            verb(alice, cube_id)


def test_threads_share_a_store(store: MemoryStore, alice: Principal, add: Add) -> None:
    errors: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for i in range(10):
                cube = add(store, alice, f"{n} {i}")
                store.record_use(alice, [cube.id])
                assert any(c.id == cube.id for c in store.list(alice))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store.list(alice)) == 40
    assert store.audit_verify() == 81


def test_a_lost_key_is_replaced_and_audited(
    reopen: Callable[..., MemoryStore], store: MemoryStore, alice: Principal, add: Add, keyring: KeyRing
) -> None:
    cube = add(store, alice, "still readable")
    old = store.keys
    store.close()
    (path,) = keyring.directory.iterdir()
    assert store.store_id in path.name
    path.unlink()
    again = reopen()
    assert again.keys != old
    assert again.keys.tenant_salt("acme") != old.tenant_salt("acme")
    assert again.get(alice, cube.id) == cube
    rows = sqlite3.connect(again.directory / "memory.db").execute("SELECT event FROM audit").fetchall()
    assert "key_replaced" in rows[-1][0]
    assert old.id in rows[-1][0]
    length = again.audit_verify()
    again.close()
    assert reopen().audit_verify() == length


def test_keys_lie_outside_of_the_store(
    tmp_path: Path, store: MemoryStore, reopen: Callable[..., MemoryStore]
) -> None:
    secret = store.keys.secret
    store.close()
    assert all(secret not in path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    for inside in ("keys", "vault/../deep/keys"):
        with pytest.raises(StoreError, match="MEMOS_ENGINE_KEYS"):
            reopen(keyring=KeyRing(tmp_path / "store" / inside))
    assert not (tmp_path / "store" / "keys").exists()


def test_a_closed_store_says_so(store: MemoryStore, alice: Principal) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.list(alice)


def test_stats(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    a = add(store, alice, "a")
    add(store, bob, "b")
    store.archive(alice, a.id)
    stats = store.stats()
    assert stats["cubes_by_state"] == {"archived": 1, "generated": 1}
    assert (stats["cubes"], stats["users"], stats["vectors"], stats["schema"]) == (2, 2, 2, 2)
    assert stats["database_bytes"] > 0
