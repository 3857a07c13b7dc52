"""splice_kv on the GPU: a stored record's K and V of all layers into pages, K rotated to its new positions.

The same write as append_kv's, one program for each token and layer, so that the bits agree.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from memos_engine.kernels.append_kv import write_token
from torch import Tensor


@triton.jit
def splice_kernel(
    k,
    v,
    k_pages,
    v_pages,
    slot_mapping,
    positions,
    cos_sin,
    k_layer,
    k_token,
    k_head,
    v_layer,
    v_token,
    v_head,
    kp_layer,
    kp_block,
    kp_token,
    kp_head,
    vp_layer,
    vp_block,
    vp_token,
    vp_head,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    position = tl.load(positions + token).to(tl.int64)
    if slot >= 0:
        write_token(
            k + layer * k_layer, v + layer * v_layer, k_pages + layer * kp_layer, v_pages + layer * vp_layer,
            slot, position, cos_sin,
            k_token, k_head, v_token, v_head, kp_block, kp_token, kp_head, vp_block, vp_token, vp_head, token,
            PAGE, HEADS, DIM, HALF, INTERLEAVED, BLOCK_H, BLOCK_D,
        )  # fmt: skip


def splice_kv(
    src_k: Tensor,
    src_v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool = False,
) -> None:
    """`src [layers, tokens, kv_heads, head_dim]` into `[layers, blocks, page, kv_heads, head_dim]`."""
    layers, tokens, heads, dim = src_k.shape
    if layers == 0 or tokens == 0:
        return
    splice_kernel[(tokens, layers)](
        src_k,
        src_v,
        k_pages,
        v_pages,
        slot_mapping,
        positions,
        src_k.new_empty(0, dtype=torch.float32) if cos_sin is None else cos_sin,
        *src_k.stride()[:3],
        *src_v.stride()[:3],
        *k_pages.stride()[:4],
        *v_pages.stride()[:4],
        PAGE=k_pages.shape[2],
        HEADS=heads,
        DIM=dim,
        HALF=0 if cos_sin is None else cos_sin.shape[1] // 2,
        INTERLEAVED=interleaved,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(dim),
        enable_fp_fusion=False,
    )
