"""Full disks and busy neighbours: nothing is half-written, all stays readable, the write can be repeated."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memos_engine.errors import MemoryInputError, StoreError, StoreFullError, StoreLockedError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.vault import FileSystem

Add = Callable[..., MemCube]


def dump(store: MemoryStore) -> dict[str, list[object]]:
    """Every row of every table, the shadow tables of full-text search included."""
    with store._db.read() as conn:
        tables = conn.execute("SELECT name FROM pragma_table_list WHERE type IN ('table', 'shadow')")
        return {name: conn.execute(f"SELECT * FROM {name}").fetchall() for (name,) in tables.fetchall()}


def _limit(store: MemoryStore, pages: int) -> None:
    with store._db.read() as conn:
        conn.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_database_refuses_whole_writes(store: MemoryStore, alice: Principal, add: Add) -> None:
    kept = [add(store, alice, f"memory {i}") for i in range(3)]
    before = dump(store)
    _limit(store, 1)  # SQLite raises it to the present size
    with pytest.raises(StoreFullError, match="free some space"):
        add(store, alice, "x" * 100_000)
    assert dump(store) == before
    assert store.list(alice) == kept
    _limit(store, 100_000)
    again = add(store, alice, "x" * 100_000)
    assert store.list(alice) == [*kept, again]
    store.audit_verify()


def test_every_point_of_a_full_database(store: MemoryStore, alice: Principal, add: Add) -> None:
    """The limit is raised page by page until the write fits: whichever statement fails, all is undone."""
    add(store, alice, "first")
    before = dump(store)
    with store._db.read() as conn:
        pages = conn.execute("PRAGMA page_count").fetchone()[0]
    refused = 0
    for extra in range(60):
        _limit(store, pages + extra)
        try:
            add(store, alice, "long" * 10_000, vector=[1.0] * 8000, model_id="wide")
        except StoreFullError:
            refused += 1
            assert dump(store) == before
        else:
            break
    assert 5 < refused < 59
    assert len(store.list(alice)) == 2
    store.audit_verify()


class FullDisk(FileSystem):
    full = False

    def write(self, fd: int, data: memoryview) -> int:
        if self.full:
            super().write(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)


def test_a_full_vault_refuses_the_record(
    reopen: Callable[..., MemoryStore], alice: Principal, add: Add
) -> None:
    disk = FullDisk()
    store = reopen(fs=disk)
    cube = add(store, alice, "x")
    held = store.put_kv(alice, cube.id, 1, "i", b"record i", 3)
    before = dump(store)
    disk.full = True
    with pytest.raises(StoreFullError):
        store.put_kv(alice, cube.id, 1, "j", b"record j", 3)
    assert dump(store) == before
    assert [p for p in store.vault.directory.rglob("*") if p.is_file()] == [store.vault.path(held)]
    assert bytes(store.vault.read(held)) == b"record i"
    disk.full = False
    assert store.find_kv(alice, cube.id, "j") is None
    store.put_kv(alice, cube.id, 1, "j", b"record j", 3)


def test_a_busy_neighbour_is_waited_for_then_named(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(store, alice, "x")
    other = sqlite3.connect(store.directory / "memory.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    for write in (lambda: add(store, alice, "y"), lambda: store.delete(alice, cube.id)):
        with pytest.raises(StoreLockedError, match="busy_timeout_ms"):
            write()
    assert store.list(alice) == [cube]  # readers never wait
    with store._db.read() as conn:
        conn.execute("PRAGMA busy_timeout = 5000")
    soon = threading.Timer(0.1, lambda: other.execute("ROLLBACK"))
    soon.start()
    assert add(store, alice, "y").body == "y"
    soon.join()
    other.close()


def test_two_processes_worth_of_stores_see_each_others_writes(
    reopen: Callable[..., MemoryStore], alice: Principal, add: Add
) -> None:
    one, two = reopen(busy_timeout_ms=5000), reopen(busy_timeout_ms=5000)

    def work(store: MemoryStore, name: str) -> None:
        for i in range(15):
            add(store, alice, f"{name} {i}")

    threads = [threading.Thread(target=work, args=pair) for pair in ((one, "a"), (two, "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(one.list(alice)) == len(two.list(alice)) == 30
    assert one.audit_verify() == two.audit_verify() == 31


class CollectsInBetween(FileSystem):
    """Another process removes the file just after its writer has made it durable."""

    armed = False

    def fsync_directory(self, path: Path) -> None:
        super().fsync_directory(path)
        if self.armed and path.name == "vault":
            self.armed = False
            for file in path.rglob("*.safetensors"):
                file.unlink()


def test_a_file_collected_before_its_row_is_written_again(
    reopen: Callable[..., MemoryStore], alice: Principal, add: Add
) -> None:
    disk = CollectsInBetween()
    store = reopen(fs=disk)
    cube = add(store, alice, "x")
    disk.armed = True
    ref = store.put_kv(alice, cube.id, 1, "i", b"record", 3)
    assert bytes(store.vault.read(ref)) == b"record"


class Stubborn(FileSystem):
    stubborn = True

    def unlink(self, path: Path) -> None:
        if self.stubborn:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        super().unlink(path)


def test_a_file_that_cannot_be_removed(
    reopen: Callable[..., MemoryStore], alice: Principal, add: Add
) -> None:
    disk = Stubborn()
    store = reopen(fs=disk)
    a, b = add(store, alice, "a"), add(store, alice, "b")
    refs = [store.put_kv(alice, cube.id, 1, "i", cube.id.encode(), 3) for cube in (a, b)]
    store.delete(alice, a.id)  # an orphan now, which is legal
    with pytest.raises(StoreError):  # but an erasure must not claim to be done
        store.erase(alice, b.id)
    assert store.history(alice, b.id)[-1].text is None
    disk.stubborn = False
    store.erase(alice, b.id)
    assert [store.vault.holds(ref) for ref in refs] == [True, False]
    assert store.collect(grace_s=0) == 1


def test_note_takes_json_only(store: MemoryStore) -> None:
    store.note({"event": "kv_refused", "identity": "x", "reason": "checksum", "n": [1, None, 2.5]})
    bad: list[dict[str, Any]] = [
        {},
        {"event": "Not a word"},
        {"event": "x", "at": "2026"},
        {"event": "x", "y": object()},
        {"event": "x", "y": float("nan")},
    ]
    before = store.audit_verify()
    for event in bad:
        with pytest.raises(MemoryInputError):
            store.note(event)
    assert store.audit_verify() == before
