"""A tiny random model with a store, and facts to learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memos_engine import MemoryEngine
from memos_engine.config import DecoderConfig
from memos_engine.consolidate import Fact
from memos_engine.memory.embed import HashingEmbedder


@pytest.fixture
def engine(tiny_folder: Path, tmp_path: Path) -> Iterator[MemoryEngine]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", decoder=DecoderConfig(dtype="float32"), embedder=HashingEmbedder(64)
    ) as opened:
        yield opened
    torch.set_num_threads(before)


@pytest.fixture
def facts() -> list[Fact]:
    return [
        Fact("Alice", "Alice bakes.", "bakes", ("What does Alice do?", "Alice's job?"), ("Who is Alice?",)),
        Fact("Alice", "Alice has Tom.", "Tom", ("What cat has Alice?",), ("Alice's cat?",)),
    ]
