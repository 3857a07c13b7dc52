"""Embedders: unit vectors, order kept, the same in every process, and MiniLM equal to its definition."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.errors import ModelFilesError, UnsupportedModelError
from memos_engine.memory import embed
from memos_engine.memory.embed import (
    Embedder,
    HashingEmbedder,
    MiniLMEmbedder,
    SentenceTransformerEmbedder,
    default_embedder,
    normalise,
)

SENTENCES = [
    "My dog is called Biscuit.",
    "The name of my puppy is Biscuit.",
    "The central bank raised interest rates by half a point.",
    "Interest rates went up after the bank's decision.",
    "",
    "x",
    "Grüße aus Köln, 猫が好き 🐈",
    "a long sentence about nothing " * 40,
]


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> MiniLMEmbedder:
    return MiniLMEmbedder(minilm_path)


# -- normalise -----------------------------------------------------------------------------------


def test_normalise() -> None:
    rows = normalise(np.array([[3.0, 4.0], [0.0, 0.0], [1e-200, 0.0], [1e30, -1e30]]))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, [[0.6, 0.8], [1, 0], [1, 0], [0.5**0.5, -(0.5**0.5)]], rtol=1e-6)


# -- hashing -------------------------------------------------------------------------------------


@given(texts=st.lists(st.text(st.characters(), max_size=60), max_size=6), dim=st.sampled_from([8, 64, 384]))
@settings(max_examples=100)
def test_hashing_gives_unit_rows_each_by_itself(texts: list[str], dim: int) -> None:
    embedder = HashingEmbedder(dim)
    rows = embedder.embed(texts)
    assert rows.shape == (len(texts), dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    for text, row in zip(texts, rows, strict=True):
        assert np.array_equal(embedder.embed([text])[0], row)


def test_hashing_likes_shared_words() -> None:
    query, same, spelling, other = HashingEmbedder().embed(
        ["What is my dog called?", "My dog is called Biscuit.", "Dogs calling", "What is the time in Tokyo?"]
    )
    assert query @ same > query @ spelling > query @ other
    assert abs(query @ other) < 0.2  # shared everyday words weigh little
    a, b = HashingEmbedder().embed(["STRAẞE ﬁne", "strasse fine"])
    assert a @ b > 0.999  # case and compatibility forms are folded


def test_hashing_depends_on_nothing_but_the_text() -> None:
    code = (
        "from memos_engine.memory.embed import HashingEmbedder as E; import hashlib;"
        "print(hashlib.sha256(E().embed(['My dog is called Biscuit', '?!']).tobytes()).hexdigest())"
    )
    seen = set()
    for seed in ("0", "1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        seen.add(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))
    assert len(seen) == 1


def test_what_is_not_a_list_of_texts() -> None:
    with pytest.raises(TypeError, match=r"embed\(\[text\]\)"):
        HashingEmbedder().embed("one text")
    with pytest.raises(ValueError, match="dim is 3"):
        HashingEmbedder(3)
    np.testing.assert_allclose(
        np.linalg.norm(HashingEmbedder().embed(["\ud800 broken"]), axis=1), 1, rtol=1e-5
    )


def test_importing_needs_no_torch() -> None:
    code = (
        "import sys, memos_engine.memory.embed; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
        == ["False"] * 2
    )


# -- the choice ----------------------------------------------------------------------------------


def test_default_without_a_model_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(embed, "_warned", threading.Event())
    with caplog.at_level(logging.WARNING):
        assert isinstance(default_embedder(), HashingEmbedder)
        assert isinstance(default_embedder(), HashingEmbedder)
    (record,) = caplog.records
    assert "memos-engine models pull minilm" in record.getMessage()


def test_default_with_a_model(minilm_path: Path, minilm: MiniLMEmbedder) -> None:
    found = default_embedder()
    assert isinstance(found, Embedder)
    assert found.model_id == minilm.model_id
    assert minilm.model_id != HashingEmbedder().model_id


def test_minilm_without_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="memos-engine models pull minilm"):
        MiniLMEmbedder(tmp_path)


def test_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UnsupportedModelError, match=r"memos-engine\[embed\]"):
        SentenceTransformerEmbedder("any")

    class Fake:
        scale = 1.0

        def __init__(self, name: str) -> None:
            self.name = name

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"w": torch.full((2, 2), self.scale, dtype=torch.bfloat16)}

        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            return np.array([[len(text), 1.0, 2.0] for text in texts])

    library = types.ModuleType("sentence_transformers")
    library.SentenceTransformer = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    first = SentenceTransformerEmbedder("any")
    assert isinstance(first, Embedder)
    assert first.dim == 3
    assert first.embed([]).shape == (0, 3)
    np.testing.assert_allclose(np.linalg.norm(first.embed(["", "long text"]), axis=1), 1, rtol=1e-6)
    Fake.scale = 2.0
    assert SentenceTransformerEmbedder("any").model_id != first.model_id  # other weights under the same name


# -- MiniLM --------------------------------------------------------------------------------------


def test_minilm_equals_its_definition(minilm: MiniLMEmbedder, minilm_path: Path) -> None:
    """Sentence by sentence, no batch, no padding: mean of the last layer in float64, then length 1."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    model = AutoModel.from_pretrained(minilm_path, dtype=torch.float64).eval()
    rows = minilm.embed(SENTENCES)
    assert rows.shape == (len(SENTENCES), 384) == (len(SENTENCES), minilm.dim)
    assert rows.dtype == np.float32
    for text, row in zip(SENTENCES, rows, strict=True):
        with torch.inference_mode():
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            mean = model(**tokens).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=2e-6)


def test_minilm_knows_meaning(minilm: MiniLMEmbedder) -> None:
    dog, puppy, rates, bank, *_ = minilm.embed(SENTENCES)
    assert dog @ puppy > 0.5 > 0.2 > max(dog @ rates, dog @ bank, puppy @ rates, puppy @ bank)
    assert rates @ bank > 0.5


def test_minilm_batches(minilm: MiniLMEmbedder) -> None:
    """More texts than a batch, shuffled lengths: every row stays with its text."""
    generator = np.random.default_rng(3)
    texts = [f"memory {i} " + "word " * int(generator.integers(0, 30)) for i in range(70)]
    together = minilm.embed(texts)
    for i in generator.choice(70, 8, replace=False):
        np.testing.assert_allclose(together[i], minilm.embed([texts[i]])[0], atol=2e-6)
    assert minilm.embed([]).shape == (0, 384)
    with pytest.raises(TypeError, match="list of texts"):
        minilm.embed("one text")
    np.testing.assert_allclose(np.linalg.norm(minilm.embed(["\ud800 broken"]), axis=1), 1, rtol=1e-5)


def test_minilm_truncates(minilm: MiniLMEmbedder) -> None:
    start = "word " * 254
    a, b, c = minilm.embed(
        [start, start + "something else entirely", "word " * 200 + "something else entirely"]
    )
    assert np.allclose(a, b, atol=2e-6)
    assert not np.allclose(a, c, atol=1e-3)


def test_minilm_in_threads(minilm: MiniLMEmbedder, minilm_path: Path) -> None:
    expected = minilm.embed(SENTENCES)
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(minilm.embed(SENTENCES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.allclose(rows, expected, atol=1e-6) for rows in found)

    before = torch.get_num_threads()
    np.testing.assert_allclose(MiniLMEmbedder(minilm_path, threads=1).embed(SENTENCES), expected, atol=2e-6)
    assert torch.get_num_threads() == before
