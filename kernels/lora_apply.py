"""lora_apply on the GPU: low-rank deltas for rows grouped by adapter, of any ranks, without padding.

One program takes one segment of rows, one projection and one tile of its outputs. For few rows it makes the
shrunk rows itself, which costs less than a second launch; for many (prefill) a kernel of its own makes them
once. Slots are read when the kernel runs, so that a captured graph follows what is published.
The idea of gathering weights by pointer is Punica's (arXiv 2310.18547).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# As in ops/lora.py, which a kernel must not import.
PARTS = ("q", "k", "v", "o", "gate", "up", "down")
BLOCK, SEGMENT_ROWS = 32, 16
FUSED_ROWS = 64  # rows of a step up to which every tile shrinks for itself


@triton.jit
def descriptor(pointers, slot, layer, part, PARTS_OF_LAYER: tl.constexpr):
    """Addresses of a and b, rank and scale of a slot's delta; rank 0 where there is none."""
    address = tl.load(pointers + slot)
    there = address != 0
    words = address.to(tl.pointer_type(tl.int64)) + (layer * PARTS_OF_LAYER + part) * 3
    a = tl.load(words, mask=there, other=0)
    b = tl.load(words + 1, mask=there, other=0)
    last = tl.load(words + 2, mask=there, other=0)
    scale = (last >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return a, b, (last & 0xFFFFFFFF).to(tl.int32), scale


@triton.jit
def shrunk(
    x, a, row, live, x_token, first, rank, INPUTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`x[row] @ a[first : first + BLOCK_R].T` in float32; a is a pointer."""
    ranks = first + tl.arange(0, BLOCK_R)
    total = tl.zeros([row.shape[0], BLOCK_R], tl.float32)
    for k in range(0, INPUTS, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        inside = column < INPUTS
        left = tl.load(
            x + row[:, None] * x_token + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        right = tl.load(
            a + ranks[None, :] * INPUTS + column[:, None],
            mask=(ranks < rank)[None, :] & inside[:, None],
            other=0.0,
        ).to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    return total


@triton.jit
def shrink_kernel(
    x, mid, pointers, order, start, slot, layer, part, x_token, mid_row,
    INPUTS: tl.constexpr, PARTS_OF_LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (segments). mid `[rows in order, mid_row] float32`, not scaled."""
    segment = tl.program_id(0)
    which = tl.load(slot + segment)
    first = tl.load(start + segment)
    count = tl.load(start + segment + 1) - first
    if (which < 0) | (count <= 0):
        return
    address, _, rank, _ = descriptor(pointers, which, layer, part, PARTS_OF_LAYER)
    a = address.to(tl.pointer_type(x.dtype.element_ty))
    at = tl.arange(0, ROWS)
    live = at < count
    row = tl.load(order + first + at, mask=live, other=0).to(tl.int64)
    for r in range(0, rank, BLOCK_R):
        made = shrunk(x, a, row, live, x_token, r, rank, INPUTS, BLOCK_R, BLOCK_K)
        ranks = r + tl.arange(0, BLOCK_R)
        place = mid + (first + at)[:, None].to(tl.int64) * mid_row + ranks[None, :]
        tl.store(place, made, mask=live[:, None] & (ranks < rank)[None, :])


@triton.jit
def expand_kernel(
    x, mid, out, pointers, order, start, slot, scale, layer, part, x_token, mid_row, out_token,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PARTS_OF_LAYER: tl.constexpr, FUSED: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (segments, tiles of BLOCK_N outputs). FUSED: shrinks by itself; mid is not read then."""
    segment = tl.program_id(0)
    which = tl.load(slot + segment)
    first = tl.load(start + segment)
    count = tl.load(start + segment + 1) - first
    if (which < 0) | (count <= 0):
        return
    to_a, to_b, rank, own = descriptor(pointers, which, layer, part, PARTS_OF_LAYER)
    if rank == 0:
        return
    a = to_a.to(tl.pointer_type(x.dtype.element_ty))
    b = to_b.to(tl.pointer_type(x.dtype.element_ty))
    at = tl.arange(0, ROWS)
    live = at < count
    row = tl.load(order + first + at, mask=live, other=0).to(tl.int64)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = output < OUTPUTS
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for r in range(0, rank, BLOCK_R):
        ranks = r + tl.arange(0, BLOCK_R)
        if FUSED:
            middle = shrunk(x, a, row, live, x_token, r, rank, INPUTS, BLOCK_R, BLOCK_K)
        else:
            place = mid + (first + at)[:, None].to(tl.int64) * mid_row + ranks[None, :]
            middle = tl.load(place, mask=live[:, None] & (ranks < rank)[None, :], other=0.0)
        weights = b + ((output // GROUP) * GROUP * rank + output % GROUP)[None, :] + ranks[:, None] * GROUP
        right = tl.load(weights, mask=(ranks < rank)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.dot(middle, right, input_precision="ieee")
    place = out + row[:, None] * out_token + output[None, :]
    mask = live[:, None] & inside[None, :]
    before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    result = before + total * (own * tl.load(scale + segment))
    tl.store(place, result.to(out.dtype.element_ty), mask=mask)


def lora_apply(
    x: Tensor, outs: Sequence[Tensor], table: Any, layer: int, parts: Sequence[str], rows: Any
) -> None:
    """As `ops.lora_apply` (table and rows: `ops.lora`). Reads no tensor's values: graphs can capture it."""
    segments, count, inputs = rows.slot.shape[0], rows.order.shape[0], x.shape[1]
    if segments == 0 or count == 0:
        return
    fused = count <= FUSED_ROWS
    mid = x if fused else torch.empty((count, table.max_rank), dtype=torch.float32, device=x.device)
    lists = (table.pointers, rows.order, rows.start, rows.slot)
    sizes = {"INPUTS": inputs, "PARTS_OF_LAYER": len(PARTS), "ROWS": SEGMENT_ROWS, "BLOCK_R": 16}
    sizes["BLOCK_K"] = min(128, max(16, triton.next_power_of_2(inputs)))
    for part, out in zip(parts, outs, strict=True):
        number = PARTS.index(part)
        if not fused:
            shrink_kernel[(segments,)](
                x, mid, *lists, layer, number, x.stride(0), mid.stride(0), **sizes
            )  # fmt: skip
        block_n = 128
        expand_kernel[(segments, triton.cdiv(out.shape[1], block_n))](
            x, mid, out, *lists, rows.scale, layer, number, x.stride(0), mid.stride(0), out.stride(0),
            OUTPUTS=out.shape[1], FUSED=fused, GROUP=BLOCK, BLOCK_N=block_n, **sizes,
        )  # fmt: skip
