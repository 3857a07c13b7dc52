"""Adapters in the store: versions of a memory of kind lora, their payloads, and what ends them.

The memory's own version is the pointer to the current one: promoting and rolling back move it, and nothing is
rewritten. An adapter holds what it was made from, so that it is revoked, payload and all, with any of it.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

from memos_engine.errors import (
    AccessError,
    ConflictError,
    MemoryInputError,
    MemoryNotFoundError,
    MemosEngineError,
    PayloadError,
)
from memos_engine.memory.adapters import HOW, MAX_NAME_CHARS, AdapterVersion, NewAdapter
from memos_engine.memory.audit import canonical_json
from memos_engine.memory.cube import MemCube, time_from_text, validate_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import CHANGEABLE, LIVE, LifecycleState, check_move
from memos_engine.memory.new import ids_once
from memos_engine.memory.store_adapter_rows import (
    SELECT_ADAPTER,
    SOURCE_GONE,
    adapter_row,
    sources_of,
    usable,
    version_of,
    with_sources,
)
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_rows import (
    append_audit,
    caller,
    find,
    find_own,
    live_states,
    principal_id,
    record_event,
    refused,
)
from memos_engine.memory.store_versions import link
from memos_engine.memory.vault import BlobRef

_HEX = re.compile(r"[0-9a-f]{64}")


class AdapterVerbs(StoreBase):
    """The store's verbs for adapters. Only an owner sees, uses and changes theirs: no grant opens them."""

    def put_adapter(
        self,
        principal: Principal,
        name: str,
        blob: bytes | bytearray | memoryview | BlobRef,
        new: NewAdapter,
        *,
        promote: bool = True,
    ) -> AdapterVersion:
        """Store an adapter under the owner's name for it, as a new version where there is one of that name.

        The file is durable before its row. The same content again is the version that there is. Names never
        identify: what is in use is named by its digest everywhere. promote: use it from now on, unless its
        report says that it failed. Raises `MemoryInputError`, `MemoryNotFoundError` (a source), `AccessError`
        (a source of somebody else), `ConflictError` (this content was revoked), `LifecycleError`,
        `StoreError`.
        """
        _check(principal, new)
        name = validate_text(name, MAX_NAME_CHARS)
        sources = ids_once("sources", new.sources)
        report = canonical_json(new.report)
        ref = blob if isinstance(blob, BlobRef) else self.vault.write(blob)
        try:
            with self._change() as (conn, now):
                cube_id, version, known = self._place(conn, principal, name, new, now)
                if not known:
                    if not self.vault.holds(ref):
                        if isinstance(blob, BlobRef):
                            raise PayloadError(f"the vault lacks {ref.sha256}; write it first.", "missing")
                        self.vault.write(blob)
                    _insert(conn, principal, (cube_id, version), ref, new, report, now)
                _derive(conn, principal, (cube_id, version), sources, now)
                if promote:
                    self._promote(conn, principal, cube_id, version, now)
                return adapter_row(conn, principal, cube_id, version, now)
        except MemosEngineError:
            self._remove([ref])  # perhaps made from a text that was erased meanwhile
            raise

    def _place(
        self, conn: sqlite3.Connection, principal: Principal, name: str, new: NewAdapter, now: str
    ) -> tuple[str, int, bool]:
        """The memory and version to write, and whether that holds this content already."""
        owner = principal_id(conn, principal, now)
        if conn.execute(
            "SELECT 1 FROM adapter_version a JOIN cube c ON c.id = a.cube_id WHERE c.owner = ? AND a.digest "
            "= ? AND a.revoked_why = ?",
            (owner, new.digest, SOURCE_GONE),
        ).fetchone():
            raise ConflictError(
                f"this content was revoked: {SOURCE_GONE}. It knows what was deleted; train it anew without "
                "that."
            )
        row = conn.execute(
            "SELECT c.id FROM cube c JOIN cube_body b ON b.cube_id = c.id AND b.version = c.version WHERE "
            "c.owner = ? AND c.kind = 'lora' AND c.state <> 'expired' AND b.body = ? ORDER BY c.id",
            (owner, name),
        ).fetchone()
        if row is not None:
            cube = find_own(conn, principal, row[0], now)
            if cube.state not in CHANGEABLE:
                raise refused(
                    principal, cube, "import", f"adapter {name!r} is {cube.state}; undo that first."
                )
            same = conn.execute(
                "SELECT version FROM adapter_version WHERE cube_id = ? AND digest = ?",
                (cube.id, new.digest),
            ).fetchone()
            if same is not None:
                return cube.id, int(same[0]), True
            (last,) = conn.execute(
                "SELECT max(version) FROM cube_version WHERE cube_id = ?", (cube.id,)
            ).fetchone()
            self._version(conn, cube.id, int(last) + 1, int(last), name, now, new.how)
            return cube.id, int(last) + 1, False
        cube_id = self._ids.new(time_from_text(now))
        check_move(None, LifecycleState.GENERATED)
        conn.execute(
            "INSERT INTO cube (id, provenance_id, owner, kind, version, state, created_at, updated_at, "
            "origin, semantic_type) VALUES (:id, :id, :owner, 'lora', 1, 'generated', :now, :now, :origin, "
            "'adapter')",
            {"id": cube_id, "owner": owner, "now": now, "origin": _origin(new.how)},
        )
        self._version(conn, cube_id, 1, None, name, now, new.how)
        record_event(conn, principal, cube_id, 1, "added", LifecycleState.GENERATED, now)
        return cube_id, 1, False

    def _version(
        self,
        conn: sqlite3.Connection,
        cube_id: str,
        version: int,
        parent: int | None,
        name: str,
        now: str,
        how: str,
    ) -> None:
        """The version's rows. Its name is not made searchable: an adapter is found by what it was made
        from."""
        conn.execute(
            "INSERT INTO cube_version (cube_id, version, parent, at, origin, semantic_type, body_hmac, "
            "key_id) VALUES (?, ?, ?, ?, ?, 'adapter', ?, ?)",
            (cube_id, version, parent, now, _origin(how), self.keys.body_hmac(name), self.keys.id),
        )
        conn.execute("INSERT INTO cube_body VALUES (?, ?, ?, '[]')", (cube_id, version, name))

    def promote_adapter(self, principal: Principal, cube_id: str, version: int) -> AdapterVersion:
        """Use a stored version from now on. Raises `MemoryNotFoundError`, `LifecycleError` where its report
        says that it failed, or the adapter is archived or frozen."""
        with self._change() as (conn, now):
            self._promote(conn, principal, cube_id, version, now)
            return adapter_row(conn, principal, cube_id, version, now)

    def _promote(
        self, conn: sqlite3.Connection, principal: Principal, cube_id: str, version: int, now: str
    ) -> None:
        cube = _adapter_cube(conn, principal, cube_id, now)
        found = adapter_row(conn, principal, cube_id, version, now)
        if found.current:
            return
        if found.revoked_at is not None:
            raise refused(principal, cube, "promote", f"version {version} was revoked ({found.revoked_why}).")
        if found.report.get("passed") is False:
            failed = ", ".join(str(name) for name in found.report.get("failed", ())) or "a gate"
            raise refused(
                principal,
                cube,
                "promote",
                f"version {version} did not pass ({failed}): it stays stored, but is not used; train it "
                "better.",
            )
        conn.execute(
            "UPDATE adapter_version SET promoted_at = coalesce(promoted_at, ?) WHERE cube_id = ? AND version "
            "= ?",
            (now, cube_id, version),
        )
        self._point(conn, principal, cube, version, "promoted", now)

    @staticmethod
    def _point(
        conn: sqlite3.Connection, principal: Principal, cube: MemCube, version: int, event: str, now: str
    ) -> None:
        if cube.state not in CHANGEABLE:
            raise refused(
                principal, cube, event, f"an adapter that is {cube.state} cannot be {event}; undo that."
            )
        conn.execute("UPDATE cube SET version = ?, updated_at = ? WHERE id = ?", (version, now, cube.id))
        record_event(conn, principal, cube.id, version, event, cube.state, now)

    def rollback_adapter(
        self, principal: Principal, cube_id: str, version: int | None = None
    ) -> AdapterVersion:
        """Use an earlier version again: the one before the current one, or `version`; only the pointer moves.

        Raises `MemoryInputError` where there is none that was promoted and not revoked,
        `MemoryNotFoundError`, `LifecycleError`.
        """
        with self._change() as (conn, now):
            cube = _adapter_cube(conn, principal, cube_id, now)
            others = usable(conn, cube_id, cube.version)
            target = (others[0] if others else None) if version is None else version
            if target is None or target not in others:
                raise MemoryInputError(
                    f"adapter {cube_id!r} is at version {cube.version}; "
                    + (f"name one of {sorted(others)}." if others else "there is no other one to go back to.")
                )
            self._point(conn, principal, cube, target, "rolled_back", now)
            return adapter_row(conn, principal, cube_id, target, now)

    def adapters(self, principal: Principal, *, everything: bool = False) -> list[AdapterVersion]:
        """The owner's adapters in use, by creation; `everything`: all versions of all that are not erased."""
        live = (
            ""
            if everything
            else (
                " AND c.state IN (SELECT value FROM json_each(:states)) AND a.version = c.version AND "
                "a.promoted_at IS NOT NULL AND a.revoked_at IS NULL"
            )
        )
        with self._db.read() as conn:
            now = self._now()
            params = {"tenant": principal.tenant, "user": principal.key, "states": live_states()}
            rows = conn.execute(f"{SELECT_ADAPTER}{live} ORDER BY a.cube_id, a.version", params).fetchall()
            return [with_sources(conn, version_of(row), now) for row in rows]

    def adapter(self, principal: Principal, given: str, version: int | None = None) -> AdapterVersion:
        """One version of the owner's adapter of this id, or beginning of one, or name; None: the current one.

        Raises `MemoryNotFoundError` (somebody else's are not there, either), `MemoryInputError`.
        """
        if not isinstance(given, str):
            raise MemoryInputError("an adapter is named by its id or its name.")
        found = [one for one in self.adapters(principal, everything=True) if given in (one.cube_id, one.name)]
        if not found and len(given) >= 8:
            every = self.adapters(principal, everything=True)
            found = [one for one in every if one.cube_id.startswith(given)]
        live = [one for one in found if one.revoked_at is None]
        ids = {one.cube_id for one in live or found}
        if len(ids) > 1:
            raise MemoryInputError(f"several adapters are called {given!r}; give an id.")
        for one in found:
            if one.cube_id in ids and (one.version == version if version is not None else one.current):
                return one
        if not found:
            raise MemoryNotFoundError(
                f"there is no adapter {given!r} for this user; `adapter ls` shows them."
            )
        raise MemoryNotFoundError(
            f"adapter {given!r} has no version {version}; `adapter show` lists them."
            if version is not None
            else f"adapter {given!r} has no version in use: promote one, `adapter show` lists them."
        )

    def adapter_in_use(self, principal: Principal, cube_id: str, version: int) -> AdapterVersion:
        """A version as it may be bound now: owner's, live, not revoked, its sources within their time.

        Raises `MemoryNotFoundError`, `AccessError`.
        """
        with self._db.read() as conn:
            now = self._now()
            try:
                cube = find_own(conn, principal, cube_id, now)
            except AccessError as error:  # to try somebody else's is kept, though it is only a read
                self._audit_refusal(error.event or {"event": "access_refused"})
                raise
            found = adapter_row(conn, principal, cube_id, version, now)
            gone = any(row[3] for row in sources_of(conn, cube_id, version, now))
        if found.blob is None or found.revoked_at is not None or gone:
            why = found.revoked_why or SOURCE_GONE
            raise MemoryNotFoundError(
                f"version {version} of adapter {cube_id!r} is not used any longer: {why}."
            )
        if cube.state not in LIVE:
            raise MemoryNotFoundError(f"adapter {cube_id!r} is {cube.state}; restore it first.")
        return found

    def note_damaged_adapter(self, found: AdapterVersion, reason: str) -> None:
        """Audit that a payload cannot be read; it stays, a backup or the same import mends it."""
        self.note({"event": "adapter_damaged", "digest": found.digest, "reason": reason[:200]})


def _insert(
    conn: sqlite3.Connection,
    principal: Principal,
    key: tuple[str, int],
    ref: BlobRef,
    new: NewAdapter,
    report: str,
    now: str,
) -> None:
    """A version's rows, and its audit event."""
    conn.execute(
        "INSERT INTO adapter_version (cube_id, version, digest, model, rank, nbytes, kv_floor, how, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, new.digest, new.model, new.rank, new.nbytes, new.kv_floor, new.how, now),
    )
    conn.execute(
        "INSERT INTO adapter_payload VALUES (?, ?, ?, ?, ?, ?)",
        (*key, ref.sha256, ref.size, ref.checksum, report),
    )
    event = {"event": "adapter_stored", "cube_id": key[0], "version": key[1], "how": new.how}
    append_audit(conn, now, {**event, "digest": new.digest, **caller(principal)})


def _derive(
    conn: sqlite3.Connection, principal: Principal, key: tuple[str, int], sources: Sequence[str], now: str
) -> None:
    """Remember what a version was made from: the owner's own memories, none of them ended."""
    for source in sources:
        find_own(conn, principal, source, now)
        origin = find(conn, principal, source, now)
        link(conn, key, "derived_from", (origin.id, origin.version), now)
    if sources:
        event = {"event": "adapter_sources", "cube_id": key[0], "version": key[1], "sources": list(sources)}
        append_audit(conn, now, {**event, **caller(principal)})


def _check(principal: Principal, new: NewAdapter) -> None:
    if not isinstance(principal, Principal):
        raise MemoryInputError(f"the caller must be a Principal, not {type(principal).__name__}.")
    if principal.branch:
        raise MemoryInputError("adapters belong to the user's own scope; leave the branch out.")
    if not all(isinstance(text, str) and _HEX.fullmatch(text) for text in (new.digest, new.model)):
        raise MemoryInputError("an adapter's digest and model are SHA-256 in hex (64 digits).")
    if type(new.rank) is not int or type(new.nbytes) is not int or new.rank < 1 or new.nbytes < 0:
        raise MemoryInputError("an adapter's rank and bytes are integers of at least 1 and 0.")
    if new.how not in HOW:
        raise MemoryInputError(f"how must be one of {', '.join(HOW)}, not {new.how!r}.")


def _origin(how: str) -> str:
    return "fine_tuning" if how == "trained" else "user_input"


def _adapter_cube(conn: sqlite3.Connection, principal: Principal, cube_id: str, now: str) -> MemCube:
    cube = find_own(conn, principal, cube_id, now)
    if cube.kind != "lora":
        raise MemoryInputError(
            f"memory {cube_id!r} is no adapter but a {cube.kind}; `cube` commands change it."
        )
    return find(conn, principal, cube_id, now)
