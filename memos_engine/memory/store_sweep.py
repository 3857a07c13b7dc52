"""What time does to memories: expiry, fading, idleness; for the operator of the store, over all users."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, fields
from datetime import timedelta

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import MemCube, time_from_text, time_to_text
from memos_engine.memory.lifecycle import CHANGEABLE, LifecycleState
from memos_engine.memory.store_kv import KVRows
from memos_engine.memory.store_life import move
from memos_engine.memory.store_rows import SELECT_CUBE, append_audit, cube_of
from memos_engine.memory.vault import BlobRef

BATCH = 200
"""Memories moved in one transaction, so that other writers never wait long."""

MAX_S = 1e10

_STATES = ", ".join(f"'{state.value}'" for state in sorted(CHANGEABLE))
_ACTIVE = "max(c.updated_at, coalesce(c.last_used_at, ''))"
_Rule = tuple[str, LifecycleState, str]
# What is due, as `(event, target, condition)`; `before` is the moment that lies the policy's time back.
_EXPIRED = ("expired", LifecycleState.EXPIRED, f"c.ttl_at <= :now AND c.state IN ({_STATES}, 'archived')")
_FADED = (
    "faded",
    LifecycleState.ARCHIVED,
    f"c.half_life_s IS NOT NULL AND c.state IN ({_STATES}) AND (julianday(:now) - julianday({_ACTIVE})) * "
    "86400 > c.half_life_s * :halvings",
)
_IDLE = ("idle", LifecycleState.ARCHIVED, f"c.state IN ({_STATES}) AND {_ACTIVE} <= :before")
_OLD_KV = "created_at <= ? AND version <> (SELECT version FROM cube WHERE cube.id = kv_artifact.cube_id)"
_FORGOTTEN = ("forgotten", LifecycleState.EXPIRED, "c.state = 'archived' AND c.updated_at <= :before")


@dataclass(frozen=True, slots=True)
class SweepPolicy:
    """What the janitor does beside expiring memories whose time to live is over.

    Memories with a half-life are archived once they were halved `halvings` times without use. `idle_s`: all
    others are archived after that many seconds without use or change (None: never). `forget_s`: archived ones
    are deleted after that long (None: never). `old_kv_s`: KV of versions that are no longer current is
    dropped after that long. Frozen memories are left alone. Raises `MemoryInputError`.
    """

    halvings: float = 4.0
    idle_s: float | None = None
    forget_s: float | None = None
    old_kv_s: float = 7 * 86400.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value <= MAX_S:
                raise MemoryInputError(
                    f"{field.name} must lie between 0 and {MAX_S:g} seconds, not {value!r}."
                )


@dataclass(frozen=True, slots=True)
class Swept:
    """How many memories a sweep moved, by why, and KV records it dropped."""

    expired: int
    faded: int
    idle: int
    forgotten: int
    kv_records: int


class SweepVerbs(KVRows):
    """Housekeeping."""

    def sweep(self, policy: SweepPolicy | None = None) -> Swept:
        """Move every memory that is due, by the one table of the lifecycle; each move shows in its history.

        In small transactions: whatever a crash or error interrupts is done by the next sweep. Raises
        `StoreError`.
        """
        policy = policy or SweepPolicy()
        counts = {
            "expired": self._sweep(*_EXPIRED, None, policy),
            "faded": self._sweep(*_FADED, None, policy),
            "idle": 0 if policy.idle_s is None else self._sweep(*_IDLE, policy.idle_s, policy),
            "forgotten": 0 if policy.forget_s is None else self._sweep(*_FORGOTTEN, policy.forget_s, policy),
        }
        return Swept(**counts, kv_records=self._drop_old_kv(policy.old_kv_s))

    def due(self, policy: SweepPolicy | None = None) -> Swept:
        """What `sweep` would move and drop now; changes nothing. Raises `StoreError`."""
        policy = policy or SweepPolicy()
        some = ((_IDLE, policy.idle_s), (_FORGOTTEN, policy.forget_s))
        rules: list[tuple[_Rule, float | None]] = [(_EXPIRED, None), (_FADED, None)]
        rules += [(rule, seconds) for rule, seconds in some if seconds is not None]
        now = self._now()
        params = {"now": now, "halvings": policy.halvings}
        params |= {f"before_{rule[0]}": "" if s is None else _back(now, s) for rule, s in rules}
        # A memory is counted once, by the first rule that it falls under, as a sweep would move it.
        cases = " ".join(
            f"WHEN {due.replace(':before', f':before_{event}')} THEN '{event}'"
            for (event, _, due), _ in rules
        )
        with self._db.read() as conn:
            rows = conn.execute(f"SELECT CASE {cases} END AS why, count(*) FROM cube c GROUP BY 1", params)
            counts = {event: count for event, count in rows if event is not None}
            (records,) = conn.execute(
                f"SELECT count(*) FROM kv_artifact WHERE {_OLD_KV}", (_back(now, policy.old_kv_s),)
            ).fetchone()
        names = ("expired", "faded", "idle", "forgotten")
        return Swept(**{name: counts.get(name, 0) for name in names}, kv_records=records)

    def _sweep(
        self, event: str, target: LifecycleState, due: str, seconds: float | None, policy: SweepPolicy
    ) -> int:
        moved = 0
        while True:
            refs: list[BlobRef] = []
            with self._change() as (conn, now):
                cubes = _due(conn, due, now, seconds, policy)
                for cube in cubes:
                    refs += move(conn, cube.owner, cube, event, target, now)
            self._remove(refs)
            moved += len(cubes)
            if len(cubes) < BATCH:
                return moved

    def _drop_old_kv(self, seconds: float) -> int:
        with self._change() as (conn, now):
            key = (_back(now, seconds),)
            rows = conn.execute(
                f"SELECT DISTINCT sha256, size, checksum FROM kv_artifact WHERE {_OLD_KV}", key
            ).fetchall()
            dropped = conn.execute(f"DELETE FROM kv_artifact WHERE {_OLD_KV}", key).rowcount
            if dropped:
                append_audit(conn, now, {"event": "old_kv_dropped", "records": dropped})
        self._remove(BlobRef(*row) for row in rows)
        return dropped


def _due(
    conn: sqlite3.Connection, due: str, now: str, seconds: float | None, policy: SweepPolicy
) -> list[MemCube]:
    rows = conn.execute(
        f"{SELECT_CUBE} WHERE {due} ORDER BY c.id LIMIT :batch",
        {
            "now": now,
            "before": None if seconds is None else _back(now, seconds),
            "halvings": policy.halvings,
            "batch": BATCH,
        },
    ).fetchall()
    return [cube_of(row) for row in rows]


def _back(now: str, seconds: float) -> str:
    try:
        return time_to_text(time_from_text(now) - timedelta(seconds=seconds))
    except OverflowError:  # before the year 1: nothing is as old
        return ""
