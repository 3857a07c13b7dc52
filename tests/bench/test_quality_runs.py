"""`bench quality` as a whole on a tiny random model: rows, differences, profiles, interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from memos_engine.bench import int8, quality, splicing
from memos_engine.bench.document import read_result, result_path
from memos_engine.bench.options import Options
from memos_engine.bench.systematic import systematic_shares

from memos_engine.config import ConfigError
from memos_engine.profile import load_profile

KEYS = {
    "method", "recompute", "memories", "kl_mean", "kl_low", "kl_high", "kl_p99", "kl_token1", "kl_tokens",
    "top1", "top1_tokens", "answer_f1", "f1_low", "f1_high", "answer_contains", "mean_recomputed",
    "n", "samples",
}  # fmt: skip


def test_rows_differences_and_controls(options):
    seen = []
    methods = (*splicing.METHODS, *splicing.CONTROLS)
    before = torch.get_num_threads()
    document = quality.run(options, lambda *tick: seen.append(tick), methods)
    assert torch.get_num_threads() == before
    assert document["complete"]
    assert "samples" not in document
    assert [(done, total) for _, done, total in seen] == [(i, 5) for i in range(1, 6)]
    # The engine has a row at each share, with int8 and neutral contexts too; the one at 0 stands for it here.
    rows = {row["method"]: row for row in reversed(document["rows"])}
    assert set(rows) == {*(m.name for m in methods), "full_bf16"}
    assert len(document["rows"]) == len(rows) + 3
    for row in document["rows"]:
        assert set(row) == KEYS
        assert row["n"] == len(row["samples"]) == 5
        assert row["kl_low"] <= row["kl_mean"] <= row["kl_high"]
    kl = {name: row["kl_mean"] for name, row in rows.items()}
    assert kl["full"] < 1e-9 < kl["full_bf16"] < kl["memos_engine"] < kl["none"]
    assert min(kl["wrong_positions"], kl["shuffled_values"]) > 1.5 * kl["memos_engine"]
    assert rows["full"]["top1"] == 1.0
    shares = {name: row["mean_recomputed"] for name, row in rows.items()}
    assert shares["full"] == 1
    assert shares["memos_engine"] == shares["none"] == 0
    assert shares["random"] == shares["first_k"] == shares["cacheblend"] == pytest.approx(0.25, abs=0.01)
    assert shares["rank"] == pytest.approx(0.25, abs=0.01)
    names = [entry["name"] for entry in document["ratios"]]
    assert "KL of none minus memos_engine at r=0, 3 memories" in names
    assert "KL of cacheblend minus memos_engine at r=0.25, 3 memories" in names
    assert "answer F1 of memos_engine at r=0 minus full, 3 memories" in names
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in document["ratios"])
    json.dumps(document)


def test_methods_can_be_chosen_by_name(options):
    document = quality.run(replace(options, n=1, methods=("memos_engine", "none")))
    assert {row["method"] for row in document["rows"]} == {"memos_engine", "none"}
    with pytest.raises(ConfigError, match="'magic' is unknown; bench quality has full, none"):
        quality.run(replace(options, methods=("magic",)))


def test_a_profile_is_kept_for_both_dtypes(options, tmp_path, monkeypatch, engine):
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path))
    document = quality.run(replace(options, profile=True, n=2), methods=splicing.METHODS[:3])
    assert any("The curve is kept" in note for note in document["notes"])
    assert len(list((tmp_path / "profiles").iterdir())) == 2
    found = load_profile(engine.decoder.runner.model.weights.digest, engine.layout.digest)
    assert found is not None
    own = [row for row in document["rows"] if row["method"] == "memos_engine"]
    assert [(p.recompute, p.kl_mean) for p in found.points] == [(r["recompute"], r["kl_mean"]) for r in own]
    assert found.kl(0.0, 3) == own[0]["kl_mean"]


def test_the_systematic_share_is_that_of_the_definition(engine):
    """What is common to all contexts, and what is noise, told apart by brute force."""
    ids = engine.layout.memory
    anchor, spans = engine.layout.anchor, [ids("One."), ids("Two and three.")]
    contexts = [ids("Something."), ids("Something else."), ids("More of it all.")]
    found = systematic_shares(engine.decoder, anchor, spans, contexts)
    for side in (0, 1):
        total = spread = 0.0
        for span in spans:
            base = engine.decoder.encode_span(anchor, span)[side].double()
            each = [engine.decoder.encode_span((*anchor, *c), span)[side].double() - base for c in contexts]
            apart = torch.stack(each)[:, 1:]
            total += float(apart.square().sum()) / 3
            spread += float(apart.var(dim=0).sum())
        assert found[side] == pytest.approx(1 - spread / total, rel=1e-3)
    same = systematic_shares(engine.decoder, anchor, spans, [contexts[0]] * 3)
    assert same == pytest.approx((1.0, 1.0))


@pytest.mark.smollm2
def test_controls_are_clearly_worse_on_the_real_model(options, smollm2_path):
    own = [method for method in splicing.METHODS if method.name in ("full", "none", "memos_engine")]
    document = quality.run(
        replace(options, model=str(smollm2_path), n=2, threads=1), methods=(*own, *splicing.CONTROLS)
    )
    kl = {row["method"]: row["kl_mean"] for row in reversed(document["rows"])}  # the engine's at r = 0
    assert kl["full"] < 1e-7 < kl["full_bf16"]
    assert kl["memos_engine"] < kl["none"]
    assert min(kl["wrong_positions"], kl["shuffled_values"]) > 1.5 * kl["memos_engine"]


def test_differences_are_taken_at_the_same_share_where_the_engine_has_one():
    figures = {"kl": [[0.1, 0.3], [0.2]], "f1": [0.5, 0.0]}
    less = {"kl": [[0.1], [0.1]], "f1": [1.0, 0.0]}
    samples = {("full", 1.0): less, ("memos_engine", 0.15): less, ("random", 0.15): figures}
    found = {entry["name"]: entry for entry in quality.differences(8, samples)}
    assert found["KL of random minus memos_engine at r=0.15, 8 memories"]["value"] == pytest.approx(0.1)
    assert found["answer F1 of random at r=0.15 minus full, 8 memories"]["value"] == pytest.approx(-0.25)


def test_an_interrupted_run_goes_on_and_ends_the_same(options, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "BLOCK", 2)
    whole = quality.run(options)
    assert quality.run(replace(options, seed=4))["rows"] != whole["rows"]
    options = replace(options, out=tmp_path / "out")

    def stop_at_3(text, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quality.run(options, stop_at_3)
    partial = read_result(result_path(options.out, "quality"))
    assert not partial["complete"]
    assert partial["units"] == ["3 memories, prompts 1-2"]
    assert {row["n"] for row in partial["rows"]} == {2}
    seen = []
    resumed = quality.run(replace(options, resume=True), lambda *tick: seen.append(tick[1]))
    assert seen == [3, 4, 5]
    assert resumed["rows"] == whole["rows"]
    assert resumed["ratios"] == whole["ratios"]
    monkeypatch.setattr(quality, "_Scorer", SimpleNamespace())  # nothing is left to measure
    assert quality.run(replace(options, resume=True))["rows"] == whole["rows"]


def test_what_the_protocol_does_not_cover_is_refused(options):
    with pytest.raises(ConfigError, match="leave out --device"):
        quality.run(replace(options, device="cuda"))
    with pytest.raises(ConfigError, match="trained model"):
        quality.run(replace(options, random_weights="qwen3-8b"))


def test_one_memory_is_exact_however_it_is_used(options):
    document = quality.run(replace(options, n=2, memories=(1, 1), recompute=(0.25, 0.25)))
    kl = {row["method"]: row["kl_mean"] for row in document["rows"]}
    assert max(kl[name] for name in ("memos_engine", "random", "first_k", "cacheblend")) < 1e-9
    assert {row["n"] for row in document["rows"]} == {2}  # asked for twice, measured once


def test_the_cost_of_int8_weights(tiny_folder, data):
    document = int8.run(Options(model=str(tiny_folder), dtype="float32", data=data, n=3))
    whole, narrow = document["rows"]
    assert (whole["weights"], narrow["weights"]) == ("whole", "int8")
    assert whole["n"] == narrow["n"] == 3
    assert 0 <= narrow["kl_mean"] < 0.1
    assert narrow["nll"] - whole["nll"] == pytest.approx(narrow["nll_more"], abs=1e-4)
    assert narrow["nll_more_low"] <= narrow["nll_more"] <= narrow["nll_more_high"]
