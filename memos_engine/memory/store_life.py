"""The store's verbs for a memory's life and end: every move goes through the one table of the lifecycle."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable

from memos_engine.errors import LifecycleError, MemoryNotFoundError
from memos_engine.memory.cube import MemCube, is_cube_id
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState, check_move
from memos_engine.memory.store_adapter_rows import revoke
from memos_engine.memory.store_fts import forget_passages
from memos_engine.memory.store_kv import KVRows, drop_rows
from memos_engine.memory.store_rows import attempt, find, find_own, record_event, record_move, refused
from memos_engine.memory.store_versions import DERIVATIONS, flag_derived, reached
from memos_engine.memory.vault import BlobRef


class LifeVerbs(KVRows):
    """Using, archiving, freezing, deleting, erasing. Others than the owner need a grant to write."""

    def record_use(self, principal: Principal, ids: Iterable[str]) -> int:
        """Count one use for every id given, in one transaction; the first use activates a memory.

        Meant for batches off the request's path, so that ids gone meanwhile are passed over, like those that
        the caller does not see. Returns how many uses were counted.
        """
        counts = Counter(cube_id for cube_id in ids if is_cube_id(cube_id))
        counted = 0
        if not counts:
            return counted
        with self._change() as (conn, now):
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

    def archive(self, principal: Principal, cube_id: str) -> MemCube:
        """Keep the memory, but offer it to no request.

        Raises `MemoryNotFoundError`, `AccessError`, `LifecycleError`.
        """
        return self._move(principal, cube_id, "archived", LifecycleState.ARCHIVED)[0]

    def restore(self, principal: Principal, cube_id: str) -> MemCube:
        """Bring an archived memory back. Raises `MemoryNotFoundError`, `LifecycleError` if not archived."""
        return self._move(
            principal, cube_id, "restored", LifecycleState.ACTIVATED, only_from=LifecycleState.ARCHIVED
        )[0]

    def freeze(self, principal: Principal, cube_id: str) -> MemCube:
        """Keep the memory as it is: still used, but closed to changes. Raises as `archive` does."""
        return self._move(principal, cube_id, "frozen", LifecycleState.FROZEN)[0]

    def unfreeze(self, principal: Principal, cube_id: str) -> MemCube:
        """Open a frozen memory to changes, in the state it was in. Raises as `restore` does."""
        return self._move(principal, cube_id, "unfrozen", None, only_from=LifecycleState.FROZEN)[0]

    def delete(self, principal: Principal, cube_id: str) -> tuple[BlobRef, ...]:
        """Hide the memory from every verb except `history`; its text stays until `erase`.

        Its KV records, and those that saw its text, are dropped; memories derived from it are marked (see
        `MemCube.source_gone_at`). Returns references of files that no memory
        names any longer: they are removed already, let go of copies in memory. Raises `MemoryNotFoundError`,
        also when the memory is deleted already, and `LifecycleError`.
        """
        return self._move(principal, cube_id, "deleted", LifecycleState.EXPIRED)[1]

    def _move(
        self,
        principal: Principal,
        cube_id: str,
        event: str,
        target: LifecycleState | None,
        only_from: LifecycleState | None = None,
    ) -> tuple[MemCube, tuple[BlobRef, ...]]:
        with self._change() as (conn, now):
            cube = find(conn, principal, cube_id, now, action="write")
            if only_from is not None and cube.state is not only_from:
                raise refused(
                    principal,
                    cube,
                    event,
                    f"a memory that is {cube.state} cannot be {event}; only one that is {only_from} can.",
                )
            if target is None:
                target = _before_freezing(conn, cube)
            refs = move(conn, principal, cube, event, target, now)
            cube = find(conn, cube.owner, cube_id, now, hidden=True)
        return cube, self._remove(refs)

    def erase(
        self, principal: Principal, cube_id: str, *, rewrite: bool = True, cascade: bool = False
    ) -> tuple[BlobRef, ...]:
        """Destroy the memory's text, tags, fact, vectors and KV in any state; ids and fingerprints remain.

        Its copies in what-if branches go too, and with `cascade` every memory derived from it, whoever owns
        it; without, those are marked. With `rewrite` no byte of the text is left in the store's files on
        return; that rewrites the database. To erase many, pass False and call `finish_erasures()` once. For
        owners only. Returns what `delete` does. Raises `MemoryNotFoundError`, also when it is erased already,
        `AccessError`, and what `finish_erasures` raises: the erasure itself is then done and final.
        """
        refs: list[BlobRef] = []
        with self._change() as (conn, now):
            find_own(conn, principal, cube_id, now)
            tombstone = conn.execute(
                "SELECT scrubbed_at FROM erasure WHERE cube_id = ?", (cube_id,)
            ).fetchone()
            if tombstone is not None and tombstone[0] is not None:
                raise MemoryNotFoundError(
                    f"memory {cube_id!r} was erased already; nothing of its text is left."
                )
            kinds = DERIVATIONS if cascade else ("branch_of",)
            for one in (*reversed(reached(conn, cube_id, kinds)), cube_id):
                refs += _erase(conn, principal, one, now)
        free = self._remove(refs)
        if rewrite:
            self.finish_erasures()
        return free


def move(
    conn: sqlite3.Connection,
    principal: Principal,
    cube: MemCube,
    event: str,
    target: LifecycleState,
    now: str,
) -> list[BlobRef]:
    """One move within the caller's transaction; files that may be named by nobody now.

    Raises `LifecycleError`, to be audited, for a move that the table does not have.
    """
    try:
        check_move(cube.state, target)
    except LifecycleError as error:
        raise LifecycleError(str(error), attempt(principal, cube, "move_refused", event)) from None
    return put_to(conn, principal, cube, event, target, now)


def put_to(
    conn: sqlite3.Connection,
    principal: Principal,
    cube: MemCube,
    event: str,
    target: LifecycleState,
    now: str,
) -> list[BlobRef]:
    """A move that was checked already."""
    refs = []
    if target is LifecycleState.EXPIRED:
        refs = drop_rows(conn, cube.id) + revoke(conn, principal, cube.id, event, now)[0]
    record_move(conn, principal, cube, event, target, now)
    if target is LifecycleState.EXPIRED:
        flag_derived(conn, principal, cube.id, now)
    return refs


def _before_freezing(conn: sqlite3.Connection, cube: MemCube) -> LifecycleState:
    row = conn.execute(
        "SELECT state FROM cube_event WHERE cube_id = ? AND state <> 'frozen' ORDER BY seq DESC LIMIT 1",
        (cube.id,),
    ).fetchone()
    return LifecycleState(row[0])


def _erase(conn: sqlite3.Connection, principal: Principal, cube_id: str, now: str) -> list[BlobRef]:
    """Destroy one memory's rows, unless that was done before."""
    if conn.execute("SELECT 1 FROM erasure WHERE cube_id = ?", (cube_id,)).fetchone():
        return []
    revoked, ended = revoke(conn, principal, cube_id, "erased", now)
    refs = drop_rows(conn, cube_id) + revoked
    payloads = json.dumps([(ref.sha256, ref.size, ref.checksum) for ref in refs])
    conn.execute("INSERT INTO erasure (cube_id, at, payloads) VALUES (?, ?, ?)", (cube_id, now, payloads))
    forget_passages(conn, cube_id)
    for table in ("vector", "cube_body", "fact_closing", "fact", "cube_source"):
        conn.execute(f"DELETE FROM {table} WHERE cube_id = ?", (cube_id,))
    conn.execute(
        "UPDATE cube SET gist = NULL, closed_at = NULL, state = 'expired', updated_at = ? WHERE id = ?",
        (now, cube_id),
    )
    (version,) = conn.execute("SELECT version FROM cube WHERE id = ?", (cube_id,)).fetchone()
    record_event(conn, principal, cube_id, version, "erased", LifecycleState.EXPIRED, now)
    flag_derived(conn, principal, cube_id, now)
    for adapter in ended:  # made from nothing but this
        refs += _erase(conn, principal, adapter, now)
    return refs
