"""Attached models for the tests of attach()."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memos_engine import MemoryEngine, attach, detach
from memos_engine.memory.embed import HashingEmbedder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models, whose threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def load(tiny_folder: Path) -> Callable[[], Any]:
    """load() -> the tiny model, float32."""
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture
def model(load: Callable[[], Any]) -> Iterator[Any]:
    model = load()
    yield model
    detach(model)


@pytest.fixture(scope="module")
def pair(load: Callable[[], Any], tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    """The same model twice: as it is, and attached."""
    own, attached = load(), load()
    attach(attached, tokenizer)
    yield own, attached
    detach(attached)


@pytest.fixture
def store(tiny_folder: Path, tmp_path: Path) -> Path:
    """A store where alice has two memories."""
    with MemoryEngine.open(tiny_folder, tmp_path / "store", embedder=HashingEmbedder(64)) as engine:
        alice = engine.user("alice")
        for fact in ("My dog is called Biscuit.", "My cat is called Tom."):
            alice.remember(fact)
    return tmp_path / "store"


@pytest.fixture(scope="session")
def ids_of() -> Callable[..., Tensor]:
    """ids_of(rows=1, length=12, seed=0) -> random ids."""
    return lambda rows=1, length=12, seed=0: torch.randint(
        3, 259, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="session")
def decoder() -> Callable[[Any], Any]:
    return lambda model: model._memos_engine.engine.decoder


@pytest.fixture(scope="session")
def assert_clean(decoder: Callable[[Any], Any]) -> Callable[[Any], None]:
    """assert_clean(model): all its pages are accounted for, and nothing runs."""

    def check(model: Any) -> None:
        decoder(model).check_integrity()
        assert not decoder(model).batcher.running
        assert not decoder(model).batcher.waiting

    return check


@pytest.fixture
def runs_here(caplog: pytest.LogCaptureFixture, ids_of: Callable[..., Tensor]) -> Callable[..., bool]:
    """runs_here(model, ids=None): whether a plain call runs in this decoder; either way it gives what the
    model's own class gives."""

    def run(model: Any, ids: Tensor | None = None) -> bool:
        ids = ids_of() if ids is None else ids
        caplog.clear()
        model._memos_engine._said.clear()
        with caplog.at_level(logging.WARNING, "memos_engine"):
            got = model.generate(ids, max_new_tokens=6, do_sample=False)
        expected = type(model).generate(model, ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, expected)
        return "own generate" not in caplog.text

    return run
