"""What a GPU has to show in one call: the writers' results against the reference, and their speed.

    bench/gpu_check.sh [--device cuda]

Needs torch (and triton) only; nothing is installed. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from memos_engine.bench.machine import machine

from memos_engine import ops
from memos_engine.ops import reference

# layers, tokens, kv_heads, head_dim: SmolLM2-135M, and Qwen3-8B with 6064 tokens
SHAPES = {"smollm2": (30, 1024, 3, 64), "qwen3-8b": (36, 6064, 8, 128)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    options = parser.parse_args()
    rows = []
    for name in options.shapes.split(","):
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(_splice(name, SHAPES[name], dtype, torch.device(options.device)))
            print(rows[-1], flush=True)
    config = {"device": options.device}
    print(
        json.dumps({"bench": "gpu_check", "version": 1, "machine": machine(), "config": config, "rows": rows})
    )


def _splice(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One record into shuffled pages: bit-equal to the reference, and GB/s against a plain copy."""
    layers, tokens, kv_heads, head_dim = shape
    page, blocks = 16, tokens // 16 + 2
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2))
    table = ops.rope_table(1.0 / 1e4 ** (torch.arange(0, head_dim, 2) / head_dim), tokens + 8).to(device)
    positions = torch.arange(5, tokens + 5, dtype=torch.int32, device=device)
    order = torch.randperm(blocks - 1, generator=generator)[: tokens // page + 1] + 1
    at = torch.arange(tokens)
    slots = (order[at // page] * page + at % page).to(device)
    pages_shape = (layers, blocks, page, kv_heads, head_dim)
    k_pages, v_pages, k_truth, v_truth = (
        torch.zeros(pages_shape, dtype=dtype, device=device) for _ in range(4)
    )
    ops.splice_kv(k, v, k_pages, v_pages, slots, positions, table)
    reference.splice_kv(k, v, k_truth, v_truth, slots, positions, table)
    equal = torch.equal(k_pages, k_truth) and torch.equal(v_pages, v_truth)
    backend = ops.backend_for(device)
    copy_to = torch.empty_like(k)
    ms = _median_ms(lambda: backend.splice_kv(k, v, k_pages, v_pages, slots, positions, table), device)
    copy_ms = 2 * _median_ms(lambda: copy_to.copy_(k), device)
    moved = 2 * (k.nbytes + v.nbytes)
    return {
        "op": "splice_kv",
        "backend": backend.NAME,
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "bit_equal": equal,
        "us_p50": round(ms * 1e3, 1),
        "gb_per_s": round(moved / ms / 1e6, 1),
        "share_of_copy": round(copy_ms / ms, 3),
    }


def _median_ms(call: Any, device: torch.device, n: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(n):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
