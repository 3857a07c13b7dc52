"""What every part of the store stands on: opening, the key, the clock, the audit trail, statistics."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from memos_engine.errors import MemoryInputError, StoreError
from memos_engine.memory.audit import verify_chain
from memos_engine.memory.cube import CubeIds, time_to_text, validate_label
from memos_engine.memory.governance import KeyRing, Principal, StoreKeys
from memos_engine.memory.snapshots import SnapshotFiles
from memos_engine.memory.store_db import INDEX, VAULT, StoreDB, translate
from memos_engine.memory.store_rows import append_audit
from memos_engine.memory.vault import FileSystem, MemVault

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


class StoreBase:
    """An open store. `vault` keeps its payload files, `keys` its secrets, `store_id` names it forever."""

    def __init__(
        self, directory: Path, keyring: KeyRing, clock: Clock, busy_timeout_ms: int, fs: FileSystem | None
    ) -> None:
        self.directory = directory
        self._clock = clock
        self._ids = CubeIds()
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
                append_audit(conn, self._now(), event)
        return store_id, key

    def close(self) -> None:
        """Close the database; using the store afterwards raises `StoreError`. Closing twice is fine."""
        self._db.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def now(self) -> datetime:
        """The store's clock."""
        return self._clock()

    def _now(self) -> str:
        return time_to_text(self._clock())

    def note(self, event: Mapping[str, Any]) -> None:
        """Append an event to the audit trail, forever: never put a memory's text in it.

        `event["event"]` is its name, a short lower-case word; the other values must be JSON. The time is
        added. Raises `MemoryInputError`.
        """
        validate_label("the event's name, event['event'],", event.get("event"))
        if "at" in event:
            raise MemoryInputError("the store sets the time of an event; leave out 'at'.")
        with self._db.write() as conn:
            append_audit(conn, self._now(), event)

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
            rows = conn.execute("SELECT tenant, user FROM principal").fetchall()
        return sorted(Principal(*row) for row in rows)

    def stats(self) -> dict[str, Any]:
        """Counts and sizes of the whole store, for its operator: they say something about every user."""
        with self._db.read():
            utils = self._db.utils
            states = {
                row["state"]: row["n"]
                for row in utils.query("SELECT state, count(*) n FROM cube GROUP BY state")
            }
            kv = next(utils.query("SELECT count(*) n, coalesce(sum(size), 0) size FROM kv_artifact"))
            counts = {name: utils.table(name).count for name in ("principal", "vector", "audit", "erasure")}
        return {
            "store_id": self.store_id,
            "schema": self._db.schema_version(),
            "cubes": sum(states.values()),
            "cubes_by_state": states,
            "users": counts["principal"],
            "vectors": counts["vector"],
            "kv_records": kv["n"],
            "kv_bytes": kv["size"],
            "audit_events": counts["audit"],
            "erasures": counts["erasure"],
            "database_bytes": os.path.getsize(self._db.path),
        }
