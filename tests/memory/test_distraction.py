"""What a memory's tokens take from the others' worth, with a budget and without."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.memory.arrange import burdens
from memos_engine.memory.costs import Frame
from memos_engine.memory.need import DISTRACTION
from memos_engine.memory.plan import KnownPrefix, PlanInput
from memos_engine.memory.quality import sketch
from memos_engine.memory.scheduler import MemScheduler
from tests.memory.test_costs import TABLE
from tests.memory.test_scheduler_budget import forms, memory, request

SCHEDULER = MemScheduler(TABLE)
BUDGETS = [None, 5000.0]


def needed(name: str, need: float, tokens: int) -> PlanInput:
    return memory(name, need, tokens, need=need)


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_would_distract_stays_out_and_says_so(budget: float | None) -> None:
    heavy = DISTRACTION * 0.4 * 0.8  # of 400 tokens beside a need of .8
    sought, short, long = needed("a", 0.8, 200), needed("b", heavy * 0.9, 30), needed("c", heavy * 0.8, 400)
    plan = SCHEDULER.plan([sought, short, long], request(budget))
    assert set(forms(plan)) == {"a", "b"}
    assert [(one.cube_id, "distract" in one.reason) for one in plan.skipped] == [("c", True)]
    assert plan.quality == pytest.approx(1.0, abs=0.05)
    all_in = MemScheduler(TABLE, distraction=0.0).plan([sought, short, long], request(budget))
    assert set(forms(all_in)) == {"a", "b", "c"}


@pytest.mark.parametrize("budget", BUDGETS)
def test_alone_a_memory_distracts_from_nothing(budget: float | None) -> None:
    assert set(forms(SCHEDULER.plan([needed("a", 0.01, 900)], request(budget)))) == {"a"}


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_said_already_distracts_too(budget: float | None) -> None:
    said = sketch(" ".join(f"word{i}" for i in range(150)))
    pair = [memory(name, 0.9, 200, need=0.5, sketch=said) for name in "ab"]
    plan = SCHEDULER.plan(pair, request(budget))
    assert len(plan.segments) == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 900)), max_size=12), st.integers(0, 12))
def test_a_burden_is_a_share_of_what_the_others_are_worth(rows: list[tuple[float, int]], most: int) -> None:
    needs, tokens = np.asarray(rows, np.float64).reshape(-1, 2).T
    cost = burdens(needs, tokens, most, 0.5)
    top = sorted(range(len(rows)), key=lambda place: -needs[place])[:most]
    for i in range(len(rows)):
        others = sum(needs[place] for place in top if place != i)
        assert cost[i] == pytest.approx(0.5 * tokens[i] / 1e3 * min(1.0, others), abs=1e-9)


def test_a_reason_prices_each_form() -> None:
    """A spliced token costs something, and less than a computed one."""
    some = [needed(f"m{i}", 0.6, 300) for i in range(60)]
    asked = request(90.0, max_memories=60, max_memory_tokens=40_000)
    plan = MemScheduler(TABLE, distraction=0.0).plan(some, asked)
    said = [re.search(r"about (\d+) ms as text, (\d+) ms as KV", one.reason) for one in plan.skipped]
    assert said
    assert all(one is not None and 0 < int(one[2]) < int(one[1]) for one in said)


def test_a_busy_engine_plans_though_every_way_distracts() -> None:
    """With KV the anchor comes from a record, so that a memory may fit where the bare query does not."""
    frame = Frame(head=31, head_rows=31, head_rows_kv=0, tail=20, busy=1.0)
    some = [needed("a", 0.01, 40), needed("b", 0.9, 3900)]
    known = (KnownPrefix(("a",), 40),)
    for budget in range(20, 60):
        plan = SCHEDULER.plan(some, request(float(budget), frame=frame, known=known, tolerance=0.5))
        assert plan.feasible or not plan.segments
