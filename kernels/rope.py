"""RoPE on the GPU, in place (arXiv 2104.09864).

One program turns all heads of one token. A thread holds both channels of a pair before it writes either, so
that no thread can read what another has turned already; products and sums are kept apart
(`enable_fp_fusion=False`), so that the bits are those of the reference and of append_kv.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rope_kernel(
    x,
    positions,
    cos_sin,
    x_token,
    x_head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """HALF is rotary_dim / 2, the number of pairs."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    inside = (head < HEADS) & (pair < HALF)
    row = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF)
    cos = tl.load(row + pair, mask=pair < HALF, other=1.0)
    sin = tl.load(row + HALF + pair, mask=pair < HALF, other=0.0)
    at = x + token * x_token + head * x_head
    if INTERLEAVED:
        first_at = at + 2 * pair
        second_at = first_at + 1
    else:
        first_at = at + pair
        second_at = first_at + HALF
    first = tl.load(first_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(first_at, (first * cos - second * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(second_at, (second * cos + first * sin).to(x.dtype.element_ty), mask=inside)


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    """As `ops.rope`: rotates `x [tokens, heads, head_dim]` in place."""
    tokens, heads, _ = x.shape
    if tokens == 0 or heads == 0:
        return
    half = cos_sin.shape[1] // 2
    rope_kernel[(tokens,)](
        x,
        positions,
        cos_sin,
        *x.stride()[:2],
        HEADS=heads,
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_P=triton.next_power_of_2(half),
        enable_fp_fusion=False,
    )
