"""What the tests of the control plane share: a ticking clock, a toy embedder, two users and their store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.store import MemoryStore


class TickingClock:
    """Each look is a millisecond later; `jump` moves it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now

    def jump(self, **delta: float) -> None:
        self.now += timedelta(**delta)


class ToyEmbedder:
    """Letter counts: deterministic, and alike for texts of like letters."""

    def __init__(self, model_id: str = "toy", dim: int = 32) -> None:
        self.model_id = model_id
        self.dim = dim
        self.batches: list[int] = []

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.batches.append(len(texts))
        rows = np.zeros((len(texts), self.dim), np.float64)
        for row, text in zip(rows, texts, strict=True):
            for letter in text.lower():
                row[ord(letter) % self.dim] += 1
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows / np.maximum(length, 1e-9)).astype(np.float32)


@pytest.fixture
def clock() -> TickingClock:
    return TickingClock()


@pytest.fixture
def toy() -> Callable[..., ToyEmbedder]:
    return ToyEmbedder


@pytest.fixture
def alice() -> Principal:
    return Principal("acme", "alice")


@pytest.fixture
def bob() -> Principal:
    return Principal("acme", "bob")


@pytest.fixture
def keyring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys")


@pytest.fixture
def reopen(tmp_path: Path, keyring: KeyRing, clock: TickingClock) -> Iterator[Callable[..., MemoryStore]]:
    """Opens the test's store, as often as wanted."""
    opened: list[MemoryStore] = []

    def open_again(**options: object) -> MemoryStore:
        settings = {"keyring": keyring, "clock": clock, "busy_timeout_ms": 200, **options}
        store = MemoryStore.open(tmp_path / "store", **settings)
        opened.append(store)
        return store

    yield open_again
    for store in opened:
        store.close()


@pytest.fixture
def store(reopen: Callable[..., MemoryStore]) -> MemoryStore:
    return reopen()


@pytest.fixture
def add() -> Callable[..., object]:
    """Adds a memory with the toy embedding."""
    embedder = ToyEmbedder()

    def add_one(store: MemoryStore, principal: Principal, text: str, **options: object) -> object:
        options = {"vector": embedder.embed([text])[0], "model_id": embedder.model_id, **options}
        return store.add(principal, text, **options)

    return add_one
