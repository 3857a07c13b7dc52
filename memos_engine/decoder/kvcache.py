"""The paged K and V tensors."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from memos_engine.decoder.spec import ModelSpec
from memos_engine.ops.int8_kv import dequantize_v


class Pages(NamedTuple):
    """One layer's K and V, `[blocks, page, kv_heads, head_dim]`, and their scales `[blocks, page, kv_heads]
    float32` where they are int8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def read(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What K and V of some `blocks [n]` stand for, `[n, page, kv_heads, head_dim]` each."""
        if self.k_scale is None or self.v_scale is None:
            return self.k[blocks].to(dtype), self.v[blocks].to(dtype)
        k = dequantize_v(self.k[blocks], self.k_scale[blocks])
        return k.to(dtype), dequantize_v(self.v[blocks], self.v_scale[blocks]).to(dtype)


class KVCache:
    """Pages `[layers, blocks, page, kv_heads, head_dim]`, K (rotated) and V separate.

    Those of int8 have scales `[layers, blocks, page, kv_heads] float32`, one for each token and head. Block 0
    is the null block. On a CPU, pages that no request has touched yet cost no memory.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_layers, num_blocks, page, spec.num_kv_heads, spec.head_dim)
        self.page = page
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if dtype == torch.int8:
            self.k_scale = _zeros(shape[:-1], torch.float32, device)
            self.v_scale = _zeros(shape[:-1], torch.float32, device)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def layer(self, index: int) -> Pages:
        return Pages(*(part[index] for part in self._parts))

    def layers(self, chosen: slice) -> Pages:
        """The same of several layers, with one more dimension in front."""
        return Pages(*(part[chosen] for part in self._parts))

    def copy_block(self, source: int, target: int) -> None:
        for part in self._parts:
            part[:, target] = part[:, source]

    def take(self, other: KVCache, blocks: Iterable[int]) -> None:
        """Copies blocks of another cache to the same places."""
        for block in blocks:
            for mine, theirs in zip(self._parts, other._parts, strict=True):
                mine[:, block] = theirs[:, block]

    @property
    def _parts(self) -> list[Tensor]:
        return [part for part in (self.k, self.v, self.k_scale, self.v_scale) if part is not None]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that the system provides at first touch, in small pages; torch.zeros writes them all at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
