"""Every op in plain torch: the definition of truth that all other backends are tested against.

Arithmetic is float32, or float64 where the inputs are float64 (tests get their reference that way), and
the result is rounded once, at the store. Shapes are those of docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memos_engine.ops.int8_kv import dequantize_k, dequantize_v, quantize_heads
from memos_engine.ops.lora import LoraRows, LoraTable, unblocked

NAME = "reference"


def rope_table(inv_freq: Tensor, length: int, attention_scaling: float = 1.0) -> Tensor:
    """Cosines and sines of positions 0..length-1: `[length, 2 * len(inv_freq)] float32`.

    `inv_freq [rotary_dim / 2]` are radians per position. Angles are made in float32, as in transformers'
    rotary embeddings, so that both give the same table; `attention_scaling` multiplies both halves.
    """
    positions = torch.arange(length, dtype=torch.float32, device=inv_freq.device)
    angles = positions[:, None] * inv_freq.float()[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_scaling


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
    """softmax(q k^T * sm_scale) v over paged keys, one request after the other."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for request, length in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        positions = q_pos[rows].long()
        # Nothing behind the last visible key is read: those slots may hold anything, NaN too.
        seen = max(0, min(length, int(positions.max()) + 1))
        blocks = block_table[request, : -(-seen // k_pages.shape[1])].long()
        sides = (k_pages, k_page_scale), (v_pages, v_page_scale)
        k, v = (_read(pages, scale, blocks, q).flatten(0, 1)[:seen] for pages, scale in sides)
        keys = torch.arange(seen, device=q.device)
        visible = keys <= positions[:, None]
        if window > 0:
            visible &= keys > positions[:, None] - window
        result, row_lse = _attend(q[rows], k, v, visible, sm_scale)
        out[rows] = result.to(out.dtype)
        if lse is not None:
            lse[rows] = row_lse.to(lse.dtype)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """One request: `q [rows, heads, dim]`, `k, v [keys, kv_heads, dim]` as `_read` gives them, and `visible
    [rows, keys]`."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = _upcast(q).view(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("rhgd,khd->rhgk", grouped, k) * sm_scale
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has lse -inf; exp(-inf - 0) then gives it zeros instead of NaN.
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    result = torch.einsum("rhgk,khd->rhgd", weights, v)
    return result.reshape(rows, heads, dim), lse.reshape(rows, heads)


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
    """Adds to `scores` what the rows of each request pay to its keys, one request after the other."""
    rows_at, keys_at, page = query_start.tolist(), key_start.tolist(), k_pages.shape[1]
    for request in range(len(rows_at) - 1):
        rows = torch.arange(rows_at[request], rows_at[request + 1], device=q.device)
        rows = rows[q_pos[rows] >= 0]
        keys = torch.arange(keys_at[request], keys_at[request + 1], device=q.device)
        keys = keys[key_slots[keys] >= 0]
        visible = key_pos[keys] <= q_pos[rows, None]
        if window > 0:
            visible &= key_pos[keys] > q_pos[rows, None].long() - window
        # What no row sees is not read: it may hold anything, NaN too.
        seen = visible.any(0)
        keys, visible = keys[seen], visible[:, seen]
        k = _read(k_pages, k_page_scale, (key_slots[keys] // page, key_slots[keys] % page), q)
        paid = _paid(q[rows], k, lse[rows], visible, sm_scale)
        scores[keys] += (paid * weight[keys]).sum(1).to(scores.dtype)


def _paid(q: Tensor, k: Tensor, lse: Tensor, visible: Tensor, sm_scale: float) -> Tensor:
    """Softmax weights `[keys, kv_heads]`, summed over rows and a group's heads; `lse [rows, heads]`, the rest
    as for `_attend`."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = _upcast(q).view(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("rhgd,khd->rhgk", grouped, k) * sm_scale
    lse = lse.to(grouped.dtype).view(*grouped.shape[:3], 1)
    hidden = ~visible[:, None, None, :] | (lse == float("-inf"))
    return torch.exp(scores - lse).masked_fill(hidden, 0).sum((0, 2)).T


def _read(pages: Tensor, scale: Tensor | None, at: Tensor | tuple[Tensor, Tensor], q: Tensor) -> Tensor:
    """`pages[at]` in the dtype to compute in, int8 ones times their `scale [blocks, page, kv_heads]`."""
    values = pages[at].to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return values if scale is None else values * scale[at].to(values.dtype)[..., None]


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
    """Rotates new tokens' K and writes K and V into one layer's pages."""
    page = k_pages.shape[1]
    kept = slot_mapping >= 0
    blocks, offsets = slot_mapping[kept] // page, slot_mapping[kept] % page
    rotated = _rotate(k[kept], positions[kept], cos_sin, interleaved)
    for x, pages, scale in ((rotated, k_pages, k_page_scale), (v[kept], v_pages, v_page_scale)):
        if scale is None:
            pages[blocks, offsets] = x.to(pages.dtype)
        else:
            pages[blocks, offsets], scale[blocks, offsets] = quantize_heads(x)


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
    """Writes stored, unrotated K and V of all layers: `append_kv` layer by layer."""
    for layer in range(src_k.shape[0]):
        k, v = src_k[layer], src_v[layer]
        if k_scale is not None and v_scale is not None:
            k, v = dequantize_k(k, k_scale[layer], first_token), dequantize_v(v, v_scale[layer])
        append_kv(
            k,
            v,
            k_pages[layer],
            v_pages[layer],
            slot_mapping,
            positions,
            cos_sin,
            interleaved,
            None if k_page_scale is None else k_page_scale[layer],
            None if v_page_scale is None else v_page_scale[layer],
        )


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    """Rotates `x [tokens, heads, head_dim]` in place."""
    x.copy_(_rotate(x, positions, cos_sin, interleaved))


def _rotate(x: Tensor, positions: Tensor, cos_sin: Tensor | None, interleaved: bool) -> Tensor:
    """The rotated copy in the compute dtype; channels from `rotary_dim` on pass unchanged."""
    x = _upcast(x)
    if cos_sin is None:
        return x
    half = cos_sin.shape[-1] // 2
    table = cos_sin[positions.long(), None, :].to(x.dtype)
    cos, sin = table[..., :half], table[..., half:]
    first, second = (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if interleaved
        else (x[..., :half], x[..., half : 2 * half])
    )
    a, b = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, after `residual += x` where a residual is given."""
    if residual is not None:
        residual.copy_(_upcast(residual) + _upcast(x))
        wide = _upcast(residual)
    else:
        wide = _upcast(x)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return _store(normed, x, out)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`."""
    wide = _upcast(gate)
    return _store(wide * torch.sigmoid(wide) * _upcast(up), gate, out)


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`x [tokens, k] @ weight[n, k]^T`, by torch's own matrix product; int8 weights take their scale."""
    if scale is not None:
        wide = torch.nn.functional.linear(_upcast(x), weight.to(_upcast(x).dtype)) * scale
        return _store(wide, x, out)
    if out is None:
        return torch.nn.functional.linear(x, weight)
    return out.copy_(torch.nn.functional.linear(x, weight))


def lora_apply(
    x: Tensor, outs: Sequence[Tensor], table: LoraTable, layer: int, parts: Sequence[str], rows: LoraRows
) -> None:
    """Adds each segment's deltas to its rows; what stands between a and b is not rounded."""
    starts, slots, scales = rows.start.tolist(), rows.slot.tolist(), rows.scale.tolist()
    for begin, end, slot, scale in zip(starts[:-1], starts[1:], slots, scales, strict=True):
        fill = None if slot < 0 or begin == end else table.fills[slot]
        if fill is None:
            continue
        at = rows.order[begin:end].long()
        for part, out in zip(parts, outs, strict=True):
            delta = fill.deltas.get((layer, part))
            if delta is not None:
                wide = _upcast(x[at])
                middle = wide @ delta.a.to(wide.dtype).T * (delta.scale * scale)
                out[at] = (_upcast(out[at]) + middle @ unblocked(delta).to(wide.dtype).T).to(out.dtype)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _store(wide: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    return wide.to(like.dtype) if out is None else out.copy_(wide)
