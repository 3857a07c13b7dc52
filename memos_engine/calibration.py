"""Measures what requests cost on this machine with this model: a probe of a few seconds, kept beside the
models.

A table belongs to a machine (processor, threads, accelerator), a build of the kernels and a model in its
dtypes; another of these needs a table of its own, and is said to have none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memos_engine import __version__, ops
from memos_engine.config import Recompute, SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import RecordIdentity, ids_digest
from memos_engine.decoder.record import KVRecord, decode_record, encode_record
from memos_engine.decoder.sequence import KVSpan, Span, Stats, TextSpan
from memos_engine.errors import MemoryInputError
from memos_engine.memory.costs import CostTable, default_table
from memos_engine.memory.embed import Embedder
from memos_engine.memory.vault import MemVault
from memos_engine.models.cache import cache_dir

log = logging.getLogger("memos_engine")

SIZES = (1, 8, 16, 24, 32, 48, 64, 65, 96, 128, 192, 256, 384, 512, 768, 1024)
ROUNDS = 4
QUERY = 24  # rows that look at what was spliced
Progress = Callable[[str, int, int], None]


def machine_of(decoder: DecoderEngine) -> dict[str, Any]:
    """What a cost table depends on, JSON-safe."""
    device = decoder.runner.device
    build = importlib.util.find_spec("memos_engine._cpu")
    native = None if build is None or build.origin is None else Path(build.origin).read_bytes()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": ops.describe()["cpu"]["isa"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "memos_engine": __version__,
        "native": None if native is None else hashlib.sha256(native).hexdigest()[:16],
        "weights": decoder.runner.model.weights.digest,
        "dtype": decoder.kv_dtype,
        "int8_decode": decoder.config.int8_decode,
        "prefill_chunk": decoder.config.prefill_chunk,
    }


def costs_key(machine: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()


def costs_path(key: str) -> Path:
    return cache_dir().parent / "costs" / f"{key[:32]}.json"


def save_costs(table: CostTable) -> Path:
    """Writes the table whole or not at all."""
    path = costs_path(table.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(table.to_json())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def load_costs(decoder: DecoderEngine) -> CostTable:
    """The table of this machine and model; a default, marked as not calibrated, where there is none, none
    that can be read, or one that was made elsewhere (which is logged)."""
    key = costs_key(machine_of(decoder))
    path = costs_path(key)
    try:
        table = CostTable.from_json(path.read_text())
        if table.key != key:
            raise MemoryInputError("it was measured on another machine, model or build")
        return table
    except FileNotFoundError:
        pass
    except (OSError, MemoryInputError) as error:
        log.warning("memos_engine: the cost table %s is not used: %s", path, error)
    spec, weights = decoder.spec, decoder.runner.model.weights
    parameters = sum(tensor.numel() for tensor in weights.tensors.values())
    return default_table(parameters, spec.num_layers, torch.get_num_threads())


def calibrate(
    decoder: DecoderEngine, embedder: Embedder | None = None, progress: Progress = lambda *_: None
) -> CostTable:
    """Measures a table on an idle engine; some seconds. Nothing of it stays in the engine's pages.

    Raises MemoryInputError where requests run: their time would be measured, too.
    """
    if not decoder.idle:
        raise MemoryInputError("Requests are running; calibrate an engine that is idle.")
    return _Probe(decoder, embedder, progress).table()


class _Probe:
    def __init__(self, decoder: DecoderEngine, embedder: Embedder | None, progress: Progress) -> None:
        self.decoder, self.embedder, self.progress = decoder, embedder, progress
        self.rng = np.random.default_rng(0)
        longest = min(decoder.spec.max_positions, decoder.pool_tokens, decoder.config.prefill_chunk + 1) - 1
        self.sizes = [size for size in SIZES if size <= longest]
        self.steps, self.done = len(self.sizes) * ROUNDS + 4, 0
        self.noise: list[float] = []

    def table(self) -> CostTable:
        raw = self._forwards()
        stored = self._record(min(512, self.sizes[-1] // 2 or 1))
        pairs_ms = self._attention(raw, stored)
        forward = tuple((n, max(0.01, ms - pairs_ms * n * n / 2e6)) for n, ms in raw.items())
        splice = self._splice(stored)
        machine = machine_of(self.decoder)
        first = CostTable(
            costs_key(machine), forward, pairs_ms, splice, self._fetch(stored),
            probe_ms=0.0, select_ms=0.0, retrieve_ms=self._retrieve(), plan_ms=3.0,
            spread=min(0.25, max(0.03, statistics.pstdev(self.noise))), machine=machine,
        )  # fmt: skip
        probe_ms, select_ms = self._probing(first, stored)
        return replace(first, probe_ms=probe_ms, select_ms=select_ms)

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.integers(0, self.decoder.spec.vocab_size, count).tolist())

    def _run(self, spans: list[Span], share: float = 0.0) -> Stats:
        """One request for one token; its pages are found by nobody again."""
        root = self.rng.bytes(16)
        params = SamplingParams(max_new_tokens=1)
        (out,) = self.decoder.generate(spans, params, root, recompute=Recompute(share))
        return out.sequence.stats

    def _tell(self, what: str) -> None:
        self.done += 1
        self.progress(what, self.done, self.steps)

    def _forwards(self) -> dict[int, float]:
        """Milliseconds of prompts of each size; the sizes take turns."""
        times: dict[int, list[float]] = {size: [] for size in self.sizes}
        for size in self.sizes[:2]:
            self._run([TextSpan(self._ids(size))])
        for round_ in range(ROUNDS):
            for size in self.sizes:
                if size >= 512 and round_ == ROUNDS - 1:
                    self._tell("forward")  # long ones vary little, and take long
                    continue
                times[size].append(_forward_ms(self._run([TextSpan(self._ids(size))])))
                self._tell("forward")
        usual = {size: _usual(taken) for size, taken in times.items()}
        self.noise = [float(np.log(ms / usual[size])) for size, taken in times.items() for ms in taken]
        return usual

    def _record(self, tokens: int) -> KVRecord:
        ids = self._ids(tokens)
        k, v = self.decoder.encode_span((), ids)
        sigma = torch.rand(v.shape[:3], generator=torch.Generator().manual_seed(0)).to(torch.float16)
        return KVRecord(k, v, ids, "calibration", "", sigma.to(v.device))

    def _again(self, record: KVRecord, tokens: int | None = None) -> KVRecord:
        """The first tokens of a record as another one: spliced anew, not found in pages."""
        n = tokens or record.num_tokens
        sigma = None if record.sigma_v is None else record.sigma_v[:, :n]
        return KVRecord(
            record.k[:, :n].contiguous(), record.v[:, :n].contiguous(), record.token_ids[:n],
            "calibration", "", sigma,
        )  # fmt: skip

    def _attention(self, raw: dict[int, float], stored: KVRecord) -> float:
        """Milliseconds a million (row, key) pairs: the same rows with and without a context."""
        rows = max(size for size in raw if size <= min(256, self.sizes[-1] - stored.num_tokens))
        taken = []
        for _ in range(ROUNDS):
            alone = _forward_ms(self._run([TextSpan(self._ids(rows))]))
            behind = _forward_ms(self._run([KVSpan(self._again(stored)), TextSpan(self._ids(rows))]))
            taken.append(behind - alone)
        self._tell("attention")
        return max(0.0, _usual(taken)) / (rows * stored.num_tokens / 1e6)

    def _splice(self, stored: KVRecord) -> tuple[float, float, float]:
        few = max(1, stored.num_tokens // 8)

        def taken(records: int, tokens: int) -> float:
            found = []
            for _ in range(ROUNDS + 1):
                spans: list[Span] = [KVSpan(self._again(stored, tokens)) for _ in range(records)]
                found.append(self._run([*spans, TextSpan(self._ids(QUERY))]).splice_ms)
            return _usual(found[1:])

        small, large, many = taken(1, few), taken(1, stored.num_tokens), taken(8, few)
        self._tell("splice")
        token = max(0.0, large - small) / max(1, stored.num_tokens - few)
        record = max(0.0, many - large) / 7
        return max(0.0, small - record - token * few), record, token * 1e3

    def _fetch(self, stored: KVRecord) -> tuple[float, float]:
        """A record of a few tokens and a whole one, from a file that the page cache holds."""
        identity = RecordIdentity("", "", "", "", "", (), ids_digest(stored.token_ids), b"")
        times = []
        with tempfile.TemporaryDirectory(prefix="memos-engine-") as folder:
            vault = MemVault(Path(folder))
            for record in (self._again(stored, max(1, stored.num_tokens // 8)), stored):
                whole = replace(identity, tokens=ids_digest(record.token_ids))
                blob = vault.write(encode_record(record, whole))
                taken = []
                for _ in range(ROUNDS + 1):
                    start = time.perf_counter()
                    decode_record(vault.read(blob), whole)
                    taken.append((time.perf_counter() - start) * 1e3)
                times.append((blob.size / 2**20, _usual(taken[1:])))
        self._tell("fetch")
        (small, little), (large, much) = times
        mib = max(0.0, much - little) / max(1e-6, large - small)
        return max(0.0, little - mib * small), mib

    def _retrieve(self) -> float:
        """A search is embedding the query and some milliseconds of index and SQLite; a store's own times are
        learnt from its requests."""
        if self.embedder is None:
            return 8.0
        self.embedder.embed(["warm up"])
        taken = []
        for i in range(ROUNDS):
            start = time.perf_counter()
            self.embedder.embed([f"Where did we meet for the first time, in the year {1990 + i}?"])
            taken.append((time.perf_counter() - start) * 1e3)
        return _usual(taken) + 3.0

    def _probing(self, table: CostTable, stored: KVRecord) -> tuple[float, float]:
        """What the first pass adds to a forward, and what choosing tokens adds between both."""
        extra, rest = [], []
        n = stored.num_tokens
        once = float(table.rows_ms(QUERY) + table.attention_ms(QUERY * (n + QUERY / 2)))
        again = round(0.1 * n)
        second = float(table.rows_ms(QUERY + again) + table.attention_ms((QUERY + again) * n * 0.75))
        for _ in range(ROUNDS + 1):
            stats = self._run([KVSpan(self._again(stored)), TextSpan(self._ids(QUERY))], 0.1)
            extra.append(stats.probe_ms - once)
            rest.append(_forward_ms(stats) - stats.probe_ms - second)
        self._tell("probe")
        probe_ms = max(0.0, _usual(extra[1:])) / (QUERY * n / 1e6)
        return probe_ms, max(0.0, _usual(rest[1:]))


def _usual(taken: Sequence[float]) -> float:
    """The second smallest: a machine that others use besides is measured as it is between their turns."""
    return sorted(taken)[min(1, len(taken) - 1)]


def _forward_ms(stats: Stats) -> float:
    """All of a request from its admission on but the splice."""
    return stats.ttft_ms - stats.queue_ms - stats.splice_ms


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
