from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError
from memos_engine.memory.costs import CostTable, Frame, Load, Pricer, default_table, stages
from memos_engine.memory.residuals import Residuals

TABLE = CostTable(
    "machine",
    forward=((1, 10.0), (64, 40.0), (65, 60.0), (1024, 500.0)),
    pairs_ms=50.0,
    splice=(0.5, 0.1, 2.0),
    fetch=(0.3, 2.0),
    probe_ms=100.0,
    select_ms=1.0,
    retrieve_ms=8.0,
    plan_ms=3.0,
    machine={"cores": 2},
)


def test_a_table_survives_its_file() -> None:
    assert CostTable.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", json.dumps({"version": 99}), TABLE.to_json().replace("50.0", "NaN"),
     TABLE.to_json().replace("50.0", "-1.0"), TABLE.to_json().replace('"key"', '"other"')],
)  # fmt: skip
def test_what_is_no_table_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(MemoryInputError):
        CostTable.from_json(text)


def test_forwards_lie_on_the_measured_curve() -> None:
    for rows, ms in TABLE.forward:
        assert TABLE.rows_ms(float(rows)) == pytest.approx(ms)
    assert TABLE.rows_ms(0.0) == 0
    assert TABLE.rows_ms(2048.0) > TABLE.rows_ms(1024.0)


@given(st.floats(1, 4000), st.floats(1, 9000))
def test_the_line_is_nowhere_above_the_curve(touch: float, rows: float) -> None:
    slope, fixed = TABLE.line(touch)
    assert slope * rows + fixed <= float(TABLE.rows_ms(rows)) + 1e-6


@given(
    st.integers(0, 900), st.integers(0, 900), st.integers(0, 900), st.integers(0, 8), st.floats(0, 60),
    st.integers(1, 64),
)  # fmt: skip
def test_more_to_do_never_takes_less(
    text: int, kv: int, again: int, records: int, mib: float, tail: int
) -> None:
    price = Pricer(TABLE, Frame(31, 31, 31, tail), promise=1.2)
    again = min(again, kv)
    base = float(price(Load(text, 0, kv, again, records, records, mib)))
    assert float(price(Load(text + 10, 0, kv, again, records, records, mib))) > base
    assert float(price(Load(text, 0, kv + 10, again, records, records, mib))) > base
    assert float(price(Load(text, 0, kv, again, records, records, mib + 1))) > base


def test_the_stages_of_a_splice() -> None:
    parts = stages(
        TABLE,
        Frame(head=31, head_rows=31, tail=20),
        Load(kv=500.0, records=3.0, disk_records=1.0, disk_mib=4.0),
    )
    assert parts["fetch"] == pytest.approx(0.3 + 4 * 2.0)
    assert parts["splice"] == pytest.approx(0.5 + 3 * 0.1 + 531 * 0.002)
    assert parts["probe"] == 0
    assert parts["forward"] == pytest.approx(float(TABLE.rows_ms(20.0)) + 20 * (531 + 10) * 50e-6)
    probed = stages(TABLE, Frame(31, 31, 0, 20), Load(kv=500.0, again=50.0, records=3.0))
    assert probed["probe"] > parts["forward"]
    assert probed["forward"] > parts["forward"]


def test_a_guess_says_that_it_is_one() -> None:
    table = default_table()
    assert not table.calibrated
    assert CostTable.from_json(table.to_json()) == table


# -- residuals -----------------------------------------------------------------------------------------


def learnt(ratios: list[float]) -> Residuals:
    residuals = Residuals(0.1)
    for ratio in ratios:
        residuals.observe({"forward": 10.0}, {"forward": 10.0 * ratio})
        residuals.promised(10.0, 10.0 * ratio)
    return residuals


def test_factors_follow_what_is_measured() -> None:
    assert learnt([]).factors() == {}
    assert learnt([2.0] * 60).factors()["forward"] == pytest.approx(2.0, rel=0.05)
    assert 1.0 < learnt([2.0]).factors()["forward"] < 1.5  # one says little


def test_a_request_that_stalled_changes_nothing() -> None:
    rng = random.Random(0)
    usual = [rng.lognormvariate(0, 0.05) for _ in range(200)]
    calm = learnt(usual)
    stalled = learnt([*usual[:100], 400.0, *usual[100:], 50.0])
    assert stalled.factors()["forward"] == pytest.approx(calm.factors()["forward"], rel=0.02)
    assert stalled.quantile(0.97) == pytest.approx(calm.quantile(0.97), rel=0.03)
    assert learnt([*usual, *[5.0] * 40]).quantile(0.97) > 2.9  # many that stall are how the machine is


@pytest.mark.parametrize("bad", [math.nan, math.inf, -5.0, 0.0, 1e300])
def test_a_clock_that_jumped_is_left_out(bad: float) -> None:
    residuals = learnt([1.0] * 50)
    before = residuals.factors()["forward"], residuals.quantile(0.97)
    for _ in range(50):
        residuals.observe({"forward": 10.0, "splice": bad}, {"forward": bad, "splice": 1.0})
        residuals.promised(10.0, bad)
        residuals.promised(bad, 10.0)
    assert (residuals.factors()["forward"], residuals.quantile(0.97)) == before


def test_quantiles_cover_what_they_say() -> None:
    rng = np.random.default_rng(1)
    residuals = learnt(list(np.exp(rng.normal(0, 0.2, 256))))
    fresh = np.exp(rng.normal(0, 0.2, 4000))
    for share in (0.5, 0.95, 0.97):
        assert abs(float((fresh <= residuals.quantile(share)).mean()) - share) < 0.04


def test_a_stage_that_was_left_out_is_tried_again() -> None:
    residuals = Residuals()
    for _ in range(64):
        residuals.observe({"retrieve": 8.0}, {"retrieve": 80.0})
    slow = residuals.factors()["retrieve"]
    for _ in range(96):
        residuals.relax("retrieve")
    assert slow > 5
    assert residuals.factors()["retrieve"] < 2
