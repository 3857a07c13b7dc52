"""What `bench steady` puts around a store: memories of known length, a retrieval that obeys the bench, a
vault that counts, and fingerprints of every record."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from memos_engine.bench.texts import facts

from memos_engine.api import MemoryEngine
from memos_engine.memory.embed import Vectors, normalise
from memos_engine.memory.vault import BlobRef, MemVault
from memos_engine.models.files import sha256_file
from memos_engine.prompt import PromptLayout
from memos_engine.user import UserMemory

LEAST, MOST = 80, 130  # a memory ends before it exceeds a number of tokens from this range
SENTENCES = 12


class Chosen:
    """An embedder that leaves no choice to retrieval. Each memory has an axis of its own; a question leans to
    those of its memories, most to the first, so that just they are found, in just this order."""

    model_id = "bench-steady"

    def __init__(self, memories: int) -> None:
        self.dim = memories
        self._orders: dict[str, tuple[int, ...]] = {}

    def lean(self, text: str, order: Sequence[int]) -> None:
        """text: a memory (its own number alone) or a question (numbers of its memories, in order)."""
        self._orders[text] = tuple(order)

    def embed(self, texts: Sequence[str]) -> Vectors:
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            order = self._orders.get(text, ())
            row[list(order)] = range(len(order), 0, -1)
        return normalise(rows)


class CountedVault(MemVault):
    """The same vault; counts how often a payload was read and written."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads = self.writes = 0

    def read(self, ref: BlobRef, into: Callable[[int], memoryview] | None = None) -> memoryview:
        self.reads += 1
        return super().read(ref, into)

    def write(self, data: bytes | bytearray | memoryview) -> BlobRef:
        self.writes += 1
        return super().write(data)


def memory_texts(layout: PromptLayout, count: int, seed: int) -> list[str]:
    """Invented memories of about 60 to 130 tokens, no two alike."""
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        most, own = rng.randint(LEAST, MOST), rng.randrange(1 << 30)
        tries = [facts(own, n) for n in range(1, SENTENCES + 1)]
        fitting = [text for text in tries if len(layout.memory(text)) <= most]
        texts[(fitting or tries[:1])[-1]] = None
    return list(texts)


def fingerprints(engine: MemoryEngine, person: UserMemory) -> dict[str, str]:
    """What each of the person's records is: its row, and the SHA-256 of its file as it lies there. Files that
    no row names are there by their paths."""
    store = engine.opened_store
    found: dict[str, str] = {}
    named: set[Path] = set()
    for cube in person.memories():
        for identity in store.kv_identities(person.principal, cube.id):
            ref = store.find_kv(person.principal, cube.id, identity)
            path = None if ref is None else store.vault.path(ref)
            held = sha256_file(path) if path is not None and path.is_file() else "no file"
            found[f"{cube.id} {identity}"] = f"{ref} {held}"
            named |= {path} if path is not None else set()
    for path in files(store.vault.directory):
        if path not in named:
            found[str(path.relative_to(store.vault.directory))] = sha256_file(path)
    return found


def difference(before: dict[str, str], after: dict[str, str]) -> dict[str, int]:
    """How many records are not what they were (or are gone), and how many were not there."""
    return {
        "records_changed": sum(after.get(name) != held for name, held in before.items()),
        "records_added": len(after.keys() - before.keys()),
    }


def files(directory: Path) -> list[Path]:
    """Every file below a directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())
