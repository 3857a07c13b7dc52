"""Several verbs as one: all of them or none, with their files, searches and refusals."""

# ruff: noqa: PT012  what happens before the error is what is tested

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from memos_engine.errors import LifecycleError, MemoryNotFoundError, StoreError
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore


def texts(store: MemoryStore, user: Principal) -> list[str | None]:
    return [cube.body for cube in store.list(user)]


def test_all_or_nothing(reopen: Callable[..., MemoryStore], alice: Principal) -> None:
    store, other = reopen(), reopen()
    kept = store.add(alice, "kept")
    with store.transaction():
        one = store.add(alice, "one")
        store.update(alice, kept.id, "kept and changed")
        assert texts(other, alice) == ["kept"]  # nobody else sees half of it
    assert texts(other, alice) == ["kept and changed", "one"]
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.archive(alice, one.id)
        store.add(alice, "two")
        raise ZeroDivisionError
    assert texts(store, alice) == ["kept and changed", "one"]
    store.audit_verify()


def test_a_part_can_be_undone_alone(store: MemoryStore, alice: Principal) -> None:
    with store.transaction():
        store.add(alice, "one")
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.add(alice, "two")
            raise ZeroDivisionError
        with pytest.raises(MemoryNotFoundError):
            store.archive(alice, "00000000-0000-7000-8000-000000000000")
        store.add(alice, "three")
    assert texts(store, alice) == ["one", "three"]
    store.audit_verify()


def test_what_was_found_in_what_was_undone_is_not_found_again(store: MemoryStore, alice: Principal) -> None:
    """Numbers of changes are given out again after an undone transaction: caches must not rely on them."""
    operator = MemOperator(store)
    store.add(alice, "first harbour")
    assert len(operator.recall(alice, "harbour")) == 1
    for outer in (True, False):
        with pytest.raises(ZeroDivisionError), store.transaction():
            if outer:
                store.add(alice, "second harbour")
                assert len(operator.recall(alice, "harbour")) == 2
                raise ZeroDivisionError
            try:
                with store.transaction():
                    store.add(alice, "third harbour")
                    assert len(operator.recall(alice, "harbour")) == 2
                    raise ZeroDivisionError
            finally:
                store.add(alice, "river")
                assert len(operator.recall(alice, "harbour")) == 1
        store_now = [c.cube.body for c in operator.recall(alice, "harbour")]
        assert store_now == ["first harbour"]
    new = store.add(alice, "last harbour")
    assert new.id in [c.cube.id for c in operator.recall(alice, "harbour")]


def test_files_of_what_was_undone_stay(store: MemoryStore, alice: Principal) -> None:
    cube = store.add(alice, "text")
    blob = store.vault.write(b"record")
    store.put_kv(alice, cube.id, 1, "identity", blob, 3)
    with pytest.raises(ZeroDivisionError), store.transaction():
        assert store.delete(alice, cube.id) == (blob,)
        raise ZeroDivisionError
    assert store.find_kv(alice, cube.id, "identity") == blob
    assert bytes(store.vault.read(blob)) == b"record"
    with store.transaction():
        store.delete(alice, cube.id)
        store.vault.verify(blob)  # until it is certain
    assert not store.vault.path(blob).exists()


def test_a_refusal_is_audited_although_all_was_undone(store: MemoryStore, alice: Principal) -> None:
    cube = store.add(alice, "text")
    store.freeze(alice, cube.id)
    length = store.audit_verify()
    with pytest.raises(LifecycleError), store.transaction():
        store.add(alice, "more")
        store.update(alice, cube.id, "other")
    assert store.audit_verify() == length + 1
    assert texts(store, alice) == ["text"]


def test_an_erasure_is_finished_outside(store: MemoryStore, alice: Principal) -> None:
    cube = store.add(alice, "secret")
    with pytest.raises(StoreError, match="rewrite=False"), store.transaction():
        store.erase(alice, cube.id)
    assert texts(store, alice) == ["secret"]
    with store.transaction():
        store.erase(alice, cube.id, rewrite=False)
    assert store.finish_erasures() == 1


def test_other_threads_wait(store: MemoryStore, alice: Principal) -> None:
    seen: list[int] = []
    with store.transaction():
        store.add(alice, "one")
        reader = threading.Thread(target=lambda: seen.append(len(store.list(alice))))
        reader.start()
        store.add(alice, "two")
        assert not seen
    reader.join()
    assert seen == [2]
