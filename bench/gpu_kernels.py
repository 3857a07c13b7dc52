"""The Triton kernels on a device: right, by float64, and how near to the device's limits.

python -m memos_engine.bench.gpu_kernels DEVICE SHAPES TARGET
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.gpu_timing import Rows, ceilings_of, device_ms
from memos_engine.bench.limits import Ceilings
from memos_engine.bench.target import SHAPES
from torch import Tensor

from memos_engine import ops
from memos_engine.ops import reference, triton

# Relative error in the Frobenius norm: inputs are exact, so this is what the kernel itself rounds.
ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
PAGE = 16


def main() -> None:
    device, shapes, target = torch.device(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    small = device.type == "cpu"
    ceilings = ceilings_of(device)
    rows = Rows(target, ceilings=ceilings.public())
    for dtype in ALLOWED:
        _check_attention(rows, device, dtype, small)
        _check_rows(rows, device, dtype)
    _time(rows, device, shapes, ceilings, small)
    wrong = [row for row in rows.rows if row.get("ok") is False]
    print(f"{len(wrong)} checks failed" if wrong else f"{len(rows.rows)} rows, every check passed")
    raise SystemExit(bool(wrong))


def paged(
    lengths: list[int],
    counts: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    layers: int = 1,
) -> tuple[list[Any], Tensor, Tensor]:
    """Arguments `[q, block_table, query_start, seq_lens, q_pos]` and pages of all layers: shuffled, NaN
    where unused."""
    needed = [-(-length // PAGE) for length in lengths]
    blocks = sum(needed) + 1
    order = (torch.randperm(blocks - 1) + 1).int()
    table = torch.full((len(lengths), max(needed)), -1, dtype=torch.int32)
    used = torch.zeros(blocks, PAGE, dtype=torch.bool)
    used[0] = True
    at = 0
    for i, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        table[i, :count] = order[at : at + count]
        for j in range(count):
            used[order[at + j], : min(PAGE, length - j * PAGE)] = True
        at += count
    shape = (layers, blocks, PAGE, kv_heads, dim)
    k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    unused = ~used.to(device)
    for pages in (k, v):
        pages[:, unused] = float("nan")
        pages[:, 0] = 0
    positions = [p for n, c in zip(lengths, counts, strict=True) for p in range(n - c, n)]
    index = [
        table,
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.tensor(lengths).int(),
        torch.tensor(positions).int(),
    ]
    q = torch.randn(sum(counts), heads, dim, device=device, dtype=dtype)
    return [q, *(t.to(device) for t in index)], k, v


def _check_attention(rows: Rows, device: torch.device, dtype: torch.dtype, small: bool) -> None:
    cases: list[tuple[str, list[int], list[int], int, int, int, int]] = [
        ("page edges", [1, 15, 16, 17, 33], [1, 2, 16, 17, 1], 4, 2, 64, 0),
        ("window", [90, 40], [21, 1], 4, 1, 32, 7),
    ]
    if not small:
        cases += [
            ("decode, 32 requests", [1000 + 37 * i for i in range(32)], [1] * 32, 32, 8, 128, 0),
            ("decode, long", [32768, 5], [1, 1], 9, 3, 64, 0),
            ("question", [6064], [167], 32, 8, 128, 0),
            ("prefill", [1500], [1500], 32, 8, 128, 0),
            ("prefill, window", [1500], [1500], 8, 1, 256, 512),
            ("mixed", [3000, 900, 4000, 17, 600], [1, 32, 400, 17, 1], 32, 8, 128, 0),
            ("mixed, one KV head each", [300, 900, 77], [300, 1, 20], 8, 8, 80, 0),
        ]
    for name, lengths, counts, heads, kv_heads, dim, window in cases:
        (q, *index), k, v = paged(lengths, counts, heads, kv_heads, dim, dtype, device)
        lse = torch.full(q.shape[:2], float("nan"), device=device)
        out = torch.full_like(q, float("nan"))
        triton.paged_attention(q, k[0], v[0], *index, dim**-0.5, window, out, lse)
        wide_lse = torch.empty(q.shape[:2], device=device, dtype=torch.float64)
        wide: list[Any] = [*(t.double() for t in (q, k[0], v[0])), *index, dim**-0.5]
        attend: Any = reference.paged_attention
        exact = attend(*wide, window, None, wide_lse)
        lse_error = (lse.double() - wide_lse).abs().max().item()
        _row(rows, f"paged_attention {name}", out, exact, dtype, lse_error < 1e-3)


def _check_rows(rows: Rows, device: torch.device, dtype: torch.dtype) -> None:
    x, residual, gate = (torch.randn(9, 576, device=device).to(dtype) for _ in range(3))
    weight, summed = torch.randn(576, device=device), residual.clone()
    exact = reference.rms_norm((x + residual).double(), weight.double(), 1e-5)
    out = triton.rms_norm(x, weight, 1e-5, summed)
    _row(rows, "rms_norm", out, exact, dtype, _same(summed, x + residual, device))
    _row(rows, "silu_mul", triton.silu_mul(x, gate), reference.silu_mul(x.double(), gate.double()), dtype)
    table = ops.rope_table(1.0 / 1e4 ** (torch.arange(0, 32, 2) / 32), 64).to(device)
    positions = torch.arange(9, dtype=torch.int32, device=device)
    for interleaved in (False, True):
        turned = x.view(9, 9, 64).clone()
        wanted = turned.clone()
        triton.rope(turned, positions, table, interleaved)
        reference.rope(wanted, positions, table, interleaved)
        _row(rows, "rope, every bit", turned, wanted.double(), dtype, _same(turned, wanted, device))


def _same(got: Tensor, wanted: Tensor, device: torch.device) -> bool:
    """Bit for bit; Triton's interpreter truncates to bfloat16."""
    if device.type == "cpu" and got.dtype == torch.bfloat16:
        return bool((got.view(torch.int16).int() - wanted.view(torch.int16).int()).abs().max() <= 1)
    return torch.equal(got, wanted)


def _row(rows: Rows, op: str, out: Tensor, exact: Tensor, dtype: torch.dtype, also: bool = True) -> None:
    error = ((out.double() - exact).norm() / exact.norm()).item()
    rows.add(
        check=op,
        dtype=str(dtype)[6:],
        error=error,
        allowed=ALLOWED[dtype],
        ok=also and error <= ALLOWED[dtype],
    )


def _time(rows: Rows, device: torch.device, shapes: str, ceilings: Ceilings, small: bool) -> None:
    hidden, inner, layers, heads, kv_heads, dim, *_ = SHAPES[shapes]
    dtype = torch.float32 if small else torch.bfloat16
    peak = ceilings.gemm[str(dtype)[6:]]
    size = dtype.itemsize
    cases = [([48], [1]), ([40], [20])] if small else [
        ([1024], [1]), ([6064], [1]), ([32768], [1]), ([1024] * 8, [1] * 8), ([1024] * 64, [1] * 64),
        ([6096], [32]), ([6231], [167]), ([6064], [6064]), ([4096] * 8 + [2048], [1] * 8 + [256]),
    ]  # fmt: skip
    for lengths, counts in cases:
        used = min(layers, 4) if sum(counts) > 1000 else layers
        (q, *index), k, v = paged(lengths, counts, heads, kv_heads, dim, dtype, device, used)
        out = torch.empty_like(q)
        pairs = sum(c * (n - c) + c * (c + 1) // 2 for n, c in zip(lengths, counts, strict=True))
        flops, moved = 4.0 * pairs * heads * dim, 2 * sum(lengths) * kv_heads * dim * size
        floor = max(moved / ceilings.read, flops / peak)
        rest = (*index, dim**-0.5, 0, out, None, max(counts))
        calls = [partial(triton.paged_attention, q, k[i], v[i], *rest) for i in range(used)]
        ms = device_ms(calls, device)
        keys = f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else "mixed"
        name = f"{sum(counts)} rows, {keys} keys"
        rows.add(op="paged_attention", shape=name, us_p50=1e3 * ms, share_of_limit=1e3 * floor / ms)
    _time_rows(rows, device, dtype, hidden, inner, heads, dim, ceilings, small)


def _time_rows(
    rows: Rows,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    inner: int,
    heads: int,
    dim: int,
    ceilings: Ceilings,
    small: bool,
) -> None:
    table = ops.rope_table(torch.rand(dim // 2), 8192).to(device)
    weight = torch.randn(hidden, device=device, dtype=dtype)
    for tokens in (2,) if small else (1, 6064):
        positions = torch.arange(tokens, dtype=torch.int32, device=device)
        x, y = (torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(2))
        gate, up = (torch.randn(tokens, inner, device=device).to(dtype) for _ in range(2))
        q = torch.randn(tokens, heads, dim, device=device).to(dtype)
        timed = [
            ("rms_norm", partial(triton.rms_norm, x, weight, 1e-5, y), 4 * x.nbytes),
            ("silu_mul", partial(triton.silu_mul, gate, up), 3 * gate.nbytes),
            ("rope", partial(triton.rope, q, positions, table), 2 * q.nbytes),
        ]
        for op, call, moved in timed:
            us = 1e3 * device_ms([call] * (1 if small else 20), device)
            rows.add(
                op=op, shape=f"{tokens} rows", us_p50=us, share_of_limit=1e6 * moved / ceilings.copy / us
            )


if __name__ == "__main__":
    main()
