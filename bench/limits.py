"""What the machine allows at best: the formulas behind every `share_of_limit` (docs/benchmarks.md).

A limit is a lower bound in milliseconds: the larger of arithmetic at the best GEMM rate measured here and of
bytes at the best read rate measured here. A share is limit / measured, so 1.0 is the machine's own speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from memos_engine.decoder.spec import ModelSpec

REFINE = "refine"  # splice, then compute a share of the memories again
REFINED = 0.15


@dataclass(frozen=True)
class Ceilings:
    """Rates of a machine. gemm: FLOP/s by dtype, best over all rows; read, copy, disk: bytes/s; a copy
    counts what it reads and what it writes."""

    gemm: dict[str, float]
    read: float
    copy: float
    disk_read: float = 0.0
    pcie: float = 0.0

    @classmethod
    def from_public(cls, data: dict[str, Any]) -> Ceilings:
        return cls(
            {name: rate * 1e9 for name, rate in data["gemm_gflops"].items()},
            data["read_gb_s"] * 1e9,
            data["copy_gb_s"] * 1e9,
            data.get("disk_read_gb_s", 0.0) * 1e9,
            data.get("pcie_gb_s", 0.0) * 1e9,
        )

    def public(self) -> dict[str, Any]:
        """As it stands in a document, in GFLOP/s and GB/s."""
        out: dict[str, Any] = {
            "gemm_gflops": {name: round(rate / 1e9, 1) for name, rate in self.gemm.items()},
            "read_gb_s": round(self.read / 1e9, 2),
            "copy_gb_s": round(self.copy / 1e9, 2),
        }
        for name in ("disk_read", "pcie"):
            if getattr(self, name):
                out[f"{name}_gb_s"] = round(getattr(self, name) / 1e9, 3)
        return out


@dataclass(frozen=True)
class Limits:
    """Limits of one model in one dtype on one machine, in milliseconds."""

    spec: ModelSpec
    dtype: str
    ceilings: Ceilings

    @property
    def layer_elements(self) -> int:
        s = self.spec
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        return s.hidden_size * (2 * q + 2 * kv + 3 * s.intermediate_size)

    @property
    def _size(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    def forward(self, rows: int, keys: int, requests: int = 1, logits: int | None = None) -> float:
        """One forward of `rows` rows for each of `requests`, over `keys` earlier keys and each other.

        FLOPs: 2 x layer weights x rows, 2 x vocabulary x hidden x rows with logits, 4 x heads x head_dim x
        visible pairs. Bytes: every weight once, every request's K and V once.
        """
        s = self.spec
        total, logits = rows * requests, requests if logits is None else logits
        pairs = requests * (rows * keys + rows * (rows + 1) // 2)
        flops = 2.0 * s.num_layers * self.layer_elements * total + 2.0 * s.vocab_size * s.hidden_size * logits
        flops += 4.0 * s.num_layers * s.num_heads * s.head_dim * pairs
        weights = (s.num_layers * self.layer_elements + s.vocab_size * s.hidden_size) * self._size
        kv = requests * (keys + rows) * s.kv_bytes_per_token(self._size)
        peak = self.ceilings.gemm.get(self.dtype) or max(self.ceilings.gemm.values())
        return 1e3 * max(flops / peak, (weights + kv) / self.ceilings.read)

    def splice(self, tokens: int) -> float:
        """Reading the records of `tokens` tokens and writing them into pages, at copy speed."""
        return 2e3 * tokens * self.spec.kv_bytes_per_token(self._size) / self.ceilings.copy

    def fetch(self, tokens: int) -> float:
        """Reading records of `tokens` tokens from a cold disk; 0 where the disk was not measured."""
        if not self.ceilings.disk_read:
            return 0.0
        return 1e3 * tokens * self.spec.kv_bytes_per_token(self._size) / self.ceilings.disk_read

    def first_token(self, mode: str, anchor: int, context: int, query: int) -> float:
        """`full` computes everything, `prefix` finds pages, `splice` copies them, `query_only` has none; and
        REFINE computes REFINED of what it copied once more, and the question twice."""
        if mode == "full":
            return self.forward(anchor + context + query, 0)
        if mode == "query_only":
            return self.forward(query, anchor)
        time = self.forward(query, anchor + context)
        if mode == REFINE:
            time += self.forward(round(REFINED * context) + query, (anchor + context) // 2)
        return time if mode == "prefix" else time + self.splice(anchor + context)

    def decode(self, context: int, batch: int) -> float:
        """One decode step of `batch` requests that have `context` tokens each."""
        return self.forward(1, context, requests=batch)
