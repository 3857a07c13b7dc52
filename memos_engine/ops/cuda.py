"""The backend of CUDA tensors: the native kernels where nvcc built them, else Triton, else the reference."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from memos_engine.ops import reference
from memos_engine.ops.reference import linear, paged_attention, rms_norm, rope, silu_mul

__all__ = ["append_kv", "linear", "paged_attention", "rms_norm", "rope", "silu_mul", "splice_kv"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load_native() -> Any:
    try:
        from memos_engine import _cuda
    except ImportError:
        return None
    return _cuda


def _load_fallback() -> Any:
    if importlib.util.find_spec("triton") is None:
        logging.getLogger("memos_engine").warning(
            "memos_engine: neither CUDA kernels nor Triton are installed; KV writes use the torch reference. "
            "Install memos-engine[cuda] for speed."
        )
        return reference
    from memos_engine.ops import triton

    return triton


_native = _load_native()
_fallback: Any = reference if _native else _load_fallback()
NAME = "cuda" if _native else str(_fallback.NAME)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool = False,
) -> None:
    if _native and k.dtype in _DTYPES and k_pages.dtype in _DTYPES:
        pages = (k_pages.unsqueeze(0), v_pages.unsqueeze(0))
        _write(
            _native.append_kv,
            (k.unsqueeze(0), v.unsqueeze(0), *pages),
            slot_mapping,
            positions,
            cos_sin,
            interleaved,
        )
    else:
        _fallback.append_kv(k, v, k_pages, v_pages, slot_mapping, positions, cos_sin, interleaved)


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
    tensors = (src_k, src_v, k_pages, v_pages)
    if _native and src_k.dtype in _DTYPES and k_pages.dtype in _DTYPES:
        _write(_native.splice_kv, tensors, slot_mapping, positions, cos_sin, interleaved)
    else:
        _fallback.splice_kv(*tensors, slot_mapping, positions, cos_sin, interleaved)


def _write(
    launch: Any,
    tensors: tuple[Tensor, ...],
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool,
) -> None:
    """Launches on the current stream of the tensors' device; all four tensors have a layer dimension."""
    k, _, k_pages, _ = tensors
    layers, tokens, kv_heads, dim = k.shape
    with torch.cuda.device(k.device):
        launch(
            *(t.data_ptr() for t in tensors),
            slot_mapping.data_ptr(),
            positions.data_ptr(),
            0 if cos_sin is None else cos_sin.data_ptr(),
            _DTYPES[k.dtype],
            _DTYPES[k_pages.dtype],
            layers,
            tokens,
            kv_heads,
            dim,
            *k_pages.shape[1:3],
            *((0, 0) if cos_sin is None else cos_sin.shape),
            *(stride for t in tensors for stride in t.stride()[:-1]),
            interleaved,
            torch.cuda.current_stream(k.device).cuda_stream,
        )
