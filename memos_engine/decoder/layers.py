"""The two halves of a Llama layer, written against the ops seam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memos_engine.decoder.weights import LayerWeights
from memos_engine.ops import Backend


@dataclass(slots=True)
class StepInput:
    """One forward's index tensors; the runner fills them, the layers read them (docs/kernels.md).

    token_ids `[tokens] int64`, positions `[tokens] int32`, slot_mapping `[tokens] int64`,
    query_start `[B + 1] int32`, block_table `[B, max_blocks] int32`, seq_lens `[B] int32`.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor


@dataclass(slots=True)
class KVCapture:
    """Takes unrotated K and V on their way into the cache, for a KV record.

    k, v `[layers, tokens, kv_heads, head_dim]`; this step's rows go to tokens `first ...`.
    """

    k: Tensor
    v: Tensor
    first: int


def attention(
    ops: Backend,
    weights: LayerWeights,
    x: Tensor,
    step: StepInput,
    pages: tuple[Tensor, Tensor],
    cos_sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention over the paged cache. x `[tokens, hidden]`; returns the output and this step's
    unrotated k and v `[tokens, kv_heads, head_dim]`."""
    tokens = x.shape[0]
    if weights.qkv is not None:
        sizes = [weights.q.shape[0], weights.k.shape[0], weights.v.shape[0]]
        q, k, v = torch.split(ops.linear(x, weights.qkv), sizes, dim=1)
    else:
        q, k, v = ops.linear(x, weights.q), ops.linear(x, weights.k), ops.linear(x, weights.v)
    q, k, v = (part.view(tokens, -1, head_dim) for part in (q, k, v))
    ops.rope(q, step.positions, cos_sin)
    k_pages, v_pages = pages
    ops.append_kv(k, v, k_pages, v_pages, step.slot_mapping, step.positions, cos_sin)
    out = ops.paged_attention(
        q,
        k_pages,
        v_pages,
        step.block_table,
        step.query_start,
        step.seq_lens,
        step.positions,
        head_dim**-0.5,
    )
    return ops.linear(out.reshape(tokens, -1), weights.o), k, v


def mlp(ops: Backend, weights: LayerWeights, x: Tensor) -> Tensor:
    """SwiGLU. x `[tokens, hidden]`."""
    if weights.gate_up is not None:
        gate, up = ops.linear(x, weights.gate_up).chunk(2, dim=1)
    else:
        gate, up = ops.linear(x, weights.gate), ops.linear(x, weights.up)
    return ops.linear(ops.silu_mul(gate, up), weights.down)
