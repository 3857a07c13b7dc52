"""One SQLite file in a directory of ours: opening with care, transactions, and one translation of errors."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlite_utils import Database

from memos_engine.errors import (
    NotAStoreError,
    StoreError,
    StoreFullError,
    StoreLockedError,
)
from memos_engine.memory.migrations import STEPS, Step, migrate, pending
from memos_engine.memory.schema import APPLICATION_ID
from memos_engine.memory.vault import FULL

DATABASE, VAULT, INDEX = "memory.db", "vault", "index"
_SIDE_FILES = {DATABASE + suffix for suffix in ("-wal", "-shm", "-journal")}
_MIN_SQLITE = (3, 37, 0)  # STRICT tables

# sqlite3 of Python 3.10 has no error codes; these texts are SQLite's own and have not changed in decades.
_MEANING: tuple[tuple[str, type[StoreError], str], ...] = (
    (
        "locked",
        StoreLockedError,
        "another process holds it; close that one, or open with a longer busy_timeout_ms",
    ),
    ("disk is full", StoreFullError, "nothing was stored; free some space and repeat"),
    ("not a database", NotAStoreError, "it was not made by memos_engine; name another directory"),
    ("malformed", StoreError, "the file is damaged; restore a backup"),
    ("readonly", StoreError, "nothing was stored; make the directory and its files writable"),
    ("unable to open", StoreError, "check the directory's permissions and free space"),
    ("no such module", StoreError, "this SQLite lacks full-text search (FTS5): use another Python"),
    ("disk I/O error", StoreError, "nothing was stored; check the disk"),
)


def translate(error: Exception, path: Path) -> StoreError:
    """The `StoreError` for an error of SQLite or the operating system; it says what to do."""
    if isinstance(error, OSError):
        if error.errno in FULL:
            return StoreFullError(
                f"no room for {path}: the disk or quota is full; free some space and repeat."
            )
        return StoreError(f"{path} cannot be used ({error.strerror}); check the path and its permissions.")
    if isinstance(error, UnicodeDecodeError):  # sqlite3 cannot even say what SQLite says of such a file
        return StoreError(f"{path}: the file is damaged ({error.reason}); restore a backup.")
    text = str(error)
    for sign, kind, advice in _MEANING:
        if sign in text:
            return kind(f"{path}: {text}; {advice}.")
    if isinstance(error, sqlite3.IntegrityError):
        return StoreError(f"{path} refused the change ({text}); nothing was stored.")
    return StoreError(f"{path} cannot be used: {text}; restore a backup if it persists.")


class StoreDB:
    """A connection shared by the threads of one process, one statement or transaction at a time."""

    def __init__(
        self, directory: Path, *, busy_timeout_ms: int = 5000, steps: Sequence[Step] = STEPS
    ) -> None:
        """Open or make the database. Nothing is written to a directory not ours (`NotAStoreError`)."""
        if sqlite3.sqlite_version_info < _MIN_SQLITE:
            raise StoreError(
                f"SQLite {sqlite3.sqlite_version} is too old; memos_engine needs 3.37 or newer: update "
                "Python."
            )
        self.path = directory / DATABASE
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._within = False  # a transaction, which a nested one is a part of
        self._conn: sqlite3.Connection | None = None
        try:
            _check_directory(directory)
            _make_directory(directory)
            _check_owner(self.path)
            self._open(busy_timeout_ms / 1000, steps)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            self.close()
            raise translate(error, self.path) from error
        except BaseException:
            self.close()
            raise

    def _open(self, timeout_s: float, steps: Sequence[Step]) -> None:
        fresh = not self.path.exists()
        conn = sqlite3.connect(self.path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        self._conn = conn
        if fresh:
            os.chmod(self.path, 0o600)  # SQLite makes files that everybody may read
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute("PRAGMA foreign_keys = ON")
        conn.execute("PRAGMA secure_delete = ON")
        conn.execute("PRAGMA temp_store = MEMORY")  # no text in files that nobody scrubs
        db = Database(conn, execute_plugins=False)
        # The schema is committed before the switch to WAL: the header then says at once whose file it is.
        if pending(db, steps):
            with self.write():
                migrate(db, steps)
        _switch_to_wal(conn, timeout_s)
        self.utils = db

    def close(self) -> None:
        with self._lock:
            conn, self._conn = self._conn, None
            if conn is not None:
                conn.close()

    def _connection(self) -> sqlite3.Connection:
        if self._conn is None:
            raise StoreError(f"{self.path} is closed; open the store again.")
        if os.getpid() != self._pid:
            raise StoreError(f"{self.path} was opened by another process; open the store again in this one.")
        return self._conn

    def schema_version(self) -> int:
        with self.read() as conn:
            return int(conn.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """The connection, outside of any transaction: each statement sees one snapshot."""
        with self._lock:
            conn = self._connection()
            try:
                yield conn
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise translate(error, self.path) from error

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start; any exception undoes all of it.

        Within another one of the same thread it is a part of that one, which can be undone alone.
        """
        with self.read() as conn:
            if self._within:
                with _savepoint(conn):
                    yield conn
                return
            conn.execute("BEGIN IMMEDIATE")
            self._within = True
            try:
                yield conn
                self.commit(conn)
            except BaseException:
                if conn.in_transaction:  # SQLite itself rolls back when the disk is full
                    conn.execute("ROLLBACK")
                raise
            finally:
                self._within = False

    def commit(self, conn: sqlite3.Connection) -> None:
        conn.execute("COMMIT")

    def shrink(self) -> bool:
        """Rewrite the file without a trace of deleted rows; False while another reader keeps old pages alive.

        `secure_delete` alone is not enough: when SQLite balances its trees it moves cells and leaves
        copies in the gaps of pages.
        """
        with self.read() as conn:
            conn.execute("VACUUM")
            busy, _, _ = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy


@contextmanager
def _savepoint(conn: sqlite3.Connection) -> Iterator[None]:
    if not conn.in_transaction:
        raise StoreError("the transaction was undone, as when the disk is full; repeat all of it.")
    conn.execute("SAVEPOINT part")
    try:
        yield
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK TO part")
            conn.execute("RELEASE part")
        raise
    conn.execute("RELEASE part")


def _check_directory(directory: Path) -> None:
    """Raises `NotAStoreError` unless this is, or can become, a store: absent, empty, or with a memory.db."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise NotAStoreError(f"{directory} is a file; a store is a directory: name another path.")
    database = directory / DATABASE
    if database.is_file() and database.stat().st_size > 0:
        return
    if database.exists() and not database.is_file():
        raise NotAStoreError(f"{database} is not a file; name another directory for the store.")
    # What a first opening that was killed may leave behind is fine too.
    for entry in os.scandir(directory):
        ours = entry.name == DATABASE or entry.name in _SIDE_FILES
        if not ours and not (entry.name in (VAULT, INDEX) and entry.is_dir() and not os.listdir(entry)):
            raise NotAStoreError(
                f"{directory} holds {entry.name!r} but no {DATABASE}: it is not a store; name a new or empty "
                "directory."
            )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotAStoreError(
            f"{directory} cannot be made, a file is in its way; name another path."
        ) from error


def _check_owner(path: Path) -> None:
    """Raises `NotAStoreError` unless the file is absent, empty or a database of ours; changes nothing.

    Opened as immutable: SQLite neither locks it nor plays back its log. Reading it without SQLite would be
    worse: closing the file would drop the locks of every other connection that this process has to it.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    conn = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        # A checkpoint or first commit that was killed half-way leaves a file shorter than its header
        # says; the real opening repairs that. This setting has SQLite read the header all the same.
        conn.execute("PRAGMA writable_schema = ON")
        (owner,) = conn.execute("PRAGMA application_id").fetchone()
    finally:
        conn.close()
    if owner != APPLICATION_ID:
        raise NotAStoreError(f"{path} is another program's database; name another directory for the store.")


def _switch_to_wal(conn: sqlite3.Connection, timeout_s: float) -> None:
    """The switch needs the file for itself and does not always wait for the busy timeout: repeat it."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            (mode,) = conn.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise StoreError("this file system does not support SQLite's write-ahead log; use a local disk.")
        return
