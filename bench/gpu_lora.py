"""`lora_apply` on a device: the CUDA kernel and Triton's, right by float64, and beside a read of their bytes.

python -m memos_engine.bench.gpu_lora DEVICE SHAPES TARGET
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.gpu_timing import Rows, ceilings_of, device_ms
from memos_engine.bench.target import SHAPES
from torch import Tensor

from memos_engine.ops import cuda, reference, triton
from memos_engine.ops.lora import LoraFill, LoraRows, LoraTable, pack, unblocked

ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
RANKS = (1, 3, 16, 64, 0, 8)
LAYERS = 8  # whose deltas are read in turn, so that the cache does not decide


def main() -> None:
    device, shapes, target = torch.device(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    ceilings = ceilings_of(device)
    rows = Rows(target, ceilings=ceilings.public(), native=native_here(device))
    for dtype in ALLOWED:
        for slots in ([0], [3], [2, -1, 0, 0, 1, 4, 2, 6, 5, 2, 2], [2] * 19, list(range(6)) * 5):
            _check(rows, device, dtype, slots)
    small = device.type == "cpu"
    hidden, inner = SHAPES[shapes][:2]
    for batch in (1,) if small else (1, 8, 32):
        for rank in (16,) if small else (8, 16, 64):
            for adapters in sorted({1, batch}):
                _time(rows, device, hidden, inner, batch, rank, adapters, ceilings.read)
    wrong = [row for row in rows.rows if row.get("ok") is False]
    print(f"{len(wrong)} checks failed" if wrong else f"{len(rows.rows)} rows, every check passed")
    raise SystemExit(bool(wrong))


def native_here(device: torch.device) -> bool:
    return device.type == "cuda" and cuda._native is not None


def backends(device: torch.device) -> dict[str, Any]:
    """Ways to run the op; the CUDA module's where it can run."""
    return ({"cuda": cuda.lora_apply} if native_here(device) else {}) | {"triton": triton.lora_apply}


def table_of(
    ranks: tuple[int, ...],
    inputs: int,
    outputs: dict[str, int],
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LoraTable:
    """A slot for each rank, and an empty one."""
    table = LoraTable(len(ranks) + 1, layers, max(*ranks, 1), device)
    for slot, rank in enumerate(ranks):
        deltas = {
            (layer, part): (torch.randn(rank, inputs) / inputs**0.5, torch.randn(n, rank), 0.5)
            for layer in range(layers)
            for part, n in outputs.items()
            if rank
        }
        table.publish(slot, pack(deltas, layers, dtype, device))
    return table


def rows_of(slots: list[int], device: torch.device) -> LoraRows:
    """Rows by slot, up to 16 a segment; -1 for none."""
    order: list[int] = []
    start, of = [0], []
    for slot in sorted(set(slots)):
        mine = [i for i, s in enumerate(slots) if s == slot]
        for at in range(0, len(mine), 16):
            order += mine[at : at + 16]
            start.append(len(order))
            of.append(slot)
    where: Any = {"dtype": torch.int32, "device": device}
    lists = torch.tensor(order, **where), torch.tensor(start, **where), torch.tensor(of, **where)
    return LoraRows(*lists, torch.full((len(of),), 0.75, device=device))


def _check(rows: Rows, device: torch.device, dtype: torch.dtype, slots: list[int]) -> None:
    outputs = {"q": 200, "k": 33, "v": 65} if device.type == "cpu" else {"q": 1200, "k": 513, "v": 65}
    inputs, parts = 100, tuple(outputs)
    table = table_of(RANKS, inputs, outputs, 2, dtype, device)
    x = torch.randn(len(slots), inputs, device=device).to(dtype)
    before = [torch.randn(len(slots), n, device=device).to(dtype) for n in outputs.values()]
    exact = _exact(x, before, table, parts, slots)
    plain = [i for i, slot in enumerate(slots) if slot < 0]
    for name, apply in backends(device).items():
        outs = [out.clone() for out in before]
        apply(x, outs, table, 1, parts, rows_of(slots, device))
        error = max(((o.double() - e).norm() / e.norm()).item() for o, e in zip(outs, exact, strict=True))
        kept = all(torch.equal(o[plain], b[plain]) for o, b in zip(outs, before, strict=True))
        rows.add(
            check=f"lora_apply {len(slots)} rows",
            backend=name,
            dtype=str(dtype)[6:],
            error=error,
            allowed=ALLOWED[dtype],
            ok=kept and error <= ALLOWED[dtype],
        )


def _exact(
    x: Tensor, before: list[Tensor], table: LoraTable, parts: tuple[str, ...], slots: list[int]
) -> list[Tensor]:
    """Row by row in float64."""
    results = [out.double() for out in before]
    for row, slot in enumerate(slots):
        fill: LoraFill | None = None if slot < 0 else table.fills[slot]
        for part, result in zip(parts, results, strict=True):
            delta = None if fill is None else fill.deltas.get((1, part))
            if delta is not None:
                middle = delta.a.double() @ x[row].double() * (delta.scale * 0.75)
                result[row] += unblocked(delta).double() @ middle
    return results


def _time(
    rows: Rows,
    device: torch.device,
    hidden: int,
    inner: int,
    batch: int,
    rank: int,
    adapters: int,
    read: float,
) -> None:
    """gate and up of a batch over so many adapters; the limit is a read of their deltas."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    outputs = {"gate": inner, "up": inner}
    table = table_of((rank,) * adapters, hidden, outputs, LAYERS, dtype, device)
    x = torch.randn(batch, hidden, device=device).to(dtype)
    outs = [torch.zeros(batch, inner, device=device, dtype=dtype) for _ in outputs]
    by_slot = rows_of([i % adapters for i in range(batch)], device)
    moved = adapters * rank * 2 * (hidden + inner) * dtype.itemsize
    ways = backends(device) | ({"reference": reference.lora_apply} if device.type == "cpu" else {})
    for name, apply in ways.items():
        calls = [partial(apply, x, outs, table, layer, tuple(outputs), by_slot) for layer in range(LAYERS)]
        us = 1e3 * device_ms(calls, device)
        rows.add(
            op="lora_apply gate up",
            backend=name,
            shape=f"{name}, {batch} rows, {adapters} adapters of rank {rank}",
            us_p50=us,
            share_of_limit=1e6 * moved / read / us,
        )


if __name__ == "__main__":
    main()
