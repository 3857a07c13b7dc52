"""How much of what neighbours do to a memory's KV is the same whoever they are: what an average can store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memos_engine.decoder.engine import DecoderEngine

Ids = tuple[int, ...]


def systematic_shares(
    engine: DecoderEngine, anchor: Ids, spans: Sequence[Ids], contexts: Sequence[Ids]
) -> tuple[float, float] | None:
    """Shares (K, V) of the squared deviation from the anchored KV that all contexts have in common; None for
    fewer than two contexts.

    With deviations d of N contexts, mean |d|^2 holds the common part and the spread; the spread is estimated
    without bias by sum |d - mean|^2 / (N - 1). Summed over spans, tokens and all layers but the first, whose
    V depends on no neighbour.
    """
    if len(contexts) < 2:
        return None
    alone = engine.encode_spans(anchor, spans)
    each = [engine.encode_spans((*anchor, *context), spans) for context in contexts]
    shares = []
    for side in (0, 1):
        total = spread = 0.0
        for index, base in enumerate(alone):
            deviations = torch.stack([found[index][side][1:].double() for found in each]) - base[side][1:]
            total += _squares(deviations) / len(contexts)
            spread += _squares(deviations - deviations.mean(0)) / (len(contexts) - 1)
        shares.append(1.0 - spread / total if total else 0.0)
    return shares[0], shares[1]


def _squares(values: Tensor) -> float:
    return float(values.square().sum())
