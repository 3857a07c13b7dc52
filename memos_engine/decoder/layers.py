"""The two halves of a layer, written against the ops seam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memos_engine.decoder.kvcache import Pages
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import LayerWeights, Weights
from memos_engine.ops import Backend, LoraRows, LoraTable


@dataclass(slots=True)
class ProbeInput:
    """What `ops.attention_probe` gathers on the way, over all layers (docs/kernels.md).

    q_pos `[tokens] int32`, -1 for rows that do not count; key_slots `[keys] int64`, key_pos `[keys] int32`,
    key_start `[B + 1] int32`; weight `[layers, keys, kv_heads] float32`; scores `[keys] float32`.
    """

    q_pos: Tensor
    key_slots: Tensor
    key_pos: Tensor
    key_start: Tensor
    weight: Tensor
    scores: Tensor


@dataclass(slots=True)
class StepInput:
    """One forward's index tensors; the runner fills them, the layers read them (docs/kernels.md).

    token_ids `[tokens] int64`, positions `[tokens] int32`, slot_mapping `[tokens] int64`,
    query_start `[B + 1] int32`, block_table `[B, max_blocks] int32`, seq_lens `[B] int32`. max_query_len and
    dense are hints to `ops.backend.Backend.paged_attention`. lora: slots, and which rows have an adapter;
    None where none has.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    max_query_len: int | None = None
    dense: bool = False
    probe: ProbeInput | None = None
    lora: tuple[LoraTable, LoraRows] | None = None


@dataclass(slots=True)
class KVCapture:
    """Takes unrotated K and V on their way into the cache, for a KV record.

    k, v `[layers, tokens, kv_heads, head_dim]`; this step's rows go to tokens `first ...`.
    """

    k: Tensor
    v: Tensor
    first: int = 0

    @classmethod
    def empty(cls, spec: ModelSpec, weights: Weights, tokens: int) -> KVCapture:
        """Room for so many tokens, in the model's dtype, whatever the pages' is."""
        shape = (spec.num_layers, tokens, spec.num_kv_heads, spec.head_dim)
        return cls(weights.embed.new_empty(shape), weights.embed.new_empty(shape))


def attention(
    ops: Backend,
    spec: ModelSpec,
    index: int,
    weights: LayerWeights,
    x: Tensor,
    step: StepInput,
    pages: Pages,
    cos_sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention of layer `index` over the paged cache. x `[tokens, hidden]`, cos_sin None: no rotation;
    returns the output and this step's k (normed, unrotated) and v `[tokens, kv_heads, head_dim]`."""
    w, tokens = weights, x.shape[0]
    if w.qkv is not None:
        sizes = [w.q.shape[0], w.k.shape[0], w.v.shape[0]]
        q, k, v = torch.split(ops.linear(x, w.qkv), sizes, dim=1)
    else:
        q, k, v = ops.linear(x, w.q), ops.linear(x, w.k), ops.linear(x, w.v)
    _add_biases((q, w.q_bias), (k, w.k_bias), (v, w.v_bias))
    _add_deltas(ops, step, x, index, q=q, k=k, v=v)
    q, k, v = (part.view(tokens, -1, spec.head_dim) for part in (q, k, v))
    q, k = _head_norm(ops, q, w.q_norm, spec.rms_eps), _head_norm(ops, k, w.k_norm, spec.rms_eps)
    if cos_sin is not None:
        ops.rope(q, step.positions, cos_sin)
    ops.append_kv(
        k,
        v,
        pages.k,
        pages.v,
        step.slot_mapping,
        step.positions,
        cos_sin,
        k_page_scale=pages.k_scale,
        v_page_scale=pages.v_scale,
    )
    probe = step.probe
    lse = None if probe is None else torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    out = ops.paged_attention(
        q,
        pages.k,
        pages.v,
        step.block_table,
        step.query_start,
        step.seq_lens,
        step.positions,
        spec.sm_scale,
        spec.layers[index].window,
        lse=lse,
        max_query_len=step.max_query_len,
        dense=step.dense,
        k_page_scale=pages.k_scale,
        v_page_scale=pages.v_scale,
    )
    if probe is not None and lse is not None:
        ops.attention_probe(
            q,
            pages.k,
            step.query_start,
            probe.q_pos,
            lse,
            probe.key_slots,
            probe.key_pos,
            probe.key_start,
            probe.weight[index],
            probe.scores,
            spec.sm_scale,
            spec.layers[index].window,
            pages.k_scale,
        )
    x = out.reshape(tokens, -1)
    out = ops.linear(x, w.o)
    _add_biases((out, w.o_bias))
    _add_deltas(ops, step, x, index, o=out)
    return out, k, v


def mlp(
    ops: Backend, spec: ModelSpec, index: int, weights: LayerWeights, x: Tensor, step: StepInput
) -> Tensor:
    """The gated MLP of layer `index`: `down(act(gate(x)) * up(x))`. x `[tokens, hidden]`."""
    w = weights
    if w.gate_up is not None:
        gate, up = ops.linear(x, w.gate_up).chunk(2, dim=1)
    else:
        gate, up = ops.linear(x, w.gate), ops.linear(x, w.up)
    _add_biases((gate, w.gate_bias), (up, w.up_bias))
    _add_deltas(ops, step, x, index, gate=gate, up=up)
    if spec.activation == "silu":
        inner = ops.silu_mul(gate, up)
    else:
        inner = F.gelu(gate, approximate="tanh").mul_(up)
    out = ops.linear(inner, w.down)
    _add_biases((out, w.down_bias))
    _add_deltas(ops, step, inner, index, down=out)
    return out


def _add_biases(*pairs: tuple[Tensor, Tensor | None]) -> None:
    for product, bias in pairs:
        if bias is not None:
            product += bias


def _add_deltas(ops: Backend, step: StepInput, x: Tensor, index: int, **products: Tensor) -> None:
    """The adapters' part of products of x, by projection, in one call."""
    if step.lora is not None:
        table, rows = step.lora
        ops.lora_apply(x, tuple(products.values()), table, index, tuple(products), rows)


def _head_norm(ops: Backend, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm of each head. x `[tokens, heads, head_dim]`."""
    if weight is None:
        return x
    return ops.rms_norm(x.reshape(-1, x.shape[2]), weight, eps).view(x.shape)
