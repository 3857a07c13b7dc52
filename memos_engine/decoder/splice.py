"""KV records in and out of pages."""

from __future__ import annotations

import torch

from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.model import PagedDecoder
from memos_engine.decoder.sequence import Splice
from memos_engine.errors import PayloadError


def splice(model: PagedDecoder, cache: KVCache, part: Splice, slots: torch.Tensor) -> None:
    """Writes a record's rows into the pages, K rotated once to its positions by each layer's own table.

    slots: `[part.count] int64`, one per row. Raises PayloadError for a record of another shape.
    """
    spec, record = model.spec, part.record
    if (record.k.shape[0], *record.k.shape[2:]) != (spec.num_layers, spec.num_kv_heads, spec.head_dim):
        raise PayloadError(f"A record of shape {tuple(record.k.shape)} does not fit this model.", "identity")
    rows = slice(part.skip, part.stop)
    k, v = (t[:, rows].to(slots.device, non_blocking=True) for t in (record.k, record.v))
    positions = torch.arange(part.start, part.start + k.shape[1], dtype=torch.int32, device=slots.device)
    for layers, table in model.table_groups:
        pages, k_scale, v_scale = cache.layers(layers), None, None
        if record.k_scale is not None and record.v_scale is not None:
            k_scale, v_scale = (t[layers].to(slots.device) for t in (record.k_scale, record.v_scale[:, rows]))
        model.ops.splice_kv(
            k[layers],
            v[layers],
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
