"""attention_probe on the GPU: how much attention query rows pay to chosen keys.

One program takes a block of keys of one request and walks over all rows and heads of it, so that every key's
score is one sum in a fixed order, whatever else is in the batch, and no program meets another's.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from memos_engine.kernels.paged_attention import find_request, first_place
from torch import Tensor

_DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LOG2E = math.log2(math.e)


@triton.jit
def probe_kernel(
    q,
    k_pages,
    query_start,
    q_pos,
    lse,
    key_slots,
    key_pos,
    key_start,
    weight,
    scores,
    requests,
    scale,
    log2e,
    q_token,
    q_head,
    k_block,
    k_slot,
    k_head,
    k_page_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    DOT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of BLOCK_N keys, as `first_place` deals them out). scale: sm_scale * log2(e).

    SCALED: pages are int8; k_page_scale `[blocks, page, kv_heads]`, contiguous.
    """
    place = tl.program_id(0)
    request = find_request(key_start, requests, place, BLOCK_N, 0)
    key_end = tl.load(key_start + request + 1)
    skipped = (place - first_place(key_start, request, BLOCK_N, 0)) * BLOCK_N
    begin = tl.load(key_start + request) + skipped
    first = tl.load(query_start + request)
    rows = (tl.load(query_start + request + 1) - first) * GROUP
    if (skipped < 0) | (begin >= key_end) | (rows == 0):
        return

    key = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)
    slot = tl.load(key_slots + key, mask=key < key_end, other=-1)
    there = slot >= 0
    key_at = tl.load(key_pos + key, mask=there, other=0)
    k_row = k_pages + slot // PAGE * k_block + slot % PAGE * k_slot
    channel = tl.arange(0, BLOCK_D)
    inside = channel < DIM
    total = tl.zeros([BLOCK_N], tl.float32)
    for kv_head in range(KV_HEADS):
        k_at = (k_row + kv_head * k_head)[None, :] + channel[:, None]
        keys = tl.load(k_at, mask=inside[:, None] & there[None, :], other=0.0).to(DOT)
        key_scale = scale
        if SCALED:
            of_key = tl.load(k_page_scale + slot * KV_HEADS + kv_head, mask=there, other=0.0)
            key_scale = (of_key * scale)[None, :]
        paid = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, rows, BLOCK_M):
            packed = start + tl.arange(0, BLOCK_M)
            token = (first + packed // GROUP).to(tl.int64)
            head = kv_head * GROUP + packed % GROUP
            position = tl.load(q_pos + token, mask=packed < rows, other=-1)
            base = tl.load(
                lse + token * (KV_HEADS * GROUP) + head, mask=position >= 0, other=float("-inf")
            )  # fmt: skip
            live = base > float("-inf")
            q_at = q + token[:, None] * q_token + head[:, None] * q_head + channel[None, :]
            query = tl.load(q_at, mask=live[:, None] & inside[None, :], other=0.0).to(DOT)
            x = tl.dot(query, keys, input_precision="ieee") * key_scale - base[:, None] * log2e
            visible = (key_at[None, :] <= position[:, None]) & live[:, None]
            if WINDOW > 0:
                visible = visible & (key_at[None, :] > position[:, None] - WINDOW)
            paid += tl.sum(tl.where(visible, tl.exp2(x), 0.0), axis=0)
        # A key that no row sees takes nothing from its weight, NaN included.
        seen = there & (paid != 0.0)
        share = tl.load(weight + key * KV_HEADS + kv_head, mask=seen, other=0.0)
        total += tl.where(seen, paid * share, 0.0)
    seen = there & (total != 0.0)
    before = tl.load(scores + key, mask=seen, other=0.0)
    tl.store(scores + key, before + total, mask=seen)


def attention_probe(
    q: Tensor,
    k_pages: Tensor,
    query_start: Tensor,
    q_pos: Tensor,
    lse: Tensor,
    key_slots: Tensor,
    key_pos: Tensor,
    key_start: Tensor,
    weight: Tensor,
    scores: Tensor,
    sm_scale: float,
    window: int = 0,
    k_page_scale: Tensor | None = None,
) -> None:
    """As `ops.attention_probe`. Nothing here reads a tensor's values: a CUDA graph can capture it."""
    (tokens, heads, dim), (_, page, kv_heads, _) = q.shape, k_pages.shape
    requests, keys = query_start.shape[0] - 1, key_slots.shape[0]
    if tokens == 0 or requests == 0 or keys == 0:
        return
    # Triton's interpreter, which runs CPU tensors, cannot multiply bfloat16.
    # What int8 holds is exact in either short float.
    same = k_pages.dtype in (q.dtype, torch.int8)
    fast = same and q.dtype in _DOT and (q.device.type != "cpu" or q.dtype == torch.float16)
    dot, block_d = _DOT[q.dtype] if fast else tl.float32, max(16, triton.next_power_of_2(dim))
    block_n = 32  # keys: small, as their blocks alone fill the GPU
    probe_kernel[(keys // block_n + requests,)](
        q, k_pages, query_start, q_pos, lse, key_slots, key_pos, key_start, weight, scores,
        requests, sm_scale * _LOG2E, _LOG2E, *q.stride()[:2], *k_pages.stride()[:3],
        lse if k_page_scale is None else k_page_scale, SCALED=k_page_scale is not None,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, PAGE=page, WINDOW=window, DOT=dot,
        BLOCK_M=32 if block_d > 64 or not fast else 64, BLOCK_N=block_n, BLOCK_D=block_d, num_stages=2,
    )  # fmt: skip
