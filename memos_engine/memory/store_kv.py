"""KV records in the store: a cache in the vault, named by rows that go with what they were made from."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from memos_engine.errors import (
    MemoryInputError,
    MemoryNotFoundError,
    PayloadError,
    StoreError,
    StoreLockedError,
)
from memos_engine.memory.governance import Principal
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_db import translate
from memos_engine.memory.store_fts import purge_words
from memos_engine.memory.store_rows import append_audit, find, visible
from memos_engine.memory.vault import BlobRef

GRACE_S = 3600.0
COMBINED = "combined:"  # begins the identity of a record of several memories: see `store_combined.py`
_IDENTITY = re.compile(r"[!-~]{1,200}")  # printable ASCII without spaces
_OFF = "splicing_off:"
_REFS = "SELECT DISTINCT sha256, size, checksum FROM kv_artifact"
_ALL_REFS = "SELECT DISTINCT sha256, size, checksum FROM payload"  # adapters' too


def drop_rows(conn: sqlite3.Connection, cube_id: str) -> list[BlobRef]:
    """Within the caller's transaction: drop every record of a memory and every record that saw its text."""
    which = (
        "WHERE cube_id = :id OR EXISTS (SELECT 1 FROM kv_context x WHERE x.identity = kv_artifact.identity "
        "AND x.cube_id = kv_artifact.cube_id AND x.source_id = :id)"
    )
    refs = [BlobRef(*row) for row in conn.execute(f"{_REFS} {which}", {"id": cube_id})]
    conn.execute(f"DELETE FROM kv_artifact {which}", {"id": cube_id})
    return refs


def _named(conn: sqlite3.Connection) -> set[str]:
    return {row[0] for row in conn.execute("SELECT sha256 FROM payload")}


class KVRows(StoreBase):
    """The store's verbs for KV records and their files."""

    def put_kv(
        self,
        principal: Principal,
        cube_id: str,
        version: int,
        identity: str,
        blob: bytes | bytearray | memoryview | BlobRef,
        tokens: int,
        context_ids: Sequence[str] = (),
    ) -> BlobRef:
        """Keep a KV record of a memory's version; one of the same identity is replaced.

        `blob` is the file's content, or the reference of one already written to `vault`. `context_ids` are
        the other memories whose text the record saw: it goes when one of them goes. The file is durable
        before its row. Raises `MemoryNotFoundError`, `MemoryInputError`, `StoreError`.
        """
        if not isinstance(identity, str) or not _IDENTITY.fullmatch(identity):
            raise MemoryInputError(
                "a KV identity must be 1 to 200 printable ASCII characters, best a hex digest."
            )
        if type(tokens) is not int or tokens < 0:
            raise MemoryInputError(f"tokens must be an integer of at least 0, not {tokens!r}.")
        ref = blob if isinstance(blob, BlobRef) else self.vault.write(blob)
        stale: list[BlobRef] = []
        try:
            with self._change() as (conn, now):
                cube = find(conn, principal, cube_id, now)
                if version != cube.version:
                    raise MemoryInputError(
                        f"memory {cube_id!r} is at version {cube.version}, not {version!r}; build its KV "
                        "anew."
                    )
                for source in context_ids:
                    find(conn, principal, source, now)
                if not self.vault.holds(ref):  # collected between its writing and this transaction
                    if isinstance(blob, BlobRef):
                        raise PayloadError(
                            f"the vault does not hold {ref.sha256}; write it first.", "missing"
                        )
                    self.vault.write(blob)
                stale = self._replace(conn, cube_id, version, identity, ref, tokens, now)
                conn.executemany(
                    "INSERT OR IGNORE INTO kv_context VALUES (?, ?, ?)",
                    [(identity, cube_id, s) for s in context_ids],
                )
        except (MemoryNotFoundError, MemoryInputError):
            self._remove([ref])  # perhaps made from a text that was erased meanwhile
            raise
        self._remove(stale)
        return ref

    @staticmethod
    def _replace(
        conn: sqlite3.Connection,
        cube_id: str,
        version: int,
        identity: str,
        ref: BlobRef,
        tokens: int,
        now: str,
    ) -> list[BlobRef]:
        key = (identity, cube_id)
        stale = [BlobRef(*row) for row in conn.execute(f"{_REFS} WHERE identity = ? AND cube_id = ?", key)]
        conn.execute("DELETE FROM kv_artifact WHERE identity = ? AND cube_id = ?", key)
        conn.execute(
            "INSERT INTO kv_artifact VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (identity, cube_id, version, ref.sha256, ref.size, ref.checksum, tokens, now),
        )
        event = {
            "event": "kv_stored",
            "cube_id": cube_id,
            "version": version,
            "identity": identity,
            "size": ref.size,
        }
        append_audit(conn, now, event)
        return stale

    def find_kv(self, principal: Principal, cube_id: str, identity: str) -> BlobRef | None:
        """Where the memory's record of this identity is; None when there is none, or none to see. Records of
        several memories are found by `find_combined` alone, which asks for all of them."""
        if identity.startswith(COMBINED):
            return None
        where, params = visible(principal, self._now())
        with self._db.read() as conn:
            row = conn.execute(
                "SELECT k.sha256, k.size, k.checksum FROM kv_artifact k JOIN cube c ON c.id = k.cube_id "
                f"WHERE {where} AND c.id = :id AND k.identity = :identity AND k.version = c.version",
                {**params, "id": cube_id, "identity": identity},
            ).fetchone()
        return BlobRef(*row) if row else None

    def kv_identities(self, principal: Principal, cube_id: str) -> list[str]:
        """Identities of the memory's records, sorted. Raises `MemoryNotFoundError`."""
        with self._db.read() as conn:
            find(conn, principal, cube_id, self._now())
            rows = conn.execute(
                "SELECT identity FROM kv_artifact WHERE cube_id = ? AND substr(identity, 1, ?) <> ? ORDER BY "
                "identity",
                (cube_id, len(COMBINED), COMBINED),
            )
            return [row[0] for row in rows]

    def drop_kv(self, identity: str, reason: str) -> int:
        """Forget every record of this identity (damaged, or no longer wanted) and remove its files; audited.

        `reason` is kept forever: no memory's text in it. Returns how many records there were.
        """
        with self._change() as (conn, now):
            rows = conn.execute(f"{_REFS} WHERE identity = ?", (identity,)).fetchall()
            count = conn.execute("DELETE FROM kv_artifact WHERE identity = ?", (identity,)).rowcount
            if count:
                event = {
                    "event": "kv_dropped",
                    "identity": identity,
                    "reason": reason[:200],
                    "records": count,
                }
                append_audit(conn, now, event)
        self._remove(BlobRef(*row) for row in rows)
        return count

    def splicing_off(self, model: str) -> str | None:
        """Why stored KV of this model (a digest) is not to be used; None: it may be."""
        with self._db.read() as conn:
            row = conn.execute("SELECT value FROM meta WHERE key = ?", (f"{_OFF}{model}",)).fetchone()
        return None if row is None else str(row[0])

    def turn_splicing(self, model: str, off: str | None) -> None:
        """Turns the use of this model's stored KV off, for a reason, or on again (None); audited."""
        key = f"{_OFF}{model}"
        with self._change() as (conn, now):
            if off is None:
                changed = conn.execute("DELETE FROM meta WHERE key = ?", (key,)).rowcount
            else:
                insert = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO NOTHING"
                changed = conn.execute(insert, (key, off[:500])).rowcount
            if changed:
                event = {"event": "splicing_off", "model": model, "reason": off[:500]} if off else None
                append_audit(conn, now, event or {"event": "splicing_on", "model": model})

    def collect(self, grace_s: float = GRACE_S) -> int:
        """Remove files that nothing names and older than `grace_s` seconds; returns how many.

        Those are payloads that no row names, index files that no header names, and drafts. Raises
        `StoreError`.
        """
        with self._db.write() as conn:
            removed = self.vault.collect(_named(conn), grace_s)
            try:
                for path, _ in self.snapshots.orphans(grace_s):
                    path.unlink(missing_ok=True)
                    removed += 1
            except OSError as error:
                raise translate(error, self.snapshots.directory) from error
        return removed

    def orphans(self, grace_s: float = GRACE_S) -> list[tuple[Path, int]]:
        """What `collect` would remove, with its bytes. Raises `StoreError`."""
        with self._db.read() as conn:
            named = _named(conn)
        try:
            return [*self.vault.orphans(named, grace_s), *self.snapshots.orphans(grace_s)]
        except OSError as error:
            raise translate(error, self.snapshots.directory) from error

    def payload_usage(self) -> tuple[int, int]:
        """How many files lie beside the database, and their bytes."""
        sizes = []
        for folder in (self.vault.directory, self.snapshots.directory):
            for path in folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if path.is_file():
                        sizes.append(path.lstat().st_size)
        return len(sizes), sum(sizes)

    def scrub(self) -> int:
        """Check every payload in full, SHA-256 included; a damaged one is audited and dropped.

        Returns how many are sound. Raises `StoreError`.
        """
        sound, damaged = self.damaged_payloads()
        for ref, error in damaged:
            self._drop_payload(ref, error)
        return sound

    def damaged_payloads(self) -> tuple[int, list[tuple[BlobRef, PayloadError]]]:
        """Read every payload in full: how many are sound, and which are not and why. Changes nothing."""
        with self._db.read() as conn:
            refs = [BlobRef(*row) for row in conn.execute(_ALL_REFS)]
        damaged = []
        for ref in refs:
            try:
                self.vault.verify(ref)
            except PayloadError as error:
                damaged.append((ref, error))
        return len(refs) - len(damaged), damaged

    def _drop_payload(self, ref: BlobRef, error: PayloadError) -> None:
        """Forget every record whose file this is; adapters stay (nothing makes them anew)."""
        with self._db.read() as conn:
            rows = conn.execute("SELECT DISTINCT identity FROM kv_artifact WHERE sha256 = ?", (ref.sha256,))
            identities = [row[0] for row in rows]
        for identity in identities:
            self.drop_kv(identity, error.reason)

    def finish_erasures(self) -> int:
        """Remove the files of erased memories and rewrite the database without their bytes.

        Takes time proportional to the database. Returns how many erasures it finished. Raises
        `StoreLockedError` while another process still reads old pages, `StoreFullError` when there is no
        room.
        """
        with self._db.read() as conn:
            pending = conn.execute(
                "SELECT cube_id, payloads FROM erasure WHERE scrubbed_at IS NULL"
            ).fetchall()
        if not pending:
            return 0
        if self._together is not None:
            raise StoreError(
                "a transaction is open, and the database cannot be rewritten in it; call "
                "finish_erasures() after it, and erase with rewrite=False."
            )
        self._remove(
            (BlobRef(*ref) for _, payloads in pending for ref in json.loads(payloads)), lenient=False
        )
        self.collect()
        try:
            with self._db.write() as conn:
                purge_words(conn, [row[0] for row in pending])
                self.snapshots.clear()
                self._postings.clear()
        except OSError as error:
            raise translate(error, self.snapshots.directory) from error
        if not self._db.shrink():
            raise StoreLockedError(
                "the memory is erased, but another process still reads the old database pages, so that a "
                "copy of its text is left in the write-ahead log; close that process and open the store "
                "again."
            )
        with self._change() as (conn, now):
            conn.executemany(
                "UPDATE erasure SET scrubbed_at = ? WHERE cube_id = ?", [(now, row[0]) for row in pending]
            )
        return len(pending)
