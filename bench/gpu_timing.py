"""What the GPU parts share: waiting, timing, and rows that are on disk as soon as they are known."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.document import write_atomically
from memos_engine.bench.limits import Ceilings
from memos_engine.bench.options import Options
from memos_engine.bench.roofline import measure


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ms(call: Callable[[], object], device: torch.device, n: int = 20, warm: int = 3) -> float:
    """Median of n calls as the host sees them, launches included."""
    times = []
    for i in range(n + warm):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        if i >= warm:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def device_ms(calls: Sequence[Callable[[], object]], device: torch.device, n: int = 20) -> float:
    """Median milliseconds of one call on the device alone: all calls in one CUDA graph, replayed n times.

    Give calls over different tensors, so that the cache does not decide.
    """
    if device.type != "cuda":
        return sum(median_ms(call, device, 1, 0) for call in calls) / len(calls)
    for call in calls:
        call()
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_ms(graph.replay, device, n) / len(calls)


def ceilings_of(device: torch.device) -> Ceilings:
    """The bench's ceilings; a GPU's matrix rate also by a product large enough to fill it."""
    found = measure(Options(device=device.type))
    if device.type == "cuda":
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * 8192**3 / (median_ms(lambda: a @ b, device) / 1e3)
        found.gemm["bfloat16"] = max(rate, found.gemm["bfloat16"])
    return found


class Rows:
    """Rows of one part, written after each; `more` holds other facts of the document."""

    def __init__(self, target: Path, **more: Any) -> None:
        self.target, self.more = target, more
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        print(row, flush=True)
        self.rows.append(row)
        write_atomically(self.target, json.dumps({"rows": self.rows, **self.more}) + "\n")
