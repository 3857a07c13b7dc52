"""The checks behind the public ops: dtypes, shapes and strides, a few microseconds and no look at the values.

Values that could lead a kernel out of its tensors (slots, positions, block ids) are checked by the native
code itself, where that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from memos_engine.errors import KernelContractError
from memos_engine.ops.int8_kv import GROUP
from memos_engine.ops.lora import PARTS, LoraRows, LoraTable

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# K and V pages, then the scales of both, where they are int8.
Pages = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def paged_attention(
    q: Tensor,
    pages: Pages,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    q_pos: Tensor,
    window: int,
    out: Tensor | None,
    lse: Tensor | None,
) -> None:
    _pages(pages, 4)
    _queries(q, pages[0])
    requests = seq_lens.shape[0] if seq_lens.dim() else -1
    _index("seq_lens", seq_lens, torch.int32, (requests,))
    _index("query_start", query_start, torch.int32, (requests + 1,))
    _index("q_pos", q_pos, torch.int32, q.shape[:1])
    if block_table.dim() != 2 or block_table.shape[0] != requests:
        _fail(f"block_table must be [{requests}, max_blocks], not {list(block_table.shape)}")
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        _fail("block_table must be int32 with contiguous rows; call .to(torch.int32).contiguous()")
    _window(window)
    if out is not None:
        _like("out", out, q, "q")
    if lse is not None:
        _float32("lse", lse, q.shape[:2])
    _devices(q, *pages, block_table, query_start, seq_lens, q_pos, out, lse)


def attention_probe(
    q: Tensor,
    pages: tuple[Tensor, Tensor | None],
    query_start: Tensor,
    q_pos: Tensor,
    lse: Tensor,
    key_slots: Tensor,
    key_pos: Tensor,
    key_start: Tensor,
    weight: Tensor,
    scores: Tensor,
    window: int,
) -> None:
    k_pages, k_page_scale = pages
    _one_side("k", k_pages, k_page_scale, 4)
    _queries(q, k_pages)
    _index("query_start", query_start, torch.int32, (max(1, query_start.numel()),))
    _index("key_start", key_start, torch.int32, query_start.shape)
    _index("q_pos", q_pos, torch.int32, q.shape[:1])
    _index("key_slots", key_slots, torch.int64, (key_slots.numel(),))
    _index("key_pos", key_pos, torch.int32, key_slots.shape)
    _float32("lse", lse, q.shape[:2])
    _float32("weight", weight, (key_slots.shape[0], k_pages.shape[2]))
    _float32("scores", scores, key_slots.shape)
    _window(window)
    _devices(q, *pages, query_start, q_pos, lse, key_slots, key_pos, key_start, weight, scores)


def write_kv(
    k: Tensor,
    v: Tensor,
    pages: Pages,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    layers: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    first_token: int = 0,
) -> None:
    """For append_kv (`layers` False) and splice_kv (True: one more dimension in front)."""
    extra = int(layers)
    if k_scale is not None and v_scale is not None:
        _int8_sources(k, v, k_scale, v_scale, first_token)
    elif k_scale is not None or v_scale is not None:
        _fail("int8 sources need both k_scale and v_scale, float sources neither")
    else:
        _floats("k", k, 3 + extra)
        _like("v", v, k, "k")
    _pages(pages, 4 + extra)
    k_pages = pages[0]
    if k.shape[-2:] != k_pages.shape[-2:] or (layers and k.shape[0] != k_pages.shape[0]):
        _fail(f"k {list(k.shape)} does not fit pages {list(k_pages.shape)} (layers, kv_heads, head_dim)")
    tokens = k.shape[extra]
    _index("slot_mapping", slot_mapping, torch.int64, (tokens,))
    _index("positions", positions, torch.int32, (tokens,))
    if cos_sin is not None:
        _table(cos_sin, k.shape[-1])
    _devices(k, v, *pages, slot_mapping, positions, cos_sin, k_scale, v_scale)


def _int8_sources(k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, first_token: int) -> None:
    for name, tensor in (("k", k), ("v", v)):
        _layout(name, tensor, 4)
        if tensor.dtype != torch.int8 or tensor.shape != k.shape:
            _fail(f"{name} with scales must be int8 {list(k.shape)}, not {tensor.dtype} {list(tensor.shape)}")
    layers, tokens, heads, dim = k.shape
    _layout("k_scale", k_scale, 4)
    groups = k_scale.shape[1]
    for name, scale, shape in (
        ("k_scale", k_scale, (layers, groups, heads, dim)),
        ("v_scale", v_scale, (layers, tokens, heads)),
    ):
        if scale.dtype != torch.float32 or scale.shape != shape:
            _fail(f"{name} must be float32 {list(shape)}, not {scale.dtype} {list(scale.shape)}")
    if first_token < 0:
        _fail(f"first_token must be 0 or positive, not {first_token}")
    if tokens and first_token + tokens > groups * GROUP:
        last = first_token + tokens - 1
        _fail(f"token {last} of the record is in group {last // GROUP}, but k_scale has {groups} groups")


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    _floats("x", x, 3)
    _index("positions", positions, torch.int32, (x.shape[0],))
    _table(cos_sin, x.shape[-1])
    _devices(x, positions, cos_sin)


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor | None) -> None:
    _floats("x", x, 2)
    if weight.shape != x.shape[1:] or weight.dtype not in FLOATS or not weight.is_contiguous():
        _fail(f"weight must be contiguous floats [{x.shape[1]}], not {weight.dtype} {list(weight.shape)}")
    if residual is not None:
        _like("residual", residual, x, "x")
    if out is not None:
        _like("out", out, x, "x")
    _devices(x, weight, residual, out)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None) -> None:
    _floats("gate", gate, 2)
    _like("up", up, gate, "gate")
    if out is not None:
        _like("out", out, gate, "gate")
    _devices(gate, up, out)


def linear(x: Tensor, weight: Tensor, out: Tensor | None, scale: Tensor | None = None) -> None:
    _floats("x", x, 2)
    if scale is None:
        _floats("weight", weight, 2)
    elif weight.dtype != torch.int8 or weight.dim() != 2 or not weight.is_contiguous():
        _fail(f"weight with a scale must be contiguous int8 [n, k], not {weight.dtype} {list(weight.shape)}")
    elif scale.dtype != torch.float32 or scale.shape != weight.shape[:1] or not scale.is_contiguous():
        _fail(f"scale must be float32 [{weight.shape[0]}], not {scale.dtype} {list(scale.shape)}")
    if x.shape[1] != weight.shape[1]:
        _fail(f"x has {x.shape[1]} columns but weight has {weight.shape[1]}")
    if scale is None and x.dtype != weight.dtype:
        _fail(f"x is {x.dtype} but weight is {weight.dtype}; give both one dtype")
    if out is not None:
        _floats("out", out, 2)
        if out.shape != (x.shape[0], weight.shape[0]) or out.dtype != x.dtype:
            _fail(f"out must be {x.dtype} {[x.shape[0], weight.shape[0]]}, not {out.dtype} {list(out.shape)}")
    _devices(x, weight, out, scale)


def lora_apply(
    x: Tensor, outs: Sequence[Tensor], table: LoraTable, layer: int, parts: Sequence[str], rows: LoraRows
) -> None:
    _floats("x", x, 2)
    if not 1 <= len(parts) <= 3 or len(outs) != len(parts) or not set(parts) <= set(PARTS):
        _fail(f"lora_apply takes one to three outs and as many of {', '.join(PARTS)}, not {list(parts)}")
    if not 0 <= layer < table.layers:
        _fail(f"layer {layer} is outside the table's {table.layers}")
    for out in outs:
        _floats("out", out, 2)
        if out.shape[0] != x.shape[0] or out.dtype != x.dtype:
            _fail(f"out must be {x.dtype} [{x.shape[0]}, n], not {out.dtype} {list(out.shape)}")
    segments = rows.slot.numel()
    _index("order", rows.order, torch.int32, (rows.order.numel(),))
    _index("start", rows.start, torch.int32, (segments + 1,))
    _index("slot", rows.slot, torch.int32, (segments,))
    _float32("scale", rows.scale, (segments,))
    _devices(x, *outs, table.pointers, rows.order, rows.start, rows.slot, rows.scale)
    for fill in table.fills:
        for index, part in enumerate(parts):
            delta = None if fill is None else fill.deltas.get((layer, part))
            if delta is None:
                continue
            if delta.a.shape[1] != x.shape[1] or delta.outputs != outs[index].shape[1]:
                _fail(
                    f"a delta of {part} is for {delta.a.shape[1]} inputs and {delta.outputs} outputs, "
                    f"not {x.shape[1]} and {outs[index].shape[1]}"
                )
            if delta.rank > table.max_rank:
                _fail(f"a delta of {part} has rank {delta.rank}, the table is for {table.max_rank} at most")
            if delta.a.dtype != x.dtype:
                _fail(f"a delta of {part} is {delta.a.dtype}, x is {x.dtype}; pack it for this model")


def _fail(message: str) -> NoReturn:
    raise KernelContractError(f"{message} (docs/kernels.md has the contract)")


def _floats(name: str, tensor: Tensor, dims: int) -> None:
    _layout(name, tensor, dims)
    if tensor.dtype not in FLOATS:
        _fail(f"{name} must be float32, float16 or bfloat16, not {tensor.dtype}")


def _layout(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        _fail(f"{name} must have {dims} dimensions, not {list(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        _fail(f"the last dimension of {name} must be contiguous, its stride is {tensor.stride(-1)}")


def _like(name: str, tensor: Tensor, model: Tensor, model_name: str) -> None:
    _floats(name, tensor, model.dim())
    if tensor.shape != model.shape or tensor.dtype != model.dtype:
        _fail(
            f"{name} must have {model_name}'s shape and dtype, {model.dtype} {list(model.shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)}"
        )


def _pages(pages: Pages, dims: int) -> None:
    k_pages, v_pages, k_page_scale, v_page_scale = pages
    _one_side("k", k_pages, k_page_scale, dims)
    if v_pages.dtype != k_pages.dtype or v_pages.shape != k_pages.shape:
        _fail(
            f"v_pages must have k_pages's shape and dtype, {k_pages.dtype} {list(k_pages.shape)}, "
            f"not {v_pages.dtype} {list(v_pages.shape)}"
        )
    _one_side("v", v_pages, v_page_scale, dims)


def _one_side(side: str, pages: Tensor, scale: Tensor | None, dims: int) -> None:
    """Pages of K or V: floats, or int8 with a scale for each token and head."""
    if pages.dtype != torch.int8:
        _floats(f"{side}_pages", pages, dims)
        if scale is not None:
            _fail(f"{side}_page_scale belongs to int8 pages, not to {pages.dtype}")
        return
    _layout(f"{side}_pages", pages, dims)
    name, shape = f"{side}_page_scale", pages.shape[:-1]
    if scale is None:
        _fail(f"int8 pages need {name}, float32 {list(shape)}")
    if scale.dtype != torch.float32 or scale.shape != shape:
        _fail(f"{name} must be float32 {list(shape)}, not {scale.dtype} {list(scale.shape)}")
    if not (scale if dims == 4 else scale[:1]).is_contiguous():
        _fail(f"{name} must be contiguous within a layer")


def _queries(q: Tensor, k_pages: Tensor) -> None:
    """q `[tokens, heads, head_dim]` beside pages `[blocks, page, kv_heads, head_dim]`."""
    _floats("q", q, 3)
    (_, heads, dim), kv_heads = q.shape, k_pages.shape[2]
    if dim != k_pages.shape[3]:
        _fail(f"q has head_dim {dim} but the pages have {k_pages.shape[3]}")
    if kv_heads == 0 or heads % kv_heads:
        _fail(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")


def _window(window: int) -> None:
    if window < 0:
        _fail(f"window must be 0 (none) or positive, not {window}")


def _float32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        _fail(f"{name} must be contiguous float32 {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")


def _index(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        _fail(f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        _fail(f"{name} must be contiguous; call .contiguous()")


def _table(cos_sin: Tensor, head_dim: int) -> None:
    if cos_sin.dim() != 2 or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        _fail(f"cos_sin must be contiguous float32 [max_position, rotary_dim], not {cos_sin.dtype}")
    if cos_sin.shape[1] % 2 or not 0 < cos_sin.shape[1] <= head_dim:
        _fail(f"rotary_dim ({cos_sin.shape[1]}) must be even and at most head_dim ({head_dim})")


def _devices(first: Tensor, *others: Tensor | None) -> None:
    device = first.device
    for other in others:
        if other is not None and other.device != device:
            _fail(f"all tensors of one call must be on one device, not {device} and {other.device}")
