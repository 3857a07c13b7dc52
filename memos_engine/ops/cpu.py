"""The native CPU backend: tensors to pointers, sizes and strides, nothing else.

Dtypes that the native code does not know (float64) and layouts that it does not take go to the reference.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, get_num_threads

from memos_engine.errors import KernelContractError, MemosEngineError
from memos_engine.ops import reference
from memos_engine.ops.int8_kv import NO_SCALES, native_arguments

NAME = "native"
native: Any = importlib.import_module("memos_engine._cpu")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Rows of x for which the native product was faster than torch's (`docs/benchmarks.md`); float32 with fewer
# rows is a tie. Where pairs of bfloat16 are multiplied, 16 rows and more are tiles, for shapes that divide
# into them; with more than a few hundred rows torch catches up.
_TILE_ROWS = 256
_PAIR_ROWS = 32  # whatever the shape
_NATIVE_ROWS = {torch.float32: range(4, 9), torch.bfloat16: range(1, 5), torch.float16: range(1, 5)}
_MESSAGES = {
    1: "query_start must ascend from 0 and stay within the rows of q",
    2: "a request sees more keys than its row of block_table has blocks for",
    3: "block_table names a block outside the pages",
    4: "slot_mapping names a slot outside the pages",
    5: "a position is negative or has no row in cos_sin; build a longer table with ops.rope_table",
    6: "key_start must ascend from 0 and stay within key_slots",
    7: "key_slots names a slot outside the pages",
    8: "k_scale has no group for some token; first_token counts from the record's beginning",
}


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
) -> Tensor:
    q_dtype, kv_dtype = DTYPES.get(q.dtype), DTYPES.get(k_pages.dtype)
    if q_dtype is None or kv_dtype is None:
        return reference.paged_attention(
            q, k_pages, v_pages, block_table, query_start, seq_lens, q_pos, sm_scale, window, out, lse
        )
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
) -> None:
    q_dtype, kv_dtype = DTYPES.get(q.dtype), DTYPES.get(k_pages.dtype)
    if q_dtype is None or kv_dtype is None:
        return reference.attention_probe(
            q,
            k_pages,
            query_start,
            q_pos,
            lse,
            key_slots,
            key_pos,
            key_start,
            weight,
            scores,
            sm_scale,
            window,
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
            get_num_threads(),
        )
    )


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
    written = _write((k, v, k_pages, v_pages), 1, (0, 0, 0, 0), slot_mapping, positions, cos_sin, interleaved)
    if not written:
        reference.append_kv(k, v, k_pages, v_pages, slot_mapping, positions, cos_sin, interleaved)


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
) -> None:
    tensors = (src_k, src_v, k_pages, v_pages)
    strides = (src_k.stride(0), src_v.stride(0), k_pages.stride(0), v_pages.stride(0))
    rest = (slot_mapping, positions, cos_sin, interleaved)
    scales = native_arguments(k_scale, v_scale, first_token)
    if not _write(tensors, src_k.shape[0], strides, *rest, scales):
        reference.splice_kv(*tensors, *rest, k_scale, v_scale, first_token)


def _write(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    layers: int,
    layer_strides: tuple[int, int, int, int],
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool,
    scales: tuple[int, ...] = NO_SCALES,
) -> bool:
    """Both writers; False when a dtype is not the native code's. With scales, sources are int8."""
    k, v, k_pages, v_pages = tensors
    src_dtype, page_dtype = 0 if scales[0] else DTYPES.get(k.dtype), DTYPES.get(k_pages.dtype)
    if src_dtype is None or page_dtype is None:
        return False
    tokens, kv_heads, dim = k.shape[-3:]
    check_status(
        native.write_kv(
            k.data_ptr(),
            v.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            slot_mapping.data_ptr(),
            positions.data_ptr(),
            0 if cos_sin is None else cos_sin.data_ptr(),
            src_dtype,
            page_dtype,
            layers,
            tokens,
            kv_heads,
            dim,
            k_pages.shape[-4],
            k_pages.shape[-3],
            *((0, 0) if cos_sin is None else cos_sin.shape),
            layer_strides[0],
            *k.stride()[-3:-1],
            layer_strides[1],
            *v.stride()[-3:-1],
            layer_strides[2],
            *k_pages.stride()[-4:-1],
            layer_strides[3],
            *v_pages.stride()[-4:-1],
            interleaved,
            *scales,
            get_num_threads(),
        )
    )
    return True


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


def check_status(status: int) -> None:
    if status:
        raise KernelContractError(f"{_MESSAGES[status]} (docs/kernels.md has the contract)")
