"""The traffic of `bench steady`: memories, questions and orders, and the engine over a store of theirs."""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from memos_engine.bench.document import Row
from memos_engine.bench.machine import resident_mb
from memos_engine.bench.options import Options
from memos_engine.bench.steady_store import Chosen, CountedVault, files, fingerprints, memory_texts
from memos_engine.bench.target import Target, check_fits
from memos_engine.bench.texts import questions

from memos_engine.api import MemoryEngine
from memos_engine.config import SYSTEM_PROMPT, ConfigError, DecoderConfig, MemoryConfig
from memos_engine.memory.retrieval import RetrievalWeights
from memos_engine.prompt import PromptLayout, load_tokenizer

STORED, TAKEN = 100, 4  # memories, and those of a request
NEW, GROUP = 4, 32  # tokens of an answer; requests that run at once
HELD, FORMS = 0.5, 2  # part of the records' bytes that host memory holds; records of a memory
# The embedder alone chooses, whatever words a question has.
NEAREST = RetrievalWeights(words=0, words_context=0, dense=1, dense_context=0, from_after=0, dated=0, named=0)
POOL = 4096  # KV pool, in tokens, of the requests that come one by one
KEYS = "MEMOS_ENGINE_KEYS"


@dataclass(frozen=True)
class Traffic:
    """What is asked. longest: tokens of a request at most, answer included; held: bytes of host memory."""

    target: Target
    dtype: str
    seed: int
    requests: int
    taken: int
    texts: list[str]
    asked: list[str]
    longest: int
    held: int

    @property
    def warmup(self) -> int:
        return max(2, self.requests // 10)

    @property
    def answers(self) -> int:
        """Of the generations that run together."""
        return 2 * self.requests

    @property
    def units(self) -> int:
        """Records to build, and requests."""
        return len(self.texts) + self.warmup + self.requests + self.answers


def traffic_of(options: Options, target: Target, requests: int) -> Traffic:
    """Raises ConfigError where requests would not fit or orders run out, TooBigError without the memory."""
    taken = (options.memories or (TAKEN,))[0]
    stored = max(2 * taken, min(STORED, requests // 5))
    layout = PromptLayout(load_tokenizer(target.folder), SYSTEM_PROMPT)
    texts = memory_texts(layout, stored, options.seed)
    asked = questions(random.Random(options.seed), requests)
    spans = [len(layout.memory(text)) for text in texts]
    query = max(len(layout.query(_question(99_999, text))) for text in asked)
    longest = len(layout.anchor) + taken * max(spans) + query + NEW
    if longest > min(POOL, target.spec.max_positions):
        raise ConfigError(
            f"memories {taken}: a request would have {longest} tokens, more than the "
            f"{min(POOL, target.spec.max_positions)} of window or pool. Use fewer --memories."
        )
    itemsize = int(getattr(torch, options.resolved_dtype).itemsize)
    held = round(HELD * FORMS * sum(spans) * target.spec.kv_bytes_per_token(itemsize))
    traffic = Traffic(
        target, options.resolved_dtype, options.seed, requests, taken, texts, asked, longest, held
    )
    if math.perm(stored, taken) < 2 * traffic.units:
        raise ConfigError(f"memories {taken}: {stored} memories have too few orders for so many requests.")
    check_fits(target, options.resolved_dtype, GROUP * 2 * longest + sum(spans), 1, options.device)
    return traffic


def _question(number: int, text: str) -> str:
    return f"Inquiry {number}. {text}"


@dataclass
class Bed:
    """An engine over a store whose records are all built, and the requests that come to it."""

    traffic: Traffic
    engine: MemoryEngine
    chosen: Chosen
    tell: Callable[[str, int], None]
    done: int = 0
    orders: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.traffic.seed)
        self.person = self.engine.user("bench")
        self._fill()
        by_text = {cube.body: cube.id for cube in self.person.memories()}
        self.ids = [by_text[text] for text in self.traffic.texts]
        self.vault = CountedVault(self.engine.opened_store.vault.directory)
        self.engine.opened_store.vault = self.vault
        self.before = fingerprints(self.engine, self.person)

    def _fill(self) -> None:
        """Remembers, builds every record, reads each once: host memory is full then."""
        engine, texts = self.engine, self.traffic.texts
        for i, text in enumerate(texts):
            self.chosen.lean(text, (i,))
        if not self.person.memories():  # another share has filled the store otherwise
            for text in texts:
                self.person.remember(text)
        engine.ready()
        self.person.warm(progress=lambda _: self.shown("building records"))
        assert engine.activation is not None
        for cube in self.person.memories():
            stored = engine.activation.find(
                self.person.principal, cube, engine.layout.memory(cube.body or "")
            )
            for form in stored.records:
                engine.activation.load(stored, form)

    def shown(self, text: str, count: int = 1) -> None:
        self.done += count
        self.tell(text, self.done)

    def next(self) -> tuple[str, tuple[str, ...]]:
        """A question never asked before, and the ids of its memories, in an order never taken before."""
        numbers, order = range(len(self.ids)), None
        while order is None or order in self.orders:
            order = tuple(self.rng.sample(numbers, self.traffic.taken))
        self.orders.add(order)
        count = len(self.orders)
        question = _question(count, self.traffic.asked[count % self.traffic.requests])
        self.chosen.lean(question, order)
        return question, tuple(self.ids[i] for i in order)

    def sizes(self) -> Row:
        """Records in the store, what they take on disk, what the process takes in memory."""
        store, caller = self.engine.opened_store, self.person.principal
        rss = resident_mb()
        return {
            "records": sum(len(store.kv_identities(caller, cube_id)) for cube_id in self.ids),
            "vault_mb": round(sum(p.stat().st_size for p in files(self.vault.directory)) / 2**20, 1),
            "rss_mb": None if rss is None else round(rss, 1),
        }


@contextmanager
def store_folder(options: Options) -> Iterator[Path]:
    """A folder for the store beside the results, where a disk is behind it: temporary folders may be memory.
    The store's key lies there too; threads are as they were asked for."""
    threads, key = torch.get_num_threads(), os.environ.get(KEYS)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        torch.set_num_threads(options.threads or threads)
        os.environ[KEYS] = str(Path(folder) / "keys")
        try:
            yield Path(folder)
        finally:
            torch.set_num_threads(threads)
            os.environ.pop(KEYS)
            if key is not None:
                os.environ[KEYS] = key


@contextmanager
def opened(traffic: Traffic, folder: Path, tell: Callable[[str, int], None]) -> Iterator[Bed]:
    """An engine of its own, so that every share begins alike; the first one fills the store."""
    chosen = Chosen(len(traffic.texts))
    pool = min(POOL, traffic.target.spec.max_positions)
    with MemoryEngine.open(
        traffic.target.folder,
        folder / "store",
        # What is watched is splicing, which each request does anew.
        decoder=DecoderConfig(dtype=traffic.dtype, pool_tokens=pool, share_spliced=False),
        memory=MemoryConfig(
            max_memories=traffic.taken, min_score=0.0, distraction=0.0, host_bytes=traffic.held
        ),
        embedder=chosen,
    ) as engine:
        engine.operator.weights = NEAREST
        yield Bed(traffic, engine, chosen, tell)
