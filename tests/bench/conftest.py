"""An invented question set and a tiny engine, for the tests of `bench quality` and its parts."""

from __future__ import annotations

import json
import random

import pytest
from memos_engine.bench.options import Options

from memos_engine.api import MemoryEngine
from memos_engine.config import DecoderConfig


def paragraphs():
    """Invented, nine of them, each with two questions and their answers."""
    rng = random.Random(7)
    for name in ("Ada", "Bela", "Cleo", "Dora", "Egon", "Finn", "Gita", "Hana", "Ivo"):
        town, year, bells = rng.choice(["Ulm", "Bonn", "Graz"]), rng.randint(1900, 1999), rng.randint(2, 90)
        text = f"{name} moved to {town} in {year}. There {bells} bells were kept in a shed. It rained."
        yield text, [(f"When did {name} move?", str(year)), (f"Where did {name} go?", town)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    entries = [
        {
            "context": text,
            "qas": [
                {"id": q, "question": q, "answers": [{"text": a, "answer_start": text.index(a)}]}
                for q, a in asked
            ],
        }
        for text, asked in paragraphs()
    ]
    folder = tmp_path_factory.mktemp("data")
    (folder / "xquad_en").mkdir()
    whole = {"version": "1.1", "data": [{"title": "Invented", "paragraphs": entries}]}
    (folder / "xquad_en" / "xquad.en.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture
def options(tiny_folder, data):
    return Options(
        model=str(tiny_folder), data=data, n=5, memories=(3,), recompute=(0.0, 0.25), threads=1, seed=3
    )


@pytest.fixture(scope="module")
def engine(tiny_folder):
    return MemoryEngine.open(tiny_folder, decoder=DecoderConfig(dtype="float32", pool_tokens=8192))
