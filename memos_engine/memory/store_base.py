"""What every part of the store stands on: opening, the key, the clock, the audit trail, statistics."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from memos_engine.errors import MemoryInputError, RefusedError, StoreError
from memos_engine.memory.audit import verify_chain
from memos_engine.memory.cube import CubeIds, time_from_text, time_to_text, validate_label
from memos_engine.memory.governance import KeyRing, Principal, StoreKeys
from memos_engine.memory.snapshots import SnapshotFiles
from memos_engine.memory.store_db import INDEX, VAULT, StoreDB, translate
from memos_engine.memory.store_fts import PostingsCache
from memos_engine.memory.store_rows import append_audit, last_moment
from memos_engine.memory.store_view import View, view
from memos_engine.memory.values import moment_text
from memos_engine.memory.vault import BlobRef, FileSystem, MemVault

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass
class Together:
    """What has to wait for the end of a `transaction`: refusals to audit, files to remove."""

    refused: list[Mapping[str, object]] = field(default_factory=list)
    removed: list[BlobRef] = field(default_factory=list)


class StoreBase:
    """An open store. `vault` keeps its payload files, `keys` its secrets, `store_id` names it forever.

    `undone` counts transactions of several verbs that were undone: what was read within one never was.
    """

    def __init__(
        self, directory: Path, keyring: KeyRing, clock: Clock, busy_timeout_ms: int, fs: FileSystem | None
    ) -> None:
        self.directory = directory
        self._clock = clock
        self._ids = CubeIds()
        self._latest = ""
        self._postings = PostingsCache()
        self._together: Together | None = None
        self.undone = 0
        if keyring.directory.absolute().resolve().is_relative_to(directory.resolve()):
            raise StoreError(
                f"the keys ({keyring.directory}) would lie inside of the store {directory}, so that a copy "
                "of the store would carry them along; name another directory in MEMOS_ENGINE_KEYS."
            )
        self._db = StoreDB(directory, busy_timeout_ms=busy_timeout_ms)
        try:
            for name in (VAULT, INDEX):
                (directory / name).mkdir(exist_ok=True, mode=0o700)
            self.vault = MemVault(directory / VAULT, fs)
            self.snapshots = SnapshotFiles(directory / INDEX)
            self.store_id, self.keys = self._identify(keyring)
        except OSError as error:
            self.close()
            raise translate(error, directory) from error
        except BaseException:
            self.close()
            raise

    def _identify(self, keyring: KeyRing) -> tuple[str, StoreKeys]:
        """The store's id and key, made at the first opening; a lost key is replaced, which is audited."""
        with self._db.read() as conn:
            meta = dict(conn.execute("SELECT key, value FROM meta"))
        if "store_id" in meta:
            key = keyring.load(meta["store_id"])
            if key is not None and key.id == meta.get("key_id"):
                return meta["store_id"], key
        with self._db.write() as conn:
            conn.execute("INSERT OR IGNORE INTO meta VALUES ('store_id', ?)", (secrets.token_hex(16),))
            meta = dict(conn.execute("SELECT key, value FROM meta"))
            store_id: str = meta["store_id"]
            key = keyring.load(store_id) or keyring.create(store_id)
            if meta.get("key_id") != key.id:
                conn.execute(
                    "INSERT INTO meta VALUES ('key_id', ?) ON CONFLICT (key) DO UPDATE SET value = "
                    "excluded.value",
                    (key.id,),
                )
                replaced = "key_id" in meta
                event: dict[str, Any] = {
                    "event": "key_replaced" if replaced else "store_created",
                    "key_id": key.id,
                }
                if replaced:
                    event["previous_key_id"] = meta["key_id"]
                append_audit(conn, self._moment(conn), event)
        return store_id, key

    def close(self) -> None:
        """Close the database; using the store afterwards raises `StoreError`. Closing twice is fine."""
        self._db.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def now(self) -> datetime:
        """The moment of a read, on the store's clock."""
        return time_from_text(self._now())

    def _now(self) -> str:
        """The moment of a read: the clock's, but never before one that this process has seen."""
        self._latest = max(self._latest, time_to_text(self._clock()))
        return self._latest

    def _view(
        self,
        principal: Principal,
        as_of: datetime | str | None = None,
        valid_at: datetime | str | None = None,
        *,
        hidden: bool = False,
        own: bool = False,
        closed: bool = True,
    ) -> View:
        """What the caller sees, see `store_view.view`. Raises `MemoryInputError` for what is no time."""
        return view(
            principal,
            self._now(),
            hidden=hidden,
            own=own,
            as_of=None if as_of is None else moment_text(as_of),
            valid_at=None if valid_at is None else moment_text(valid_at),
            closed=closed,
        )

    @contextmanager
    def _change(self) -> Iterator[tuple[sqlite3.Connection, str]]:
        """A write transaction and its moment, which is later than all others in the store.

        A refusal undoes the transaction; that it was tried is then audited in one of its own.
        """
        try:
            with self._db.write() as conn:
                yield conn, self._moment(conn)
        except RefusedError as error:
            if error.event is not None:
                self._audit_refusal(error.event)
            raise

    def _audit_refusal(self, event: Mapping[str, object]) -> None:
        if self._together is not None:
            self._together.refused.append(event)
            return
        with self._db.write() as conn:
            append_audit(conn, self._moment(conn), event)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All verbs of this thread within it happen together or, where an exception leaves it, not at all.

        One within another can be undone alone. Nobody else writes, and no other thread of this process
        reads, until it ends: keep it short, without a model in it. What was refused is audited in any case.
        Erasures within it need `rewrite=False` and `finish_erasures` afterwards.
        """
        with self._db.read():  # no other thread gets in between
            outermost = self._together is None
            together = self._together = self._together or Together()
            try:
                with self._db.write():
                    yield
            except BaseException:
                self.undone += 1
                self._postings.clear()  # numbers of passages will be given out again
                raise
            finally:
                if outermost:
                    self._together = None
                    for event in together.refused:
                        self._audit_refusal(event)
            if outermost:
                self._remove(together.removed)

    def _remove(self, refs: Iterable[BlobRef], *, lenient: bool = True) -> tuple[BlobRef, ...]:
        """Remove files that no row names, under the write lock: nobody can begin to name them meanwhile.

        Within a `transaction` the files wait for its end: if it is undone, rows name them again. Returns
        which no row names. A file that cannot be removed is an orphan, which `collect` tries again; unless
        not `lenient`.
        """
        candidates = list(dict.fromkeys(refs))
        if not candidates:
            return ()
        with self._db.write() as conn:
            named = "SELECT 1 FROM payload WHERE sha256 = ?"
            free = tuple(ref for ref in candidates if not conn.execute(named, (ref.sha256,)).fetchone())
            if self._together is not None:
                self._together.removed += free
                return free
            for ref in free:
                try:
                    self.vault.delete(ref)
                except StoreError:
                    if not lenient:
                        raise
        return free

    def _moment(self, conn: sqlite3.Connection) -> str:
        """The moment of a write, within its transaction; clocks may go back, the store's does not."""
        now, last = self._now(), last_moment(conn)
        if last is not None and now <= last:
            with contextlib.suppress(OverflowError):  # the last microsecond of the year 9999
                last = time_to_text(time_from_text(last) + timedelta(microseconds=1))
            now = self._latest = last
        return now

    def note(self, event: Mapping[str, Any]) -> None:
        """Append an event to the audit trail, forever: never put a memory's text in it.

        `event["event"]` is its name, a short lower-case word; the other values must be JSON. The time is
        added. Raises `MemoryInputError`.
        """
        validate_label("the event's name, event['event'],", event.get("event"))
        if "at" in event:
            raise MemoryInputError("the store sets the time of an event; leave out 'at'.")
        with self._change() as (conn, now):
            append_audit(conn, now, event)

    def audit_verify(self) -> int:
        """Check the whole audit trail; returns its length. Raises `StoreError` naming the first bad row."""
        with self._db.read() as conn:
            last = conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'audit'").fetchone()
            rows = conn.execute(
                "SELECT seq, event, hash FROM audit WHERE seq <= ? ORDER BY seq", last or (0,)
            )
            return verify_chain(rows, last[0] if last else 0)

    def known_users(self) -> list[Principal]:
        """Everybody who ever stored a memory here, sorted. For the operator of the store, not for users."""
        with self._db.read() as conn:
            rows = conn.execute(
                "SELECT tenant, user FROM principal p WHERE EXISTS (SELECT 1 FROM cube WHERE owner = p.id) "
                "AND NOT EXISTS (SELECT 1 FROM branch WHERE scope = p.id)"
            ).fetchall()
        return sorted(Principal.from_key(*row) for row in rows)

    def stats(self) -> dict[str, Any]:
        """Counts and sizes of the whole store, for its operator: they say something about every user."""
        with self._db.read():
            utils = self._db.utils
            states = {
                row["state"]: row["n"]
                for row in utils.query("SELECT state, count(*) n FROM cube GROUP BY state")
            }
            size = "SELECT count(*) n, coalesce(sum(size), 0) size FROM"
            kv, lora = (next(utils.query(f"{size} {name}")) for name in ("kv_artifact", "adapter_payload"))
            counts = {name: utils.table(name).count for name in ("vector", "audit", "erasure")}
        return {
            "store_id": self.store_id,
            "schema": self._db.schema_version(),
            "cubes": sum(states.values()),
            "cubes_by_state": states,
            "users": len(self.known_users()),
            "vectors": counts["vector"],
            "kv_records": kv["n"],
            "kv_bytes": kv["size"],
            "adapters": lora["n"],
            "adapter_bytes": lora["size"],
            "audit_events": counts["audit"],
            "erasures": counts["erasure"],
            "database_bytes": os.path.getsize(self._db.path),
        }
