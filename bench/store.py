"""The store by its size: adding a memory beside a bare fsync, reading one, searching, opening, bytes on disk.

Memories have 200 characters, no embedding and no KV. Every read goes through access control: somebody reads
and searches who sees the memories by a grant. The stores take turns, round by round, each with an fsync of
its own disk.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from memos_engine.bench.document import Document, Row
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.stats import p95, paired_bootstrap, timing

from memos_engine.memory.embed import COMMON_WORDS
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore, NewMemory

SIZES = (1_000, 10_000, 100_000)
QUICK_SIZES = (1_000, 5_000)
CHARACTERS = 200
BATCH = 1_000  # memories added in one transaction while a store is filled
WARM_UP = 5
VOCABULARY = 30_000
PAGE = b"x" * 4096
OWNER, READER = Principal("bench", "owner"), Principal("bench", "reader")
NOTES = (
    "add: one memory of 200 characters, durable on return; fsync: 4 KiB appended to a file beside the "
    "store, in "
    "the same round.",
    "get: by id, by a user who sees the memories through a grant; past: the same memory as of an "
    "earlier moment.",
    "search: the ten best for eight words that follow each other in some memory, by the same user; they are "
    "as frequent as Zipf says, the most frequent ones English function words. Each search follows an add, "
    "which it takes in; first_search_s is the first search of a process, which reads what may be searched.",
    "bytes_per_cube: all files of the closed store, for the memories in it.",
)


@dataclass
class Bed:
    """A store of some size and what was timed in it, in milliseconds."""

    root: Path
    cubes: int
    store: MemoryStore
    ids: list[str] = field(default_factory=list)
    add_ms: list[float] = field(default_factory=list)
    fsync_ms: list[float] = field(default_factory=list)
    get_ms: list[float] = field(default_factory=list)
    past_ms: list[float] = field(default_factory=list)
    search_ms: list[float] = field(default_factory=list)
    own_search_ms: list[float] = field(default_factory=list)
    first_search_s: float = 0.0

    def __post_init__(self) -> None:
        self.operator = MemOperator(self.store)


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench store`. The stores lie in the system's folder for temporary files."""
    document = Document("store", options)
    sizes = options.cubes or (QUICK_SIZES if options.quick else SIZES)
    if not document.has("stores"):
        with tempfile.TemporaryDirectory() as folder:
            rows, ratios = _measured(Path(folder), sorted(set(sizes)), options, progress)
        document.add("stores", rows, ratios, NOTES)
    return document.finish()


def words(rng: random.Random) -> str:
    """A text of 200 characters: common English words and made-up ones, as frequent as Zipf's law says."""
    vocabulary, weights = _vocabulary()
    text = " ".join(rng.choices(vocabulary, cum_weights=weights, k=CHARACTERS // 2))
    return text[: CHARACTERS - 1] + "."


@functools.cache
def _vocabulary() -> tuple[list[str], list[float]]:
    rng = random.Random(0)
    found = dict.fromkeys(sorted(COMMON_WORDS, key=lambda word: (len(word), word)))
    while len(found) < VOCABULARY:
        found["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10)))] = None
    return list(found), list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(found))))


def _measured(
    folder: Path, sizes: list[int], options: Options, progress: Progress
) -> tuple[list[Row], list[Row]]:
    rng, rounds = random.Random(options.seed), options.rounds(300, 60)
    total = 2 * sum(sizes)
    beds: list[Bed] = []
    for size in sizes:
        progress(f"filling a store with {size} memories", sum(b.cubes for b in beds), total)
        beds.append(_filled(folder / str(size), size, rng))
    for round_ in range(WARM_UP + rounds):
        progress("adding and reading", total // 2 + total * round_ // (3 * rounds), total)
        for bed in rng.sample(beds, len(beds)):
            _turn(bed, rng, keep=round_ >= WARM_UP)
    progress("opening", total - 1, total)
    rows = [_row(bed) for bed in beds]
    ratios = [_access(bed, options.seed) for bed in beds]
    return rows, [*ratios, _growth(beds[0], beds[-1], options.seed)] if len(beds) > 1 else ratios


def _filled(root: Path, size: int, rng: random.Random) -> Bed:
    bed = Bed(root, size, _open(root))
    bed.store.grant(OWNER, "read", to=READER)
    while len(bed.ids) < size:
        batch = [NewMemory(words(rng), tags=("bench",)) for _ in range(min(BATCH, size - len(bed.ids)))]
        bed.ids += [cube.id for cube in bed.store.add_many(OWNER, batch)]
    start = time.perf_counter()
    bed.operator.recall(READER, words(rng)[:40], k=10)
    bed.first_search_s = time.perf_counter() - start
    bed.operator.recall(OWNER, words(rng)[:40], k=10)
    return bed


def _open(root: Path) -> MemoryStore:
    return MemoryStore.open(root / "store", keyring=KeyRing(root / "keys"))


def _turn(bed: Bed, rng: random.Random, *, keep: bool) -> None:
    text, one = words(rng), rng.choice(bed.ids)
    moment = bed.store.get(OWNER, bed.ids[-1]).created_at
    timed: list[tuple[list[float], Callable[[], object]]] = [
        (bed.add_ms, lambda: bed.ids.append(bed.store.add(OWNER, text, tags=("bench",)).id)),
        (bed.fsync_ms, lambda: _sync(bed.root)),
        (bed.get_ms, lambda: bed.store.get(READER, one)),
        (bed.past_ms, lambda: bed.store.get(READER, one, as_of=moment)),
    ]
    rng.shuffle(timed)
    said = (bed.store.get(OWNER, rng.choice(bed.ids)).body or "").split()
    at = rng.randrange(max(1, len(said) - 8))
    query = " ".join(said[at : at + 8])
    searches: list[tuple[list[float], Callable[[], object]]] = [
        (bed.search_ms, lambda: bed.operator.recall(READER, query, k=10)),
        (bed.own_search_ms, lambda: bed.operator.recall(OWNER, query, k=10)),
    ]
    timed += rng.sample(searches, 2)
    for samples, call in timed:
        start = time.perf_counter()
        call()
        if keep:
            samples.append((time.perf_counter() - start) * 1e3)


def _sync(root: Path) -> None:
    handle = os.open(root / "fsync", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(handle, PAGE)
        os.fsync(handle)
    finally:
        os.close(handle)


def _row(bed: Bed) -> Row:
    bed.store.close()
    opened = []
    for _ in range(3):
        start = time.perf_counter()
        store = _open(bed.root)
        opened.append(time.perf_counter() - start)
        store.close()
    size = sum(path.stat().st_size for path in (bed.root / "store").rglob("*") if path.is_file())
    add = timing(bed.add_ms, "add_ms")
    return {
        "system": "memos_engine",
        "cubes": bed.cubes,
        **add,
        "fsync_ms_p95": round(p95(bed.fsync_ms), 3),
        **{k: v for k, v in timing(bed.get_ms, "get_ms").items() if k.startswith("get")},
        **{k: v for k, v in timing(bed.past_ms, "past_ms").items() if k.startswith("past")},
        **{k: v for k, v in timing(bed.search_ms, "search_ms").items() if k.startswith("search")},
        "first_search_s": round(bed.first_search_s, 3),
        "open_s": round(statistics.median(opened), 4),
        "bytes_per_cube": round(size / len(bed.ids)),
    }


def _access(bed: Bed, seed: int) -> Row:
    ratio = paired_bootstrap(
        [bed.own_search_ms, bed.search_ms], lambda a, b: np.median(b, axis=-1) / np.median(a, axis=-1), seed
    )
    return {"name": f"search by a grant over search of one's own, {bed.cubes} memories", **ratio.public()}


def _growth(small: Bed, large: Bed, seed: int) -> Row:
    ratio = paired_bootstrap(
        [small.add_ms, large.add_ms], lambda a, b: np.median(b, axis=-1) / np.median(a, axis=-1), seed
    )
    return {"name": f"add at {large.cubes} over add at {small.cubes}", **ratio.public()}
