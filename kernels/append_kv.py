"""append_kv on the GPU: rotate new K, round, scatter K and V into one layer's pages.

One program writes one token of one layer. Every value is widened to float32 right after its load and rounded
once at its store; products and sums are kept apart (`enable_fp_fusion=False`), so that the bits are those of
the reference.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def store_heads(
    x,
    to,
    scale_to,
    head,
    channel,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Rounds `x [BLOCK_H, BLOCK_D] float32`, zeros outside HEADS x DIM, and stores it to the pointers `to`.

    QUANTIZED: to int8, as ops/int8_kv.py defines it; the heads' scales go to the pointers `scale_to`.
    """
    inside = (head < HEADS) & (channel < DIM)
    if QUANTIZED:
        largest = tl.max(tl.abs(x), axis=1)[:, None]
        scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
        # Never subnormal, and 127 times it is finite.
        scale = tl.minimum(tl.maximum(scale, 1.1754943508222875e-38), 2.679388396504876e36)
        multiple = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
        multiple = tl.minimum(tl.maximum(multiple, -127.0), 127.0)
        # Adding 1.5 * 2^23 rounds to a whole number, ties to even.
        whole = (multiple + 12582912.0) - 12582912.0
        tl.store(to, whole.to(tl.int8), mask=inside)
        tl.store(scale_to, tl.where(largest > 0.0, scale, 0.0), mask=head < HEADS)
    else:
        tl.store(to, x.to(to.dtype.element_ty), mask=inside)


@triton.jit
def write_token(
    k,
    v,
    k_pages,
    v_pages,
    slot,
    position,
    cos_sin,
    k_token,
    k_head,
    v_token,
    v_head,
    kp_block,
    kp_token,
    kp_head,
    vp_block,
    vp_token,
    vp_head,
    token,
    k_scale,
    v_scale,
    ks_head,
    vs_head,
    k_page_scale,
    v_page_scale,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token; the pointers are those of one layer. HALF is rotary_dim / 2, 0 for no rotation.

    SCALED: values are int8; k_scale and v_scale point to the scales of this token. QUANTIZED: pages are int8;
    k_page_scale and v_page_scale are `[blocks, page, kv_heads]`, contiguous.
    """
    head = tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (channel < DIM)
    block = slot // PAGE
    offset = slot % PAGE

    k_row = k + token * k_token + head * k_head
    scale_row = k_scale + head * ks_head
    x = tl.load(k_row + channel, mask=inside, other=0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scale_row + channel, mask=inside, other=0.0)
    if HALF > 0:
        if INTERLEAVED:
            partner = channel ^ 1
            pair = channel // 2
            first = channel % 2 == 0
        else:
            partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
            pair = channel % HALF
            first = channel < HALF
        turned = channel < 2 * HALF
        y = tl.load(k_row + partner, mask=inside & turned, other=0).to(tl.float32)
        if SCALED:
            y = y * tl.load(scale_row + partner, mask=inside & turned, other=0.0)
        row = cos_sin + position * (2 * HALF)
        cos = tl.load(row + pair, mask=turned, other=1.0)
        sin = tl.load(row + HALF + pair, mask=turned, other=0.0)
        x = tl.where(turned, tl.where(first, x * cos - y * sin, x * cos + y * sin), x)
    k_to = k_pages + block * kp_block + offset * kp_token + head * kp_head + channel
    scale_at = slot * HEADS + head
    store_heads(x, k_to, k_page_scale + scale_at, head, channel, HEADS, DIM, QUANTIZED)

    value = tl.load(v + token * v_token + head * v_head + channel, mask=inside, other=0).to(tl.float32)
    if SCALED:
        value = value * tl.load(v_scale + head * vs_head, mask=head < HEADS, other=0.0)
    v_to = v_pages + block * vp_block + offset * vp_token + head * vp_head + channel
    store_heads(value, v_to, v_page_scale + scale_at, head, channel, HEADS, DIM, QUANTIZED)


@triton.jit
def append_kernel(
    k,
    v,
    k_pages,
    v_pages,
    slot_mapping,
    positions,
    cos_sin,
    k_token,
    k_head,
    v_token,
    v_head,
    kp_block,
    kp_token,
    kp_head,
    vp_block,
    vp_token,
    vp_head,
    k_page_scale,
    v_page_scale,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    position = tl.load(positions + token).to(tl.int64)
    if slot >= 0:
        write_token(
            k, v, k_pages, v_pages, slot, position, cos_sin,
            k_token, k_head, v_token, v_head, kp_block, kp_token, kp_head, vp_block, vp_token, vp_head, token,
            k, v, 0, 0, k_page_scale, v_page_scale,
            PAGE, HEADS, DIM, HALF, INTERLEAVED, False, QUANTIZED, BLOCK_H, BLOCK_D,
        )  # fmt: skip


def append_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool = False,
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> None:
    """`k, v [tokens, kv_heads, head_dim]` into pages `[blocks, page, kv_heads, head_dim]`, of which int8 ones
    have scales `[blocks, page, kv_heads] float32`."""
    tokens, heads, dim = k.shape
    if tokens == 0:
        return
    nothing = k.new_empty(0, dtype=torch.float32)
    append_kernel[(tokens,)](
        k,
        v,
        k_pages,
        v_pages,
        slot_mapping,
        positions,
        nothing if cos_sin is None else cos_sin,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        nothing if k_page_scale is None else k_page_scale,
        nothing if v_page_scale is None else v_page_scale,
        PAGE=k_pages.shape[1],
        HEADS=heads,
        DIM=dim,
        HALF=0 if cos_sin is None else cos_sin.shape[1] // 2,
        INTERLEAVED=interleaved,
        QUANTIZED=k_page_scale is not None,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(dim),
        enable_fp_fusion=False,
    )
