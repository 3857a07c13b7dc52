from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError
from memos_engine.memory.costs import Frame
from memos_engine.memory.plan import KnownPrefix, KVAvailability, Plan, PlanInput, PlanRequest
from memos_engine.memory.quality import overlaps, sketch
from memos_engine.memory.scheduler import MOST, MemScheduler
from tests.memory.test_costs import TABLE

SCHEDULER = MemScheduler(TABLE)
FRAME = Frame(head=31, head_rows=15, head_rows_kv=0, tail=20)
NONE = KVAvailability(False, reason="no KV stored yet")


def kv(tokens: int, tier: str = "host") -> KVAvailability:
    return KVAvailability(True, tokens, False, "", tier, tokens * 23_000)


def memory(name: str, score: float, tokens: int, held: bool = True, **more: object) -> PlanInput:
    return PlanInput(name, score, tokens, kv(tokens) if held else NONE, **more)  # type: ignore[arg-type]


def request(budget: float | None, **more: object) -> PlanRequest:
    options = {"form": "auto", "max_memory_tokens": 4000, "max_memories": 8, "frame": FRAME, **more}
    return PlanRequest(budget_ms=budget, **options)  # type: ignore[arg-type]


def forms(plan: Plan) -> dict[str, str]:
    return {segment.cube_id: segment.form for segment in plan.segments}


availabilities = st.builds(
    KVAvailability, st.booleans(), st.integers(1, 300), st.booleans(), st.just(""),
    st.sampled_from(["host", "disk"]), st.integers(0, 10_000_000),
)  # fmt: skip
inputs = st.lists(
    st.builds(
        PlanInput, st.uuids().map(str), st.floats(-1, 1), st.integers(1, 300), availabilities, st.none(),
        st.none() | st.floats(0, 1), st.sampled_from([None, "kv", "text"]),
    ),
    max_size=20,
    unique_by=lambda c: c.cube_id,
)  # fmt: skip


@settings(deadline=None)
@given(inputs, st.floats(5, 1500), st.integers(0, 2500), st.integers(0, 10), st.floats(0, 1))
def test_every_plan_keeps_its_limits(
    candidates: list[PlanInput], budget: float, room: int, most: int, busy: float
) -> None:
    asked = request(budget, max_memory_tokens=room, max_memories=most, frame=replace(FRAME, busy=busy))
    plan = SCHEDULER.plan(candidates, asked)
    seen = [s.cube_id for s in plan.segments] + [s.cube_id for s in plan.skipped]
    assert sorted(seen) == sorted(one.cube_id for one in candidates)
    assert plan.tokens <= room
    assert len(plan.segments) <= most
    assert plan.forecast is not None
    assert plan.feasible == (plan.forecast.promise_ms <= budget + 1e-6)
    assert 0 <= plan.quality <= 1 + 1e-9
    assert plan.gap >= 0
    by_id = {one.cube_id: one for one in candidates}
    for segment in plan.segments:
        assert segment.form == "text" or by_id[segment.cube_id].kv.available
        assert segment.reason
    assert all(one.reason for one in plan.skipped)
    json.dumps(plan.report())


@settings(deadline=None, max_examples=40)
@given(inputs)
def test_quality_rises_with_the_budget(candidates: list[PlanInput]) -> None:
    found = candidates[:6]  # few enough to be solved exactly
    qualities = [SCHEDULER.plan(found, request(budget)).quality for budget in (30, 60, 120, 300, 900, 3000)]
    assert all(a <= b + 1e-6 for a, b in pairwise(qualities))


def test_time_buys_exactness() -> None:
    found = [memory("a", 0.8, 150), memory("b", 0.7, 150), memory("c", 0.6, 150, held=False)]
    tight, more, all_ = (SCHEDULER.plan(found, request(budget)) for budget in (40, 200, 2000))
    assert forms(tight) == {"a": "kv", "b": "kv"}
    assert tight.recompute == 0
    assert "ms as text, no KV stored yet" in tight.skipped[0].reason
    assert forms(more)["c"] == "text"
    assert set(forms(all_).values()) == {"text"}
    assert all_.quality == pytest.approx(1.0)
    assert tight.quality < more.quality < all_.quality
    assert tight.rejected


def test_a_budget_that_cannot_be_met_is_stated() -> None:
    plan = SCHEDULER.plan([memory("a", 0.9, 100)], request(3.0))
    assert not plan.segments
    assert not plan.feasible
    assert "bare query cannot meet 3 ms" in plan.notes[0]
    assert plan.report()["feasible"] is False


@pytest.mark.parametrize("budget", [0.0, -5.0, float("nan"), float("inf"), True, "fast"])
def test_what_is_no_budget_is_refused(budget: object) -> None:
    with pytest.raises(MemoryInputError, match="ttft_budget_ms"):
        request(budget)  # type: ignore[arg-type]


def test_without_a_budget_the_fastest_form_that_keeps_the_quality() -> None:
    found = [memory("a", 0.8, 150), memory("b", 0.7, 150)]
    assert set(forms(SCHEDULER.plan(found, request(None))).values()) == {"kv"}
    exact = SCHEDULER.plan(found, request(None, tolerance=0.0))
    assert set(forms(exact).values()) == {"text"}
    assert "more quality than allowed" in exact.segments[0].reason
    some = SCHEDULER.plan(found, request(None, tolerance=0.006))
    assert 0 < some.recompute < 1


def test_a_thousand_candidates_are_cut_with_a_reason() -> None:
    found = [memory(f"m{i:04}", 0.9 - i / 2000, 50) for i in range(1000)]
    plan = SCHEDULER.plan(found, request(300.0))
    assert len(plan.skipped) + len(plan.segments) == 1000
    assert sum("most relevant candidates are weighed" in one.reason for one in plan.skipped) == 1000 - MOST


def test_the_same_said_twice_enters_once() -> None:
    text = "the harbour was built in nineteen hundred and four by the city of Bremen after a long quarrel"
    same = (
        sketch(text),
        sketch(text + " indeed"),
        sketch("an owl sleeps in the barn behind our old mill house"),
    )
    found = [
        memory("first", 0.8, 100, held=False, need=0.6, sketch=same[0]),
        memory("again", 0.7, 100, held=True, need=0.55, sketch=same[1]),
        memory("other", 0.6, 100, held=False, need=0.3, sketch=same[2]),
    ]
    assert overlaps(same)[0, 1] > 0.5
    assert overlaps(same)[0, 2] == 0
    plan = SCHEDULER.plan(found, request(130.0))
    assert "again" in forms(plan)  # its record makes it cheaper than the likelier one that says the same
    assert "other" in forms(plan)
    assert "first" not in forms(plan)


def test_text_that_is_in_pages_costs_nothing() -> None:
    found = [memory("a", 0.8, 300, held=False), memory("b", 0.7, 300, held=False)]
    without = SCHEDULER.plan(found, request(60.0))
    assert not without.segments
    known = SCHEDULER.plan(found, request(60.0, known=(KnownPrefix(("b", "a"), 600),)))
    assert [s.cube_id for s in known.segments] == ["b", "a"]
    assert "in pages" in known.segments[0].reason
    missing = SCHEDULER.plan(found, request(60.0, known=(KnownPrefix(("b", "x"), 600),)))
    assert not missing.segments


def test_a_busy_engine_gives_quality_for_speed() -> None:
    found = [memory("a", 0.8, 150), memory("b", 0.7, 150)]
    idle = SCHEDULER.plan(found, request(1000.0))
    busy = SCHEDULER.plan(found, request(1000.0, frame=replace(FRAME, busy=1.0)))
    assert set(forms(idle).values()) == {"text"}
    assert set(forms(busy).values()) == {"kv"}
    assert busy.forecast is not None
    assert idle.forecast is not None
    assert busy.forecast.total_ms < idle.forecast.total_ms / 2
    assert any("slow for a busy engine" in option.reason for option in busy.rejected)


def test_waiting_for_others_is_part_of_the_promise() -> None:
    found = [memory("a", 0.8, 150)]
    queued = SCHEDULER.plan(found, request(150.0, frame=replace(FRAME, queue_ms=90.0)))
    assert queued.forecast is not None
    assert queued.forecast.stages["queue"] == 90.0
    assert forms(queued) == {"a": "kv"}
    assert forms(SCHEDULER.plan(found, request(150.0))) == {"a": "text"}


def test_policies_tip_the_scale_only() -> None:
    a = memory("a", 0.8, 40)
    budget = request(2000.0)
    assert forms(SCHEDULER.plan([a], budget)) == {"a": "text"}
    session = [replace(a, prefers="text"), memory("b", 0.7, 300)]
    assert forms(SCHEDULER.plan(session, request(None))) == {"a": "text", "b": "kv"}


def test_a_table_of_guesses_is_named_in_the_plan() -> None:
    assert any("doctor --calibrate" in note for note in MemScheduler().plan([], request(100.0)).notes)
    assert not SCHEDULER.plan([], request(100.0)).notes
