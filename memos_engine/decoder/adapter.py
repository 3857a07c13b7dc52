"""An adapter in memory: the low-rank deltas (LoRA, Hu et al., arXiv 2106.09685) of a model's projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from memos_engine.ops.lora import LoraLayout, unblocked

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


@dataclass(frozen=True, eq=False)
class PackedModules(Mapping[tuple[int, str], LowRank]):
    """Modules in one flat tensor, in the layout of a slot, so that filling one is one copy. What it hands
    out: a as a view, b as a copy."""

    layout: LoraLayout
    flat: Tensor

    def __getitem__(self, key: tuple[int, str]) -> LowRank:
        delta = self.layout.delta(self.flat, self.layout.keys[key])
        return LowRank(delta.a, unblocked(delta), delta.scale)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self.layout.keys)

    def __len__(self) -> int:
        return len(self.layout.modules)

    @property
    def rank(self) -> int:
        return int(self.layout.modules[:, 2].max(initial=0))

    @property
    def nbytes(self) -> int:
        _, _, rank, inputs, outputs = self.layout.modules.T
        return int((rank * (inputs + outputs)).sum()) * self.flat.element_size()


@dataclass(frozen=True)
class Adapter:
    """digest: SHA-256 of the content, which alone identifies it. modules: by layer and projection, named as
    in `LayerWeights`; what is missing stays as it is."""

    digest: str
    modules: Mapping[tuple[int, str], LowRank]

    @cached_property
    def rank(self) -> int:
        """The largest rank."""
        if isinstance(self.modules, PackedModules):
            return self.modules.rank
        return max((module.rank for module in self.modules.values()), default=0)

    @cached_property
    def nbytes(self) -> int:
        """Of the matrices."""
        if isinstance(self.modules, PackedModules):
            return self.modules.nbytes
        return sum(t.numel() * t.element_size() for m in self.modules.values() for t in (m.a, m.b))

    @cached_property
    def kv_floor(self) -> int | None:
        """The first layer whose K or V differ from the base model's; None where there is no delta.

        K and V of a layer depend on all weights below it and on its own k and v.
        """
        floors = [layer if name in ("k", "v") else layer + 1 for layer, name in self.modules]
        return min(floors, default=None)
