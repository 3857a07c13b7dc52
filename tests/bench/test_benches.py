"""Each bench end to end on a tiny model: its documented rows, its refusals, its partial results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from memos_engine.bench import (
    attach,
    decode,
    kernels,
    load,
    paper_table5,
    report,
    roofline,
    suite,
    systems,
    ttft,
)
from memos_engine.bench.document import Document
from memos_engine.bench.limits import Ceilings, Limits
from memos_engine.bench.options import Options
from memos_engine.bench.peers.process import PeerError, PeerProcess, worker_path
from memos_engine.bench.systems import Arm, interleave
from memos_engine.bench.target import TooBigError, check_fits, open_target
from memos_engine.bench.workload import Workloads

from memos_engine.config import ConfigError
from memos_engine.decoder.spec import ModelSpec

FAST = Ceilings({"float32": 1e11, "bfloat16": 4e11}, read=3e10, copy=4e10, disk_read=1e9)


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda options: FAST)


def tiny(tiny_folder: Path, **more: object) -> Options:
    defaults = {"model": str(tiny_folder), "dtype": "float32", "contexts": (96,), "queries": (16,)}
    return Options(**{**defaults, "memories": (3,), "n": 2, "peers": (), **more})


def test_ttft_rows_and_ratios(tiny_folder):
    document = ttft.run(tiny(tiny_folder, peers=("transformers",)))
    again = [r for r in document["rows"] if r["mode"] == "splice" and r["recompute"] == 0.15]
    assert [r["n"] for r in again] == [2]
    rows = {(r["system"], r["mode"]): r for r in document["rows"] if r not in again}
    assert set(rows) == {
        *(("memos_engine", mode) for mode in ("full", "prefix", "splice", "query_only")),
        ("transformers", "full"),
        ("transformers", "prefix"),
    }
    keys = "scope reuse context query memories recompute dtype tier ttft_ms_p50 ttft_ms_p95 same_first_token"
    for row in rows.values():
        assert set(keys.split()) <= set(row)
        assert row["n"] == len(row["samples"]) == 2
        assert row["share_of_limit"] >= 0
    for exact in (("memos_engine", "prefix"), ("transformers", "full"), ("transformers", "prefix")):
        assert rows[exact]["same_first_token"] == 1.0
    names = {ratio["name"] for ratio in document["ratios"]}
    assert "spliced / own full prefill" in names
    assert "spliced / transformers exact prefix" in names
    assert document["complete"]
    assert any("window" in note for note in document["notes"])  # request scope does not fit this model


def test_an_order_of_its_own_for_every_round(tiny_folder):
    with open_target(tiny(tiny_folder)) as target:
        work = Workloads(target, 0).make(96, 16, 3)
    assert [len(span) for span in work.spans] == [32, 32, 32]
    assert len(work.query) == 16
    assert work.parts([2, 0, 1])[1] == list(work.spans[2])


def test_a_second_run_with_resume_measures_nothing_again(tiny_folder, tmp_path, monkeypatch):
    options = tiny(tiny_folder, contexts=(64, 96), out=tmp_path)
    first = ttft.run(options)
    data = json.loads((tmp_path / "ttft.json").read_text())
    data["units"], data["complete"] = data["units"][:1], False
    data["rows"] = [row for row in data["rows"] if row["context"] in (0, 64)][:5]
    (tmp_path / "ttft.json").write_text(json.dumps(data))
    again = ttft.run(tiny(tiny_folder, contexts=(64, 96), out=tmp_path, resume=True))
    assert again["rows"][:5] == first["rows"][:5]
    assert len(again["rows"]) == len(first["rows"])


def test_decode_rows(tiny_folder):
    document = decode.run(tiny(tiny_folder, batches=(1, 2), quick=True))
    assert [(r["system"], r["batch"]) for r in document["rows"]] == [("memos_engine", 1), ("memos_engine", 2)]
    assert all(r["ms_per_token_p50"] > 0 and r["tokens_per_s"] > 0 for r in document["rows"])


def test_kernels_rows():
    document = kernels.run(Options(random_weights="tiny", dtype="float32", contexts=(64,), n=2))
    ops = {row["op"] for row in document["rows"]}
    assert ops == {"paged_attention", "splice_kv", "append_kv", "linear", "rms_norm", "silu_mul"}
    assert all(row["us_p50"] > 0 and row["share_of_limit"] >= 0 for row in document["rows"])


def test_load_rows(monkeypatch):
    monkeypatch.setattr(load, "SECONDS", (0.6, 0.6))
    document = load.run(Options(random_weights="tiny", dtype="float32", quick=True))
    closed = [r for r in document["rows"] if r["traffic"] == "closed"]
    offered = [r for r in document["rows"] if r["traffic"] == "open"]
    assert {(r["clients"], r["mode"]) for r in closed} == {(c, m) for c in (1, 4) for m in load.MODES}
    assert len(offered) == 4
    for row in document["rows"]:
        assert row["ttft_ms_p50"] <= row["ttft_ms_p95"] <= row["ttft_ms_p99"] + 1e-6
        assert 0 <= row["met_share"] <= 1
        assert row["requests"] >= len(row["samples"])


def test_table_5_stands_beside_the_papers_cells():
    options = Options(random_weights="tiny", dtype="float32", contexts=(583,), queries=(167,), n=2)
    document = paper_table5.run(options)
    (row,) = document["rows"]
    assert row["paper_reduction"] == 0.713
    assert row["same_first_token"] == 1.0  # one memory behind the anchor is exact
    assert {"build_ms", "direct_ms", "ours_ms", "reduction", "break_even"} <= set(row)
    for cells in paper_table5.PAPER.values():
        for build, kv, direct, reduction in cells.values():
            assert 100 * (1 - kv / direct) == pytest.approx(reduction, abs=5.0)  # as rounded in print
            assert build > 0


def test_roofline_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "ROWS", (1, 32))
    document = roofline.run(Options(quick=True, out=tmp_path))
    ceilings = {row["ceiling"] for row in document["rows"]}
    assert ceilings == {"gemm", "read", "copy", "disk_read", "disk_write", "fsync"}
    assert all(row["value"] > 0 for row in document["rows"])
    assert Ceilings.from_public(document["ceilings"]).read > 0


# -- limits --------------------------------------------------------------------------------------


def test_limits_follow_their_formulas():
    with open_target(Options(random_weights="smollm2-135m")) as target:
        limits = Limits(target.spec, "bfloat16", FAST)
        assert target.weight_elements == pytest.approx(134.5e6, rel=0.01)
    weights = 2 * target.weight_elements
    assert limits.decode(0, 1) == pytest.approx(1e3 * weights / FAST.read, rel=0.01)
    assert limits.decode(1024, 1) > limits.decode(0, 1)
    full = limits.first_token("full", 32, 1024, 32)
    flops = 2 * 1088 * 30 * limits.layer_elements + 4 * 30 * 9 * 64 * 1088 * 1089 / 2 + 2 * 49152 * 576
    assert full == pytest.approx(1e3 * flops / 4e11)
    splice = limits.first_token("splice", 32, 1024, 32)
    assert splice == pytest.approx(
        limits.first_token("prefix", 32, 1024, 32) + 2e3 * 1056 * 23040 / FAST.copy
    )
    assert limits.first_token("query_only", 32, 1024, 32) < splice < full
    assert limits.fetch(1000) == pytest.approx(23.04)


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_model_too_big_says_what_would_fit(monkeypatch):
    from memos_engine.bench import target as module

    monkeypatch.setattr(module, "free_bytes", lambda device: 6 << 30)
    with (
        open_target(Options(random_weights="qwen3-8b")) as big,
        pytest.raises(TooBigError, match=r"smollm2-1\.7b"),
    ):
        check_fits(big, "bfloat16", 2048, 1, "cpu")
    with (
        open_target(Options(random_weights="llama-3.2-1b")) as fits,
        pytest.raises(TooBigError, match="--peers none"),
    ):
        check_fits(fits, "bfloat16", 2048, 3, "cpu")
    check_fits(fits, "bfloat16", 2048, 1, "cpu")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"contexts": (4096,)}, "window"),
        ({"contexts": (16,)}, "16 tokens for each"),
        ({"peers": ("nonsense",)}, "nonsense"),
        ({"random_weights": "gpt-5"}, "gpt-5"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_folder, options, match):
    with pytest.raises(ConfigError, match=match):
        ttft.run(tiny(tiny_folder, **options))


def test_no_cuda_device_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        decode.run(Options(random_weights="tiny", device="cuda"))


BROKEN = """
import os, time
from serve import serve
class Worker:
    def load(self, **_): return {"versions": {"broken": "1"}, "notes": []}
    def first_token(self, mode, parts):
        if mode == "full": os._exit(7)
        time.sleep(60)
    def decode(self, **_): raise RuntimeError("out of luck")
serve(Worker())
"""


@pytest.fixture
def broken_peer(tmp_path, monkeypatch):
    """A peer that dies, hangs or raises, in the place of transformers."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)

    def start(name: str, timeout: float, device: str, threads: int) -> PeerProcess:
        here = str(Path(worker_path("own")).parent)
        return PeerProcess(name, [sys.executable, str(script)], {"PYTHONPATH": here}, timeout)

    monkeypatch.setattr(systems.registry, "start", start)


def test_a_peer_that_dies_is_a_marked_row_and_ours_goes_on(tiny_folder, broken_peer):
    document = ttft.run(tiny(tiny_folder, peers=("transformers",)))
    rows = {(r["system"], r["mode"]): r for r in document["rows"]}
    dead = rows["transformers", "full"]
    assert dead["status"] == "crashed"
    assert "status 7" in dead["reason"]
    assert "ttft_ms_p50" not in dead
    assert rows["memos_engine", "splice"]["n"] == 2


def test_a_peer_that_hangs_is_ended(tiny_folder, broken_peer, monkeypatch):
    monkeypatch.setattr(ttft, "modes", lambda name: ("full",) if name == "memos_engine" else ("prefix",))
    document = ttft.run(tiny(tiny_folder, peers=("transformers",), peer_timeout=3.0))
    (row,) = [r for r in document["rows"] if r["system"] == "transformers"]
    assert row["status"] == "timeout"
    assert "3 s" in row["reason"]


def test_attach_is_measured_beside_what_it_wraps(tiny_folder):
    document = attach.run(tiny(tiny_folder))
    modes = [row["mode"] for row in document["rows"]]
    assert modes == [attach.EMPTY, attach.PLAIN, attach.ENGINE, attach.OWN]
    assert all(row["call_ms_p50"] > 0 for row in document["rows"])
    assert len(document["ratios"]) == 3


def test_a_peer_that_raises_is_a_failed_row(tiny_folder, broken_peer):
    document = decode.run(tiny(tiny_folder, peers=("transformers",), quick=True))
    (row,) = [r for r in document["rows"] if r["system"] == "transformers"]
    assert row["status"] == "failed"
    assert "out of luck" in row["reason"]


def test_every_arm_leads_in_turn_and_a_failed_one_is_dropped():
    seen: list[tuple[str, int]] = []

    def call(name: str, fails: bool = False):
        def run(given: int) -> dict[str, float]:
            seen.append((name, given))
            if fails and given == 1:
                raise PeerError("failed", "no")
            return {"ms": float(given)}

        return run

    arms = [Arm("a", "x", call("a")), Arm("b", "x", call("b", fails=True)), Arm("c", "x", call("c"))]
    measured = interleave(arms, [0, 1, 2], warmup=1)
    assert measured.samples(("a", "x")) == [1.0, 2.0]
    assert ("b", "x") in measured.failed
    assert measured.samples(("b", "x")) == []
    assert [name for name, given in seen if given == 1] == ["b", "c", "a"]
    assert [name for name, given in seen if given == 2] == ["c", "a"]


def test_all_goes_on_past_a_bench_that_cannot_run_and_resumes(tmp_path, monkeypatch):
    calls: list[str] = []

    def runner(bench: str):
        def run(options: Options, progress: object) -> dict[str, object]:
            calls.append(bench)
            if bench == "quality":
                raise ConfigError("no data")
            document = Document(bench, options)
            document.add("unit", [{"system": "memos_engine", "value": 1}])
            return document.finish()

        return run

    monkeypatch.setattr(suite, "runner", runner)
    monkeypatch.setattr(report, "write", lambda folder, documents: [folder / "report.html"])
    data = suite.run_all(Options(out=tmp_path))
    rows = {row["name"]: row for row in data["rows"]}
    assert set(rows) == set(suite.BENCHES)
    assert rows["quality"]["reason"] == "no data"
    calls.clear()
    suite.run_all(Options(out=tmp_path, resume=True))
    assert calls == ["quality"]


def test_random_weights_have_the_shapes_they_are_named_for():
    with open_target(Options(random_weights="qwen3-8b")) as target:
        assert target.weight_elements == pytest.approx(8.19e9, rel=0.01)
        assert target.nbytes("bfloat16", 6064) - 2 * target.weight_elements == 6064 * 144 * 1024
        assert isinstance(target.spec, ModelSpec)
