"""The native CPU backend: tensors to pointers, sizes and strides, nothing else.

Dtypes that the native code does not know (float64) and layouts that it does not take go to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from memos_engine.errors import MemosEngineError
from memos_engine.ops import reference
from memos_engine.ops.cpu_kv import append_kv, splice_kv
from memos_engine.ops.cpu_lora import lora_apply
from memos_engine.ops.cpu_native import DTYPES, PAGE_DTYPES, check_status, native

__all__ = [
    "append_kv",
    "attention_probe",
    "available",
    "isa",
    "linear",
    "lora_apply",
    "native_linear",
    "paged_attention",
    "rms_norm",
    "rope",
    "select_isa",
    "silu_mul",
    "splice_kv",
]

NAME = "native"

# Rows of x for which the native product was faster than torch's (`docs/benchmarks.md`); float32 with fewer
# rows is a tie. Where pairs of bfloat16 are multiplied, 16 rows and more are tiles, for shapes that divide
# into them; with more than a few hundred rows torch catches up.
_TILE_ROWS = 256
_PAIR_ROWS = 32  # whatever the shape
_NATIVE_ROWS = {torch.float32: range(4, 9), torch.bfloat16: range(1, 5), torch.float16: range(1, 5)}


_pairs = False  # whether the level in use multiplies pairs of bfloat16


def available() -> list[str]:
    """Instruction set levels that were compiled and that this machine runs, worst first."""
    return [name for name, supported in native.isa_levels() if supported]


def isa() -> str:
    """The level in use."""
    return str(native.isa_selected())


def select_isa(name: str) -> None:
    """Uses a level by name, or the best one for an empty name."""
    levels = available()
    if not levels:
        raise MemosEngineError(
            "this processor is older than x86-64-v2, the least that the native code needs; "
            "set MEMOS_ENGINE_CPU_ISA=reference"
        )
    wanted = name or levels[-1]
    if not native.isa_select(wanted):
        compiled = [level for level, _ in native.isa_levels()]
        why = "is not supported by this machine" if wanted in compiled else "is not a known level"
        raise MemosEngineError(
            f"MEMOS_ENGINE_CPU_ISA={wanted} {why}; choose one of {', '.join(['reference', *levels])}"
        )
    global _pairs
    _pairs = wanted in ("amx", "avx512bf16")


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
    q_dtype, kv_dtype = DTYPES.get(q.dtype), PAGE_DTYPES.get(k_pages.dtype)
    if q_dtype is None or kv_dtype is None:
        return reference.paged_attention(
            q, k_pages, v_pages, block_table, query_start, seq_lens, q_pos, sm_scale, window, out, lse,
            k_page_scale=k_page_scale, v_page_scale=v_page_scale,
        )  # fmt: skip
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    tokens, heads, dim = q.shape
    blocks, page, kv_heads, _ = k_pages.shape
    requests, max_blocks = block_table.shape
    check_status(
        native.paged_attention(
            q.data_ptr(),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            block_table.data_ptr(),
            query_start.data_ptr(),
            seq_lens.data_ptr(),
            q_pos.data_ptr(),
            q_dtype,
            kv_dtype,
            tokens,
            requests,
            heads,
            kv_heads,
            dim,
            blocks,
            page,
            max_blocks,
            block_table.stride(0),
            *q.stride()[:2],
            *out.stride()[:2],
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            window,
            sm_scale,
            0 if k_page_scale is None else k_page_scale.data_ptr(),
            0 if v_page_scale is None else v_page_scale.data_ptr(),
            get_num_threads(),
        )
    )
    return out


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
    q_dtype, kv_dtype = DTYPES.get(q.dtype), PAGE_DTYPES.get(k_pages.dtype)
    if q_dtype is None or kv_dtype is None:
        keys = (key_slots, key_pos, key_start, weight, scores)
        return reference.attention_probe(
            q, k_pages, query_start, q_pos, lse, *keys, sm_scale, window, k_page_scale
        )
    tokens, heads, dim = q.shape
    blocks, page, kv_heads, _ = k_pages.shape
    return check_status(
        native.attention_probe(
            q.data_ptr(),
            k_pages.data_ptr(),
            query_start.data_ptr(),
            q_pos.data_ptr(),
            lse.data_ptr(),
            key_slots.data_ptr(),
            key_pos.data_ptr(),
            key_start.data_ptr(),
            weight.data_ptr(),
            scores.data_ptr(),
            q_dtype,
            kv_dtype,
            tokens,
            query_start.shape[0] - 1,
            key_slots.shape[0],
            heads,
            kv_heads,
            dim,
            blocks,
            page,
            *q.stride()[:2],
            *k_pages.stride()[:3],
            window,
            sm_scale,
            0 if k_page_scale is None else k_page_scale.data_ptr(),
            get_num_threads(),
        )
    )


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    dtype = DTYPES.get(x.dtype)
    if dtype is None:
        return reference.rope(x, positions, cos_sin, interleaved)
    return check_status(
        native.rope(
            x.data_ptr(),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            dtype,
            *x.shape,
            *x.stride()[:2],
            *cos_sin.shape,
            interleaved,
            get_num_threads(),
        )
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    dtype, weight_dtype = DTYPES.get(x.dtype), DTYPES.get(weight.dtype)
    if dtype is None or weight_dtype is None:
        return reference.rms_norm(x, weight, eps, residual, out)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    native.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        dtype,
        weight_dtype,
        *x.shape,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        get_num_threads(),
    )
    return out


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    dtype = DTYPES.get(gate.dtype)
    if dtype is None:
        return reference.silu_mul(gate, up, out)
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype)
    native.silu_mul(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        dtype,
        *gate.shape,
        gate.stride(0),
        up.stride(0),
        out.stride(0),
        get_num_threads(),
    )
    return out


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    rows, inputs = x.shape
    if scale is not None:
        return (
            native_linear(x, weight, out, scale)
            if x.dtype in DTYPES
            else reference.linear(x, weight, out, scale)
        )
    most = 0
    if _pairs and x.dtype == torch.bfloat16:
        most = _TILE_ROWS if inputs % 32 == 0 and weight.shape[0] % 16 == 0 else _PAIR_ROWS
    if 0 < rows <= most or rows in _NATIVE_ROWS.get(x.dtype, ()):
        return native_linear(x, weight, out)
    return reference.linear(x, weight, out)


def native_linear(
    x: Tensor, weight: Tensor, out: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The native kernel whether it wins or not."""
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    status = native.linear(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        *x.shape,
        weight.shape[0],
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        0 if scale is None else scale.data_ptr(),
        get_num_threads(),
    )
    check_status(status)
    return out
