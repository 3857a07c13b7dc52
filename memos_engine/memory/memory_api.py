"""The Memory API: create, query, update, transfer, compose and audit memories, with structured replies.

After the Memory API of the MemOS paper (arXiv 2507.03724, section 5.3): a MemCube is what goes in and what
comes out, provenance is embedded whenever one is made or modified, and every call either happens as a whole
or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from memos_engine.errors import (
    ConflictError,
    MemoryInputError,
    MemoryNotFoundError,
    MemosEngineError,
    RefusedError,
)
from memos_engine.memory.call import Intent, MemoryCall
from memos_engine.memory.cube import MemCube, Provenance
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import Principal
from memos_engine.memory.new import NewMemory
from memos_engine.memory.operator import Candidate, MemOperator
from memos_engine.memory.store import MemoryStore

STATUSES = ("ok", "invalid", "not_found", "refused", "conflict", "failed")
_STATUS: tuple[tuple[type[MemosEngineError], str], ...] = (
    (MemoryInputError, "invalid"),
    (MemoryNotFoundError, "not_found"),
    (RefusedError, "refused"),
    (ConflictError, "conflict"),
    (MemosEngineError, "failed"),
)


@dataclass(frozen=True)
class ApiReply:
    """What a call did. `status` is one of `STATUSES`; unless it is ok, nothing happened: `message` says why.

    `cubes` are the memories as they are now, those of a query best first, with `candidates` saying how well
    each fits. `events` are entries of the audit trail. `took_ms` is wall time in milliseconds.
    """

    operation: str
    status: str
    message: str = ""
    cubes: tuple[MemCube, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    events: tuple[dict[str, Any], ...] = ()
    took_ms: float = 0.0
    error: MemosEngineError | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def cube(self) -> MemCube:
        """The one memory of this reply. Raises the call's error, `MemoryInputError` for none or several."""
        self.require()
        if len(self.cubes) != 1:
            raise MemoryInputError(f"{self.operation} gave {len(self.cubes)} memories; read .cubes.")
        return self.cubes[0]

    def require(self) -> ApiReply:
        """The reply itself. Raises the call's error where it did not work."""
        if self.error is not None:
            raise self.error
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "operation": self.operation,
            "status": self.status,
            "message": self.message,
            "cubes": [cube.to_dict() for cube in self.cubes],
            "scores": [round(found.score, 6) for found in self.candidates],
            "events": list(self.events),
            "took_ms": round(self.took_ms, 3),
        }


@dataclass(frozen=True)
class LogQuery:
    """Which events of the audit trail are asked for; see `MemoryStore.audit_log`."""

    since: datetime | str | None = None
    until: datetime | str | None = None
    event: str | None = None
    cube_id: str | None = None
    limit: int | None = None


class MemoryAPI:
    """The calls of one caller. `provenance` goes with all that is made or changed; a call's own one wins."""

    def __init__(
        self,
        store: MemoryStore,
        operator: MemOperator,
        principal: Principal,
        provenance: Provenance | None = None,
    ) -> None:
        self.store, self.operator, self.principal = store, operator, principal
        self.provenance = provenance

    def create(self, memory: str | NewMemory | Sequence[str | NewMemory], **fields: Any) -> ApiReply:
        """Store one memory or several, all or none. `fields` are those of `NewMemory`, for plain texts."""
        given = [memory] if isinstance(memory, (str, NewMemory)) else memory

        def act() -> Outcome:
            made = [one if isinstance(one, NewMemory) else NewMemory(one, **fields) for one in given]
            ready = [self.operator.embedded(self._sourced(one)) for one in made]
            return Outcome(cubes=self.store.add_many(self.principal, ready))

        return self._call("create", act)

    def query(
        self, text: str, k: int = 8, *, filters: Filters | None = None, explain: bool = False
    ) -> ApiReply:
        """The `k` memories that fit best; see `MemOperator.recall`."""

        def act() -> Outcome:
            found = self.operator.recall(self.principal, text, k, filters=filters, explain=explain)
            return Outcome(cubes=[one.cube for one in found], candidates=found)

        return self._call("query", act)

    def update(self, cube_id: str, text: str, mode: str = "overwrite", **options: Any) -> ApiReply:
        """A new version by `overwrite`, `append` or `merge`; `options` are those of `MemoryStore.update`."""

        def act() -> Outcome:
            named = {"provenance": self.provenance, **options}
            return Outcome(cubes=[self.store.update(self.principal, cube_id, text, mode=mode, **named)])

        return self._call("update", act)

    def transfer(self, cube_id: str, to: Principal | None = None, *, keep: bool = True) -> ApiReply:
        """A copy in another scope; see `MemoryStore.transfer`."""
        return self._call(
            "transfer", lambda: Outcome(cubes=[self.store.transfer(self.principal, cube_id, to, keep=keep)])
        )

    def compose(
        self,
        cube_ids: Iterable[str],
        write: Callable[[Sequence[MemCube]], str] | None = None,
        *,
        archive: bool = False,
        **fields: Any,
    ) -> ApiReply:
        """One new memory out of several, `derived_from` them, with the tags of all of them.

        `write` makes its text of the memories, in the order given (default: their lines, each once). With
        `archive` they are archived, in the same transaction. `fields` are those of `NewMemory`.
        """

        def act() -> Outcome:
            parts = [self.store.get(self.principal, one) for one in dict.fromkeys(cube_ids)]
            if not parts:
                raise MemoryInputError("compose needs at least one memory.")
            text = (write or _lines)(parts)
            tags = dict.fromkeys(tag for part in parts for tag in part.tags)
            named = {"tags": tuple(tags), "origin": "inference", **fields}
            new = self._sourced(NewMemory(text, derived_from=[part.id for part in parts], **named))
            ready = self.operator.embedded(new)
            with self.store.transaction():
                for part in parts:
                    now = self.store.get(self.principal, part.id)
                    if now.version != part.version:
                        raise ConflictError(f"memory {part.id!r} changed meanwhile; compose again.")
                made = self.store.add_many(self.principal, [ready])
                for part in parts if archive else ():
                    self.store.archive(self.principal, part.id)
            return Outcome(cubes=made)

        return self._call("compose", act)

    def audit(self, query: LogQuery | None = None) -> ApiReply:
        """The caller's own events in the audit trail that the query asks for, oldest first."""
        wanted = query or LogQuery()

        def act() -> Outcome:
            found = self.store.audit_log(
                self.principal,
                since=wanted.since,
                until=wanted.until,
                event=wanted.event,
                cube_id=wanted.cube_id,
                limit=wanted.limit,
            )
            return Outcome(events=[one.to_dict() for one in found])

        return self._call("audit", act)

    def carry_out(self, call: MemoryCall, k: int = 8) -> ApiReply:
        """What a `MemoryCall` asks for: `remember` is stored (for others to read, where it says so), `recall`
        and `question` are looked up in its scope.

        `update` and `forget` change nothing: words alone do not name a memory. The reply has the memories
        that may be meant, best first; do it by id then. Raises nothing, see `ApiReply`.
        """

        def act() -> Outcome:
            if call.caller != self.principal:
                raise MemoryInputError("the call is of another caller; carry it out through their own API.")
            if call.intent is Intent.REMEMBER:
                visibility = "read_only" if call.scope == "shared" else "private"
                fields = {} if call.semantic_type is None else {"semantic_type": call.semantic_type}
                return Outcome(cubes=self.create(call.text, visibility=visibility, **fields).require().cubes)
            kinds = () if call.semantic_type is None else (call.semantic_type,)
            if not call.text and call.intent is Intent.RECALL:
                found = self.store.list(self.principal)
                wanted = [c for c in found if not kinds or c.semantic_type in kinds]
                return Outcome(cubes=[c for c in wanted if self._in_scope(c, call.scope)][-k:])
            hits = self.operator.recall(
                self.principal, call.text, 4 * k, filters=Filters(semantic_types=kinds)
            )
            near = [hit for hit in hits if self._in_scope(hit.cube, call.scope)][:k]
            return Outcome(cubes=[hit.cube for hit in near], candidates=near)

        return self._call(call.intent.value, act)

    # -- parts ---------------------------------------------------------------------------------------

    def _in_scope(self, cube: MemCube, scope: str) -> bool:
        return scope == "all" or (cube.owner == self.principal) == (scope == "private")

    def _sourced(self, new: NewMemory) -> NewMemory:
        return new if new.provenance is not None else replace(new, provenance=self.provenance)

    @staticmethod
    def _call(operation: str, act: Callable[[], Outcome]) -> ApiReply:
        start = time.perf_counter()
        try:
            done = act()
        except MemosEngineError as error:
            status = next(name for kind, name in _STATUS if isinstance(error, kind))
            took = (time.perf_counter() - start) * 1e3
            return ApiReply(operation, status, str(error), took_ms=took, error=error)
        took = (time.perf_counter() - start) * 1e3
        return ApiReply(
            operation,
            "ok",
            cubes=tuple(done.cubes),
            candidates=tuple(done.candidates),
            events=tuple(done.events),
            took_ms=took,
        )


@dataclass(frozen=True)
class Outcome:
    """What a call that worked gives."""

    cubes: Sequence[MemCube] = ()
    candidates: Sequence[Candidate] = ()
    events: Sequence[dict[str, Any]] = ()


def _lines(parts: Sequence[MemCube]) -> str:
    return "\n".join(dict.fromkeys(line for part in parts for line in (part.body or "").splitlines()))
