"""An adapter in memory: the low-rank deltas (LoRA, Hu et al., arXiv 2106.09685) of a model's projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LowRank:
    """One projection's delta: it adds `scale * (x @ a.T) @ b.T`. a `[rank, in]`, b `[out, rank]`."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """digest: SHA-256 of the content, which alone identifies it. modules: by layer and projection, named as
    in `LayerWeights`; what is missing stays as it is."""

    digest: str
    modules: Mapping[tuple[int, str], LowRank]

    @cached_property
    def rank(self) -> int:
        """The largest rank."""
        return max((module.rank for module in self.modules.values()), default=0)

    @cached_property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for m in self.modules.values() for t in (m.a, m.b))

    @cached_property
    def kv_floor(self) -> int | None:
        """The first layer whose K or V differ from the base model's; None where there is no delta.

        K and V of a layer depend on all weights below it and on its own k and v.
        """
        floors = [layer if name in ("k", "v") else layer + 1 for layer, name in self.modules]
        return min(floors, default=None)
