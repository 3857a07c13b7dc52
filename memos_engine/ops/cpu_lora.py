"""`lora_apply` on the CPU: pointers, and the rows by adapter for one op or for a whole layer stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, get_num_threads

from memos_engine.ops import reference
from memos_engine.ops.cpu_native import DTYPES, check_status, native
from memos_engine.ops.lora import PARTS, LoraRows, LoraTable


def native_rows(table: LoraTable, rows: LoraRows) -> Any:
    """The native view of both, which they must outlive; made once for the same rows."""
    address = table.pointers.data_ptr()
    found = rows.views.get(address)
    if found is None:
        tensors = (table.pointers, rows.order, rows.start, rows.slot, rows.scale)
        sizes = rows.slot.shape[0], rows.order.shape[0], table.pointers.shape[0], table.layers
        found = rows.views[address] = native.LoraRows([t.data_ptr() for t in tensors], *sizes)
    return found


def lora_apply(
    x: Tensor, outs: Sequence[Tensor], table: LoraTable, layer: int, parts: Sequence[str], rows: LoraRows
) -> None:
    dtype = DTYPES.get(x.dtype)
    if dtype is None:
        return reference.lora_apply(x, outs, table, layer, parts, rows)
    status = native.lora_apply(
        x.data_ptr(),
        [out.data_ptr() for out in outs],
        [PARTS.index(part) for part in parts],
        [out.shape[1] for out in outs],
        [out.stride(0) for out in outs],
        dtype,
        *x.shape,
        x.stride(0),
        layer,
        native_rows(table, rows),
        get_num_threads(),
    )
    return check_status(status)
