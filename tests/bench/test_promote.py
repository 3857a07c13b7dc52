"""The replayed workload is the same for the same seed; every policy keeps within its bytes; value wins."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memos_engine.bench.policies import POLICIES, Clairvoyant
from memos_engine.bench.promote import KV_BYTES, Costs, promotion_rows, replay
from memos_engine.bench.replay import Workload, events, memories
from memos_engine.bench.report.figures_promote import promotion
from memos_engine.bench.report.plots import available, draw


def test_a_seed_is_a_workload():
    load = Workload(shift_at=50)
    one, two = list(events(load, 3, 120)), list(events(load, 3, 120))
    assert one == two != list(events(load, 4, 120))
    assert memories(load, 3) == memories(load, 3)
    assert [e.time for e in one] == sorted(e.time for e in one)
    known = memories(load, 3)
    for event in one:
        assert {known[key].user for key in event.wanted} <= {event.user}
        assert len(set(event.wanted)) == len(event.wanted) <= load.wanted
    plain = list(events(Workload(), 3, 120))
    assert plain[:50] == one[:50]
    assert plain[50:] != one[50:]


wants = st.lists(st.tuples(st.integers(0, 15), st.integers(1, 30)), max_size=80)


@pytest.mark.parametrize("name", [*POLICIES, "clairvoyant"])
@settings(max_examples=25)
@given(todo=wants, most=st.integers(0, 60))
def test_no_policy_keeps_more_than_its_bytes(name, todo, most):
    sizes = dict(todo)
    made = Clairvoyant(most, [[key] for key, _ in todo]) if name == "clairvoyant" else POLICIES[name](most)
    kept: set[int] = set()
    for now, (key, _) in enumerate(todo):
        assert made.want(key, sizes[key], 1.0 * sizes[key], now) == (key in kept)
        kept = {k for k in sizes if made.holds(k)}
        assert sum(sizes[k] for k in kept) <= most


def test_times_are_the_sum_of_their_parts():
    load, costs = Workload(), Costs()
    known, asked = memories(load, 0), list(events(load, 0, 200))
    nothing = replay(known, asked, POLICIES["lru"](0), POLICIES["lru"](0), costs, 0)
    everything = replay(known, asked, POLICIES["lru"](1 << 50), POLICIES["lru"](1 << 50), costs, 0)
    assert nothing.saved == [0.0] * 200
    assert nothing.host_hits + nothing.disk_hits == 0
    assert everything.disk_hits == everything.again == 0
    assert sum(everything.ttft) + sum(everything.saved) == pytest.approx(sum(nothing.ttft))


def test_value_is_faster_than_lru_and_lfu_and_follows_the_shift():
    """On two seeds; the bench has twenty."""
    rows = {r["system"]: r for r in promotion_rows((300, 301), policies=("memos_engine", "lru", "lfu"))}
    ours = rows.pop("memos_engine")
    assert all(row["kv_bytes"] == KV_BYTES for row in rows.values())
    assert all(row["ttft_ms_mean"] > 1.05 * ours["ttft_ms_mean"] for row in rows.values())
    assert all(row["built_again_per_1000"] > 2 * ours["built_again_per_1000"] for row in rows.values())
    drawings = promotion([ours, *rows.values()])
    assert "LRU" in drawings[0].alt
    if available():
        assert draw(drawings)[0].png.startswith(b"\x89PNG")
