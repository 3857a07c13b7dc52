"""The store's Time Machine: differences, rollback of one memory or of all, what-if branches.

Nothing is rewritten: going back appends versions and events, so that this can be undone in the same way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

from memos_engine.errors import ConflictError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import MemCube, time_from_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState
from memos_engine.memory.store_facts import close_fact, last_closing, settle
from memos_engine.memory.store_fts import copy_passage
from memos_engine.memory.store_life import LifeVerbs, put_to
from memos_engine.memory.store_rows import (
    append_audit,
    caller,
    check_changeable,
    check_version,
    find,
    live_states,
    principal_id,
    record_event,
    record_move,
)
from memos_engine.memory.store_times import copy_times
from memos_engine.memory.store_versions import carry_forms, content_of, link, unflag_derived
from memos_engine.memory.store_view import visible
from memos_engine.memory.store_write import WriteVerbs
from memos_engine.memory.timemachine import Branch, Rollback, VersionDiff, changed_lines
from memos_engine.memory.values import is_number, moment_text
from memos_engine.memory.vault import BlobRef

Mark = int | datetime | str  # a version, or a moment
_LAST = "(SELECT max(x.seq) FROM cube_event x WHERE x.cube_id = c.id{})"

# Rows of one version that go into another one, of the same memory or of a copy.
_COPIES = (
    "INSERT INTO cube_version (cube_id, version, at, origin, semantic_type, body_hmac, key_id, gist) "
    "SELECT :to, 1, :now, origin, semantic_type, body_hmac, key_id, gist FROM cube_version WHERE {}",
    "INSERT INTO cube_body SELECT :to, 1, body, tags FROM cube_body WHERE {}",
    "INSERT INTO fact SELECT :to, 1, subject, attribute, key, valid_from, valid_to FROM fact WHERE {}",
    "INSERT INTO cube_source SELECT :to, 1, data FROM cube_source WHERE {}",
    "INSERT INTO vector SELECT :to, 1, model_id, dim, vec FROM vector WHERE {}",
    "INSERT INTO kv_artifact SELECT identity, :to, 1, sha256, size, checksum, tokens, created_at FROM "
    "kv_artifact WHERE {}",
)


class _DryRun(Exception):
    """Ends a transaction that was only to show what it would do."""


class TimeVerbs(WriteVerbs, LifeVerbs):
    """Going back, and aside."""

    def diff(self, principal: Principal, cube_id: str, before: Mark, after: Mark) -> VersionDiff:
        """What changed between two versions, given by their numbers or by moments at which they were current.

        Raises `MemoryNotFoundError`, `MemoryInputError`.
        """
        with self._db.read() as conn:
            cube = find(conn, principal, cube_id, self._now(), hidden=True)
            a, b = (_version_at(conn, cube.id, mark) for mark in (before, after))
            one, two = content_of(conn, cube.id, a), content_of(conn, cube.id, b)
        return VersionDiff(
            cube.id,
            a,
            b,
            changed_lines(one.text, two.text),
            tuple(tag for tag in two.tags if tag not in one.tags),
            tuple(tag for tag in one.tags if tag not in two.tags),
            one.fact,
            two.fact,
        )

    def rollback(
        self, principal: Principal, cube_id: str, version: int, *, if_version: int | None = None
    ) -> MemCube:
        """Make a version of a memory the present one again, as a new version with its words and vectors.

        The memory is Activated then, also when it was archived; KV that the version had is used again. Raises
        `MemoryInputError`, `MemoryNotFoundError`, `AccessError`, `LifecycleError` (frozen), `ConflictError`.
        """
        with self._change() as (conn, now):
            cube = find(conn, principal, cube_id, now, action="write")
            check_version(cube, if_version)
            if cube.state is not LifecycleState.ARCHIVED:
                check_changeable(principal, cube, "rollback")
            if not is_number(version) or version == cube.version:
                raise MemoryInputError(
                    f"memory {cube_id!r} is at version {cube.version}; name another one, not {version!r}."
                )
            closed = last_closing(conn, cube.id, version)
            self._return(conn, principal, cube, version, LifecycleState.ACTIVATED, closed, now)
            settle(conn, principal, find(conn, principal, cube_id, now), now)
            return find(conn, principal, cube_id, now)

    def rollback_to(self, principal: Principal, moment: datetime | str, *, dry_run: bool = False) -> Rollback:
        """Take all of the caller's own memories back to a moment on the store's clock.

        Contents, facts and states become what they were; memories added later are archived; deleted ones come
        back; erased ones never, nor those past their time to live, nor adapters. Settings, grants and numbers
        of uses stay. With `dry_run` nothing changes, the result says what would. Raises `MemoryInputError`
        for a moment to come.
        """
        at = moment_text(moment)
        restored, put_away, ended = [], [], []
        refs: list[BlobRef] = []
        where, params = visible(principal, self._now(), hidden=True, own=True)
        with suppress(_DryRun), self._change() as (conn, now):
            if at > now:
                raise MemoryInputError(f"{at} is still to come; name a moment in the past.")
            rows = conn.execute(
                "SELECT c.id, e.version, e.state FROM cube c LEFT JOIN cube_event e ON e.seq = "
                f"{_LAST.format(' AND x.at <= :at')} WHERE {where} AND {_LAST.format('')} > coalesce(e.seq, "
                "0) AND c.kind <> 'lora' AND NOT EXISTS (SELECT 1 FROM erasure x WHERE x.cube_id = c.id) AND "
                "(c.ttl_at IS NULL OR c.ttl_at > :now) ORDER BY c.id",
                {**params, "at": at, "now": now},
            ).fetchall()
            for cube_id, version, state in rows:
                cube = find(conn, principal, cube_id, now, hidden=True)
                if version is None:
                    if cube.state in LIVE:
                        put_to(conn, principal, cube, "rolled_back", LifecycleState.ARCHIVED, now)
                        put_away.append(cube_id)
                elif state == LifecycleState.EXPIRED.value:
                    if cube.state is not LifecycleState.EXPIRED:
                        refs += put_to(conn, principal, cube, "rolled_back", LifecycleState.EXPIRED, now)
                        ended.append(cube_id)
                elif self._restore(conn, principal, cube, version, LifecycleState(state), at, now):
                    restored.append(cube_id)
            result = Rollback(time_from_text(at), tuple(restored), tuple(put_away), tuple(ended))
            if dry_run:
                raise _DryRun  # undoes the transaction
            counts = {"restored": len(restored), "put_away": len(put_away), "ended": len(ended)}
            append_audit(conn, now, {"event": "rolled_back", "to": at, **counts, **caller(principal)})
        if not dry_run:
            self._remove(refs)
        return result

    def _restore(
        self,
        conn: sqlite3.Connection,
        principal: Principal,
        cube: MemCube,
        version: int,
        state: LifecycleState,
        at: str,
        now: str,
    ) -> bool:
        """Content, fact and state of a moment; False where they are still the same."""
        closed = last_closing(conn, cube.id, version, at)
        if cube.version != version:
            self._return(conn, principal, cube, version, state, closed, now)
        elif closed != last_closing(conn, cube.id, version):
            close_fact(conn, cube.id, version, closed, now)
            record_move(conn, principal, cube, "rolled_back", state, now)
        elif cube.state is not state:
            record_move(conn, principal, cube, "rolled_back", state, now)
        else:
            return False
        if cube.state is LifecycleState.EXPIRED:
            unflag_derived(conn, cube.id)
        return True

    def _return(
        self,
        conn: sqlite3.Connection,
        principal: Principal,
        cube: MemCube,
        version: int,
        state: LifecycleState,
        closed: str | None,
        now: str,
    ) -> None:
        """A new version with everything that an old one had; the stored KV that it named goes along."""
        content = content_of(conn, cube.id, version)
        new = self._new_version(conn, principal, cube, content, "rolled_back", state, now, parent=version)
        carry_forms(conn, cube.id, version, new)
        if closed is not None:
            close_fact(conn, cube.id, new, closed, now)

    def branch(self, principal: Principal, name: str) -> Principal:
        """A what-if scope that begins with copies of the caller's own live memories; returns its caller.

        Whatever is done in it leaves the originals alone, and it shows its own memories only. Erasing an
        original erases its copies. `name` is a lower-case word, of a branch that never was. Raises
        `MemoryInputError`, `ConflictError` for a name in use or used before.
        """
        if principal.branch:
            raise MemoryInputError("a branch has no branches; branch from the user's own scope.")
        scope = Principal(principal.tenant, principal.user, name)
        if not name:
            raise MemoryInputError("a branch needs a name; give a lower-case word.")
        where, params = visible(principal, self._now(), own=True)
        with self._change() as (conn, now):
            origin = principal_id(conn, principal, now)
            names = (scope.tenant, scope.key)
            if conn.execute("SELECT 1 FROM principal WHERE tenant = ? AND user = ?", names).fetchone():
                raise ConflictError(f"there is or was a branch {name!r}; choose another name.")
            row = conn.execute(
                "INSERT INTO principal (tenant, user, created_at) VALUES (?, ?, ?) RETURNING id",
                (*names, now),
            ).fetchone()
            conn.execute("INSERT INTO branch (scope, origin, at) VALUES (?, ?, ?)", (row[0], origin, now))
            originals = conn.execute(
                f"SELECT c.id FROM cube c WHERE {where} AND c.kind <> 'lora' AND c.state IN (SELECT value "
                "FROM json_each(:states)) ORDER BY c.id",
                {**params, "now": now, "states": live_states()},
            ).fetchall()
            for (original,) in originals:
                self._copy(conn, principal, find(conn, principal, original, now), scope, int(row[0]), now)
            event = {"event": "branched", "branch": name, "memories": len(originals)}
            append_audit(conn, now, {**event, **caller(principal)})
        return scope

    def _copy(
        self,
        conn: sqlite3.Connection,
        principal: Principal,
        cube: MemCube,
        scope: Principal,
        scope_id: int,
        now: str,
    ) -> None:
        copy = self._ids.new(time_from_text(now))
        which = {"to": copy, "now": now, "id": cube.id, "version": cube.version, "scope": scope_id}
        conn.execute(
            "INSERT INTO cube (id, provenance_id, owner, kind, version, state, created_at, updated_at, "
            "origin, semantic_type, priority, ttl_at, sensitivity, gist, half_life_s) SELECT :to, "
            "provenance_id, :scope, kind, 1, 'generated', :now, :now, origin, semantic_type, priority, "
            "ttl_at, sensitivity, gist, half_life_s FROM cube WHERE id = :id",
            which,
        )
        for statement in _COPIES[:2]:
            conn.execute(statement.format("cube_id = :id AND version = :version"), which)
        copy_passage(conn, scope, (cube.id, cube.version), copy)
        copy_times(conn, (cube.id, cube.version), copy)
        for statement in _COPIES[2:]:
            conn.execute(statement.format("cube_id = :id AND version = :version"), which)
        conn.execute(
            "INSERT INTO kv_context SELECT x.identity, :to, x.source_id FROM kv_context x JOIN kv_artifact "
            "k ON k.identity = x.identity AND k.cube_id = :to WHERE x.cube_id = :id",
            which,
        )
        record_event(conn, scope, copy, 1, "branched", LifecycleState.GENERATED, now)
        closed = last_closing(conn, cube.id, cube.version)
        if closed is not None:
            close_fact(conn, copy, 1, closed, now)
        link(conn, (copy, 1), "branch_of", (cube.id, cube.version), now)

    def branches(self, principal: Principal) -> list[Branch]:
        """The caller's branches, dropped ones too, oldest first."""
        with self._db.read() as conn:
            rows = conn.execute(
                "SELECT s.user, b.at, b.dropped_at FROM branch b JOIN principal s ON s.id = b.scope JOIN "
                "principal o ON o.id = b.origin WHERE o.tenant = ? AND o.user = ? ORDER BY b.at, b.scope",
                (principal.tenant, principal.key),
            ).fetchall()
        return [
            Branch(
                Principal.from_key(principal.tenant, key).branch,
                time_from_text(at),
                time_from_text(dropped) if dropped else None,
            )
            for key, at, dropped in rows
        ]

    def drop_branch(self, principal: Principal, name: str) -> int:
        """Delete every memory of a branch, and the branch; returns how many memories those were.

        What was written in it stays until erased, like everything deleted. Raises `MemoryNotFoundError`.
        """
        scope = Principal(principal.tenant, principal.user, name)
        refs: list[BlobRef] = []
        where, params = visible(scope, self._now(), own=True)
        with self._change() as (conn, now):
            changed = conn.execute(
                "UPDATE branch SET dropped_at = ? WHERE dropped_at IS NULL AND scope = (SELECT id FROM "
                "principal WHERE tenant = ? AND user = ?)",
                (now, scope.tenant, scope.key),
            ).rowcount
            if not changed or not name:
                raise MemoryNotFoundError(f"there is no branch {name!r}; branches shows which there are.")
            ids: Sequence[tuple[str]] = conn.execute(
                f"SELECT c.id FROM cube c WHERE {where} ORDER BY c.id", {**params, "now": now}
            ).fetchall()
            for (cube_id,) in ids:
                cube = find(conn, scope, cube_id, now)
                refs += put_to(conn, scope, cube, "dropped", LifecycleState.EXPIRED, now)
            event = {"event": "branch_dropped", "branch": name, "memories": len(ids)}
            append_audit(conn, now, {**event, **caller(principal)})
        self._remove(refs)
        return len(ids)


def _version_at(conn: sqlite3.Connection, cube_id: str, mark: Mark) -> int:
    if isinstance(mark, int):
        return mark
    row = conn.execute(
        "SELECT version FROM cube_event WHERE cube_id = ? AND at <= ? ORDER BY seq DESC LIMIT 1",
        (cube_id, moment_text(mark)),
    ).fetchone()
    if row is None:
        raise MemoryInputError(f"memory {cube_id!r} was not there yet at {mark}; name a later moment.")
    return int(row[0])
