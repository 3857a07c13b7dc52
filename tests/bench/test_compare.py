"""Comparing two results: verdicts with known truth, rows that do not meet, and what else differed."""

from __future__ import annotations

import copy
import json
import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memos_engine.bench.compare import compare, compare_files
from memos_engine.bench.compare_rows import matched, metrics, wilson
from memos_engine.bench.document import ReportFolderError
from memos_engine.bench.report import build

from memos_engine.config import ConfigError

documents = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("report_documents.py"))))


def noisy(middle: float, n: int = 21, seed: int = 0, spread: float = 0.03) -> list[float]:
    rng = random.Random(seed)
    return [middle * rng.lognormvariate(0, spread) for _ in range(n)]


def one(values, system="memos_engine", mode="splice", context=64, name="ttft_ms", **more):
    row = {"system": system, "mode": mode, "scope": "engine", "context": context, "dtype": "float32"}
    return row | documents.timed(values, name) | more


def verdicts(a, b, **options):
    found = compare(documents.document("ttft", a), documents.document("ttft", b), **options)
    return [row["verdict"] for row in found["rows"]]


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, "slower"), (0.6, "faster"), (1.0, "same"), (1.001, "same")]
)
def test_a_verdict_follows_the_truth(factor, verdict):
    a, b = noisy(100, 41, 1, 0.01), noisy(100 * factor, 41, 2, 0.01)
    assert verdicts([one(a)], [one(b)]) == [verdict]


def test_a_ratio_within_its_interval_of_the_tolerance_is_unclear():
    a, b = noisy(100, 21, 1, 0.2), noisy(108, 21, 2, 0.2)
    found = compare(documents.document("ttft", [one(a)]), documents.document("ttft", [one(b)]))
    (row,) = found["rows"]
    assert row["verdict"] == "unclear"
    assert row["low"] < 1.05 < row["high"]
    assert found["regressions"] == 0


def test_the_tolerance_decides():
    a, b = noisy(100, 41, 1, 0.01), noisy(110, 41, 2, 0.01)
    assert verdicts([one(a)], [one(b)]) == ["slower"]
    assert verdicts([one(a)], [one(b)], tolerance=0.3) == ["same"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(7, 40), st.floats(0.001, 0.05))
def test_a_sample_against_its_own_resample_is_never_far(seed, n, spread):
    a = noisy(100, n, seed, spread)
    b = random.Random(seed + 1).choices(a, k=n)
    assert not {"slower", "faster"} & set(verdicts([one(a)], [one(b)], tolerance=0.25))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.5, 20.0))
def test_swapping_the_sides_swaps_the_verdict(seed, factor):
    a, b = noisy(10, 21, seed), noisy(10 * factor, 21, seed + 1)
    assert verdicts([one(a)], [one(b)]) == ["slower"]
    assert verdicts([one(b)], [one(a)]) == ["faster"]


def test_a_document_against_itself_has_no_difference():
    for found in documents.all_documents():
        same = compare(found, copy.deepcopy(found))
        assert same["regressions"] == 0
        assert not {"slower", "faster", "worse", "better", "lost"} & {r["verdict"] for r in same["rows"]}
        assert not any("Different" in note for note in same["notes"])
        assert same["largest_ratio_difference"] == 0
        json.dumps(same, allow_nan=False)


def test_few_samples_give_no_verdict():
    found = compare(
        documents.document("ttft", [one([1.0] * 3)]), documents.document("ttft", [one([9.0] * 3)])
    )
    assert found["rows"][0]["verdict"] == "unclear"
    assert found["rows"][0]["ratio"] == 9.0
    assert any("too few samples" in note for note in found["notes"])


def test_where_more_is_better_less_is_a_regression():
    rows = [
        one([1.0], mode="decode", name="x") | {"throughput_tokens_per_s": 50.0, "met_share": 0.9, "n": 4000}
    ]
    worse = [{**rows[0], "throughput_tokens_per_s": 40.0, "met_share": 0.5}]
    found = compare(documents.document("load", rows), documents.document("load", worse))
    by = {row["metric"]: row for row in found["rows"]}
    assert by["met_share"]["verdict"] == "worse"
    assert by["met_share"]["better"] == "higher"
    assert by["throughput_tokens_per_s"]["verdict"] == "unclear"
    assert by["throughput_tokens_per_s"]["ratio"] == 0.8
    assert found["regressions"] == 1


def test_kl_is_compared_over_the_same_prompts_and_lower_is_better():
    kl = [0.01 * (1 + i % 5) for i in range(30)]
    mean = sum(kl) / len(kl)
    base = {"method": "memos_engine", "memories": 4, "recompute": 0.2, "n": 30}
    a = [{**base, "kl_mean": mean, "samples": kl}]
    b = [{**base, "kl_mean": 2 * mean, "samples": [2 * k for k in kl]}]
    found = compare(documents.document("quality", a), documents.document("quality", b))
    (row,) = found["rows"]
    assert row["verdict"] == "worse"
    assert row["low"] == pytest.approx(2)
    assert row["high"] == pytest.approx(2)
    assert compare(documents.document("quality", b), documents.document("quality", a))["regressions"] == 0


def test_kl_without_samples_uses_the_stated_intervals():
    base = {"method": "memos_engine", "memories": 4, "recompute": 0.2}
    a = [{**base, "kl_mean": 0.1, "kl_low": 0.09, "kl_high": 0.11}]
    b = [{**base, "kl_mean": 0.2, "kl_low": 0.19, "kl_high": 0.21}]
    (row,) = compare(documents.document("quality", a), documents.document("quality", b))["rows"]
    assert row["verdict"] == "worse"
    assert (row["low"], row["high"]) == (
        pytest.approx(0.19 / 0.11, abs=1e-3),
        pytest.approx(0.21 / 0.09, abs=1e-3),
    )


def test_rows_of_only_one_side_are_named():
    a, b = [one(noisy(1), context=64)], [one(noisy(1), context=128)]
    assert verdicts(a, b) == ["only in a", "only in b"]
    assert verdicts(a, []) == ["only in a"]
    assert verdicts([], b) == ["only in b"]


def test_a_row_that_now_crashes_is_lost_and_a_peer_that_is_gone_is_not_a_regression():
    a = [
        one(noisy(10)),
        one(noisy(10), system="vllm", mode="full"),
        one(noisy(10), system="vllm", context=128),
    ]
    b = [
        {
            "system": "memos_engine",
            "mode": "splice",
            "context": 64,
            "status": "crashed",
            "reason": "signal 11",
        },
        {"system": "vllm", "status": "absent", "reason": "no environment"},
    ]
    found = compare(documents.document("ttft", a), documents.document("ttft", b))
    assert [(r["verdict"], r["regression"]) for r in found["rows"]] == [
        ("lost", True), ("not measured", False), ("not measured", False),
    ]  # fmt: skip
    assert found["rows"][0]["why"] == "signal 11"
    back = compare(documents.document("ttft", b), documents.document("ttft", a))
    assert {r["verdict"] for r in back["rows"]} == {"new"}


def test_a_slower_peer_is_the_machine_and_no_regression():
    a = [one(noisy(10, seed=s), system=s_, mode="full") for s, s_ in enumerate(("transformers", "vllm"))]
    b = [one(noisy(20, seed=s), system=s_, mode="full") for s, s_ in enumerate(("transformers", "vllm"))]
    found = compare(documents.document("ttft", a), documents.document("ttft", b))
    assert {row["verdict"] for row in found["rows"]} == {"slower"}
    assert found["regressions"] == 0
    assert any("Other systems moved too, by a factor of 2.0" in note for note in found["notes"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 5.0))
def test_relative_takes_out_what_slows_every_system_of_a_round(seed, speed):
    rng = random.Random(seed)
    ref, own = noisy(100, 15, seed), noisy(20, 15, seed + 1)
    drift = [speed * rng.lognormvariate(0, 0.5) for _ in ref]
    a = [one(ref, "transformers", "full"), one(own)]
    b = [
        one([x * d for x, d in zip(ref, drift, strict=True)], "transformers", "full"),
        one([x * d for x, d in zip(own, drift, strict=True)]),
    ]
    found = compare(
        documents.document("ttft", a), documents.document("ttft", b), relative="transformers", tolerance=0.1
    )
    reference, row = found["rows"]
    assert reference["verdict"] == "reference"
    assert row["ratio"] == pytest.approx(1, abs=1e-9)
    assert row["a"] == pytest.approx(row["b"])
    assert row["verdict"] in ("same", "unclear")
    assert "over transformers" in row["metric"]


def test_relative_still_sees_what_is_ours():
    ref = noisy(100, 31, 1, 0.3)
    a = [one(ref, "transformers", "full"), one([x / 5 for x in ref])]
    b = [one([3 * x for x in ref], "transformers", "full"), one([3 * x / 4 for x in ref])]
    found = compare(documents.document("ttft", a), documents.document("ttft", b), relative="transformers")
    assert found["rows"][1]["verdict"] == "slower"
    assert found["rows"][1]["ratio"] == pytest.approx(1.25)
    assert found["regressions"] == 1


def test_relative_needs_that_system_and_rounds_that_pair():
    a = documents.document("ttft", [one(noisy(10))])
    with pytest.raises(ConfigError, match="transformers"):
        compare(a, a, relative="transformers")
    rows = [one(noisy(10)), one(noisy(10, 9), "transformers", "full")]
    found = compare(
        documents.document("ttft", rows), documents.document("ttft", rows), relative="transformers"
    )
    assert [r["verdict"] for r in found["rows"]] == ["no reference", "reference"]
    assert any("as many rounds" in note for note in found["notes"])


def test_open_loop_rows_meet_though_each_run_sets_its_own_rate():
    def row(rate, ms):
        return one(noisy(ms), traffic="open") | {
            "offered_per_s": rate,
            "objective_ms": 9 * rate,
            "unfinished": 2,
        }

    a, b = [row(1.111, 10), row(2.222, 20)], [row(1.2, 10), row(2.4, 40)]
    found = compare(documents.document("load", a), documents.document("load", b))
    assert [r["verdict"] for r in found["rows"] if r["metric"] == "ttft_ms_p50"] == ["same", "slower"]
    assert any("pair by their place" in note for note in found["notes"])


def test_columns_of_a_later_version_and_whole_numbers_as_floats_do_not_part_rows():
    a = [one(noisy(10))]
    b = [{**a[0], "context": 64.0, "device": "cpu", "notes": "two of nine", "unfinished": 3}]
    pairs, alone = matched(a, b)
    assert len(pairs) == 1
    assert not alone


def test_rows_that_nothing_tells_apart_pair_in_their_order():
    a = [one(noisy(10, seed=1)), one(noisy(30, seed=2))]
    assert verdicts(a, [dict(r) for r in a], tolerance=0.2) == ["same", "same"]


def test_ratios_are_compared_and_differences_are_left_out():
    ratio = {"name": "spliced / full", "context": 64, "value": 0.2, "low": 0.1, "high": 0.3}
    minus = {"name": "KL of random minus ours", "value": 0.001}
    a = documents.document("ttft", [], ratios=[ratio, minus])
    b = documents.document("ttft", [], ratios=[{**ratio, "value": 0.23}, {**minus, "value": 0.1}])
    found = compare(a, b)
    assert [r["difference"] for r in found["ratios"]] == [pytest.approx(0.15), None]
    assert found["largest_ratio_difference"] == pytest.approx(0.15)


def test_what_else_differed_is_said():
    a = documents.document("ttft", [])
    b = copy.deepcopy(a)
    b["machine"] |= {"torch": "2.14.0", "load_average": 2.5, "ops": {"linear": {"cpu": "reference"}}}
    b["config"] |= {"seed": 7}
    b |= {"commit": "fedcba987654-dirty", "complete": False}
    b["ceilings"] = {"read": {"value": 15.0, "unit": "GB/s"}, "pcie": {"value": 9.0}}
    said = " ".join(compare(a, b)["notes"])
    for words in (
        "Different torch: 2.13.0, then 2.14.0", "Different load: 1.00 before, 2.50 after",
        "Different kernels in use: linear.cpu", "seed unset, then 7",
        "Different commits: 0123456789ab, then fedcba987654-dirty", "Result b is incomplete",
        "Ceiling read.value moved by -25 %: 20, then 15", "Ceilings in only one of the two: pcie.value",
    ):  # fmt: skip
        assert words in said


def test_different_benches_and_odd_tolerances_are_refused():
    a, b = documents.document("ttft", []), documents.document("decode", [])
    with pytest.raises(ConfigError, match="different benches"):
        compare(a, b)
    with pytest.raises(ConfigError, match="tolerance"):
        compare(a, a, tolerance=1.5)


def test_files_are_compared_and_the_report_shows_it(tmp_path):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, scale in zip(paths, (1.0, 2.0), strict=True):
        path.write_text(json.dumps(documents.document("ttft", documents.ttft_rows(scale))))
    found = compare_files(paths[0], paths[1], tolerance=0.1)
    assert found["regressions"] == 10
    assert found["config"]["a"]["file"] == "before.json"
    assert found["command"] == "memos-engine bench compare before.json after.json --tolerance 0.1"
    html, _ = build([found])
    assert "Regressions" in html
    assert "slower" in html
    with pytest.raises(ReportFolderError, match="cannot be read"):
        compare_files(tmp_path / "none.json", paths[1])
    paths[0].write_text("[]")
    with pytest.raises(ReportFolderError, match="not a result document"):
        compare_files(paths[0], paths[1])


def test_whatever_the_rows_hold_there_is_a_result():
    odd = [
        {},
        {"system": None},
        {"samples": "x", "ttft_ms_p50": None},
        {"ttft_ms_p50": 0.0, "samples": [0, 0]},
    ]
    found = compare(documents.document("ttft", [*odd, 3]), documents.document("ttft", odd[::-1]))
    json.dumps(found, allow_nan=False)


def test_a_metric_from_nothing_has_no_ratio():
    base = {"method": "memos_engine", "memories": 4, "recompute": 1.0}
    a, b = [{**base, "kl_mean": 0.0}], [{**base, "kl_mean": 0.1}]
    (row,) = compare(documents.document("quality", a), documents.document("quality", b))["rows"]
    assert row["ratio"] is None
    assert row["verdict"] == "unclear"


def test_tails_ends_and_inverses_are_not_compared_twice():
    row = documents.timed([1.0] * 5, "ms_per_token") | {
        "tokens_per_s": 9.0,
        "share_of_limit": 0.5,
        "limit_ms": 3.0,
    }
    assert [m.name for m in metrics(row, row)] == ["ms_per_token_p50"]


@pytest.mark.parametrize("n", [1, 10, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_interval_of_a_share_holds_it_and_narrows(share, n):
    low, high = wilson(share, n)
    assert 0 < low <= share + 1e-6
    assert share <= high + 1e-6 <= 1 + 2e-6
    wide = wilson(share, n / 2)
    assert high - low <= wide[1] - wide[0]
