from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError
from memos_engine.memory.plan import REQUEST_FORMS, KVAvailability, PlanInput, PlanRequest
from memos_engine.memory.scheduler import MemScheduler

PLAN = MemScheduler().plan
HELD = KVAvailability(True, tokens=10, exact_in_slot0=True)
NONE = KVAvailability(False, reason="another model's record")


def request(form: str = "auto", **options: object) -> PlanRequest:
    return PlanRequest(**{"form": form, "max_memory_tokens": 100, "max_memories": 8, **options})  # type: ignore[arg-type]


kv = st.builds(
    KVAvailability, st.booleans(), st.integers(0, 40), st.booleans(), st.sampled_from(["", "weights differ"])
)
candidates = st.lists(
    st.builds(PlanInput, st.uuids().map(str), st.floats(-1, 1), st.integers(0, 40), kv),
    max_size=12,
    unique_by=lambda c: c.cube_id,
)
requests = st.builds(
    PlanRequest,
    st.sampled_from(REQUEST_FORMS),
    st.integers(0, 120),
    st.integers(0, 10),
    st.none() | st.floats(-1, 1),
)


@given(candidates, requests, st.randoms())
def test_every_plan_is_sound(inputs: list[PlanInput], asked: PlanRequest, rng: random.Random) -> None:
    plan = PLAN(inputs, asked)
    by_id = {one.cube_id: one for one in inputs}
    seen = [s.cube_id for s in plan.segments] + [s.cube_id for s in plan.skipped]
    assert sorted(seen) == sorted(by_id)
    assert plan.tokens <= asked.max_memory_tokens
    assert len(plan.segments) <= asked.max_memories
    assert [s.slot for s in plan.segments] == list(range(len(plan.segments)))
    scores = [s.score for s in plan.segments]
    assert scores == sorted(scores, reverse=True)
    assert all(s.reason for s in (*plan.segments, *plan.skipped))
    for segment in plan.segments:
        one = by_id[segment.cube_id]
        assert (segment.form == "kv") == (asked.form in ("auto", "kv") and one.kv.available)
        assert segment.tokens == (one.kv.tokens if segment.form == "kv" else one.text_tokens)
        assert asked.min_score is None or one.score >= asked.min_score
    if asked.form == "none":
        assert not plan.segments
    rows = json.loads(json.dumps(plan.explain()))
    assert [row["cube_id"] for row in rows] == seen
    assert {row["form"] for row in rows} <= {"kv", "text", "skip"}
    rng.shuffle(inputs)
    assert PLAN(inputs, asked) == plan  # the order of candidates does not matter


def test_forms_and_reasons() -> None:
    a, b = PlanInput("a", 0.9, 12, HELD), PlanInput("b", 0.5, 7, NONE)
    first, second = PLAN([b, a], request()).segments
    assert (first.cube_id, first.form, first.tokens) == ("a", "kv", 10)
    assert "exact" in first.reason
    assert (second.form, second.tokens, second.reason) == ("text", 7, "another model's record")
    assert "KV was asked for" in PLAN([b], request("kv")).segments[0].reason
    assert [s.form for s in PLAN([a, b], request("text")).segments] == ["text", "text"]
    assert "exact" not in PLAN([a, PlanInput("c", 1.0, 1, HELD)], request()).segments[1].reason


def test_a_memory_too_long_leaves_room_for_a_shorter_one() -> None:
    long, short = PlanInput("long", 0.9, 90, NONE), PlanInput("short", 0.5, 10, NONE)
    plan = PLAN([long, short], request(max_memory_tokens=50))
    assert [s.cube_id for s in plan.segments] == ["short"]
    assert plan.skipped[0].reason == "it needs 90 tokens, 50 of 50 are left"


@pytest.mark.parametrize(
    "options",
    [
        {"form": "both"},
        {"recompute": 1.5},
        {"recompute": -0.1},
        {"recompute": float("nan")},
        {"max_memory_tokens": -1},
        {"max_memories": -1},
    ],
)
def test_impossible_requests_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(MemoryInputError):
        request(**options)  # type: ignore[arg-type]


def test_impossible_candidates_are_refused() -> None:
    good = PlanInput("a", 0.5, 1, NONE)
    for bad in ([good, good], [PlanInput("a", float("nan"), 1, NONE)], [PlanInput("a", 0.1, -1, NONE)]):
        with pytest.raises(MemoryInputError):
            PLAN(bad, request())
