"""From candidates to a plan with its records: the scheduler decides, the records are read, and what turns out
to be damaged, or comes too late for the budget, is planned around."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from memos_engine.activation import ANCHORED, ActivationMemory, StoredKV
from memos_engine.decoder.record import KVRecord
from memos_engine.errors import PayloadError
from memos_engine.memory.operator import Candidate
from memos_engine.memory.plan import KVAvailability, Plan, PlanInput, PlanRequest
from memos_engine.memory.scheduler import MemScheduler

log = logging.getLogger("memos_engine")

REPLANS = 2  # times that a late record or a late hour changes a plan
READERS = 4  # threads that may wait for files at once; a stalled disk must not gather more
LEAST_PATIENCE_MS = 1.0
MARGIN = 1.2  # a read that is late goes on beside the forward, which then takes longer

Wanted = tuple[str, str]  # a memory and the form of its record
_reading = threading.Semaphore(READERS)


@dataclass(frozen=True)
class Since:
    """Milliseconds since a request's call."""

    start: float
    clock: Callable[[], float] = time.perf_counter

    def __call__(self) -> float:
        return max(0.0, (self.clock() - self.start) * 1e3)


@dataclass(frozen=True)
class Planned:
    """The plan, the record of each memory that enters as KV, and the milliseconds that reading these and
    deciding took."""

    plan: Plan
    records: dict[str, KVRecord]
    fetch_ms: float
    schedule_ms: float


def plan_input(
    found: Candidate, tokens: int, sketch: bytes, stored: StoredKV, exact: bool, prefers: str | None = None
) -> PlanInput:
    """A candidate of `tokens` tokens for the scheduler; sketch: `quality.sketch` of its text. exact: slot 0
    stands right behind the anchor."""
    kv = KVAvailability(
        bool(stored.records),
        tokens=tokens if stored.records else 0,
        exact_in_slot0=exact and ANCHORED in stored.records,
        reason=stored.reason,
        tier=stored.tier,
        nbytes=stored.nbytes,
    )
    return PlanInput(found.cube.id, found.score, tokens, kv, found.relevance, prefers=prefers, sketch=sketch)


def plan_with_records(
    scheduler: MemScheduler,
    activation: ActivationMemory | None,
    inputs: Sequence[PlanInput],
    request: PlanRequest,
    stored: dict[str, StoredKV],
    since: Since | None = None,
) -> Planned:
    """Plans, reads the records, and plans again where one cannot be had.

    What turns out to be damaged goes from `stored`. since: the request's clock, by which a budget is kept:
    a record that is not there when the rest would no longer fit stays out, and what is left is planned anew.
    """
    since = since or Since(time.perf_counter())
    candidates = {one.cube_id: one for one in inputs}
    got: dict[Wanted, KVRecord] = {}
    notes: list[str] = []
    spent, deciding, late = 0.0, 0.0, 0
    while True:
        begun = time.perf_counter()
        frame = replace(request.frame, spent_ms=since())
        plan = scheduler.plan(list(candidates.values()), replace(request, frame=frame))
        deciding += (time.perf_counter() - begun) * 1e3
        wanted = _wanted(plan, candidates, stored) if activation is not None else {}
        lacking = [key for key in wanted.values() if key not in got]
        start = time.perf_counter()
        failed = _fetch(activation, stored, lacking, got, _patience(plan, since)) if activation else {}
        spent += (time.perf_counter() - start) * 1e3
        for key, why in failed.items():
            candidates[key[0]] = _without(candidates[key[0]], stored, key[1], why)
        for one, _ in got:
            kv = candidates[one].kv
            candidates[one] = replace(candidates[one], kv=replace(kv, tier="host", nbytes=0))
        if any(why is None for why in failed.values()):
            late += 1
            notes.append("a record was not read in time; it was planned without")
        elif not failed and (late >= REPLANS or not _too_late(plan, since)):
            break
        elif not failed:
            late += 1
            notes.append("preparing took longer than planned; less goes in")
    records = {cube_id: got[key] for cube_id, key in wanted.items()}
    return Planned(replace(plan, notes=(*plan.notes, *dict.fromkeys(notes))), records, spent, deciding)


def _wanted(plan: Plan, candidates: dict[str, PlanInput], stored: dict[str, StoredKV]) -> dict[str, Wanted]:
    """By memory: the record that its segment needs."""
    out = {}
    for segment in plan.segments:
        if segment.form == "kv":
            first = segment.slot == 0 and candidates[segment.cube_id].kv.exact_in_slot0
            out[segment.cube_id] = (segment.cube_id, stored[segment.cube_id].form_for(first))
    return out


def _rest_ms(plan: Plan) -> float:
    """What is promised to take from the records on."""
    forecast = plan.forecast
    if forecast is None:
        return 0.0
    rest = sum(ms for name, ms in forecast.stages.items() if name != "fetch")
    fetch = forecast.stages.get("fetch", 0.0)
    spent = forecast.total_ms - rest - fetch
    return max(rest, forecast.promise_ms - spent - fetch * forecast.fetch_promise)


def _too_late(plan: Plan, since: Since) -> bool:
    return bool(plan.budget_ms is not None and plan.segments and since() + _rest_ms(plan) > plan.budget_ms)


def _patience(plan: Plan, since: Since) -> float | None:
    """Milliseconds that reading may take; None: as long as it takes."""
    if plan.budget_ms is None:
        return None
    return max(LEAST_PATIENCE_MS, plan.budget_ms - since() - MARGIN * _rest_ms(plan))


def _without(one: PlanInput, stored: dict[str, StoredKV], form: str, why: str | None) -> PlanInput:
    """A candidate after one of its records was refused; why None: after reading it took too long."""
    if why is None:
        kv = replace(one.kv, available=False, tokens=0, exact_in_slot0=False, reason=LATE)
        return replace(one, kv=kv)
    left = {name: record for name, record in stored[one.cube_id].records.items() if name != form}
    stored[one.cube_id] = StoredKV(
        left, why, tier=stored[one.cube_id].tier, nbytes=stored[one.cube_id].nbytes
    )
    exact = one.kv.exact_in_slot0 and ANCHORED in left
    kv = replace(
        one.kv, available=bool(left), tokens=one.kv.tokens * bool(left), exact_in_slot0=exact, reason=why
    )
    return replace(one, kv=kv)


LATE = "its stored KV was not read in time"
Failed = dict[Wanted, str | None]


def _fetch(
    activation: ActivationMemory,
    stored: dict[str, StoredKV],
    lacking: Sequence[Wanted],
    got: dict[Wanted, KVRecord],
    patience_ms: float | None,
) -> Failed:
    """Puts records into `got`; returns those that could not be had: why, or None where they are late."""
    failed: Failed = {}
    on_disk = []
    for key in lacking:
        record = activation.at_hand(stored[key[0]], key[1])
        if record is None:
            on_disk.append(key)
        else:
            got[key] = record
    if patience_ms is None:
        for key in on_disk:
            outcome = _read(activation, stored[key[0]], key[1])
            _sort_out(activation, stored, key, outcome, got, failed)
        return failed
    if not on_disk:
        return failed
    if not _reading.acquire(blocking=False):
        log.warning("memos_engine: %d reads of stored KV are stalled; memories go in as text.", READERS)
        return dict.fromkeys(on_disk)
    arrived: SimpleQueue[tuple[Wanted, KVRecord | PayloadError | OSError]] = SimpleQueue()
    wanted = [(key, stored[key[0]]) for key in on_disk]

    def read() -> None:
        try:
            for key, one in wanted:
                arrived.put((key, _read(activation, one, key[1])))
        finally:
            _reading.release()

    threading.Thread(target=read, name="memos-engine-fetch", daemon=True).start()
    until = time.perf_counter() + patience_ms / 1e3
    for _ in on_disk:
        try:
            key, outcome = arrived.get(timeout=max(0.0, until - time.perf_counter()))
        except Empty:
            break
        _sort_out(activation, stored, key, outcome, got, failed)
    return failed | {key: None for key in on_disk if key not in got and key not in failed}


def _read(activation: ActivationMemory, one: StoredKV, form: str) -> KVRecord | PayloadError | OSError:
    try:
        return activation.read(one, form)
    except (PayloadError, OSError) as error:
        return error


def _sort_out(
    activation: ActivationMemory,
    stored: dict[str, StoredKV],
    key: Wanted,
    outcome: KVRecord | PayloadError | OSError,
    got: dict[Wanted, KVRecord],
    failed: Failed,
) -> None:
    if isinstance(outcome, KVRecord):
        got[key] = outcome
    elif isinstance(outcome, PayloadError):
        activation.refuse(stored[key[0]], key[1], outcome)
        failed[key] = f"its stored KV was refused ({outcome.reason}): {outcome}"
    else:
        failed[key] = f"its stored KV could not be read: {outcome}"
