"""`splice_kv` on a device: bit-equal to the reference, and its speed against a plain copy.

python -m memos_engine.bench.gpu_writers DEVICE TARGET SHAPES ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.gpu_timing import Rows, median_ms
from memos_engine.bench.target import SHAPES

from memos_engine import ops
from memos_engine.ops import reference

TOKENS = {"tiny": 200, "smollm2-135m": 1024, "qwen3-8b": 6064}


def main() -> None:
    device = torch.device(sys.argv[1])
    rows = Rows(Path(sys.argv[2]))
    for name in sys.argv[3:]:
        for dtype in (torch.float32, torch.bfloat16):
            rows.add(**check(name, dtype, device))
    equal = all(row["bit_equal"] for row in rows.rows)
    print("every bit as the reference" if equal else "DIFFERS from the reference")
    raise SystemExit(not equal)


def check(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One record into shuffled pages."""
    _, _, layers, _, kv_heads, head_dim, *_ = SHAPES[name]
    tokens, page = TOKENS[name], 16
    shape, blocks = (layers, tokens, kv_heads, head_dim), tokens // page + 2
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
    ms = median_ms(lambda: backend.splice_kv(k, v, k_pages, v_pages, slots, positions, table), device)
    copy_ms = 2 * median_ms(lambda: copy_to.copy_(k), device)
    return {
        "op": "splice_kv",
        "backend": backend.NAME,
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "bit_equal": equal,
        "us_p50": round(ms * 1e3, 1),
        "gb_per_s": round(2 * (k.nbytes + v.nbytes) / ms / 1e6, 1),
        "share_of_copy": round(copy_ms / ms, 3),
    }


if __name__ == "__main__":
    main()
