"""The one seam to the kernels: typed functions, checked contracts, a backend chosen by the tensor's device.

CPU tensors go to the native code where it was built, CUDA tensors to the CUDA or Triton kernels, everything
else to `ops.reference`, which defines what is right. Shapes and dtypes are in docs/kernels.md; a tensor that
breaks them raises `KernelContractError`. A caller whose tensors are right by construction may take
`backend_for(device)` and call the same functions without the checks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memos_engine.ops import contracts
from memos_engine.ops.backend import OPS, Backend, backend_for, describe, layer_stack_of
from memos_engine.ops.lora import LoraRows, LoraTable
from memos_engine.ops.reference import rope_table

__all__ = [
    "OPS",
    "Backend",
    "LoraRows",
    "LoraTable",
    "append_kv",
    "attention_probe",
    "backend_for",
    "describe",
    "layer_stack_of",
    "linear",
    "lora_apply",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_table",
    "set_checks",
    "silu_mul",
    "splice_kv",
]

_checks = True


def set_checks(enabled: bool) -> bool:
    """Turns the contract checks of the functions below on or off; returns what it was."""
    global _checks
    before, _checks = _checks, enabled
    return before


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
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * sm_scale) v over paged K and V; each row sees the keys at positions <= its own.

    Args:
        q: `[tokens, heads, head_dim]`, the rows of all requests one after the other.
        k_pages, v_pages: `[blocks, page, kv_heads, head_dim]`, one layer.
        block_table: `[B, max_blocks] int32`; entry i holds positions `i * page ... i * page + page - 1`.
        query_start: `[B + 1] int32`, the row range of each request.
        seq_lens: `[B] int32`, keys of each request.
        q_pos: `[tokens] int32`, the position of each row, in any order.
        sm_scale: factor on the scores, usually `head_dim ** -0.5`.
        window: when positive, a row sees only keys at positions `> q_pos - window`.
        out: where to write, like `q`; a new tensor by default.
        lse: `[tokens, heads] float32`, filled with the natural log of each row's softmax denominator.
        k_page_scale, v_page_scale: `[blocks, page, kv_heads] float32`, of int8 pages.

    Returns `out`. A row that sees no key is zero and its LSE is -inf.
    """
    if _checks:
        pages = (k_pages, v_pages, k_page_scale, v_page_scale)
        contracts.paged_attention(q, pages, block_table, query_start, seq_lens, q_pos, window, out, lse)
    return backend_for(q.device).paged_attention(
        q, k_pages, v_pages, block_table, query_start, seq_lens, q_pos, sm_scale, window, out, lse,
        k_page_scale=k_page_scale, v_page_scale=v_page_scale,
    )  # fmt: skip


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
    """How much attention the rows of each request pay to chosen keys, weighted; no score matrix is kept.

    `scores[j] += exp(sm_scale * q[i, h] . k[j, h // group] - lse[i, h]) * weight[j, h // group]`, summed over
    the heads h and over the rows i of key j's request with `key_pos[j] <= q_pos[i]`.

    Args:
        q: `[tokens, heads, head_dim]`, as given to `paged_attention`.
        k_pages: `[blocks, page, kv_heads, head_dim]`, one layer.
        query_start: `[B + 1] int32`, the row range of each request.
        q_pos: `[tokens] int32`, the position of each row; a row with a negative one counts for nothing.
        lse: `[tokens, heads] float32`, which `paged_attention` filled for the same rows; -inf adds nothing.
        key_slots: `[keys] int64`, `block * page + offset` of each key; negative leaves its score as it is.
        key_pos: `[keys] int32`, the position of each key.
        key_start: `[B + 1] int32`, the key range of each request.
        weight: `[keys, kv_heads] float32`.
        scores: `[keys] float32`, added to in place. A key that no row sees keeps its bits.
        sm_scale: factor on the scores, that of `paged_attention`.
        window: when positive, a row sees only keys at positions `> q_pos - window`.
        k_page_scale: `[blocks, page, kv_heads] float32` of int8 pages.
    """
    keys = (key_slots, key_pos, key_start, weight, scores)
    if _checks:
        contracts.attention_probe(q, (k_pages, k_page_scale), query_start, q_pos, lse, *keys, window)
    backend_for(q.device).attention_probe(
        q, k_pages, query_start, q_pos, lse, *keys, sm_scale, window, k_page_scale
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
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> None:
    """Writes new tokens into one layer's pages; K comes unrotated and is rotated on the way.

    Args:
        k, v: `[tokens, kv_heads, head_dim]`.
        k_pages, v_pages: `[blocks, page, kv_heads, head_dim]`, written in place.
        slot_mapping: `[tokens] int64`, `block * page + offset`; negative skips the token.
        positions: `[tokens] int32`, for the rotation.
        cos_sin: `[max_position, rotary_dim] float32` (see `rope_table`), or None for a layer without RoPE.
        interleaved: pairs are (even, odd) channels instead of (i, i + rotary_dim / 2).
        k_page_scale, v_page_scale: `[blocks, page, kv_heads] float32`, written in place. Pages are int8 then:
            each head of a token, K after its rotation, is rounded to 127ths of its largest size.
    """
    scales = (k_page_scale, v_page_scale)
    if _checks:
        pages = (k_pages, v_pages, *scales)
        contracts.write_kv(k, v, pages, slot_mapping, positions, cos_sin, layers=False)
    backend_for(k.device).append_kv(
        k, v, k_pages, v_pages, slot_mapping, positions, cos_sin, interleaved, *scales
    )


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
    """Writes a stored record into the pages of all layers, rotating K to its new positions.

    `src_k, src_v [layers, tokens, kv_heads, head_dim]` (K unrotated, any float dtype) go into
    `k_pages, v_pages [layers, blocks, page, kv_heads, head_dim]`; the rest is as in `append_kv`, and so is
    every bit that is written.

    With scales, src_k and src_v are int8 and stand for their products with the scales in float32, which are
    rotated and rounded once, as any other source.

    Args:
        k_scale: `[layers, groups, kv_heads, head_dim] float32`, of the whole record; its token t belongs to
            group `t // 64`.
        v_scale: `[layers, tokens, kv_heads] float32`, of the tokens given.
        first_token: which token of the record the first one given is.
        k_page_scale, v_page_scale: `[layers, blocks, page, kv_heads] float32`, as in `append_kv`.
    """
    scales, page_scales = (k_scale, v_scale, first_token), (k_page_scale, v_page_scale)
    if _checks:
        pages = (k_pages, v_pages, *page_scales)
        contracts.write_kv(src_k, src_v, pages, slot_mapping, positions, cos_sin, True, *scales)
    backend_for(src_k.device).splice_kv(
        src_k, src_v, k_pages, v_pages, slot_mapping, positions, cos_sin, interleaved, *scales, *page_scales
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """RMS norm of `x [tokens, hidden]`, times `weight [hidden]`, in float32.

    With `residual [tokens, hidden]`: first `residual += x` in place, rounded to its dtype, then the norm of
    that sum (Zhang and Sennrich, arXiv 1910.07467). `out` may be `x`.
    """
    if _checks:
        contracts.rms_norm(x, weight, residual, out)
    return backend_for(x.device).rms_norm(x, weight, eps, residual, out)


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None:
    """Rotates `x [tokens, heads, head_dim]` in place (RoPE, arXiv 2104.09864); see `append_kv`."""
    if _checks:
        contracts.rope(x, positions, cos_sin)
    backend_for(x.device).rope(x, positions, cos_sin, interleaved)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, all `[tokens, n]`; rows may be strided, so that both may be halves of one tensor."""
    if _checks:
        contracts.silu_mul(gate, up, out)
    return backend_for(gate.device).silu_mul(gate, up, out)


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`x [tokens, k] @ weight[n, k]^T`. Few rows take a kernel that reads the weights once.

    With scale `[n] float32` weight is int8, and `out[:, n]` is the product times `scale[n]`.
    """
    if _checks:
        contracts.linear(x, weight, out, scale)
    return backend_for(x.device).linear(x, weight, out, scale)


def lora_apply(
    x: Tensor, outs: Sequence[Tensor], table: LoraTable, layer: int, parts: Sequence[str], rows: LoraRows
) -> None:
    """Adds low-rank deltas (LoRA, arXiv 2106.09685) to products of the same `x`, in place, for rows that have
    an adapter: `out[row] += scale * (x[row] @ a.T) @ b.T`, in float32, rounded once.

    Args:
        x: `[tokens, in]`.
        outs: one to three of `[tokens, out]`, one for each of `parts`; rows may be strided.
        table: the slots, filled by `ops.lora.pack` in x's dtype.
        layer: whose deltas.
        parts: names from `ops.lora.PARTS`, one for each of `outs`.
        rows: which rows have which slot's adapter, and its scale.
    """
    if _checks:
        contracts.lora_apply(x, outs, table, layer, parts, rows)
    backend_for(x.device).lora_apply(x, outs, table, layer, parts, rows)
