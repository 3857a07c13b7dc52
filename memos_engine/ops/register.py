"""The ops as `torch.ops.memos_engine.*`, for torch.compile and for graphs.

Importing this module registers them. They are defined with `Library.define` rather than `custom_op`, whose
calls cost eight times as much. An op that mutates says so in its schema; optional outputs have no place in a
schema, so `paged_attention_out` and `add_rms_norm` are ops of their own; `splice_kv_int8`, which has scales,
is one as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memos_engine import ops

# Registrations end when this object does.
LIBRARY = torch.library.Library("memos_engine", "FRAGMENT")  # type: ignore[no-untyped-call]

_ATTENTION = (
    "Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start, Tensor seq_lens, "
    "Tensor q_pos, float sm_scale, int window=0"
)
_READ_SCALES = "Tensor? k_page_scale=None, Tensor? v_page_scale=None"
_WRITE_SCALES = "Tensor(c!)? k_page_scale=None, Tensor(d!)? v_page_scale=None"
_PROBE = (
    "Tensor q, Tensor k_pages, Tensor query_start, Tensor q_pos, Tensor lse, Tensor key_slots, "
    "Tensor key_pos, Tensor key_start, Tensor weight, Tensor(a!) scores, float sm_scale, int window=0, "
    "Tensor? k_page_scale=None"
)
_WRITE = (
    "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slot_mapping, Tensor positions, Tensor? cos_sin, "
    "bool interleaved=False"
)


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"memos_engine::{name}", fake, lib=LIBRARY)


def _nothing(*_: Any) -> None:
    """The fake of an op that only mutates."""


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty(first.shape, dtype=first.dtype, device=first.device)


def _paged_attention_out(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    q_pos: Tensor,
    sm_scale: float,
    window: int = 0,
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> None:
    args = (q, k_pages, v_pages, block_table, query_start, seq_lens, q_pos, sm_scale, window)
    ops.paged_attention(*args, out, lse, k_page_scale, v_page_scale)


def _paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    q_pos: Tensor,
    sm_scale: float,
    window: int = 0,
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> Tensor:
    args = (q, k_pages, v_pages, block_table, query_start, seq_lens, q_pos, sm_scale, window)
    return ops.paged_attention(*args, k_page_scale=k_page_scale, v_page_scale=v_page_scale)


def _splice_kv(
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
    args = (k, v, k_pages, v_pages, slot_mapping, positions, cos_sin, interleaved)
    ops.splice_kv(*args, k_page_scale=k_page_scale, v_page_scale=v_page_scale)


def _splice_kv_int8(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool = False,
    first_token: int = 0,
    k_page_scale: Tensor | None = None,
    v_page_scale: Tensor | None = None,
) -> None:
    args = (k, v, k_pages, v_pages, slot_mapping, positions, cos_sin, interleaved)
    ops.splice_kv(*args, k_scale, v_scale, first_token, k_page_scale, v_page_scale)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, weight, eps, residual)


def _linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


_define(f"paged_attention({_ATTENTION}, {_READ_SCALES}) -> Tensor", _paged_attention, _like_first)
_define(
    "paged_attention_out(Tensor q, Tensor(a!) out, Tensor(b!)? lse, "
    f"{_ATTENTION.removeprefix('Tensor q, ')}, {_READ_SCALES}) -> ()",
    _paged_attention_out,
    _nothing,
)
_define(f"attention_probe({_PROBE}) -> ()", ops.attention_probe, _nothing)
_define(f"append_kv(Tensor k, Tensor v, {_WRITE}, {_WRITE_SCALES}) -> ()", ops.append_kv, _nothing)
_define(f"splice_kv(Tensor k, Tensor v, {_WRITE}, {_WRITE_SCALES}) -> ()", _splice_kv, _nothing)
_define(
    f"splice_kv_int8(Tensor k, Tensor v, Tensor k_scale, Tensor v_scale, {_WRITE}, SymInt first_token=0, "
    f"{_WRITE_SCALES}) -> ()",
    _splice_kv_int8,
    _nothing,
)
_define(
    "rope(Tensor(a!) x, Tensor positions, Tensor cos_sin, bool interleaved=False) -> ()", ops.rope, _nothing
)
_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", ops.rms_norm, _like_first)
_define(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    _add_rms_norm,
    _like_first,
)
_define("silu_mul(Tensor gate, Tensor up) -> Tensor", ops.silu_mul, _like_first)
_define("linear(Tensor x, Tensor weight) -> Tensor", ops.linear, _linear_fake)
