"""Background jobs in the store: queued once, leased, tried again, cancelled; they outlive the process.

A worker holds a job for the time of its lease and renews it while it works. Where it dies, the lease ends and
another worker takes the job: what a job does must therefore be right when it is done twice. Nothing of a
memory's text is in a job.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any

from memos_engine.errors import ConflictError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import time_from_text, time_to_text, validate_label
from memos_engine.memory.governance import Principal
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_rows import append_audit, caller, find, principal_id

LIVE_STATES = ("waiting", "running")
STATES = (*LIVE_STATES, "done", "failed", "cancelled")
MOST_ATTEMPTS = 5
LEASE_S = 60.0
RETRY_S = 5.0  # before the second attempt; doubled for each further one
LONGEST_RETRY_S = 3600.0
_REASON = 300  # letters
_SELECT = (
    "SELECT j.id, p.tenant, p.user, j.kind, j.state, j.value, j.detail, j.attempts, j.most_attempts, "
    "j.progress, j.reason, j.cancel_asked, j.not_before, j.worker, j.created_at, j.updated_at, "
    "(SELECT json_group_array(x.cube_id) FROM (SELECT cube_id FROM job_cube WHERE job_id = j.id ORDER BY "
    "place) x) FROM job j JOIN principal p ON p.id = j.owner"
)


@dataclass(frozen=True, slots=True)
class Job:
    """value: milliseconds that it saves in a second; the most valuable is done first. detail: labels and
    numbers of its kind. progress: 0 to 1. reason: why it waits, failed or was cancelled. Times: ISO 8601."""

    id: str
    owner: Principal
    kind: str
    cube_ids: tuple[str, ...]
    state: str = "waiting"
    value: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0
    most_attempts: int = MOST_ATTEMPTS
    progress: float = 0.0
    reason: str = ""
    cancel_asked: bool = False
    not_before: str = ""
    worker: str | None = None
    created_at: str = ""
    updated_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        names = tuple(name for name in self.__dataclass_fields__ if name not in ("owner", "cube_ids"))
        data = {name: getattr(self, name) for name in names}
        return {**data, "owner": self.owner.to_dict(), "cube_ids": list(self.cube_ids)}


def _job_of(row: tuple[Any, ...]) -> Job:
    return Job(
        id=row[0], owner=Principal.from_key(row[1], row[2]), kind=row[3], cube_ids=tuple(json.loads(row[16])),
        state=row[4], value=row[5], detail=json.loads(row[6]), attempts=row[7], most_attempts=row[8],
        progress=row[9], reason=row[10], cancel_asked=bool(row[11]), not_before=row[12], worker=row[13],
        created_at=row[14], updated_at=row[15],
    )  # fmt: skip


def _seconds(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1e9):
        raise MemoryInputError(f"{name} must be a number of seconds from 0 to 1e9, not {value!r}.")
    return float(value)


def later(now: str, seconds: float) -> str:
    """A moment so many seconds after another one."""
    return time_to_text(time_from_text(now) + timedelta(seconds=seconds))


class JobRows(StoreBase):
    """The store's verbs for jobs. Owners queue, see and cancel their own; workers serve the whole store."""

    def queue_job(
        self,
        principal: Principal,
        kind: str,
        cube_ids: Sequence[str],
        *,
        value: float = 0.0,
        detail: Mapping[str, Any] | None = None,
        reason: str = "",
        most_attempts: int = MOST_ATTEMPTS,
    ) -> Job:
        """A job on memories that the caller sees. The same one that waits or runs already is returned, with
        the new value: queueing twice is fine.

        Raises `MemoryInputError`, and `MemoryNotFoundError` where one of the memories is not to be seen.
        """
        validate_label("the kind of a job", kind)
        if not cube_ids or len(set(cube_ids)) != len(cube_ids):
            raise MemoryInputError("a job names at least one memory, and each of them once.")
        if not math.isfinite(value):
            raise MemoryInputError(f"value={value}: must be a finite number.")
        if type(most_attempts) is not int or most_attempts < 1:
            raise MemoryInputError(f"most_attempts={most_attempts!r}: must be an integer of at least 1.")
        try:
            text = json.dumps(dict(detail or {}), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise MemoryInputError(f"detail must be JSON: {error}.") from error
        token = sha256(json.dumps([*cube_ids, text]).encode()).hexdigest()
        with self._change() as (conn, now):
            for cube_id in cube_ids:
                find(conn, principal, cube_id, now)
            owner = principal_id(conn, principal, now)
            row = conn.execute(
                "SELECT id FROM job WHERE owner = ? AND kind = ? AND token = ? AND state IN ('waiting', "
                "'running')",
                (owner, kind, token),
            ).fetchone()
            if row is not None:
                conn.execute("UPDATE job SET value = ?, updated_at = ? WHERE id = ?", (value, now, row[0]))
                return self._one(conn, row[0])
            job_id = self._ids.new(time_from_text(now))
            conn.execute(
                "INSERT INTO job (id, owner, kind, token, state, value, detail, most_attempts, not_before, "
                "reason, created_at, updated_at) VALUES (?, ?, ?, ?, 'waiting', ?, ?, ?, ?, ?, ?, ?)",
                (job_id, owner, kind, token, value, text, most_attempts, now, reason[:_REASON], now, now),
            )
            conn.executemany(
                "INSERT INTO job_cube VALUES (?, ?, ?)",
                [(job_id, place, cube_id) for place, cube_id in enumerate(cube_ids)],
            )
            event = {"event": "job_queued", "job": job_id, "kind": kind, "cube_ids": list(cube_ids)}
            append_audit(conn, now, {**event, **caller(principal)})
            return self._one(conn, job_id)

    def jobs(
        self,
        principal: Principal | None = None,
        states: Collection[str] = STATES,
        limit: int = 100,
    ) -> list[Job]:
        """The caller's jobs, those under way and then the most valuable first. None: everybody's, for the
        operator of the store."""
        with self._db.read() as conn:
            rows = conn.execute(
                f"{_SELECT} WHERE j.state IN (SELECT value FROM json_each(:states)) AND (:user IS NULL OR "
                "p.tenant = :tenant AND p.user = :user) ORDER BY j.state <> 'running', j.state <> 'waiting', "
                "j.value DESC, j.id LIMIT :limit",
                {
                    "states": json.dumps(list(states)),
                    "tenant": None if principal is None else principal.tenant,
                    "user": None if principal is None else principal.key,
                    "limit": limit,
                },
            ).fetchall()
        return [_job_of(row) for row in rows]

    def cancel_job(self, principal: Principal, job_id: str) -> Job:
        """Ends a job of the caller's: at once where it waits, at its next step where it runs; one that has
        ended stays as it is. Raises `MemoryNotFoundError` for any other one."""
        with self._change() as (conn, now):
            row = conn.execute(
                f"{_SELECT} WHERE j.id = ? AND p.tenant = ? AND p.user = ?",
                (job_id, principal.tenant, principal.key),
            ).fetchone()
            if row is None:
                raise MemoryNotFoundError(f"there is no job {job_id!r}; jobs() lists them.")
            state = row[4]
            if state == "waiting":
                self._end(conn, job_id, "cancelled", "cancelled by its owner", now)
            elif state == "running":
                conn.execute("UPDATE job SET cancel_asked = 1, updated_at = ? WHERE id = ?", (now, job_id))
            return self._one(conn, job_id)

    # -- for workers -----------------------------------------------------------------------------

    def claim_job(self, worker: str, kinds: Collection[str], lease_s: float = LEASE_S) -> Job | None:
        """The most valuable job of these kinds that is due, leased to this worker; None where there is none.
        A job whose lease has ended counts as due; one that has used its attempts up has failed."""
        validate_label("a worker's name", worker)
        _seconds("lease_s", lease_s)
        with self._change() as (conn, now):
            lost = conn.execute(
                "SELECT id, attempts, most_attempts, cancel_asked FROM job WHERE state = 'running' AND "
                "lease_until <= ?",
                (now,),
            ).fetchall()
            for job_id, attempts, most, cancelled in lost:
                if cancelled:
                    self._end(conn, job_id, "cancelled", "cancelled by its owner", now)
                elif attempts >= most:
                    self._end(conn, job_id, "failed", f"its worker was lost {attempts} times", now)
                else:
                    self._wait(conn, job_id, "its worker was lost", now, now)
            row = conn.execute(
                "SELECT id FROM job WHERE state = 'waiting' AND not_before <= ? AND kind IN (SELECT value "
                "FROM json_each(?)) ORDER BY value DESC, created_at, id LIMIT 1",
                (now, json.dumps(list(kinds))),
            ).fetchone()
            if row is None:
                return None
            conn.execute(
                "UPDATE job SET state = 'running', worker = ?, lease_until = ?, attempts = attempts + 1, "
                "progress = 0, reason = '', updated_at = ? WHERE id = ?",
                (worker, later(now, lease_s), now, row[0]),
            )
            return self._one(conn, row[0])

    def renew_job(self, job: Job, progress: float, lease_s: float = LEASE_S) -> bool:
        """Says that the worker goes on; returns whether it is to stop, because the job was cancelled. Raises
        `ConflictError` where the job is not this worker's any longer."""
        _seconds("lease_s", lease_s)
        with self._change() as (conn, now):
            self._mine(conn, job)
            conn.execute(
                "UPDATE job SET progress = ?, lease_until = ?, updated_at = ? WHERE id = ?",
                (min(max(float(progress), 0.0), 1.0), later(now, lease_s), now, job.id),
            )
            return self._one(conn, job.id).cancel_asked

    def finish_job(self, job: Job, reason: str = "") -> Job:
        """It is done. Raises `ConflictError` as `renew_job`."""
        with self._change() as (conn, now):
            self._mine(conn, job)
            self._end(conn, job.id, "done", reason, now)
            return self._one(conn, job.id)

    def stop_job(self, job: Job) -> Job:
        """The worker has stopped, as the owner asked. Raises `ConflictError` as `renew_job`."""
        with self._change() as (conn, now):
            self._mine(conn, job)
            self._end(conn, job.id, "cancelled", "cancelled by its owner", now)
            return self._one(conn, job.id)

    def fail_job(self, job: Job, reason: str, *, final: bool = False, retry_s: float = RETRY_S) -> Job:
        """An attempt failed: it is tried again later, each time twice as late, until its attempts are used up
        or the failure is `final`. Raises `ConflictError` as `renew_job`."""
        _seconds("retry_s", retry_s)
        with self._change() as (conn, now):
            held = self._mine(conn, job)
            if held.cancel_asked:
                self._end(conn, job.id, "cancelled", "cancelled by its owner", now)
            elif final or held.attempts >= held.most_attempts:
                self._end(conn, job.id, "failed", reason, now)
            else:
                pause = min(retry_s * 2.0 ** min(held.attempts - 1, 60), LONGEST_RETRY_S)
                self._wait(conn, job.id, reason, later(now, pause), now)
            return self._one(conn, job.id)

    def release_job(self, job: Job, reason: str, delay_s: float = 0.0) -> Job:
        """Back to where it was, through no fault of its own: the attempt does not count. Raises
        `ConflictError` as `renew_job`."""
        _seconds("delay_s", delay_s)
        with self._change() as (conn, now):
            held = self._mine(conn, job)
            if held.cancel_asked:
                self._end(conn, job.id, "cancelled", "cancelled by its owner", now)
            else:
                self._wait(conn, job.id, reason, later(now, delay_s), now)
                conn.execute("UPDATE job SET attempts = max(attempts - 1, 0) WHERE id = ?", (job.id,))
            return self._one(conn, job.id)

    def explain_waiting(self, kinds: Collection[str], reason: str) -> int:
        """Notes why jobs of these kinds wait; returns how many there are."""
        with self._change() as (conn, now):
            return conn.execute(
                "UPDATE job SET reason = ?, updated_at = ? WHERE state = 'waiting' AND kind IN (SELECT value "
                "FROM json_each(?)) AND reason <> ?",
                (reason[:_REASON], now, json.dumps(list(kinds)), reason[:_REASON]),
            ).rowcount

    @staticmethod
    def _one(conn: sqlite3.Connection, job_id: str) -> Job:
        return _job_of(conn.execute(f"{_SELECT} WHERE j.id = ?", (job_id,)).fetchone())

    def _mine(self, conn: sqlite3.Connection, job: Job) -> Job:
        row = conn.execute(
            f"{_SELECT} WHERE j.id = ? AND j.state = 'running' AND j.worker = ? AND j.attempts = ?",
            (job.id, job.worker, job.attempts),
        ).fetchone()
        if row is None:
            raise ConflictError(
                f"job {job.id!r} is not this worker's any longer: its lease ended, it was ended, or a memory "
                "of it was erased. Drop what was made for it."
            )
        return _job_of(row)

    @staticmethod
    def _end(conn: sqlite3.Connection, job_id: str, state: str, reason: str, now: str) -> None:
        conn.execute(
            "UPDATE job SET state = ?, reason = ?, worker = NULL, lease_until = NULL, updated_at = ?, "
            "progress = CASE ? WHEN 'done' THEN 1.0 ELSE progress END WHERE id = ?",
            (state, reason[:_REASON], now, state, job_id),
        )
        append_audit(conn, now, {"event": f"job_{state}", "job": job_id, "reason": reason[:_REASON]})

    @staticmethod
    def _wait(conn: sqlite3.Connection, job_id: str, reason: str, not_before: str, now: str) -> None:
        conn.execute(
            "UPDATE job SET state = 'waiting', reason = ?, not_before = ?, worker = NULL, lease_until = "
            "NULL, updated_at = ? WHERE id = ?",
            (reason[:_REASON], not_before, now, job_id),
        )
