"""The store's verbs for what belongs to a memory beside its words: derivations, settings, permissions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memos_engine.errors import AccessError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import (
    MemCube,
    time_from_text,
    time_to_text,
    validate_half_life,
    validate_label,
    validate_priority,
    validate_visibility,
)
from memos_engine.memory.governance import RULES, Grant, Principal
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_rows import append_audit, caller, find, principal_id, record_move
from memos_engine.memory.store_versions import link
from memos_engine.memory.store_view import visible
from memos_engine.memory.values import is_number

LINKS = ("derived_from", "mentions", "supersedes")
EFFECTS = ("allow", "deny")
_GRANTS = (
    "SELECT g.id, o.tenant, o.user, g.cube_id, w.user, g.action, g.effect, g.at, g.expires_at, g.revoked_at "
    "FROM grant_ g JOIN principal o ON o.id = g.owner LEFT JOIN principal w ON w.id = g.grantee "
    "JOIN principal b ON b.id = g.granted_by"
)


@dataclass(frozen=True, slots=True)
class Edge:
    """`source` (at a version) is `kind` `target`: derived_from, merged_from, branch_of, supersedes, ..."""

    source: str
    source_version: int
    kind: str
    target: str
    target_version: int
    at: datetime

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        names = ("source", "source_version", "kind", "target", "target_version")
        return {**{name: getattr(self, name) for name in names}, "at": time_to_text(self.at)}


class AccessVerbs(StoreBase):
    """Derivations, settings and grants."""

    def lineage(self, principal: Principal, cube_id: str) -> list[Edge]:
        """Edges from and to a memory, oldest first; only those whose other end the caller sees, too.

        Raises `MemoryNotFoundError`.
        """
        where, params = visible(principal, self._now(), hidden=True)
        with self._db.read() as conn:
            find(conn, principal, cube_id, self._now(), hidden=True)
            rows = conn.execute(
                "SELECT e.source, e.source_version, e.kind, e.target, e.target_version, e.at FROM edge e "
                "JOIN cube c ON c.id = CASE e.source WHEN :id THEN e.target ELSE e.source END "
                f"WHERE {where} AND (e.source = :id OR e.target = :id) ORDER BY e.seq",
                {**params, "id": cube_id},
            ).fetchall()
        return [Edge(a, b, kind, c, d, time_from_text(at)) for a, b, kind, c, d, at in rows]

    def link(self, principal: Principal, source: str, kind: str, target: str) -> None:
        """Note that a memory, as it is now, is `derived_from`, `mentions` or `supersedes` another one.

        Raises `MemoryInputError` (also for a derivation in a circle), `MemoryNotFoundError`, `AccessError`.
        """
        if kind not in LINKS:
            raise MemoryInputError(f"kind must be one of {', '.join(LINKS)}, not {kind!r}.")
        with self._change() as (conn, now):
            one = find(conn, principal, source, now, action="write")
            other = find(conn, principal, target, now)
            if one.id == other.id:
                raise MemoryInputError("a memory cannot be linked to itself; name another target.")
            link(conn, (one.id, one.version), kind, (other.id, other.version), now)
            event = {"event": "linked", "source": one.id, "kind": kind, "target": other.id}
            append_audit(conn, now, {**event, **caller(principal)})

    def govern(
        self,
        principal: Principal,
        cube_id: str,
        *,
        visibility: str | None = None,
        priority: int | None = None,
        sensitivity: str | None = None,
        ttl_at: datetime | None = None,
        half_life_s: float | None = None,
    ) -> MemCube:
        """Change a memory's settings; those left out stay. They hold for reads of the past, too.

        `visibility`: `private`, `read_only` (everybody of the tenant may read) or `shared` (and write).
        Others than the owner need a grant to share for `visibility` (for `shared` one to write, too), and
        one to write for the rest. Raises
        `MemoryInputError`, `MemoryNotFoundError`, `AccessError`.
        """
        wanted = {
            "visibility": None if visibility is None else validate_visibility(visibility),
            "priority": None if priority is None else validate_priority(priority),
            "sensitivity": None if sensitivity is None else validate_label("sensitivity", sensitivity),
            "ttl_at": None if ttl_at is None else time_to_text(ttl_at),
            "half_life_s": validate_half_life(half_life_s),
        }
        changes = {name: value for name, value in wanted.items() if value is not None}
        if not changes:
            raise MemoryInputError("govern changes nothing; name at least one setting.")
        with self._change() as (conn, now):
            if set(changes) - {"visibility"}:
                cube = find(conn, principal, cube_id, now, action="write")
            if visibility is not None:
                cube = find(conn, principal, cube_id, now, action="share")
                _no_branch(principal)
            if visibility == "shared":  # nobody gives more than they have
                cube = find(conn, principal, cube_id, now, action="write")
            if (expiry := changes.get("ttl_at")) is not None and expiry <= now:
                raise MemoryInputError(f"ttl_at {expiry} is not in the future; delete the memory instead.")
            names = ", ".join(f"{name} = :{name}" for name in changes)
            conn.execute(f"UPDATE cube SET {names} WHERE id = :id", {**changes, "id": cube_id})
            append_audit(conn, now, {"event": "settings", "cube_id": cube_id, **changes, **caller(principal)})
            record_move(conn, principal, cube, "governed", cube.state, now)
            return find(conn, principal, cube_id, now)

    def grant(
        self,
        principal: Principal,
        action: str,
        *,
        cube_id: str | None = None,
        to: Principal | None = None,
        effect: str = "allow",
        expires_at: datetime | None = None,
    ) -> Grant:
        """Let `to` (None: everybody of the tenant) do `action` with a memory of the caller's, or all of them.

        Actions: `read`; `write` (and read): new versions, links, archiving, freezing, deleting; `share` (and
        read): grants of what the grantee may do. `effect="deny"` takes it away, whatever else allows it;
        owners cannot be denied anything. Somebody with a grant to share may grant, for that memory only, what
        they may do themselves; that stays until revoked. Audited. Raises `MemoryInputError`,
        `MemoryNotFoundError`, `AccessError`.
        """
        if action not in RULES:
            raise MemoryInputError(f"action must be one of {', '.join(RULES)}, not {action!r}.")
        if effect not in EFFECTS:
            raise MemoryInputError(f"effect must be one of {', '.join(EFFECTS)}, not {effect!r}.")
        if to is not None and (to.tenant != principal.tenant or to.branch):
            raise MemoryInputError("a grant stays within the tenant, between users; name another grantee.")
        expiry = None if expires_at is None else time_to_text(expires_at)
        _no_branch(principal)
        with self._change() as (conn, now):
            if expiry is not None and expiry <= now:
                raise MemoryInputError(f"expires_at {expiry} is not in the future; the grant would be void.")
            owner = principal
            if cube_id is not None:
                cube = find(conn, principal, cube_id, now, action="share")
                owner = cube.owner
                if owner != principal:
                    find(conn, principal, cube_id, now, action=action)
                    _only_gives(principal, cube, effect)
            me = principal_id(conn, principal, now)
            whose = principal_id(conn, owner, now)
            whom = None if to is None else principal_id(conn, to, now)
            row = conn.execute(
                "INSERT INTO grant_ (owner, cube_id, grantee, action, effect, expires_at, granted_by, at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                (whose, cube_id, whom, action, effect, expiry, me, now),
            ).fetchone()
            made = _grant_of(conn.execute(f"{_GRANTS} WHERE g.id = ?", (row[0],)).fetchone())
            append_audit(conn, now, {"event": "granted", "grant": made.to_dict(), **caller(principal)})
        return made

    def revoke(self, principal: Principal, grant_id: int) -> Grant:
        """Take a grant (or a denial) back; only its owner and who gave it can. Audited.

        Raises `MemoryNotFoundError` for any other one.
        """
        with self._change() as (conn, now):
            row = conn.execute(
                f"{_GRANTS} WHERE g.id = :id AND g.revoked_at IS NULL AND o.tenant = :tenant AND (o.user = "
                ":user OR b.user = :user)",
                {
                    "id": grant_id if is_number(grant_id) else 0,
                    "tenant": principal.tenant,
                    "user": principal.key,
                },
            ).fetchone()
            if row is None:
                raise MemoryNotFoundError(f"there is no grant {grant_id!r} to revoke; grants shows them.")
            conn.execute("UPDATE grant_ SET revoked_at = ? WHERE id = ?", (now, grant_id))
            append_audit(conn, now, {"event": "revoked", "grant": grant_id, **caller(principal)})
            return _grant_of(conn.execute(f"{_GRANTS} WHERE g.id = ?", (grant_id,)).fetchone())

    def grants(self, principal: Principal, cube_id: str | None = None) -> list[Grant]:
        """Grants in force on the caller's memories, and those that the caller gave; oldest first."""
        with self._db.read() as conn:
            rows = conn.execute(
                f"{_GRANTS} WHERE g.revoked_at IS NULL AND (g.expires_at IS NULL OR g.expires_at > :now) AND "
                "o.tenant = :tenant AND (o.user = :user OR b.user = :user) AND "
                "(:id IS NULL OR g.cube_id = :id) ORDER BY g.id",
                {"now": self._now(), "id": cube_id, "tenant": principal.tenant, "user": principal.key},
            ).fetchall()
        return [_grant_of(row) for row in rows]


def _grant_of(row: tuple[Any, ...]) -> Grant:
    tenant = row[1]
    times = [None if text is None else time_from_text(text) for text in row[8:10]]
    return Grant(
        row[0],
        Principal.from_key(tenant, row[2]),
        row[3],
        None if row[4] is None else Principal.from_key(tenant, row[4]),
        row[5],
        row[6],
        time_from_text(row[7]),
        *times,
    )


def _no_branch(principal: Principal) -> None:
    if principal.branch:
        raise MemoryInputError("a branch is its user's alone; share the memories outside of it.")


def _only_gives(principal: Principal, cube: MemCube, effect: str) -> None:
    if effect == "deny":
        raise AccessError(f"only the owner of memory {cube.id!r} may deny; ask them.")
