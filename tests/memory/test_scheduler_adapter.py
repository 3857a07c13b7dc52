from __future__ import annotations

from dataclasses import replace

from memos_engine.memory.adapters import AdapterOption
from memos_engine.memory.plan import Plan, PlanRequest
from tests.memory.test_scheduler_budget import SCHEDULER, forms, memory, request

OPTION = AdapterOption(
    "lora", 1, "0" * 64, 0.9, 4 << 20, warm=True, policy="exclusive", covers=("a",), reason="made from a"
)
FOUND = [memory("a", 0.9, 300, held=False, need=0.6), memory("b", 0.5, 100, need=0.3)]


def plan(asked: PlanRequest, option: AdapterOption | None = OPTION) -> Plan:
    return SCHEDULER.plan(FOUND, replace(asked, adapter=option))


def test_an_adapter_stands_for_a_memory_that_there_is_no_time_for() -> None:
    without, bound = plan(request(60.0), None), plan(request(60.0))
    assert without.adapter is None
    assert forms(without) == forms(bound) == {"b": "kv"}
    assert bound.adapter == OPTION
    assert bound.quality > without.quality
    assert any("it is bound" in note for note in bound.notes)
    assert bound.report()["adapter"] == "lora"


def test_where_its_memories_fit_an_adapter_adds_nothing() -> None:
    for budget in (3000.0, None):
        alone = plan(request(budget))
        assert alone.adapter is None
        assert forms(alone).keys() == {"a", "b"}
        assert any("memories alone promise" in note for note in alone.notes)


def test_swapping_counts_against_the_budget() -> None:
    cold = replace(OPTION, warm=False, swap_ms=500.0)
    dear = plan(request(60.0), cold)
    assert dear.adapter is None
    assert any("memories alone promise more" in note for note in dear.notes)
    slow = plan(request(1200.0, max_memory_tokens=150), cold)  # the long one finds no room
    assert slow.adapter == cold
    assert slow.forecast is not None
    assert slow.forecast.stages["fetch"] >= 500.0


def test_an_adapter_that_changes_how_is_bound_beside_the_memories() -> None:
    how = replace(OPTION, policy="procedural", covers=())
    bound = plan(request(3000.0), how)
    assert bound.adapter == how
    assert forms(bound).keys() == {"a", "b"}


def test_nothing_found_binds_nothing() -> None:
    assert SCHEDULER.plan([], replace(request(100.0), adapter=OPTION)).adapter is None
