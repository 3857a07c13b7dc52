"""The store's verb that brings a memory into another scope: to another user, or out of a branch."""

from __future__ import annotations

import sqlite3

from memos_engine.errors import AccessError, MemoryInputError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.new import NewMemory
from memos_engine.memory.store_life import LifeVerbs, move
from memos_engine.memory.store_rows import append_audit, attempt, caller, find, principal_id
from memos_engine.memory.store_versions import link
from memos_engine.memory.store_write import WriteVerbs


class TransferVerbs(WriteVerbs, LifeVerbs):
    """Memories on their way from one scope to another."""

    def transfer(
        self, principal: Principal, cube_id: str, to: Principal | None = None, *, keep: bool = True
    ) -> MemCube:
        """Copy a memory that the caller sees to `to` (default: the caller), who owns the copy; returns it.

        The copy has the words, tags, fact, sources, vectors and the provenance id of the original and is
        private; it is `derived_from` it. Without `keep` the original is archived, which needs leave to write
        it. Nobody is given memories unasked: another user must have granted the caller to `write` all of
        theirs; a user's own branches need nothing. Raises `MemoryInputError`, `MemoryNotFoundError`,
        `AccessError`, `LifecycleError`.
        """
        target = principal if to is None else to
        if target.tenant != principal.tenant:
            raise MemoryInputError("a transfer stays within the tenant; name another user.")
        with self._change() as (conn, now):
            cube = find(conn, principal, cube_id, now, action="read" if keep else "write")
            if cube.kind == "lora":
                raise MemoryInputError("an adapter stays with its owner; export it, where they agree.")
            if cube.owner == target:
                raise MemoryInputError(f"memory {cube_id!r} is {target.user!r}'s already; name another.")
            if target.user != principal.user and not _welcome(conn, principal, target, now):
                raise AccessError(
                    f"{target.user!r} takes no memories from you; ask for a grant to write all of theirs.",
                    attempt(principal, cube, "access_refused", "transfer"),
                )
            new = NewMemory(
                cube.body or "",
                tags=cube.tags,
                semantic_type=cube.semantic_type,
                origin=cube.origin,
                ttl_at=cube.ttl_at,
                half_life_s=cube.half_life_s,
                priority=cube.priority,
                sensitivity=cube.sensitivity,
                fact=cube.fact,
                provenance=cube.provenance,
            )
            owner = principal_id(conn, target, now)
            copy = self._add(conn, target, owner, new, None, now, provenance_id=cube.provenance_id)
            link(conn, (copy.id, 1), "derived_from", (cube.id, cube.version), now)
            conn.execute(
                "INSERT INTO vector SELECT :to, 1, model_id, dim, vec FROM vector WHERE cube_id = :id AND "
                "version = :version",
                {"to": copy.id, "id": cube.id, "version": cube.version},
            )
            if not keep:
                move(conn, principal, cube, "transferred", LifecycleState.ARCHIVED, now)
            event = {"event": "transferred", "cube_id": cube.id, "copy": copy.id, "to": target.key}
            append_audit(conn, now, {**event, **caller(principal)})
            return copy


def _welcome(conn: sqlite3.Connection, giver: Principal, target: Principal, now: str) -> bool:
    """Whether the giver may write all of the target's memories, by a grant that nothing denies."""
    effects = {
        row[0]
        for row in conn.execute(
            "SELECT g.effect FROM grant_ g JOIN principal o ON o.id = g.owner LEFT JOIN principal w ON "
            "w.id = g.grantee WHERE o.tenant = :tenant AND o.user = :target AND g.cube_id IS NULL AND "
            "g.revoked_at IS NULL AND (g.expires_at IS NULL OR g.expires_at > :now) AND (w.user IS NULL OR "
            "w.user = :giver) AND (g.action = 'write' OR g.effect = 'deny' AND g.action = 'read')",
            {"tenant": giver.tenant, "target": target.key, "giver": giver.key, "now": now},
        )
    }
    return effects == {"allow"}
