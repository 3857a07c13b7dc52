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

GROUP = 64  # tokens of a record that share a row of k_scale


@triton.jit(do_not_specialize=["first_token"])  # it differs from call to call
def splice_kernel(
    k,
    v,
    k_pages,
    v_pages,
    slot_mapping,
    positions,
    cos_sin,
    k_scale,
    v_scale,
    first_token,
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
    ks_layer,
    ks_group,
    ks_head,
    vs_layer,
    vs_token,
    vs_head,
    k_page_scale,
    v_page_scale,
    kps_layer,
    vps_layer,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SCALED: sources are int8; GROUP_TOKENS of a record share a row of k_scale. QUANTIZED: pages are."""
    token = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    position = tl.load(positions + token).to(tl.int64)
    if slot >= 0:
        write_token(
            k + layer * k_layer, v + layer * v_layer, k_pages + layer * kp_layer, v_pages + layer * vp_layer,
            slot, position, cos_sin,
            k_token, k_head, v_token, v_head, kp_block, kp_token, kp_head, vp_block, vp_token, vp_head, token,
            k_scale + layer * ks_layer + (first_token + token) // GROUP_TOKENS * ks_group,
            v_scale + layer * vs_layer + token * vs_token, ks_head, vs_head,
            k_page_scale + layer * kps_layer, v_page_scale + layer * vps_layer,
            PAGE, HEADS, DIM, HALF, INTERLEAVED, SCALED, QUANTIZED, BLOCK_H, BLOCK_D,
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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    first_token: int = 0,
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> None:
    """`src [layers, tokens, kv_heads, head_dim]` into `[layers, blocks, page, kv_heads, head_dim]`.

    With scales src is int8, with scales of pages these are, as in `ops.splice_kv`.
    """
    layers, tokens, heads, dim = src_k.shape
    if layers == 0 or tokens == 0:
        return
    nothing = src_k.new_empty(0, dtype=torch.float32)
    splice_kernel[(tokens, layers)](
        src_k,
        src_v,
        k_pages,
        v_pages,
        slot_mapping,
        positions,
        nothing if cos_sin is None else cos_sin,
        nothing if k_scale is None else k_scale,
        nothing if v_scale is None else v_scale,
        first_token,
        *src_k.stride()[:3],
        *src_v.stride()[:3],
        *k_pages.stride()[:4],
        *v_pages.stride()[:4],
        *((0, 0, 0) if k_scale is None else k_scale.stride()[:3]),
        *((0, 0, 0) if v_scale is None else v_scale.stride()),
        nothing if k_page_scale is None else k_page_scale,
        nothing if v_page_scale is None else v_page_scale,
        0 if k_page_scale is None else k_page_scale.stride(0),
        0 if v_page_scale is None else v_page_scale.stride(0),
        PAGE=k_pages.shape[2],
        HEADS=heads,
        DIM=dim,
        HALF=0 if cos_sin is None else cos_sin.shape[1] // 2,
        INTERLEAVED=interleaved,
        SCALED=k_scale is not None,
        QUANTIZED=k_page_scale is not None,
        GROUP_TOKENS=GROUP,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(dim),
        enable_fp_fusion=False,
    )
