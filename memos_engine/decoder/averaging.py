"""Context-averaged keys and values: what a span's KV is whoever stands to its left.

About two thirds of what neighbours do to a span's KV is the same for any neighbours, so that the mean over a
few left contexts comes nearer to the KV in a new place than that of any one context. The spread that is left
says which tokens depend most on their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memos_engine.decoder.engine import DecoderEngine


@dataclass(frozen=True)
class AveragedKV:
    """k (before RoPE), v `[layers, tokens, kv_heads, head_dim]` in the model's dtype: means over contexts.

    sigma_v `[layers, tokens, kv_heads] float32`: root mean square distance of V from its mean. rank
    `[tokens] float32`: variance of K and V relative to their size, summed over layers and heads; the largest
    are those to compute again where nothing is known of the query.
    """

    k: Tensor
    v: Tensor
    sigma_v: Tensor
    rank: Tensor


def encode_averaged(
    engine: DecoderEngine,
    anchor: Sequence[int],
    spans: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]],
) -> list[AveragedKV]:
    """Encodes each span behind the anchor and each of the contexts (token ids), and averages.

    A context is computed once for all spans. Raises ValueError without a context, ContextLengthError where
    one does not fit the model's window.
    """
    if not contexts:
        raise ValueError("an average needs at least one left context")
    sums = [(_Sums(), _Sums()) for _ in spans]
    for context in contexts:
        for (k_sum, v_sum), (k, v) in zip(sums, engine.encode_spans((*anchor, *context), spans), strict=True):
            k_sum.add(k)
            v_sum.add(v)
    dtype = engine.runner.model.weights.dtype
    return [_averaged(k_sum, v_sum, dtype) for k_sum, v_sum in sums]


def _averaged(k: _Sums, v: _Sums, dtype: torch.dtype) -> AveragedKV:
    relative = [sums.spread / sums.size.clamp_min(1e-30) for sums in (k, v)]
    rank = (relative[0] + relative[1]).sum(dim=(0, 2))
    return AveragedKV(k.mean.to(dtype), v.mean.to(dtype), v.spread.sqrt().float(), rank.float())


class _Sums:
    """Mean and spread of tensors `[layers, tokens, kv_heads, head_dim]`, one after the other."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        wide = value.double()
        self.count += 1
        self.total = self.total + wide
        self.squares = self.squares + wide.square().sum(-1)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def size(self) -> Tensor:
        """Squared length of the mean, `[layers, tokens, kv_heads]`."""
        return self.mean.square().sum(-1)

    @property
    def spread(self) -> Tensor:
        """Mean squared distance from the mean, `[layers, tokens, kv_heads]`."""
        return (self.squares / self.count - self.size).clamp_min(0)
