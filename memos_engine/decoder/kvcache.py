"""The paged K and V tensors."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from memos_engine.decoder.spec import ModelSpec


class KVCache:
    """Pages `[layers, blocks, page, kv_heads, head_dim]`, K (rotated) and V separate.

    Block 0 is the null block. On a CPU, pages that no request has touched yet cost no memory.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_layers, num_blocks, page, spec.num_kv_heads, spec.head_dim)
        self.page = page
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """One layer's K and V, `[blocks, page, kv_heads, head_dim]`."""
        return self.k[index], self.v[index]

    def copy_block(self, source: int, target: int) -> None:
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that the system provides at first touch, in small pages; torch.zeros writes them all at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
