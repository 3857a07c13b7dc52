"""RMS norm on the GPU (Zhang and Sennrich, arXiv 1910.07467), with the residual sum in front of it.

One program norms as many rows as make a worthwhile tile: one of a hidden state, several of q or k by head.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    residual,
    out,
    tokens,
    x_token,
    residual_token,
    out_token,
    eps,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_W)[None, :]
    inside = (token < tokens) & (column < WIDTH)
    wide = tl.load(x + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = residual + token * residual_token + column
        total = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + wide).to(residual.dtype.element_ty)
        tl.store(at, total, mask=inside)
        wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / WIDTH
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(mean + eps)[:, None] * scale
    tl.store(out + token * out_token + column, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """As `ops.rms_norm`: `x [tokens, hidden]`, normed after `residual += x` where a residual is given."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    tokens, width = x.shape
    if tokens == 0 or width == 0:
        return out
    block_w = triton.next_power_of_2(width)
    block_t = max(1, 1024 // block_w)
    other = x if residual is None else residual
    rms_norm_kernel[(triton.cdiv(tokens, block_t),)](
        x,
        weight,
        other,
        out,
        tokens,
        x.stride(0),
        other.stride(0),
        out.stride(0),
        eps,
        WIDTH=width,
        RESIDUAL=residual is not None,
        BLOCK_T=block_t,
        BLOCK_W=block_w,
        num_warps=min(16, max(4, block_w // 512)),
    )
    return out
