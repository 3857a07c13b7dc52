"""Result documents: valid after every unit, resumed where nothing has changed; options; statistics."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memos_engine.bench import stats
from memos_engine.bench.document import (
    Document,
    ReportFolderError,
    command,
    commit,
    read_result,
    write_atomically,
)
from memos_engine.bench.options import Options

from memos_engine.config import ConfigError


def test_the_file_is_valid_json_after_every_unit(tmp_path):
    document = Document("ttft", Options(out=tmp_path))
    path = tmp_path / "ttft.json"
    assert not path.exists()  # nothing is claimed before something was measured
    for i in range(3):
        document.add(f"unit {i}", [{"value": i}], notes=["once"])
        data = json.loads(path.read_text())
        assert [row["value"] for row in data["rows"]] == list(range(i + 1))
        assert data["complete"] is False
    assert document.finish()["complete"]
    assert json.loads(path.read_text())["notes"] == ["once"]
    assert [p.name for p in tmp_path.iterdir()] == ["ttft.json"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    options = Options(out=tmp_path)
    Document("ttft", options).add("first", [{"value": 1}])
    again = Document("ttft", replace(options, resume=True))
    assert again.has("first")
    again.add("second", [{"value": 2}])
    assert [row["value"] for row in again.finish()["rows"]] == [1, 2]
    fresh = Document("ttft", options)
    assert not fresh.has("first")


@pytest.mark.parametrize("change", [{"seed": 1}, {"contexts": (7,)}, {"dtype": "float32"}])
def test_another_configuration_is_not_resumed(tmp_path, change):
    Document("ttft", Options(dtype="bfloat16", out=tmp_path)).add("first", [{"value": 1}])
    again = Document("ttft", replace(Options(dtype="bfloat16", out=tmp_path, resume=True), **change))
    assert not again.has("first")
    assert "begun anew" in again.data["notes"][0]


def test_another_commit_or_machine_is_not_resumed(tmp_path):
    path = tmp_path / "ttft.json"
    for key, value in (("commit", "other"), ("machine", {"cpu": "other"})):
        Document("ttft", Options(out=tmp_path)).add("first", [{"value": 1}])
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, key: value}))
        assert not Document("ttft", Options(out=tmp_path, resume=True)).has("first")


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportFolderError, match="cannot be written"):
        Document("ttft", Options(out=tmp_path / "file"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere but where the kernel itself refuses
        locked = Path("/proc")
        if not locked.is_dir():
            pytest.skip("READ-ONLY FOLDER NOT TESTED: root may write anywhere here")
    with pytest.raises(ReportFolderError, match="cannot be written"):
        Document("ttft", Options(out=locked))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}', "\x00"])
def test_what_is_no_result_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ReportFolderError):
        read_result(path)
    with pytest.raises(ReportFolderError):
        read_result(tmp_path / "missing.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def refuse(source: object, target: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_command_repeats_the_run():
    assert command("ttft", Options()) == "memos-engine bench ttft"
    options = Options(contexts=(512, 1024), peers=(), quick=True, threads=1, out=Path("x"), resume=True)
    assert command("all", options) == (
        "memos-engine bench all --threads 1 --context 512 --context 1024 --peers none --quick"
    )
    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) == 12


@pytest.mark.parametrize(
    "bad",
    [
        {"dtype": "int8"},
        {"device": "tpu"},
        {"contexts": (0,)},
        {"batches": (-1,)},
        {"recompute": (1.5,)},
        {"n": 0},
        {"peer_timeout": 0.0},
        {"objective_ms": -1.0},
    ],
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError):
        Options(**bad)


# -- statistics ----------------------------------------------------------------------------------

positive = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=40)


@given(positive)
def test_timing_says_what_numpy_says(values):
    row = stats.timing(values, "ms")
    assert row["n"] == len(values) == len(row["samples"])
    assert row["ms_p50"] == pytest.approx(float(np.median(values)), abs=1e-3)
    assert row["ms_p50"] <= row["ms_p95"] + 1e-3


@given(positive, st.floats(0.1, 10))
def test_a_paired_ratio_is_exact_however_the_machine_drifts(values, factor):
    found = stats.ratio([factor * v for v in values], values)
    assert found.value == pytest.approx(factor)
    assert found.low == pytest.approx(factor)
    assert found.high == pytest.approx(factor)


def test_intervals_hold_what_they_should():
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(100):
        sample = rng.normal(5, 2, size=40)
        interval = stats.bootstrap(list(sample), seed=seed)
        held += interval.low <= 5 <= interval.high
    assert 85 <= held <= 100
    both = stats.ratio_of_medians([2.0] * 5, [1.0] * 5)
    assert (both.low, both.value, both.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="one length"):
        stats.ratio([1.0, 2.0], [1.0])
