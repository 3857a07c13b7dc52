"""The backend of CUDA tensors: native kernels where nvcc built them, Triton, else the reference."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from memos_engine.ops import dense as dense_ops
from memos_engine.ops import reference
from memos_engine.ops.int8_kv import NO_SCALES, dequantize_v, native_arguments, page_arguments
from memos_engine.ops.lora import PARTS, LoraRows, LoraTable
from memos_engine.ops.reference import linear

__all__ = [
    "append_kv",
    "attention_probe",
    "linear",
    "lora_apply",
    "paged_attention",
    "rms_norm",
    "rope",
    "silu_mul",
    "splice_kv",
]

P = ParamSpec("P")
R = TypeVar("R")

# Rows with an adapter up to which the native kernel serves; it reads a and b anew for each four of them.
LORA_ROWS = 64
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def _load_native() -> Any:
    try:
        from memos_engine import _cuda
    except ImportError:
        return None
    return _cuda


def _load_triton() -> Any:
    """Triton's backend, or the reference in its place."""
    if importlib.util.find_spec("triton") is None:
        logging.getLogger("memos_engine").warning(
            "memos_engine: Triton is not installed; attention and the other GPU kernels are the slow torch "
            "reference. Install memos-engine[cuda] for speed."
        )
        return reference
    from memos_engine.ops import triton

    return triton


_native = _load_native()
_triton: Any = _load_triton()
NAME = "cuda" if _native else str(_triton.NAME)
# Whether a CUDA graph may capture these ops: the reference reads lengths on the host.
CAPTURABLE = _triton is not reference
_several = torch.cuda.device_count() > 1


def _triton_for(*tensors: Tensor) -> Any:
    """Triton, unless a tensor is of a dtype that only the reference computes in (float64)."""
    return _triton if all(t.dtype in _DTYPES for t in tensors) else reference


def _on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _several:
            return function(*args, **kwargs)
        first: Any = args[0]
        with torch.cuda.device(first.device):
            return function(*args, **kwargs)

    return guarded


@_on_its_device
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    q_pos: Tensor,
    sm_scale: float,
    window: int = 0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    max_query_len: int | None = None,
    dense: bool = False,
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> Tensor:
    """As `ops.backend.Backend.paged_attention`; a library for dense prefill may serve `dense`."""
    args = (q, k_pages, v_pages, block_table, query_start, seq_lens, q_pos, sm_scale, window, out, lse)
    if dense and lse is None:
        sides = (k_pages, k_page_scale), (v_pages, v_page_scale)
        result = _dense(q, sides, block_table, sm_scale, window)
        if result is not None:
            return result if out is None else out.copy_(result)
    attended: Tensor = _triton_for(q, k_pages).paged_attention(
        *args, max_query_len, k_page_scale=k_page_scale, v_page_scale=v_page_scale
    )
    return attended


def _dense(
    q: Tensor,
    sides: tuple[tuple[Tensor, Tensor | None], ...],
    block_table: Tensor,
    sm_scale: float,
    window: int,
) -> Tensor | None:
    """The one request's keys out of their pages, then the library. sides: K and V, each pages and scale."""
    if dense_ops.available() is None:
        return None
    tokens, page = q.shape[0], sides[0][0].shape[1]
    blocks = block_table[0, : -(-tokens // page)].long()

    def read(pages: Tensor, scale: Tensor | None) -> Tensor:
        values = pages[blocks] if scale is None else dequantize_v(pages[blocks], scale[blocks]).to(q.dtype)
        return values.flatten(0, 1)[:tokens]

    k, v = (read(*side) for side in sides)
    return dense_ops.dense_prefill(q, k, v, sm_scale, window)


@_on_its_device
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
    keys = (key_slots, key_pos, key_start, weight, scores)
    _triton_for(q, k_pages).attention_probe(
        q, k_pages, query_start, q_pos, lse, *keys, sm_scale, window, k_page_scale
    )


@_on_its_device
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    normed: Tensor = _triton_for(x, weight).rms_norm(x, weight, eps, residual, out)
    return normed


@_on_its_device
def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    _triton_for(x).rope(x, positions, cos_sin, interleaved)


@_on_its_device
def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    product: Tensor = _triton_for(gate).silu_mul(gate, up, out)
    return product


@_on_its_device
def lora_apply(
    x: Tensor, outs: Sequence[Tensor], table: LoraTable, layer: int, parts: Sequence[str], rows: LoraRows
) -> None:
    ops = _triton_for(x)
    segments, count = rows.slot.shape[0], rows.order.shape[0]
    if not _native or ops is not _triton or count > LORA_ROWS or table.max_rank > _native.LORA_MAX_RANK:
        ops.lora_apply(x, outs, table, layer, parts, rows)
    elif segments and count:
        lists = (table.pointers, rows.order, rows.start, rows.slot, rows.scale)
        _native.lora_apply(
            x.data_ptr(),
            [out.data_ptr() for out in outs],
            [PARTS.index(part) for part in parts],
            [out.shape[1] for out in outs],
            [out.stride(0) for out in outs],
            _DTYPES[x.dtype],
            *x.shape,
            x.stride(0),
            layer,
            [t.data_ptr() for t in lists],
            [segments, count, table.pointers.shape[0], table.layers],
            table.max_rank,
            torch.cuda.current_stream(x.device).cuda_stream,
        )


@_on_its_device
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
    ops, page_scales = _triton_for(k, k_pages), (k_page_scale, v_page_scale)
    if _native and ops is _triton:
        tensors = (k.unsqueeze(0), v.unsqueeze(0), k_pages.unsqueeze(0), v_pages.unsqueeze(0))
        scales = (*NO_SCALES, *page_arguments(*page_scales))
        _write(_native.append_kv, tensors, slot_mapping, positions, cos_sin, interleaved, scales)
    else:
        ops.append_kv(k, v, k_pages, v_pages, slot_mapping, positions, cos_sin, interleaved, *page_scales)


@_on_its_device
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
    ops, page_scales = _triton_for(src_k, k_pages), (k_page_scale, v_page_scale)
    tensors, rest = (src_k, src_v, k_pages, v_pages), (slot_mapping, positions, cos_sin, interleaved)
    if _native and ops is _triton:
        scales = (*native_arguments(k_scale, v_scale, first_token), *page_arguments(*page_scales))
        _write(_native.splice_kv, tensors, *rest, scales)
    else:
        ops.splice_kv(*tensors, *rest, k_scale, v_scale, first_token, *page_scales)


def _write(
    launch: Any,
    tensors: tuple[Tensor, ...],
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool,
    scales: tuple[int, ...],
) -> None:
    """Launches on the current stream of the tensors' device; all four tensors have a layer dimension. scales:
    of int8 sources, then of pages."""
    k, _, k_pages, _ = tensors
    layers, tokens, kv_heads, dim = k.shape
    launch(
        *(t.data_ptr() for t in tensors),
        slot_mapping.data_ptr(),
        positions.data_ptr(),
        0 if cos_sin is None else cos_sin.data_ptr(),
        0 if scales[0] else _DTYPES[k.dtype],  # int8 is told by its scales
        _DTYPES[k_pages.dtype],
        layers,
        tokens,
        kv_heads,
        dim,
        *k_pages.shape[1:3],
        *((0, 0) if cos_sin is None else cos_sin.shape),
        *(stride for t in tensors for stride in t.stride()[:-1]),
        interleaved,
        *scales,
        torch.cuda.current_stream(k.device).cuda_stream,
    )
