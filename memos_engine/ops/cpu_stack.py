"""The native layer stack: every pointer is handed over once, a step is one call and one parallel region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from memos_engine.ops.cpu import isa
from memos_engine.ops.cpu_lora import native_rows
from memos_engine.ops.cpu_native import DTYPES, PAGE_DTYPES, check_status, native
from memos_engine.ops.int8_kv import page_arguments
from memos_engine.ops.lora import LoraRows, LoraTable
from memos_engine.ops.stack import LayerStack, StackLayer

# Rows up to which one call was faster than torch's products for each op (docs/benchmarks.md).
_MAX_ROWS = {torch.bfloat16: 64, torch.float32: 8, torch.float16: 8}
_WEIGHTS = ("input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down")
_SCALES = ("q_scale", "k_scale", "v_scale", "o_scale", "gate_scale", "up_scale", "down_scale")
_PARTS = (*_WEIGHTS, "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "cos_sin", *_SCALES)
_INT8_ROWS = 8  # with more, widening the weights costs more than reading them whole


class CpuStack:
    """See `ops.stack.LayerStack`."""

    def __init__(
        self,
        layers: Sequence[StackLayer],
        final_norm: Tensor,
        eps: float,
        sm_scale: float,
        dtype: torch.dtype,
        k_pages: Tensor,
        v_pages: Tensor,
        k_page_scale: Tensor | None,
        v_page_scale: Tensor | None,
    ) -> None:
        first = layers[0]
        dim = k_pages.shape[-1]
        self.max_rows = _MAX_ROWS[dtype] if first.q_scale is None else _INT8_ROWS
        # What the pointers lead to.
        self._kept = (layers, final_norm, k_pages, v_pages, k_page_scale, v_page_scale)
        self._stack = native.Stack(
            final_norm.data_ptr(),
            DTYPES[dtype],
            DTYPES[final_norm.dtype],
            first.q.shape[1],
            first.gate.shape[0],
            first.q.shape[0] // dim,
            k_pages.shape[-2],
            dim,
            eps,
            sm_scale,
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            *k_pages.shape[1:3],
            [*k_pages.stride()[:4], *v_pages.stride()[:4]],
            PAGE_DTYPES[k_pages.dtype],
            *page_arguments(k_page_scale, v_page_scale),
        )
        for layer in layers:
            parts = [getattr(layer, name) for name in _PARTS]
            shape = (0, 0) if layer.cos_sin is None else tuple(layer.cos_sin.shape)
            pointers = [0 if part is None else part.data_ptr() for part in parts]
            self._stack.add_layer(pointers, *shape, layer.window)

    def run(
        self,
        hidden: Tensor,
        slot_mapping: Tensor,
        positions: Tensor,
        query_start: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        rows: Tensor | None = None,
        lora: tuple[LoraTable, LoraRows] | None = None,
    ) -> Tensor:
        wanted = hidden.shape[0] if rows is None else rows.shape[0]
        out = hidden.new_empty((wanted, hidden.shape[1]))
        status = self._stack.run(
            hidden.data_ptr(),
            out.data_ptr(),
            0 if rows is None else rows.data_ptr(),
            slot_mapping.data_ptr(),
            positions.data_ptr(),
            query_start.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            hidden.shape[0],
            wanted,
            *block_table.shape,
            block_table.stride(0),
            None if lora is None else native_rows(*lora),
            get_num_threads(),
        )
        check_status(status)
        return out


def layer_stack(
    layers: Sequence[StackLayer],
    final_norm: Tensor,
    eps: float,
    sm_scale: float,
    k_pages: Tensor,
    v_pages: Tensor,
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> LayerStack | None:
    """A plan over these weights and pages `[layers, blocks, page, kv_heads, head_dim]`; None where the native
    code does not take their dtypes, shapes or layout.

    Pages of int8 have scales `[layers, blocks, page, kv_heads] float32`; dtype is then that of hidden states.
    """
    dtype, norm_dtype = dtype or k_pages.dtype, final_norm.dtype
    page_dtype = dtype if k_page_scale is None else torch.int8
    if dtype not in DTYPES or norm_dtype not in DTYPES:
        return None
    if k_pages.dtype != page_dtype or v_pages.dtype != page_dtype:
        return None
    hidden, heads = layers[0].q.shape[1], k_pages.shape[-2:]
    for layer in layers:
        parts = [getattr(layer, name) for name in _PARTS]
        if any(part is not None and not part.is_contiguous() for part in parts):
            return None
        projections = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
        norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        biases = (layer.q_bias, layer.k_bias, layer.v_bias)
        scales = [getattr(layer, name) for name in _SCALES]
        narrow = all(scale is not None and scale.dtype == torch.float32 for scale in scales)
        if not narrow and any(scale is not None for scale in scales):
            return None
        if any(part.dtype != (torch.int8 if narrow else dtype) for part in projections):
            return None
        if any(part is not None and part.dtype != dtype for part in biases):
            return None
        if any(part is not None and part.dtype != norm_dtype for part in norms):
            return None
        if isa() == "amx" and not narrow and any(part.shape[0] % 16 for part in projections):
            return None  # q, k and v share one packed x: all of them or none on tiles
        if layer.k.shape[0] != heads.numel() or layer.q.shape != (layer.o.shape[1], hidden):
            return None
    pages = (k_pages, v_pages, k_page_scale, v_page_scale)
    return CpuStack(layers, final_norm, eps, sm_scale, dtype, *pages)
