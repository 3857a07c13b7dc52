"""The check of a whole store: each kind of damage is found in its part, and what is a copy is mended."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memos_engine.errors import StoreError, StoreLockedError
from memos_engine.memory.checkup import Checkup
from memos_engine.memory.cube import Fact, MemCube
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.janitor import Janitor, SweepPolicy
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore

Open = Callable[..., MemoryStore]
Add = Callable[..., MemCube]


def wrong(found: Checkup) -> list[str]:
    return [part.name for part in found.parts if part.problems]


@pytest.fixture
def lived(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> MemoryStore:
    """A store in which everything has happened once; closed."""
    dog = add(store, alice, "My dog is called Biscuit.", tags=["pets"], fact=Fact("dog", "name"))
    add(store, alice, "My dog is called Rex.", fact=Fact("dog", "name"))
    cat = add(store, bob, "My cat is called Tom.")
    store.put_kv(alice, dog.id, 1, "i", b"record" * 100, 3)
    store.put_kv(bob, cat.id, 1, "j", b"other" * 100, 3, context_ids=[cat.id])
    store.update(alice, dog.id, "He likes bones.", mode="append")
    store.govern(bob, cat.id, visibility="read_only", priority=2)
    store.record_use(alice, [dog.id, cat.id])
    store.freeze(bob, cat.id)
    store.rollback(alice, dog.id, 1)
    store.branch(alice, "what_if")
    gone = add(store, bob, "gone")
    store.delete(bob, gone.id)
    store.erase(alice, add(store, alice, "erased").id)
    store.rollback_to(bob, cat.created_at)
    store.note({"event": "noted", "cube_id": dog.id})
    store.snapshots.write("one", lambda path: Path(path).write_bytes(b"graph"), lambda act: act(), applied=1,
                          dim=2, model_id="toy", count=3)  # fmt: skip
    store.close()
    return store


def run_sql(store: MemoryStore, *statements: str) -> None:
    """As somebody with the file would: without the triggers that keep the past as it is."""
    conn = sqlite3.connect(store.directory / "memory.db")
    for (name,) in conn.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        conn.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        assert conn.execute(statement).rowcount != 0
    conn.commit()
    conn.close()


def test_a_sound_store(lived: MemoryStore, reopen: Open) -> None:
    told: list[str] = []
    found = reopen().check(progress=told.append)
    assert found.sound
    assert not found.mendable
    assert wrong(found) == []
    assert told == [part.name for part in found.parts]
    counts = {part.name: part.looked_at for part in found.parts}
    assert counts["payloads"] == 2
    assert counts["index"] == 1
    assert counts["embeddings"] == counts["words"] - 1  # the version that was appended to has none
    assert counts["texts"] == counts["words"] == 8
    assert counts["histories"] == 7
    assert all(part.looked_at for part in found.parts if part.name != "files")
    assert found.to_dict()["parts"][0]["sound"] is True


@pytest.mark.parametrize(
    ("statement", "parts"),
    [
        ("UPDATE audit SET event = replace(event, 'added', 'asked') WHERE seq = 2", ["audit", "histories"]),
        ("UPDATE audit SET event = '7' WHERE seq = 2", ["audit", "histories"]),
        ("DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)", ["audit"]),
        ("UPDATE cube_event SET state = 'frozen' WHERE seq = 1", ["histories"]),
        ("UPDATE cube SET state = 'archived' WHERE rowid = 2", ["histories"]),
        ("UPDATE cube_body SET body = replace(body, 'Biscuit', 'Rex') WHERE version = 1", ["texts", "words"]),
        ("UPDATE cube_version SET body_hmac = zeroblob(32) WHERE rowid = 1", ["texts"]),
        ("DELETE FROM embedder", ["references"]),
    ],
)  # fmt: skip
def test_what_was_changed_behind_its_back(
    lived: MemoryStore, reopen: Open, statement: str, parts: list[str]
) -> None:
    run_sql(lived, statement)
    store = reopen()
    found = store.check()
    assert wrong(found) == parts
    assert not found.sound
    # What is no copy of anything stays as it is.
    again = store.check(repair=True)
    assert wrong(again) == parts
    assert again.sound is False


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        (f"UPDATE vector SET vec = x'{'00' * 124}00002042' WHERE rowid = 1", "embeddings"),
        (f"UPDATE vector SET vec = x'{'00' * 124}0000c07f' WHERE rowid = 1", "embeddings"),
        ("INSERT INTO fts_1 (fts_1) VALUES ('delete-all')", "words"),
        ("INSERT INTO fts_1 (rowid, body) VALUES (99, 'stray')", "words"),
        ("UPDATE fts_1_data SET block = zeroblob(length(block)) WHERE id > 10", "words"),
        ("UPDATE fts_1_data SET block = zeroblob(length(block))", "words"),
    ],
)
def test_copies_in_the_database_are_mended(
    lived: MemoryStore, reopen: Open, alice: Principal, toy: Callable[[], object], statement: str, part: str
) -> None:
    before = MemOperator(reopen(), toy()).recall(alice, "Biscuit")
    run_sql(lived, statement)
    store = reopen()
    found = store.check()
    assert wrong(found) == [part]
    assert found.mendable
    mended = store.check(repair=True)
    assert mended.sound, mended
    assert wrong(mended) == [part]
    assert wrong(store.check()) == []
    after = MemOperator(store, toy()).recall(alice, "Biscuit")
    assert [(c.cube, pytest.approx(c.score)) for c in before] == [(c.cube, c.score) for c in after]


def payload(store: MemoryStore) -> Path:
    return next(iter(sorted(store.vault.directory.rglob("*.safetensors"))))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flip", "cut", "gone", "grown"])
def test_damaged_payloads_are_found_and_dropped(lived: MemoryStore, reopen: Open, kind: str) -> None:
    path = payload(lived)
    shared = path.stat().st_size == 600  # the branch's copy names it, too
    if kind == "flip":
        flip(path, 17)
    elif kind == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if kind == "cut" else path.read_bytes() + b"x")
    store = reopen()
    found = store.check()
    assert wrong(found) == ["payloads"]
    assert path.name in next(p for p in found.parts if p.problems).problems[0].what
    assert store.stats()["kv_records"] == 3
    assert store.check(repair=True).sound
    assert store.stats()["kv_records"] == (1 if shared else 2)
    assert wrong(store.check()) == []
    store.audit_verify()


@pytest.mark.parametrize("kind", ["body", "header", "gone", "cut"])
def test_damaged_snapshots_are_found_and_dropped(lived: MemoryStore, reopen: Open, kind: str) -> None:
    body, header = (next(lived.snapshots.directory.glob(f"*.{end}")) for end in ("hnsw", "json"))
    match kind:
        case "body":
            flip(body, 3)
        case "header":
            flip(header, 20)
        case "gone":
            body.unlink()
        case "cut":
            body.write_bytes(b"")
    store = reopen()
    assert wrong(store.check()) == ["index"]
    assert store.check(repair=True).sound
    assert list(store.snapshots.directory.iterdir()) == []
    assert wrong(store.check()) == []


def test_a_flipped_byte_anywhere_in_the_database_is_never_a_traceback(
    lived: MemoryStore, keyring: KeyRing
) -> None:
    path = lived.directory / "memory.db"
    whole = path.read_bytes()
    rng, found = random.Random(5), 0
    used = [at for at, byte in enumerate(whole) if byte]  # most of a small store is free space
    for at in [whole.index(b"Biscuit") + 2, *rng.sample(used, 100)]:
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            with MemoryStore.open(lived.directory, keyring=keyring) as store:
                found += not store.check().sound
        except StoreError:
            found += 1
        for side in ("-wal", "-shm"):
            path.with_name(path.name + side).unlink(missing_ok=True)
        if at == whole.index(b"Biscuit") + 2:
            assert found == 1
    assert found > 50  # the others say nothing that is written twice
    path.write_bytes(whole)


def test_a_damaged_database_is_not_written_to(lived: MemoryStore, reopen: Open) -> None:
    payload(lived).unlink()
    run_sql(lived, "DELETE FROM embedder WHERE 0 OR 1")
    path = lived.directory / "memory.db"
    conn = sqlite3.connect(path)
    (root,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'cube_by_gist'").fetchone()
    (size,) = conn.execute("PRAGMA page_size").fetchone()
    conn.close()
    data = bytearray(path.read_bytes())
    data[(root - 1) * size + 3 : (root - 1) * size + 5] = b"\0\0"  # an index page that holds no cells
    path.write_bytes(data)
    store = reopen()
    found = store.check(repair=True)
    assert "database" in wrong(found)
    (lost,) = next(part for part in found.parts if part.name == "payloads").problems
    assert not lost.mended


def test_a_lost_key_is_a_note(lived: MemoryStore, reopen: Open, tmp_path: Path) -> None:
    found = reopen(keyring=KeyRing(tmp_path / "elsewhere")).check()
    assert found.sound
    assert any("earlier key" in note for part in found.parts for note in part.notes)


def test_a_busy_store_is_no_damaged_one(lived: MemoryStore, reopen: Open) -> None:
    store = reopen(busy_timeout_ms=1)
    with reopen()._db.write(), pytest.raises(StoreLockedError):
        store.check()


def test_cleaning(store: MemoryStore, alice: Principal, add: Add) -> None:
    kept, idle = add(store, alice, "kept"), add(store, alice, "idle")
    store.put_kv(alice, kept.id, 1, "i", b"old" * 10, 1)
    store.update(alice, kept.id, "kept again")
    store.freeze(alice, kept.id)
    orphan = store.vault.write(b"orphan")
    for name in (".draft-x", "0" * 64 + ".hnsw"):
        (store.snapshots.directory / name).write_bytes(b"1234")
    (store.snapshots.directory / "README").write_text("mine")
    assert next(p for p in store.check().parts if p.name == "files").looked_at == 3
    janitor = Janitor(store, SweepPolicy(idle_s=0, old_kv_s=0))
    assert janitor.clean(dry_run=True).files == 0  # as young as they are they may be somebody's
    would = janitor.clean(grace_s=0, dry_run=True)
    assert (would.swept.idle, would.swept.kv_records, would.files, would.bytes) == (1, 1, 3, 6 + 8)
    assert store.vault.holds(orphan)
    done = janitor.clean(grace_s=0)
    assert done.swept == would.swept
    assert (done.files, done.bytes) == (4, 6 + 8 + 30)
    assert not store.vault.holds(orphan)
    assert store.get(alice, idle.id).state.value == "archived"
    assert [p.name for p in store.snapshots.directory.iterdir()] == ["README"]
    assert janitor.clean(grace_s=0).to_dict()["files"] == 0
    with pytest.raises(ValueError, match="grace_s"):
        janitor.clean(grace_s=-1)


def test_what_is_due_is_what_a_sweep_does(
    store: MemoryStore, alice: Principal, add: Add, clock: object
) -> None:
    rng = np.random.default_rng(0)
    for n in range(40):
        options = {}
        if n % 3 == 0:
            options["ttl_at"] = clock.now + __import__("datetime").timedelta(hours=1 + n)
        if n % 4 == 0:
            options["half_life_s"] = float(rng.integers(60, 9000))
        cube = add(store, alice, f"text {n}", **options)
        if n % 5 == 0:
            store.archive(alice, cube.id)
        if n % 7 == 0:
            store.freeze(alice, add(store, alice, f"frozen {n}").id)
    clock.jump(hours=20)
    for policy in (SweepPolicy(), SweepPolicy(forget_s=3600), SweepPolicy(idle_s=50_000, forget_s=3600)):
        would = store.due(policy)
        assert store.sweep(policy) == would


def test_words_made_anew_are_found_by_whoever_searched_before(
    lived: MemoryStore, reopen: Open, alice: Principal
) -> None:
    def found(operator: MemOperator) -> set[str]:
        return {c.cube.id for word in ("Biscuit", "Rex") for c in operator.recall(alice, word)}

    before = found(MemOperator(reopen()))
    assert before
    run_sql(lived, "INSERT INTO fts_1 (fts_1) VALUES ('delete-all')")
    stores = [reopen(), reopen()]
    operators = [MemOperator(store) for store in stores]
    assert [found(operator) for operator in operators] == [set(), set()]
    stores[0].check(repair=True)
    assert [found(operator) for operator in operators] == [before, before]
