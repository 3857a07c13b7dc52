"""KV records in and out of pages."""

from __future__ import annotations

import torch

from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.model import PagedDecoder
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import Splice
from memos_engine.errors import PayloadError


def splice(
    model: PagedDecoder, cache: KVCache, part: Splice, slots: torch.Tensor, layer: int | None = None
) -> None:
    """Writes a record's rows into the pages, K rotated once to its positions by each layer's own table.

    slots: `[part.count] int64`, one per row. layer: this one alone (default: all). The record is one that
    `require_fitting` lets pass.
    """
    record, rows = part.record, slice(part.skip, part.stop)
    positions = torch.arange(part.start, part.start + part.count, dtype=torch.int32, device=slots.device)
    groups = model.table_groups if layer is None else [(slice(layer, layer + 1), model.tables[layer])]
    for layers, table in groups:
        k, v = (t[layers, rows].to(slots.device, non_blocking=True) for t in (record.k, record.v))
        pages, k_scale, v_scale = cache.layers(layers), None, None
        if record.k_scale is not None and record.v_scale is not None:
            k_scale, v_scale = (
                t.to(slots.device) for t in (record.k_scale[layers], record.v_scale[layers, rows])
            )
        model.ops.splice_kv(
            k,
            v,
            pages.k,
            pages.v,
            slots,
            positions,
            table,
            k_scale=k_scale,
            v_scale=v_scale,
            first_token=part.skip,
            k_page_scale=pages.k_scale,
            v_page_scale=pages.v_scale,
        )


def require_fitting(model: PagedDecoder, record: KVRecord) -> None:
    """Raises PayloadError for a record of another shape."""
    spec = model.spec
    if (record.k.shape[0], *record.k.shape[2:]) != (spec.num_layers, spec.num_kv_heads, spec.head_dim):
        raise PayloadError(f"A record of shape {tuple(record.k.shape)} does not fit this model.", "identity")
