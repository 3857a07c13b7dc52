"""Opening: what is not ours stays as it is, and every failure says what to do."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlite_utils import Database

from memos_engine.errors import NotAStoreError, StoreError, StoreLockedError, StoreVersionError
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.migrations import STEPS
from memos_engine.memory.schema import APPLICATION_ID
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_db import StoreDB, translate


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below with its time of change and content."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [directory, *directory.rglob("*")]
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "place" / "store"


@pytest.fixture
def attempt(place: Path, keyring: KeyRing) -> Callable[[], MemoryStore]:
    return lambda: MemoryStore.open(place, keyring=keyring, busy_timeout_ms=100)


def test_a_new_store_is_private_and_complete(place: Path, attempt: Callable[[], MemoryStore]) -> None:
    with attempt() as store:
        assert sorted(os.listdir(place)) == ["index", "memory.db", "memory.db-shm", "memory.db-wal", "vault"]
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert stat.S_IMODE((place / "memory.db").stat().st_mode) == 0o600
        with store._db.read() as conn:
            pragmas = {
                name: conn.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete", "application_id")
            }
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "secure_delete": 1,
        "application_id": APPLICATION_ID,
    }


def test_every_table_is_strict(attempt: Callable[[], MemoryStore]) -> None:
    with attempt() as store, store._db.read() as conn:
        tables = conn.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type <> 'view'"
        ).fetchall()
    assert {name for name, strict in tables if not strict} == {"sqlite_schema", "sqlite_sequence"}


def test_an_empty_directory_and_a_relative_path_will_do(
    tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    for place in ("s", "deep/er/s"):
        MemoryStore.open(place, keyring=keyring).close()
        assert (tmp_path / place / "memory.db").exists()


def _file(place: Path) -> None:
    place.write_text("a file")


def _foreign_folder(place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("mine")


def _foreign_vault(place: Path) -> None:
    (place / "vault").mkdir(parents=True)
    (place / "vault" / "gold").write_text("bars")


def _not_sqlite(place: Path) -> None:
    place.mkdir()
    (place / "memory.db").write_bytes(b"not a database at all" * 100)


def _short(place: Path) -> None:
    place.mkdir()
    (place / "memory.db").write_bytes(b"SQLite format 3\0")


def _foreign_database(place: Path) -> None:
    place.mkdir()
    conn = sqlite3.connect(place / "memory.db")
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("CREATE TABLE t (x)")
    conn.commit()
    shutil.copy(place / "memory.db-wal", place / "kept")  # a write-ahead log that opening would play back
    conn.close()
    (place / "kept").rename(place / "memory.db-wal")


def _database_is_a_folder(place: Path) -> None:
    (place / "memory.db" / "x").mkdir(parents=True)


@pytest.mark.parametrize(
    "prepare",
    [
        _file,
        _foreign_folder,
        _foreign_vault,
        _not_sqlite,
        _short,
        _foreign_database,
        _database_is_a_folder,
    ],
)
def test_what_is_not_ours_stays_untouched(
    place: Path, attempt: Callable[[], MemoryStore], prepare: Callable[[Path], None], keyring: KeyRing
) -> None:
    place.parent.mkdir()
    prepare(place)
    before = snapshot(place.parent)
    with pytest.raises(NotAStoreError, match="name"):
        attempt()
    assert snapshot(place.parent) == before
    assert not keyring.directory.exists()


def test_a_file_in_the_way_of_the_path(place: Path, attempt: Callable[[], MemoryStore]) -> None:
    place.parent.write_text("")
    with pytest.raises(NotAStoreError):
        attempt()


def test_leftovers_of_a_killed_first_opening_are_no_obstacle(
    place: Path, attempt: Callable[[], MemoryStore]
) -> None:
    (place / "vault").mkdir(parents=True)
    (place / "memory.db").write_bytes(b"")
    with attempt() as store:
        assert store.audit_verify() == 1


def test_a_newer_store_is_refused_and_stays(place: Path, attempt: Callable[[], MemoryStore]) -> None:
    attempt().close()
    conn = sqlite3.connect(place / "memory.db")
    conn.execute(
        "INSERT INTO schema_migration (migration_set, name, applied_at) VALUES ('memos_engine', '0099_x', '')"
    )
    conn.commit()
    conn.execute("PRAGMA user_version = 99")
    conn.close()
    before = (place / "memory.db").read_bytes()
    with pytest.raises(StoreVersionError, match=rf"99.*{len(STEPS)}"):
        attempt()
    assert (place / "memory.db").read_bytes() == before


def _columns(db: Database) -> None:
    db.execute("ALTER TABLE cube ADD COLUMN mood TEXT")


def _fails_half_way(db: Database) -> None:
    db.execute("CREATE TABLE half (x TEXT) STRICT")
    db.execute("INSERT INTO nowhere VALUES (1)")


def test_migrations_apply_in_order_whole_or_not_at_all(place: Path) -> None:
    place.mkdir(parents=True)
    StoreDB(place).close()

    def schema() -> tuple[object, ...]:
        conn = sqlite3.connect(place / "memory.db")
        found = (
            conn.execute("SELECT name FROM sqlite_schema ORDER BY 1").fetchall(),
            conn.execute("SELECT name FROM pragma_table_info('cube')").fetchall(),
            conn.execute("SELECT name FROM schema_migration ORDER BY id").fetchall(),
            conn.execute("PRAGMA user_version").fetchone(),
        )
        conn.close()
        return found

    before = schema()
    with pytest.raises(StoreError):
        StoreDB(place, steps=(*STEPS, ("9001_columns", _columns), ("9002_fails", _fails_half_way)))
    assert schema() == before
    StoreDB(place, steps=(*STEPS, ("9001_columns", _columns))).close()
    after = schema()
    assert after[2:] == ([(name,) for name, _ in STEPS] + [("9001_columns",)], (len(STEPS) + 1,))
    assert ("mood",) in after[1]  # type: ignore[operator]
    with pytest.raises(StoreVersionError, match=rf"version {len(STEPS) + 1}.*up to {len(STEPS)}"):
        StoreDB(place)


def test_openers_racing_for_a_new_store_agree(place: Path, keyring: KeyRing) -> None:
    found: list[object] = []

    def open_one() -> None:
        try:
            with MemoryStore.open(place, keyring=keyring) as store:
                found.append((store.store_id, store.keys))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1, found
    assert isinstance(found[0], tuple)


def test_a_corrupt_database_is_an_error(
    place: Path, attempt: Callable[[], MemoryStore], alice: Principal
) -> None:
    attempt().close()
    data = bytearray((place / "memory.db").read_bytes())
    data[100:] = os.urandom(len(data) - 100)
    (place / "memory.db").write_bytes(data)
    with pytest.raises(StoreError):
        attempt()
    (place / "memory.db").write_bytes(data[:5000])
    with pytest.raises(StoreError):
        attempt()


def test_a_locked_database_is_an_error(place: Path, attempt: Callable[[], MemoryStore]) -> None:
    attempt().close()
    holder = sqlite3.connect(place / "memory.db", isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("DELETE FROM access_log")
    with pytest.raises(StoreLockedError, match="another process"):
        attempt()
    holder.close()
    attempt().close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("existing", [False, True])
def test_a_read_only_directory_is_an_error(existing: bool) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        place, keys = root / "store", KeyRing(root / "keys")
        if existing:
            MemoryStore.open(place, keyring=keys).close()
            (place / "memory.db").chmod(0o444)
            for key in keys.directory.iterdir():
                key.chmod(0o444)
        for folder in (place, keys.directory) if existing else ():
            folder.chmod(0o555)
        root.chmod(0o555)
        pid = os.fork()
        if pid == 0:  # as nobody: root may write anywhere
            code = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                MemoryStore.open(place, keyring=keys)
            except StoreError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        root.chmod(0o755)
        for folder in root.iterdir():
            folder.chmod(0o755)
        shutil.rmtree(root)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_must_open_its_own(attempt: Callable[[], MemoryStore], alice: Principal) -> None:
    with attempt() as store:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                store.list(alice)
            except StoreError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("database is locked", StoreLockedError),
        ("attempt to write a readonly database", StoreError),
        ("disk I/O error", StoreError),
        ("database disk image is malformed", StoreError),
        ("file is not a database", NotAStoreError),
        ("something new", StoreError),
    ],
)
def test_sqlite_errors_are_translated(text: str, kind: type[StoreError]) -> None:
    error = translate(sqlite3.OperationalError(text), Path("memory.db"))
    assert type(error) is kind
    assert text in str(error)


def test_a_second_opening_in_one_process_keeps_the_first_ones_locks(
    place: Path, attempt: Callable[[], MemoryStore]
) -> None:
    """POSIX drops all of a process's locks on a file when it closes any descriptor of that file."""
    code = (
        "import sqlite3, sys\n"
        "conn = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "print(conn.execute('PRAGMA journal_mode = DELETE').fetchone()[0])\n"
    )

    def outsider() -> str:  # may leave the write-ahead log only where nobody else has the database open
        run = [sys.executable, "-c", code, str(place / "memory.db")]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip().splitlines()[-1]

    with attempt() as first:
        first.stats()
        attempt().close()
        assert "locked" in outsider()
    assert outsider() == "delete"


def test_a_checkpoint_killed_half_way_is_repaired(
    place: Path, attempt: Callable[[], MemoryStore], alice: Principal, add: Callable[..., object]
) -> None:
    """Page 1, with the new size of the database, is written back first: the file is shorter than it says."""
    with attempt() as store:
        add(store, alice, "long " * 30_000)
        expected = store.list(alice)
        shutil.copytree(place, place.parent / "killed")
    first_page = (place / "memory.db").read_bytes()[:4096]
    killed = bytearray((place.parent / "killed" / "memory.db").read_bytes())
    assert int.from_bytes(first_page[28:32], "big") > len(killed) // 4096
    killed[:4096] = first_page
    (place.parent / "killed" / "memory.db").write_bytes(killed)
    shutil.rmtree(place)
    (place.parent / "killed").rename(place)
    with attempt() as store:
        assert store.list(alice) == expected


def test_a_first_opening_killed_half_way_is_repaired(place: Path, attempt: Callable[[], MemoryStore]) -> None:
    """The commit of the schema has written page 1 only; its journal says that the file was empty before."""
    attempt().close()
    whole = (place / "memory.db").read_bytes()
    shutil.rmtree(place)
    place.mkdir()
    conn = sqlite3.connect(place / "memory.db", isolation_level=None)
    conn.execute("BEGIN IMMEDIATE")
    conn.execute("CREATE TABLE t (x)")
    conn.execute("PRAGMA cache_spill = 1")
    conn.execute("INSERT INTO t VALUES (zeroblob(10000000))")  # spills, so that the journal reaches the disk
    journal = (place / "memory.db-journal").read_bytes()
    conn.close()
    assert journal[:8].hex() == "d9d505f920a163d7"
    (place / "memory.db").write_bytes(whole[:4096])
    (place / "memory.db-journal").write_bytes(journal)
    with attempt() as store:
        assert store.stats()["cubes"] == 0
