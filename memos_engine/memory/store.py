"""MemoryStore: SQLite is the sole truth about memories.

A store is a directory: `memory.db`, `vault/` (payload files), `index/` (rebuildable caches); its key lies
elsewhere. Every verb takes the caller and sees the caller's rows only, through one predicate (`visible`).
Every change is one transaction together with its audit event.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import datetime
from pathlib import Path

import numpy.typing as npt

from memos_engine.errors import (
    ConflictError,
    LifecycleError,
    MemoryInputError,
    MemoryNotFoundError,
    StoreError,
)
from memos_engine.memory.cube import (
    HistoryEntry,
    MemCube,
    is_cube_id,
    time_to_text,
    validate_label,
    validate_origin,
    validate_tags,
    validate_text,
)
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState, check_move
from memos_engine.memory.store_base import Clock, utc_now
from memos_engine.memory.store_fts import forget_passages, insert_passage
from memos_engine.memory.store_kv import KVRows, drop_rows
from memos_engine.memory.store_retrieval import RetrievalRows
from memos_engine.memory.store_rows import (
    SELECT_CUBE,
    among,
    append_audit,
    cube_of,
    find,
    history_of,
    not_found,
    record_event,
    record_move,
    visible,
)
from memos_engine.memory.store_vectors import VectorRows, insert_vector, unit_vector
from memos_engine.memory.vault import BlobRef, FileSystem

__all__ = ["HistoryEntry", "MemoryStore"]

Cubes = list[MemCube]  # inside of the class, `list` is a verb
History = list[HistoryEntry]


class MemoryStore(RetrievalRows, VectorRows, KVRows):
    """An open store; made by `MemoryStore.open`, usable by all threads of the process that opened it."""

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        keyring: KeyRing | None = None,
        clock: Clock | None = None,
        busy_timeout_ms: int = 5000,
        fs: FileSystem | None = None,
    ) -> MemoryStore:
        """Open the store in `directory`, or make one where nothing is yet.

        `clock` gives aware datetimes; `fs` stands in for the vault's file system in tests. Raises
        `NotAStoreError` (and changes nothing) for a place that is not ours, `StoreVersionError` for a store
        of a newer memos_engine, `StoreLockedError`, `StoreFullError`, and `StoreError` for everything else.
        """
        store = cls(Path(directory), keyring or KeyRing(), clock or utc_now, busy_timeout_ms, fs)
        with contextlib.suppress(StoreError):  # still pending then, for the next opening
            store.finish_erasures()
        return store

    def __enter__(self) -> MemoryStore:
        return self

    # -- writing -----------------------------------------------------------------------------------------

    def add(
        self,
        principal: Principal,
        text: str,
        *,
        vector: npt.ArrayLike | None = None,
        model_id: str | None = None,
        tags: Iterable[str] = (),
        semantic_type: str = "fact",
        origin: str = "user_input",
        idempotency_key: str | None = None,
        ttl_at: datetime | None = None,
        session: str | None = None,
        valid_from: datetime | None = None,
    ) -> MemCube:
        """Store a new memory with its embedding `vector [dim]`; it is durable and retrievable on return.

        Without `vector` and `model_id` it is found by its words, until an embedder meets it. `session` names
        the conversation it is from: what was said before it there is its context in retrieval. `valid_from`
        is since when it holds (default: now). Repeating a call with the same `idempotency_key` returns the
        memory of the first one. Raises `MemoryInputError`, `ConflictError` (that key was used for another
        text, or its memory is gone), `StoreFullError`, `StoreError`.
        """
        validate_text(text)
        labels = json.dumps(validate_tags(tags))
        validate_label("semantic_type", semantic_type)
        validate_origin(origin)
        if (vector is None) != (model_id is None):
            raise MemoryInputError("give vector and model_id together, or neither of them.")
        unit = None if vector is None else unit_vector(vector)
        model = "" if model_id is None else validate_text(model_id, 256)
        since = None if valid_from is None else time_to_text(valid_from)
        label = None if session is None else validate_text(session, 256)
        expiry = None if ttl_at is None else time_to_text(ttl_at)
        where, params = visible(principal, "", hidden=True)
        token = None
        if idempotency_key is not None:
            token = self.keys.token_hmac(principal, validate_text(idempotency_key, 1000))
        fingerprint = self.keys.body_hmac(text)
        with self._db.write() as conn:
            moment = self._clock()
            now = time_to_text(moment)
            if token is not None:
                row = conn.execute(
                    "SELECT c.id, v.body_hmac FROM cube c JOIN cube_version v ON v.cube_id = c.id AND "
                    f"v.version = 1 WHERE {where} AND c.idempotency = :token",
                    {**params, "token": token},
                ).fetchone()
                if row is not None:
                    if row[1] != fingerprint:
                        raise ConflictError("this idempotency key was used for another text; use a new key.")
                    try:
                        return find(conn, principal, row[0], now)
                    except MemoryNotFoundError:
                        raise ConflictError(
                            "this idempotency key's memory was deleted; use a new key."
                        ) from None
            if expiry is not None and expiry <= now:
                raise MemoryInputError(
                    f"ttl_at {expiry} is not in the future; the memory would be gone at once."
                )
            conn.execute(
                "INSERT OR IGNORE INTO principal (tenant, user, created_at) VALUES (?, ?, ?)",
                (principal.tenant, principal.user, now),
            )
            cube_id = self._ids.new(moment)
            conn.execute(
                "INSERT INTO cube (id, provenance_id, owner, kind, version, state, created_at, updated_at, "
                "origin, semantic_type, ttl_at, idempotency) SELECT :id, :id, p.id, 'text', 1, :state, :now, "
                ":now, :origin, :type, :ttl, :token FROM principal p WHERE p.tenant = :tenant AND p.user = "
                ":user",
                {
                    **params,
                    "id": cube_id,
                    "state": LifecycleState.GENERATED.value,
                    "now": now,
                    "origin": origin,
                    "type": semantic_type,
                    "ttl": expiry,
                    "token": token,
                },
            )
            conn.execute(
                "INSERT INTO cube_version (cube_id, version, at, origin, semantic_type, body_hmac, key_id) "
                "VALUES (?, 1, ?, ?, ?, ?, ?)",
                (cube_id, now, origin, semantic_type, fingerprint, self.keys.id),
            )
            conn.execute("INSERT INTO cube_body VALUES (?, 1, ?, ?)", (cube_id, text, labels))
            if unit is not None:
                insert_vector(conn, cube_id, 1, model, unit)
            insert_passage(conn, principal, cube_id, 1, text, since or now, label)
            record_event(conn, principal, cube_id, 1, "added", LifecycleState.GENERATED, now)
            return find(conn, principal, cube_id, now)

    def record_use(self, principal: Principal, ids: Iterable[str]) -> int:
        """Count one use for every id given, in one transaction; the first use activates a memory.

        Meant for batches off the request's path, so that ids gone meanwhile are passed over, like those of
        other users. Returns how many uses were counted.
        """
        counts = Counter(cube_id for cube_id in ids if is_cube_id(cube_id))
        counted = 0
        if not counts:
            return counted
        with self._db.write() as conn:
            now = self._now()
            for cube_id, uses in sorted(counts.items()):
                try:
                    cube = find(conn, principal, cube_id, now)
                except MemoryNotFoundError:
                    continue
                conn.execute(
                    "UPDATE cube SET uses = uses + ?, last_used_at = ? WHERE id = ?", (uses, now, cube_id)
                )
                conn.execute(
                    "INSERT INTO access_log (at, cube_id, uses) VALUES (?, ?, ?)", (now, cube_id, uses)
                )
                if cube.state is LifecycleState.GENERATED:
                    record_move(conn, principal, cube, "activated", LifecycleState.ACTIVATED, now)
                counted += uses
        return counted

    # -- reading -----------------------------------------------------------------------------------------

    def get(self, principal: Principal, cube_id: str) -> MemCube:
        """One memory, live or archived. Raises `MemoryNotFoundError`."""
        with self._db.read() as conn:
            return find(conn, principal, cube_id, self._now())

    def get_many(self, principal: Principal, ids: Iterable[str]) -> dict[str, MemCube]:
        """Those of `ids` that the caller may see and that are live, by id."""
        found: dict[str, MemCube] = {}
        with self._db.read() as conn:
            now = self._now()
            for cube_id in dict.fromkeys(ids):
                with contextlib.suppress(MemoryNotFoundError):
                    cube = find(conn, principal, cube_id, now)
                    if cube.state in LIVE:
                        found[cube_id] = cube
        return found

    def list(
        self, principal: Principal, *, states: Collection[LifecycleState] = LIVE, limit: int | None = None
    ) -> Cubes:
        """The caller's memories in these states, by creation; the oldest `limit` of them. Deleted ones show
        only in `history`."""
        where, params = visible(principal, self._now())
        params["states"] = among(LifecycleState(state).value for state in states)
        with self._db.read() as conn:
            rows = conn.execute(
                f"{SELECT_CUBE} WHERE {where} AND c.state IN (SELECT value FROM json_each(:states)) "
                "ORDER BY c.id LIMIT :limit",
                {**params, "limit": -1 if limit is None else limit},
            ).fetchall()
        return [cube_of(row) for row in rows]

    def history(self, principal: Principal, cube_id: str) -> History:
        """Every event in a memory's life, oldest first, even once deleted. Raises `MemoryNotFoundError`."""
        where, params = visible(principal, self._now(), hidden=True)
        with self._db.read() as conn:
            rows = conn.execute(
                "SELECT e.version, e.at, e.event, e.state, b.body FROM cube_event e JOIN cube c ON c.id = "
                "e.cube_id LEFT JOIN cube_body b ON b.cube_id = e.cube_id AND b.version = e.version "
                f"WHERE {where} AND e.cube_id = :id ORDER BY e.seq",
                {**params, "id": cube_id if is_cube_id(cube_id) else ""},
            ).fetchall()
        if not rows:
            raise not_found(cube_id)
        return [history_of(row) for row in rows]

    # -- life and end ------------------------------------------------------------------------------------

    def archive(self, principal: Principal, cube_id: str) -> MemCube:
        """Keep the memory, but offer it to no request. Raises `MemoryNotFoundError`, `LifecycleError`."""
        return self._move(principal, cube_id, "archived", LifecycleState.ARCHIVED)[0]

    def restore(self, principal: Principal, cube_id: str) -> MemCube:
        """Bring an archived memory back. Raises `MemoryNotFoundError`, `LifecycleError` if not archived."""
        return self._move(
            principal, cube_id, "restored", LifecycleState.ACTIVATED, only_from=LifecycleState.ARCHIVED
        )[0]

    def delete(self, principal: Principal, cube_id: str) -> tuple[BlobRef, ...]:
        """Hide the memory from every verb except `history`; its text stays until `erase`.

        Its KV records, and those that saw its text, are dropped. Returns references of files that no memory
        names any longer: they are removed already, let go of copies in memory. Raises `MemoryNotFoundError`,
        also when the memory is deleted already, and `LifecycleError`.
        """
        return self._move(principal, cube_id, "deleted", LifecycleState.EXPIRED)[1]

    def _move(
        self,
        principal: Principal,
        cube_id: str,
        event: str,
        target: LifecycleState,
        only_from: LifecycleState | None = None,
    ) -> tuple[MemCube, tuple[BlobRef, ...]]:
        refused: LifecycleError | None = None
        refs: tuple[BlobRef, ...] = ()
        with self._db.write() as conn:
            now = self._now()
            cube = find(conn, principal, cube_id, now)
            try:
                if only_from is not None and cube.state is not only_from:
                    raise LifecycleError(
                        f"a memory that is {cube.state} cannot be {event}; only one that is {only_from} can."
                    )
                check_move(cube.state, target)
            except LifecycleError as error:  # the refusal is audited, so the transaction must commit
                refused = error
                tried = {
                    "event": "move_refused",
                    "cube_id": cube_id,
                    "state": cube.state.value,
                    "tried": event,
                }
                append_audit(conn, now, {**tried, "tenant": principal.tenant, "user": principal.user})
            else:
                if target is LifecycleState.EXPIRED:
                    refs = tuple(drop_rows(conn, cube_id))
                record_move(conn, principal, cube, event, target, now)
                cube = find(conn, principal, cube_id, now, hidden=True)
        if refused is not None:
            raise refused
        return cube, self._remove(refs)

    def erase(self, principal: Principal, cube_id: str, *, rewrite: bool = True) -> tuple[BlobRef, ...]:
        """Destroy the memory's text, tags, vectors and KV in any state; ids, times and fingerprints remain.

        With `rewrite` no byte of the text is left in the store's files on return; that rewrites the database.
        To erase many, pass False and call `finish_erasures()` once. Returns what `delete` does. Raises
        `MemoryNotFoundError`, also when it is erased already, and what `finish_erasures` raises: the erasure
        itself is then done and final.
        """
        refs: tuple[BlobRef, ...] = ()
        with self._db.write() as conn:
            now = self._now()
            cube = find(conn, principal, cube_id, now, hidden=True)
            tombstone = conn.execute(
                "SELECT scrubbed_at FROM erasure WHERE cube_id = ?", (cube_id,)
            ).fetchone()
            if tombstone is None:
                refs = tuple(drop_rows(conn, cube_id))
                payloads = json.dumps([(ref.sha256, ref.size, ref.checksum) for ref in refs])
                conn.execute(
                    "INSERT INTO erasure (cube_id, at, payloads) VALUES (?, ?, ?)", (cube_id, now, payloads)
                )
                forget_passages(conn, cube_id)
                conn.execute("DELETE FROM vector WHERE cube_id = ?", (cube_id,))
                conn.execute("DELETE FROM cube_body WHERE cube_id = ?", (cube_id,))
                record_move(conn, principal, cube, "erased", LifecycleState.EXPIRED, now)
            elif tombstone[0] is not None:
                raise MemoryNotFoundError(
                    f"memory {cube_id!r} was erased already; nothing of its text is left."
                )
        free = self._remove(refs)
        if rewrite:
            self.finish_erasures()
        return free
