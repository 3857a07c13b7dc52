"""The budget bench on a tiny model, its simulation, the need bench on two small dialogues, their drawings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from memos_engine.bench import budget, budget_bed, need, planner, report, suite
from memos_engine.bench.budget_policies import OURS, POLICIES
from memos_engine.bench.options import Options
from memos_engine.bench.report import tables
from memos_engine.bench.report.figures_budget import budget as drawn
from memos_engine.bench.report.plots import available, draw
from memos_engine.bench.xquad import DatasetError

from memos_engine.config import ConfigError
from memos_engine.interfaces import cli_bench
from memos_engine.memory.embed import HashingEmbedder
from tests.bench.test_retrieval_bench import _dialogue

PROMOTED = {"system": "lru", "workload": "mixed", "ttft_ms_mean": 2.0, "built_per_1000": 1.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(tiny_folder, data):
    options = Options(
        model=str(tiny_folder), dtype="float32", threads=1, data=data, n=6, quick=True,
        budgets=(0.01, 60_000.0),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_bed, "default_embedder", lambda: HashingEmbedder(64))
        return budget.run(options)


def test_a_row_for_each_policy_and_budget(measured):
    (bare,) = [row for row in measured["rows"] if "budget_ms" not in row]
    assert bare["policy"] == "bare query"
    rows = [row for row in measured["rows"] if "budget_ms" in row]
    names = [OURS, *(policy.name for policy in POLICIES)]
    assert [(row["budget_ms"], row["policy"]) for row in rows] == [
        (ms, name) for ms in (0.01, 60_000.0) for name in names
    ]
    for row in rows:
        assert row["scope"] == "request"
        assert row["requests"] == 6
        assert 0 <= row["met_share"] <= 1
        assert row["kl_low"] <= row["kl_mean"] <= row["kl_high"]
        assert 0 <= row["answer_f1"] <= 1
        assert row["judged"] == 6


def test_what_cannot_be_kept_is_excluded_and_what_can_is_kept(measured):
    rows = {(row["budget_ms"], row["policy"]): row for row in measured["rows"] if "budget_ms" in row}
    hopeless, ample = rows[0.01, OURS], rows[60_000.0, OURS]
    assert (hopeless["excluded_share"], hopeless["met_share"], hopeless["memories_mean"]) == (1.0, 0.0, 0.0)
    assert hopeless["quality"] == pytest.approx(0.0, abs=1e-3)  # a prompt without memories
    assert (ample["excluded_share"], ample["met_share"]) == (0.0, 1.0)
    assert ample["memories_mean"] > 0  # hashed words seldom reach min_score
    assert ample["quality"] == pytest.approx(1.0, abs=1e-3)
    assert ample["kl_mean"] == pytest.approx(0.0, abs=1e-3)
    assert {row["kv_share"] for (ms, _), row in rows.items() if ms == 0.01} == {0.0}


def test_differences_are_ours_less_each_policys(measured):
    assert [one["name"] for one in measured["ratios"][:3]] == [
        f"{what}: ours - {POLICIES[0].name}" for what in ("kl", "gold_kl", "f1")
    ]
    assert len(measured["ratios"]) == 2 * 3 * len(POLICIES)
    assert all(one["low"] <= one["value"] <= one["high"] for one in measured["ratios"])


def test_the_report_and_the_terminal_show_it(measured):
    page, _ = report.build([measured])
    assert "Answers within a time" in page
    assert "Time kept, time foreseen" in page
    shown = [c.text for c in tables.listing(cli_bench._narrow(measured)).head]
    assert shown[:2] == ["policy", "budget, ms"]
    assert "error of the forecast, P50" in shown


def test_it_is_drawn_where_there_are_two_budgets(measured):
    drawings = drawn(measured["rows"])
    assert [one.name for one in drawings] == ["budget-quality", "budget-kept"]
    assert OURS in drawings[0].alt
    if available():
        assert all(one.png.startswith(b"\x89PNG") for one in draw(drawings))
    assert drawn([row for row in measured["rows"] if row.get("budget_ms") == 0.01]) == []
    assert drawn([]) == []


def test_what_it_cannot_measure_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="on the CPU"):
        budget.run(Options(model=str(tiny_folder), device="cuda"))
    with pytest.raises(DatasetError):
        budget.run(Options(model=str(tiny_folder), data=tmp_path))


# -- in simulated time ---------------------------------------------------------------------------


def test_the_simulation_is_repeatable_and_has_a_place_in_the_report(tmp_path, monkeypatch):
    from memos_engine.bench import budget_simulated

    monkeypatch.setattr(budget_simulated, "promotion_rows", lambda **_: [PROMOTED])
    monkeypatch.setattr(budget_simulated, "LOADS", (0.6, 1.2))
    options = Options(simulate=True, quick=True, n=60, cubes=(1000,), out=tmp_path)
    document = budget.run(options)
    assert (document["bench"], document["units"]) == (
        "budget-simulated",
        ["load 0.6", "load 1.2", "promotion"],
    )
    rows = [row for row in document["rows"] if "load" in row]
    assert len(rows) == 8
    assert {row["admission"] for row in rows} == {"slack", "fifo"}
    assert all(row["requests"] > 0 and row["cubes"] == 1000 and 0 <= row["met_share"] <= 1 for row in rows)
    again = budget.run(Options(simulate=True, quick=True, n=60, cubes=(1000,)))
    assert again["rows"] == document["rows"]
    (found,) = suite.documents_in(tmp_path)
    assert found["rows"] == document["rows"]
    page, _ = report.build([found])
    assert "Answers within a time, simulated" in page
    assert "Value against LRU" in page or not available()
    assert tables.listing(cli_bench._narrow(document)).head[0].text == "policy"


# -- how likely a memory is needed ---------------------------------------------------------------


def test_need_is_fitted_on_one_dialogue_and_scored_on_the_other(tmp_path: Path, monkeypatch):
    (tmp_path / "locomo").mkdir()
    path = tmp_path / "locomo" / "locomo10.json"
    path.write_text(json.dumps([_dialogue("Anna"), _dialogue("Ben")]))
    monkeypatch.setattr(need, "default_embedder", lambda: HashingEmbedder(64))
    document = need.run(Options(data=tmp_path))
    assert [(row["model"], row["part"]) for row in document["rows"]] == [
        (name, part)
        for name in ("fitted here", "as shipped")
        for part in ("fitted on", "held out")
        for _ in need.LENGTHS
    ]
    for row in document["rows"]:
        assert row["questions"] == 3
        assert 0 < row["base_rate"] <= 1
        assert 0 <= row["calibration_error"] <= 1
        assert len(row["coefficients"]) == 6
    fitted = document["rows"][0]
    assert fitted["log_loss"] < fitted["base_log_loss"]
    assert "need" in suite.BENCHES
    assert "Which memories are needed" in report.build([document])[0]
    assert "log loss, nats" in [c.text for c in tables.listing(document).head]
    path.write_text(json.dumps([_dialogue("Anna")]))
    with pytest.raises(DatasetError, match="two"):
        need.run(Options(data=tmp_path))


def test_the_planner_is_timed_by_number_of_candidates(tiny_folder, monkeypatch):
    monkeypatch.setattr(planner, "default_embedder", lambda: HashingEmbedder(64))
    monkeypatch.setattr(planner, "REPEATS", 6)
    rows = planner.run(Options(model=str(tiny_folder), dtype="float32", threads=1))["rows"]
    assert [row["candidates"] for row in rows] == [8, 16, 64]
    assert all(0 <= row["gap_p50"] <= row["gap_p95"] for row in rows)
