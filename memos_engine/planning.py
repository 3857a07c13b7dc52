"""From stored KV to a plan with its records: the scheduler decides, the records are read, and one that turns
out to be damaged is planned around."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from memos_engine.activation import ANCHORED, ActivationMemory, StoredKV
from memos_engine.decoder.record import KVRecord
from memos_engine.errors import PayloadError
from memos_engine.memory.operator import Candidate
from memos_engine.memory.plan import KVAvailability, Plan, PlanInput, PlanRequest
from memos_engine.memory.scheduler import MemScheduler


def plan_input(found: Candidate, tokens: int, stored: StoredKV, exact: bool) -> PlanInput:
    """A candidate of `tokens` tokens for the scheduler. exact: slot 0 stands right behind the anchor."""
    kv = KVAvailability(
        bool(stored.records),
        tokens=tokens if stored.records else 0,
        exact_in_slot0=exact and ANCHORED in stored.records,
        reason=stored.reason,
    )
    return PlanInput(found.cube.id, found.score, tokens, kv, found.relevance)


def plan_with_records(
    scheduler: MemScheduler,
    activation: ActivationMemory | None,
    inputs: Sequence[PlanInput],
    request: PlanRequest,
    stored: dict[str, StoredKV],
) -> tuple[Plan, dict[str, KVRecord], float]:
    """The plan, the record of each memory that enters as KV, and the milliseconds that reading them took.

    What turns out to be damaged goes from `stored`.
    """
    candidates, spent = list(inputs), 0.0
    while True:
        plan = scheduler.plan(candidates, request)
        start = time.perf_counter()
        records: dict[str, KVRecord] = {}
        refused = None
        for segment in plan.segments:
            if segment.form != "kv" or activation is None:
                continue
            here = next(i for i, one in enumerate(candidates) if one.cube_id == segment.cube_id)
            first = segment.slot == 0 and candidates[here].kv.exact_in_slot0
            form = stored[segment.cube_id].form_for(first)
            try:
                records[segment.cube_id] = activation.load(stored[segment.cube_id], form)
            except PayloadError as error:
                refused = here, form, f"its stored KV was refused ({error.reason}): {error}"
                break
        spent += (time.perf_counter() - start) * 1e3
        if refused is None:
            return plan, records, spent
        here, form, why = refused
        one = candidates[here]
        left = {name: record for name, record in stored[one.cube_id].records.items() if name != form}
        stored[one.cube_id] = again = StoredKV(left, why)
        kv = replace(one.kv, available=bool(left), exact_in_slot0=one.kv.exact_in_slot0 and ANCHORED in left)
        candidates[here] = replace(one, kv=replace(kv, tokens=kv.tokens * bool(left), reason=again.reason))
