"""K and V in eight bits: what the values stand for, and their scales as native code takes them.

In a record, K has a scale for each channel and group of `GROUP` tokens, counted from the record's beginning,
and V has one for each token and head. In pages, both have one for each token and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
NO_SCALES = (0,) * 10

LIMIT = 127
# A scale is a 127th of the largest size, but not subnormal, where steps are too coarse to keep errors within
# half a scale; and 127 times it is finite, which rounding up denies to a 127th of float32's own maximum.
_LEAST_SCALE = 2.0**-126
_MOST_SCALE = (2.0**128 - 2.0**105) / LIMIT


def scale_of(largest: Tensor) -> Tensor:
    """The scale of values of at most this size, `largest` float32 of any shape: 0 where that is 0."""
    limit = largest.new_full((), LIMIT)  # on a GPU, torch multiplies by the inverse of a plain number
    return torch.where(largest > 0, (largest / limit).clamp_(_LEAST_SCALE, _MOST_SCALE), 0.0)


def rounded(wide: Tensor, scale: Tensor) -> Tensor:
    """The nearest multiples of the scale as int8, ties to even; where it is 0, so are all values."""
    multiples = wide / torch.where(scale > 0, scale, 1.0)
    return multiples.round_().clamp_(-LIMIT, LIMIT).to(torch.int8)


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [..., kv_heads, head_dim]`, finite floats, as int8 of that shape and scales `[..., kv_heads]
    float32`: V of records, and both sides of pages."""
    wide = x.float()
    scale = scale_of(wide.abs().amax(dim=-1))
    return rounded(wide, scale[..., None]), scale


def dequantize_k(values: Tensor, scale: Tensor, first_token: int = 0) -> Tensor:
    """`values [..., tokens, kv_heads, head_dim] int8` times their scales, in float32.

    scale: `[..., groups, kv_heads, head_dim] float32`, of the whole record. first_token: which token of the
    record the first of these is.
    """
    tokens = torch.arange(first_token, first_token + values.shape[-3], device=values.device)
    return values.float() * scale.index_select(-3, tokens // GROUP)


def dequantize_v(values: Tensor, scale: Tensor) -> Tensor:
    """`values [..., tokens, kv_heads, head_dim] int8` times `scale [..., tokens, kv_heads]`, in float32."""
    return values.float() * scale[..., None]


def native_arguments(k_scale: Tensor | None, v_scale: Tensor | None, first_token: int) -> tuple[int, ...]:
    """The end of the native writers' argument list (csrc/bind_kv_write.h): zeros where sources are floats."""
    if k_scale is None or v_scale is None:
        return NO_SCALES
    pointers = (k_scale.data_ptr(), v_scale.data_ptr())
    return (*pointers, k_scale.shape[1], first_token, *k_scale.stride()[:3], *v_scale.stride())


def page_arguments(k_page_scale: Tensor | None, v_page_scale: Tensor | None) -> tuple[int, int, int, int]:
    """What follows those: pointers to int8 pages' scales and their strides by layer, 0 for float pages."""
    if k_page_scale is None or v_page_scale is None:
        return 0, 0, 0, 0
    strides = [t.stride(0) if t.dim() == 4 else 0 for t in (k_page_scale, v_page_scale)]
    return k_page_scale.data_ptr(), v_page_scale.data_ptr(), strides[0], strides[1]
