"""KV records in eight bits: about a quarter of float32's bytes, half of bfloat16's.

Symmetric: the largest size becomes 127. K has outlying channels, so each channel has a scale, shared by the
tokens of a group; V has none, and each token and head has one (KIVI, arXiv 2402.02750). K is taken before
RoPE, which mixes its channels (KVQuant, arXiv 2401.18079). `ops.splice_kv` reads both as they are.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from memos_engine.decoder.record import KVRecord
from memos_engine.ops.int8_kv import GROUP, dequantize_k, dequantize_v, quantize_heads, rounded, scale_of

__all__ = ["GROUP", "INT8", "dequantize_k", "dequantize_v", "quantize_k", "quantize_record", "quantize_v"]

INT8 = "int8: k by channel and 64 tokens, v by token and head"  # as a record's identity names it


def quantize_record(record: KVRecord) -> KVRecord:
    """The record with K and V in eight bits."""
    (k, k_scale), (v, v_scale) = quantize_k(record.k), quantize_v(record.v)
    return replace(record, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def quantize_k(k: Tensor) -> tuple[Tensor, Tensor]:
    """`k [layers, tokens, kv_heads, head_dim]`, finite floats, as int8 of that shape and its scales.

    The scales are `[layers, groups, kv_heads, head_dim] float32`; the last group may have fewer tokens.
    """
    wide = k.float()
    layers, tokens, heads, dim = wide.shape
    groups = -(-tokens // GROUP)
    sizes = pad(wide.abs(), (0, 0, 0, 0, 0, groups * GROUP - tokens))
    scale = scale_of(sizes.reshape(layers, groups, GROUP, heads, dim).amax(dim=2))
    return rounded(wide, scale.repeat_interleave(GROUP, dim=1)[:, :tokens]), scale


def quantize_v(v: Tensor) -> tuple[Tensor, Tensor]:
    """`v [layers, tokens, kv_heads, head_dim]`, finite floats, as int8 of that shape and its scales.

    The scales are `[layers, tokens, kv_heads] float32`.
    """
    return quantize_heads(v)
