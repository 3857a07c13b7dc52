"""K and V of a record in eight bits: what the values stand for, and their scales as native code takes them.

K has a scale for each channel and group of `GROUP` tokens, counted from the record's beginning; V has one for
each token and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
NO_SCALES = (0,) * 10


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
