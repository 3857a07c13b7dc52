"""The machine's ceilings: GEMM by rows and dtype, read, copy, fsync, disk, PCIe.

Each ceiling is the best of several tries and, where there is more than one way (torch's and our own kernels),
of all of them: it has to be what the machine can do, not what one library does with it.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.document import Document, Row, read_result, result_path
from memos_engine.bench.limits import Ceilings
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.target import check_device

from memos_engine.ops import backend_for

ROWS = (1, 8, 32, 128, 512, 2048)
_WIDTH = 2048


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench roofline`."""
    check_device(options.device)
    with threads(options.threads):
        document = Document("roofline", options)
        probes = _probes(options)
        for done, (unit, probe) in enumerate(probes):
            progress(unit, done, len(probes))
            if not document.has(unit):
                document.add(unit, probe())
        document.data["ceilings"] = ceilings_of(document.data["rows"]).public()
        return document.finish()


def measure(options: Options) -> Ceilings:
    """The ceilings that limits need, in a few seconds; part of every timed bench."""
    with threads(options.threads):
        rows: list[Row] = []
        for dtype in ("float32", "bfloat16"):
            rows += _gemm(options.device, dtype, (1, 2048), seconds=0.4)
        rows += _read(options.device, 0.8) + _copy(options.device, 0.8)
        if options.device == "cuda":
            rows += _pcie()
        return ceilings_of(rows)


def ceilings_for(document: Document, options: Options) -> Ceilings:
    """The ceilings a document's limits use: measured now or before an interruption, and no lower than what
    `bench roofline` found in the same folder on the same machine; a busy moment must not flatter a row."""
    data = document.data
    if not data["ceilings"]:
        best = measure(options).public()
        path = None if options.out is None else result_path(options.out, "roofline")
        if path is not None and path.is_file():
            other = read_result(path)
            same = other["machine"].get("cpu") == data["machine"]["cpu"]
            if same and other.get("config", {}).get("threads") == options.threads and other.get("ceilings"):
                best = _larger(best, other["ceilings"])
        data["ceilings"] = best
    return Ceilings.from_public(data["ceilings"])


def _larger(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    out = dict(a)
    for name, value in b.items():
        nested = isinstance(value, dict)
        out[name] = _larger(a.get(name, {}), value) if nested else max(a.get(name, 0.0), value)
    return out


class threads:
    """Pins torch's threads (and with them ours) for a block."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.count is not None:
            torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def ceilings_of(rows: list[Row]) -> Ceilings:
    """The best value of each ceiling, in base units."""

    def best(name: str) -> float:
        values = [row["value"] for row in rows if row["ceiling"] == name and "value" in row]
        return 1e9 * max(values, default=0.0)

    gemm: dict[str, float] = {}
    for row in rows:
        if row["ceiling"] == "gemm":
            gemm[row["dtype"]] = max(gemm.get(row["dtype"], 0.0), row["value"] * 1e9)
    return Ceilings(gemm, best("read"), best("copy"), best("disk_read"), best("pcie"))


def _probes(options: Options) -> list[tuple[str, Callable[[], list[Row]]]]:
    device, seconds = options.device, 0.5 if options.quick else 1.5
    folder = options.out or Path(tempfile.gettempdir())
    probes: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"gemm {dtype}", lambda d=dtype: _gemm(device, d, ROWS, seconds))  # type: ignore[misc]
        for dtype in ("float32", "bfloat16")
    ]
    probes += [("read", lambda: _read(device, seconds)), ("copy", lambda: _copy(device, seconds))]
    probes += [("disk", lambda: _disk(folder, (64 if options.quick else 256) << 20))]
    probes += [("fsync", lambda: _fsync(folder, 20 if options.quick else 60))]
    if device == "cuda":
        probes.append(("pcie", _pcie))
    return probes


def _best_seconds(call: Callable[[], object], device: str, seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def _gemm(device: str, dtype: str, rows: tuple[int, ...], seconds: float) -> list[Row]:
    """`[rows, 2048] x [2048, 2048]`; few rows take the weights of 24 layers in turn, so that they come from
    memory, many take fewer, for they are bound by arithmetic."""
    kind = getattr(torch, dtype)
    first = torch.randn(_WIDTH, _WIDTH, device=device).to(kind)
    weights = [first.clone() for _ in range(24)]
    ours = backend_for(device).linear
    out: list[Row] = []
    for count in rows:
        x = torch.randn(count, _WIDTH, device=device).to(kind)
        used = weights[: max(1, min(24, 1024 // count))]
        flops = 2.0 * count * _WIDTH * _WIDTH * len(used)
        best = float("inf")
        for product in (torch.nn.functional.linear, ours):

            def products(product: Any = product, x: Any = x, used: Any = used) -> None:
                for weight in used:
                    product(x, weight)

            best = min(best, _best_seconds(products, device, seconds / 2))
        out.append(_row("gemm", flops / best / 1e9, "GFLOP/s", dtype=dtype, rows=count))
    return out


def _read(device: str, seconds: float) -> list[Row]:
    """Bytes read a second: a sum over 512 MB, and our one-row product over the same bytes."""
    weights = torch.ones(1 << 15, 1 << 13, dtype=torch.bfloat16, device=device)
    x = torch.ones(1, 1 << 13, dtype=torch.bfloat16, device=device)
    ours = backend_for(device).linear
    calls = [lambda: ours(x, weights), lambda: weights.view(torch.float32).sum()]
    best = min(_best_seconds(call, device, seconds / len(calls)) for call in calls)
    return [_row("read", weights.nbytes / best / 1e9, "GB/s")]


def _copy(device: str, seconds: float) -> list[Row]:
    """Bytes read and written a second, into memory that has been touched before."""
    source = torch.ones(1 << 26, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    best = _best_seconds(lambda: target.copy_(source), device, seconds)
    return [_row("copy", 2 * source.nbytes / best / 1e9, "GB/s")]


def _disk(folder: Path, size: int) -> list[Row]:
    """A file written and synced, dropped from the page cache, and read again."""
    block = os.urandom(1 << 20)
    buffer = mmap.mmap(-1, 1 << 22)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        handle = file.fileno()
        start = time.perf_counter()
        for _ in range(size >> 20):
            os.write(handle, block)
        os.fsync(handle)
        written = time.perf_counter() - start
        best = float("inf")
        for _ in range(3):
            drop_from_page_cache(handle)
            os.lseek(handle, 0, os.SEEK_SET)
            start = time.perf_counter()
            while os.readv(handle, [buffer]):
                pass
            best = min(best, time.perf_counter() - start)
    return [
        _row("disk_write", size / written / 1e9, "GB/s"),
        _row("disk_read", size / best / 1e9, "GB/s"),
    ]


def drop_from_page_cache(handle: int) -> bool:
    """Asks the system to forget a file's pages, so that the next read comes from the disk. False where the
    system cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _fsync(folder: Path, count: int) -> list[Row]:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        times = []
        for _ in range(count):
            os.write(file.fileno(), b"x" * 4096)
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - start) * 1e3)
    return [_row("fsync", statistics.median(times), "ms")]


def _pcie() -> list[Row]:
    source = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    best = _best_seconds(lambda: target.copy_(source, non_blocking=True), "cuda", 1.0)
    return [_row("pcie", source.nbytes / best / 1e9, "GB/s")]


def _row(ceiling: str, value: float, unit: str, **more: Any) -> Row:
    return {"ceiling": ceiling, **more, "value": round(value, 3), "unit": unit}
