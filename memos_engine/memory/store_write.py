"""The store's verbs that add memories and give them new versions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import Enum

import numpy.typing as npt

from memos_engine.errors import ConflictError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import (
    Fact,
    MemCube,
    Provenance,
    time_from_text,
    time_to_text,
    validate_label,
    validate_origin,
    validate_tags,
    validate_text,
)
from memos_engine.memory.dates import prepare
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState, check_move
from memos_engine.memory.new import NewMemory, check_embedding, ids_once
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_facts import carry_closing, settle
from memos_engine.memory.store_rows import (
    check_changeable,
    check_version,
    find,
    principal_id,
    record_event,
    record_move,
)
from memos_engine.memory.store_vectors import Vector, insert_vector, unit_vector
from memos_engine.memory.store_versions import (
    Content,
    carry_forms,
    content_of,
    dated,
    flag_alike,
    insert_version,
    link,
)

MODES = ("overwrite", "append", "merge")


class Keep(Enum):
    """The fact of the version before stays."""

    KEEP = "keep"


class WriteVerbs(StoreBase):
    """Adding and updating."""

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
        half_life_s: float | None = None,
        visibility: str = "private",
        priority: int = 0,
        sensitivity: str = "normal",
        fact: Fact | None = None,
        provenance: Provenance | None = None,
        derived_from: Iterable[str] = (),
        session: str | None = None,
        valid_from: datetime | None = None,
    ) -> MemCube:
        """Store a new memory; it is durable and retrievable on return.

        `vector [dim]` is its embedding by `model_id`; without, it is found by its words until an embedder
        meets it. `session` names the conversation it is from: what was said before it there is its context in
        retrieval. `valid_from` is since when it holds (default: now), short for a `fact` that says no more. A
        `fact` ends those of the owner that it contradicts. `derived_from` names the memories that its words
        come from. Repeating a call with the same `idempotency_key` returns the memory of the first one.

        Raises `MemoryInputError`, `MemoryNotFoundError` (a source), `ConflictError` (that key was used for
        another text, or its memory is gone), `StoreFullError`, `StoreError`.
        """
        new = NewMemory(
            text,
            vector,
            model_id,
            tags,
            semantic_type,
            origin,
            idempotency_key,
            ttl_at,
            half_life_s,
            visibility,
            priority,
            sensitivity,
            fact,
            provenance,
            derived_from,
            session,
            valid_from,
        )
        return self.add_many(principal, [new])[0]

    def add_many(self, principal: Principal, memories: Sequence[NewMemory]) -> list[MemCube]:
        """Store all of these memories or, where one of them is refused, none: one transaction, one fsync.

        Returns them in the same order. Raises as `add` does.
        """
        if not isinstance(principal, Principal):
            raise MemoryInputError(
                f"the caller must be a Principal(tenant, user), not {type(principal).__name__}."
            )
        vectors = [None if new.vector is None else unit_vector(new.vector) for new in memories]
        if not memories:
            return []
        for new in memories:
            prepare(new.text)
        with self._change() as (conn, now):
            owner = principal_id(conn, principal, now)
            return [
                self._add(conn, principal, owner, new, vector, now)
                for new, vector in zip(memories, vectors, strict=True)
            ]

    def _add(
        self,
        conn: sqlite3.Connection,
        principal: Principal,
        owner: int,
        new: NewMemory,
        vector: Vector | None,
        now: str,
        provenance_id: str | None = None,
    ) -> MemCube:
        token = None
        if new.idempotency_key is not None:
            token = self.keys.token_hmac(principal, new.idempotency_key)
            if (earlier := self._repeated_add(conn, principal, owner, token, new.text, now)) is not None:
                return earlier
        expiry = None if new.ttl_at is None else time_to_text(new.ttl_at)
        if expiry is not None and expiry <= now:
            raise MemoryInputError(f"ttl_at {expiry} is not in the future; the memory would be gone at once.")
        if principal.branch and new.visibility != "private":
            raise MemoryInputError("memories of a branch are private; leave visibility out.")
        cube_id = self._ids.new(time_from_text(now))
        check_move(None, LifecycleState.GENERATED)
        conn.execute(
            "INSERT INTO cube (id, provenance_id, owner, kind, version, state, created_at, updated_at, "
            "origin, semantic_type, visibility, priority, ttl_at, half_life_s, sensitivity, idempotency) "
            "VALUES (:id, coalesce(:provenance, :id), :owner, 'text', 1, :state, :now, :now, :origin, :type, "
            ":visibility, :priority, :ttl, :half_life, :sensitivity, :token)",
            {
                "id": cube_id,
                "provenance": provenance_id,
                "owner": owner,
                "state": LifecycleState.GENERATED.value,
                "now": now,
                "origin": new.origin,
                "type": new.semantic_type,
                "visibility": new.visibility,
                "priority": new.priority,
                "ttl": expiry,
                "half_life": new.half_life_s,
                "sensitivity": new.sensitivity,
                "token": token,
            },
        )
        content = Content(
            new.text,
            tuple(new.tags),
            new.origin,
            new.semantic_type,
            dated(new.fact, now),
            new.provenance,
            new.session,
        )
        insert_version(conn, self.keys, principal, cube_id, 1, None, content, now)
        if vector is not None and new.model_id is not None:
            insert_vector(conn, cube_id, 1, new.model_id, vector)
        record_event(conn, principal, cube_id, 1, "added", LifecycleState.GENERATED, now)
        return self._connect(conn, principal, cube_id, "derived_from", new.derived_from, now)

    def _repeated_add(
        self, conn: sqlite3.Connection, principal: Principal, owner: int, token: bytes, text: str, now: str
    ) -> MemCube | None:
        row = conn.execute(
            "SELECT c.id, v.body_hmac FROM cube c JOIN cube_version v ON v.cube_id = c.id AND v.version = 1 "
            "WHERE c.owner = ? AND c.idempotency = ?",
            (owner, token),
        ).fetchone()
        if row is None:
            return None
        if row[1] != self.keys.body_hmac(text):
            raise ConflictError("this idempotency key was used for another text; use a new key.")
        return self._still_there(conn, principal, row[0], now)

    @staticmethod
    def _still_there(conn: sqlite3.Connection, principal: Principal, cube_id: str, now: str) -> MemCube:
        try:
            return find(conn, principal, cube_id, now)
        except MemoryNotFoundError:
            raise ConflictError("this idempotency key's memory was deleted; use a new key.") from None

    @staticmethod
    def _connect(
        conn: sqlite3.Connection,
        principal: Principal,
        cube_id: str,
        kind: str,
        sources: Iterable[str],
        now: str,
    ) -> MemCube:
        """Derivations and contradictions of a version just written; the memory as it then is."""
        cube = find(conn, principal, cube_id, now)
        for source in sources:
            origin = find(conn, principal, source, now)
            link(conn, (cube.id, cube.version), kind, (origin.id, origin.version), now)
        flag_alike(conn, cube, now)
        if cube.fact is None:
            return cube
        settle(conn, principal, cube, now)
        return find(conn, principal, cube_id, now)

    def update(
        self,
        principal: Principal,
        cube_id: str,
        text: str,
        *,
        mode: str = "overwrite",
        if_version: int | None = None,
        tags: Iterable[str] | None = None,
        vector: npt.ArrayLike | None = None,
        model_id: str | None = None,
        semantic_type: str | None = None,
        origin: str = "user_input",
        fact: Fact | Keep | None = Keep.KEEP,
        provenance: Provenance | None = None,
        derived_from: Iterable[str] = (),
        merged_from: Iterable[str] = (),
        idempotency_key: str | None = None,
    ) -> MemCube:
        """A new version of a memory, which becomes (or stays) Merged; the versions before it are kept.

        `mode`: `overwrite` replaces the text (and the tags, where given), `append` adds a line, `merge` adds
        those lines that are not there yet, so that repeating a text confirms it. `vector` embeds the whole
        new text. With `if_version` the update happens only while that is the memory's version. `merged_from`
        names memories that went into this one: they are archived. A fact stays unless another one, or None,
        is given. Vectors and KV of the version before are not used any longer, unless the text is the same.

        Raises `MemoryInputError`, `MemoryNotFoundError`, `AccessError`, `LifecycleError` (frozen or
        archived), `ConflictError` (another version, or this key was used for another call), `StoreError`.
        """
        validate_text(text)
        validate_origin(origin)
        check_embedding(vector, model_id)
        if mode not in MODES:
            raise MemoryInputError(f"mode must be one of {', '.join(MODES)}, not {mode!r}.")
        if semantic_type is not None:
            validate_label("semantic_type", semantic_type)
        labels = None if tags is None else validate_tags(tags)
        unit = None if vector is None else unit_vector(vector)
        sources, merged = ids_once("derived_from", derived_from), ids_once("merged_from", merged_from)
        request = self.keys.request_hmac("update", str(cube_id), mode, text)
        token = None
        if idempotency_key is not None:
            token = self.keys.token_hmac(principal, validate_text(idempotency_key, 1000))
        prepare(text)
        with self._change() as (conn, now):
            call = None if token is None else (principal_id(conn, principal, now), token)
            if call is not None and (earlier := self._repeated(conn, principal, call, request, now)):
                return earlier
            cube = find(conn, principal, cube_id, now, action="write")
            check_version(cube, if_version)
            check_changeable(principal, cube, "update")
            old = content_of(conn, cube.id, cube.version)
            content = Content(
                text if mode == "overwrite" else _longer(old.text, text, only_new=mode == "merge"),
                _labels(old.tags, labels, mode),
                origin,
                semantic_type or old.semantic_type,
                old.fact if isinstance(fact, Keep) else dated(fact, now),
                provenance,
            )
            version = self._new_version(conn, principal, cube, content, "updated", LifecycleState.MERGED, now)
            if isinstance(fact, Keep):
                carry_closing(conn, cube, version, now)
            if content.text == old.text:
                carry_forms(conn, cube.id, cube.version, version)
            if unit is not None and model_id is not None:
                insert_vector(conn, cube.id, version, model_id, unit)
            for other in merged:
                self._merge_in(conn, principal, (cube.id, version), other, now)
            if call is not None:
                conn.execute("INSERT INTO done VALUES (?, ?, ?, ?, ?)", (*call, request, cube.id, version))
            return self._connect(conn, principal, cube.id, "derived_from", sources, now)

    def _repeated(
        self,
        conn: sqlite3.Connection,
        principal: Principal,
        call: tuple[int, bytes],
        request: bytes,
        now: str,
    ) -> MemCube | None:
        row = conn.execute(
            "SELECT request, cube_id FROM done WHERE caller = ? AND token = ?", call
        ).fetchone()
        if row is None:
            return None
        if row[0] != request:
            raise ConflictError("this idempotency key was used for another call; use a new key.")
        return self._still_there(conn, principal, row[1], now)

    def _new_version(
        self,
        conn: sqlite3.Connection,
        principal: Principal,
        cube: MemCube,
        content: Content,
        event: str,
        state: LifecycleState,
        now: str,
        parent: int | None = None,
    ) -> int:
        """Append a version to a memory and make it the present one; returns its number."""
        (last,) = conn.execute(
            "SELECT max(version) FROM cube_version WHERE cube_id = ?", (cube.id,)
        ).fetchone()
        version = int(last) + 1
        insert_version(conn, self.keys, cube.owner, cube.id, version, parent or cube.version, content, now)
        conn.execute(
            "UPDATE cube SET version = ?, state = ?, updated_at = ?, origin = ?, semantic_type = ? "
            "WHERE id = ?",
            (version, state.value, now, content.origin, content.semantic_type, cube.id),
        )
        record_event(conn, principal, cube.id, version, event, state, now)
        return version

    @staticmethod
    def _merge_in(
        conn: sqlite3.Connection, principal: Principal, target: tuple[str, int], other: str, now: str
    ) -> None:
        cube = find(conn, principal, other, now, action="write")
        link(conn, target, "merged_from", (cube.id, cube.version), now)
        if cube.state is LifecycleState.ARCHIVED:
            return
        check_changeable(principal, cube, "merge")
        record_move(conn, principal, cube, "merged", LifecycleState.ARCHIVED, now)


def _longer(old: str, text: str, *, only_new: bool) -> str:
    known = set(old.splitlines()) if only_new else set()
    return validate_text("\n".join([old, *(line for line in text.splitlines() if line not in known)]))


def _labels(old: tuple[str, ...], given: tuple[str, ...] | None, mode: str) -> tuple[str, ...]:
    if given is None:
        return old
    return given if mode == "overwrite" else validate_tags((*old, *given))
