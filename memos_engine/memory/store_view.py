"""How the store looks to a caller, now or in the past: the one predicate through which rows are seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.governance import RULES, Principal

Params = dict[str, Any]

_ME = "(SELECT id FROM principal WHERE tenant = :tenant AND user = :user)"
_OWN = f"c.owner = {_ME}"
_THERE = "c.state <> 'expired'"
_ALIVE = f"{_THERE} AND (c.ttl_at IS NULL OR c.ttl_at > :now)"
_AT_MOMENT = "e.state <> 'expired' AND (c.ttl_at IS NULL OR c.ttl_at > :as_of)"
# `at` never goes back, so that the last event by a moment is the one with the highest number.
_PAST = (
    "JOIN cube_event e ON e.seq = (SELECT max(x.seq) FROM cube_event x WHERE x.cube_id = c.id "
    "AND x.at <= :as_of)"
)
_USES_PAST = "FROM access_log x WHERE x.cube_id = c.id AND x.at <= :as_of"
_CLOSED_PAST = (
    "(SELECT x.valid_to FROM fact_closing x WHERE x.cube_id = c.id AND x.version = e.version "
    "AND x.at <= :as_of ORDER BY x.seq DESC LIMIT 1)"
)


def _names(words: tuple[str, ...]) -> str:
    return ", ".join(f"'{word}'" for word in words)


def _others(action: str, alive: str) -> str:
    """Memories of others in the tenant that their visibility or a grant opens, unless a grant denies them.

    Each road begins with a condition of its own on an index; a common one would hide them from the planner.
    """
    rule = RULES[action]

    def grants(effect: str, actions: tuple[str, ...]) -> str:
        return (
            f"FROM grant_ g WHERE g.effect = '{effect}' AND g.action IN ({_names(actions)}) AND "
            f"g.revoked_at IS NULL AND (g.expires_at IS NULL OR g.expires_at > :now) AND "
            f"(g.grantee IS NULL OR g.grantee = {_ME})"
        )

    allow = grants("allow", rule.allowed_by)
    roads = [
        f"c.id IN (SELECT g.cube_id {allow} AND g.cube_id IS NOT NULL)",
        f"c.owner IN (SELECT g.owner {allow} AND g.cube_id IS NULL)",
    ]
    if rule.visibilities:
        roads.append(f"c.visibility <> 'private' AND c.visibility IN ({_names(rule.visibilities)})")
    fence = (
        "c.owner IN (SELECT id FROM principal WHERE tenant = :tenant) AND NOT EXISTS (SELECT 1 "
        f"{grants('deny', rule.denied_by)} AND g.owner = c.owner AND (g.cube_id IS NULL OR g.cube_id = c.id))"
        f" AND {alive}"
    )
    return " OR ".join(f"({road} AND {fence})" for road in roads)


_OTHERS = {(action, alive): _others(action, alive) for action in RULES for alive in (_THERE, _ALIVE)}


def visible(
    principal: Principal,
    now: str,
    *,
    hidden: bool = False,
    action: str = "read",
    own: bool = False,
    as_of: str | None = None,
    outlived: bool = False,
) -> tuple[str, Params]:
    """The only way to rows: a condition on `cube c` that holds for what this caller may do `action` with.

    Nothing is visible by default; a memory is visible to its owner, and to others of the tenant as its
    visibility and the grants of `now` say. `hidden` also shows the owner those that are deleted or past
    their time to live, which only history and erasure may look at. `own` leaves others' out. With `as_of`
    the condition is on `cube_event e` too (see `View.join`), and erased memories are never shown. Only the
    owner sees what was deleted since. `outlived` shows what is past its time to live, too: for caches that
    ask the clock themselves.
    """
    if not isinstance(principal, Principal):
        raise MemoryInputError(
            f"the caller must be a Principal(tenant, user), not {type(principal).__name__}."
        )
    # A branch is a world of its own: what is shared with its user shows in the user's own scope.
    mine = own or bool(principal.branch)
    alive = _THERE if outlived else _ALIVE
    who = f"({_OWN})" if mine else f"({_OWN} OR {_OTHERS[action, alive]})"
    params: Params = {"tenant": principal.tenant, "user": principal.key, "now": now}
    if as_of is not None:
        params["as_of"] = as_of
        erased = "EXISTS (SELECT 1 FROM erasure x WHERE x.cube_id = c.id)"
        return f"({who} AND {_AT_MOMENT} AND NOT {erased})", params
    return (who if hidden else f"({who} AND {alive})"), params


@dataclass(frozen=True, slots=True)
class View:
    """`FROM cube c {join} WHERE {where}` with `params`; the other fields are the columns that differ.

    `version` and `state` are what a memory has in this view, `moved_at` when it came to it, `closed` when its
    fact ended (NULL: not), `uses` and `last_used` how often and when it was used by then.
    """

    join: str
    where: str
    params: Params
    version: str = "c.version"
    state: str = "c.state"
    moved_at: str = "c.updated_at"
    closed: str = "c.closed_at"
    uses: str = "c.uses"
    last_used: str = "c.last_used_at"


def view(
    principal: Principal,
    now: str,
    *,
    hidden: bool = False,
    own: bool = False,
    as_of: str | None = None,
    valid_at: str | None = None,
    closed: bool = True,
) -> View:
    """What `visible` shows, at the moment `as_of` on the store's clock (None: now).

    `valid_at` keeps those that say something about that moment, on the clock of facts; without `closed`
    those go whose fact a later one has ended by then.
    """
    where, params = visible(principal, now, hidden=hidden, own=own, as_of=as_of)
    found = View("", where, params)
    if as_of is not None:
        found = View(
            _PAST,
            where,
            params,
            version="e.version",
            state="e.state",
            moved_at="e.at",
            closed=_CLOSED_PAST,
            uses=f"(SELECT coalesce(sum(x.uses), 0) {_USES_PAST})",
            last_used=f"(SELECT max(x.at) {_USES_PAST})",
        )
    extra = ""
    if valid_at is not None:
        params["valid_at"] = valid_at
        extra = (
            f" AND ({found.closed} IS NULL OR {found.closed} > :valid_at) AND NOT EXISTS (SELECT 1 FROM "
            f"fact w WHERE w.cube_id = c.id AND w.version = {found.version} AND (w.valid_from > :valid_at "
            "OR w.valid_to <= :valid_at))"
        )
    elif not closed:
        params["valid_at"] = as_of or now
        extra = f" AND ({found.closed} IS NULL OR {found.closed} > :valid_at)"
    return replace(found, where=f"({found.where}{extra})")
