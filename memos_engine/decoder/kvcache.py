"""The paged K and V tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from memos_engine.decoder.spec import ModelSpec


class KVCache:
    """Pages `[layers, blocks, page, kv_heads, head_dim]`, K (rotated) and V separate.

    Block 0 is the null block. Memory is zero-filled by the system, so untouched pages cost nothing.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_layers, num_blocks, page, spec.num_kv_heads, spec.head_dim)
        self.page = page
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """One layer's K and V, `[blocks, page, kv_heads, head_dim]`."""
        return self.k[index], self.v[index]

    def copy_block(self, source: int, target: int) -> None:
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]
