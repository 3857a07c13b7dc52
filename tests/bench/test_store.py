"""`bench store`: its rows, its ratio, and that it can be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from memos_engine.bench import report, store, suite
from memos_engine.bench.options import Options

from memos_engine.config import ConfigError


def test_rows_and_growth(tmp_path: Path) -> None:
    options = Options(cubes=(30, 10, 30), n=3, out=tmp_path)
    document = store.run(options)
    assert [row["cubes"] for row in document["rows"]] == [10, 30]
    for row in document["rows"]:
        assert row["n"] == len(row["samples"]) == 3
        timed = ("add_ms_p50", "add_ms_p95", "fsync_ms_p95", "get_ms_p50", "past_ms_p95", "search_ms_p50")
        for key in (*timed, "open_s"):
            assert row[key] > 0
        assert row["bytes_per_cube"] > store.CHARACTERS
    *access, ratio = document["ratios"]
    assert len(access) == 2
    assert ratio["name"] == "add at 30 over add at 10"
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert "--cubes 30 --cubes 10" in document["command"]
    page = report.write(tmp_path, [document])[0].read_text()
    assert "bytes a memory" in page
    again = store.run(Options(cubes=(30, 10, 30), n=3, out=tmp_path, resume=True))
    assert again["rows"] == document["rows"]


def test_one_size_has_no_growth() -> None:
    document = store.run(Options(cubes=(5,), n=1))
    assert (len(document["rows"]), len(document["ratios"])) == (1, 1)


def test_it_is_one_of_all() -> None:
    assert suite.runner("store") is store.run
    with pytest.raises(ConfigError, match="cube 0"):
        Options(cubes=(0,))


def test_texts_have_the_promised_length() -> None:
    import random

    texts = {store.words(random.Random(seed)) for seed in range(50)}
    assert len(texts) == 50
    assert {len(text) for text in texts} == {store.CHARACTERS}
