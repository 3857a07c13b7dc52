"""Which tokens of spliced memories are worth computing again.

A first pass of the query over the stored KV tells how much it attends to each token; what a token's V still
varies with its neighbours (sigma_v, from the record) tells how wrong the stored one may be. The product of
both, summed over layers, heads and query rows, ranks the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memos_engine.decoder.record import KVRecord

# Where a record goes: the position of its first row.
Placed = tuple[int, KVRecord]


@dataclass(eq=False)
class Probe:
    """What the first pass of one request gathers, and about which tokens.

    first_row: position of the query's first token; only rows from there on count. positions: of the spliced
    memory tokens that are not exact. weight `[layers, keys, kv_heads] float32`; scores `[keys] float32`.
    """

    first_row: int
    positions: list[int]
    weight: Tensor
    scores: Tensor
    budget: int

    def selected(self) -> tuple[int, ...]:
        """Positions to compute again, ascending."""
        return _top(self.positions, self.scores, self.budget)


def probe(placed: Sequence[Placed], budget: int, first_row: int) -> Probe:
    """A probe over these records. Where one of them has no sigma_v, attention alone decides."""
    weights = [None if record.sigma_v is None else record.sigma_v.float() for _, record in placed]
    if any(weight is None for weight in weights):
        weights = [record.v.new_ones(record.v.shape[:3]).float() for _, record in placed]
    there = placed[0][1].v.device  # some records may wait on the device, and others in host memory
    weight = torch.cat([w.to(there) for w in weights if w is not None], dim=1).contiguous()
    positions = _positions(placed)
    return Probe(first_row, positions, weight, weight.new_zeros(len(positions)), budget)


def by_rank(placed: Sequence[Placed], budget: int) -> tuple[int, ...]:
    """Positions to compute again by the records' own ranks, ascending. A record without ranks counts from its
    first token on, below all others (the first tokens depend most on what stands before them)."""
    ranks = []
    for _, record in placed:
        falling = -torch.arange(record.num_tokens, dtype=torch.float32)
        ranks.append(falling if record.rank is None else record.rank.cpu())
    return _top(_positions(placed), torch.cat(ranks), budget)


def _positions(placed: Sequence[Placed]) -> list[int]:
    return [p for start, record in placed for p in range(start, start + record.num_tokens)]


def _top(positions: Sequence[int], scores: Tensor, budget: int) -> tuple[int, ...]:
    best = torch.topk(scores, min(budget, len(positions)), sorted=False).indices.tolist()
    return tuple(sorted(positions[i] for i in best))
