"""What memories that are not needed cost: the model's fit, and the bench on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from memos_engine.bench import distraction
from memos_engine.bench.options import Options

from memos_engine.memory.embed import HashingEmbedder


def test_the_fit_finds_what_was_planted():
    rng = np.random.default_rng(0)
    needed, others = rng.integers(0, 2, 400).astype(float), rng.uniform(0, 1.5, 400)
    gain = 0.2 + 1.3 * needed * (1 - 0.4 * others) + rng.normal(0, 1e-3, 400)
    x = np.stack([np.ones(400), needed, needed * others], axis=1)
    assert distraction.distraction(x, gain) == pytest.approx(0.4, abs=0.01)
    assert np.isnan(distraction.distraction(x * [1, 0, 0], gain))


def _dialogue(number):
    said = [f"Ann: my thing {number} {i} is {['red', 'blue', 'green'][i % 3]}" for i in range(12)]
    turns = [{"speaker": "Ann", "dia_id": f"D1:{i + 1}", "text": text} for i, text in enumerate(said)]
    ask = [
        {"question": f"what is my thing {number} {i}?", "evidence": [f"D1:{i + 1}"], "category": 4}
        | ({"answer": said[i].split()[-1]} if i else {})
        for i in range(6)
    ]
    return {
        "conversation": {"session_1": turns, "session_1_date_time": "1:56 pm on 8 May, 2023"},
        "qa": ask,
    }


def test_every_length_and_count_is_scored(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "locomo"
    folder.mkdir()
    (folder / "locomo.json").write_text(json.dumps([_dialogue(0), _dialogue(1)]))
    monkeypatch.setattr(distraction, "default_embedder", lambda: HashingEmbedder(64))
    options = Options(model=str(tiny_folder), dtype="float32", threads=1, data=tmp_path, quick=True)
    found = distraction.run(options)
    rows = found["rows"]
    assert len(rows) == 2 * len(distraction.LENGTHS) * len(distraction.COUNTS)
    assert {row["questions"] for row in rows} == {3}
    assert all(row["log_likelihood"] == 0 for row in rows if row["memories"] == 0)
    assert [one["part"] for one in found["ratios"]] == ["fitted on"] * 2 + ["held out"] * 2
