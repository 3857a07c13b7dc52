from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.memory.costs import CostTable, Frame, Pricer
from memos_engine.memory.items import KV, SKIP, TEXT, Items, Limits, loads, values
from memos_engine.memory.knapsack import search
from memos_engine.memory.relaxation import many

# A step between 64 and 65 rows, where another kernel takes over; dear first rows.
TABLE = CostTable(
    "test",
    forward=((1, 20.0), (16, 26.0), (64, 45.0), (65, 70.0), (256, 160.0), (1024, 640.0)),
    pairs_ms=40.0,
    splice=(0.6, 0.3, 4.0),
    fetch=(0.8, 1.0),
    probe_ms=60.0,
    select_ms=2.0,
    retrieve_ms=8.0,
    plan_ms=2.0,
)
SHARES = ((0.0, 0.98), (0.1, 0.99), (0.4, 0.998))


def made(seed: int, n: int, cached: int = 0) -> Items:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, 250, n).astype(np.float64)
    held = rng.random(n) < 0.6
    overlap = np.triu((rng.random((n, n)) < 0.05 / n) * 0.8, 1)
    return Items(
        need=np.sort(rng.random(n))[::-1].copy(),
        text=tokens,
        kv=tokens * held,
        exact=held & (rng.random(n) < 0.8),
        disk=held & (rng.random(n) < 0.3),
        mib=held * tokens * 0.02,
        text_worth=np.ones(n),
        kv_worth=np.ones(n) - 0.01 * (rng.random(n) < 0.2),
        overlap=overlap + overlap.T,
        burden=tokens / 1e3 * rng.choice([0.0, 0.5, 2.0]),
        cached=cached,
    )


def pricer(seed: int = 0) -> Pricer:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(0, 31))
    rows_kv = int(rng.integers(0, rows + 1)) if seed % 2 else rows
    frame = Frame(30, rows, rows_kv, tail=20, queue_ms=float(rng.integers(0, 20)))
    return Pricer(TABLE, frame, {"forward": 1.1, "splice": 0.9}, promise=1.15, plan_ms=1.0)


def brute(items: Items, price: Pricer, budget: float, room: int, most: int) -> float:
    """The best value of all choices, one by one."""
    best = -np.inf
    for forms in product((SKIP, TEXT, KV), repeat=len(items)):
        tokens = sum((items.text, items.kv)[form - 1][i] for i, form in enumerate(forms) if form)
        allowed = all(form == SKIP or (items.text, items.kv)[form - 1][i] for i, form in enumerate(forms))
        allowed &= all(form == TEXT for form in forms[: items.cached])
        if not allowed or tokens > room or sum(map(bool, forms)) > most:
            continue
        row = np.asarray([forms], np.int8)
        for share, quality in SHARES:
            load = loads(items, row, share)
            if share and not load.again[0]:  # type: ignore[index]
                continue
            if price(load)[0] <= budget:
                best = max(best, float(values(items, row, quality)[0]))
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(20, 900), st.integers(0, 600), st.integers(0, 5))
def test_few_candidates_are_chosen_best(seed: int, n: int, budget: float, room: int, most: int) -> None:
    items, price = made(seed, n, cached=seed % 2), pricer(seed)
    found, bound = search(items, SHARES, Limits(price, budget, room, most))
    truth = brute(items, price, budget, room, most)
    assert max((one.value for one in found), default=-np.inf) == pytest.approx(truth)
    assert all(one.ms <= budget for one in found)
    assert bound == pytest.approx(truth if np.isfinite(truth) else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(20, 900), st.integers(50, 2000))
def test_the_relaxation_never_promises_less_than_the_best(
    seed: int, n: int, budget: float, room: int
) -> None:
    """The way that many candidates go, on few ones: feasible, and its bound holds."""
    items, price = made(seed, n, cached=seed % 3 == 0), pricer(seed)
    truth = brute(items, price, budget, room, n)
    found, bound = many(items, SHARES, Limits(price, budget, room, n))
    for one in found:
        assert one.ms <= budget
        row = np.asarray([one.forms], np.int8)
        assert one.ms == pytest.approx(float(price(loads(items, row, one.share))[0]))
        quality = dict(SHARES)[one.share]
        assert one.value == pytest.approx(float(values(items, row, quality)[0]))
        assert one.value <= truth + 1e-9
    assert bound >= truth - 1e-9


def test_many_candidates_come_close_to_their_bound() -> None:
    gaps = []
    for seed in range(30):
        items, price = made(seed, 64), pricer(seed)
        for budget in (120, 300, 800):
            found, bound = search(items, SHARES, Limits(price, budget, 4000, 32))
            gaps.append(bound / max(one.value for one in found) - 1)
    assert np.median(gaps) < 0.1


@given(st.integers(0, 1000), st.floats(1, 3000))
def test_the_floor_is_never_above_the_price(seed: int, rows: float) -> None:
    items, price = made(seed, 6), pricer(seed)
    rng = np.random.default_rng(seed)
    forms = rng.integers(0, 3, (20, 6)).astype(np.int8)
    forms[(forms == KV) & (items.kv == 0)[None]] = SKIP
    slack = max(0.5, float((items.kv * items.exact).max()))
    for share, _ in SHARES:
        load = loads(items, forms, share)
        there = (np.asarray(load.again) > 0) | (share == 0)
        floor = price.floor(load, share, slack, rows)
        assert (floor <= price(load) + 1e-9)[there].all()


def test_a_dearer_share_is_taken_only_where_it_fits() -> None:
    items, price = made(3, 4), pricer(4)
    slow, _ = search(items, SHARES, Limits(price, 5000, 4000, 4))
    assert {one.share for one in slow} == {0.0, 0.1, 0.4}
    bare = float(price(loads(items, np.zeros((1, 4), np.int8), 0.0))[0])
    tight, _ = search(items, SHARES, Limits(price, bare, 4000, 4))
    assert [one.share for one in tight] == [0.0]
    assert tight[0].forms == (SKIP,) * 4
