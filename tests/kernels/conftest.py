"""Inputs for kernel tests: ragged requests over shuffled pages whose unused slots are NaN."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from memos_engine.ops import reference


def levels() -> list[str]:
    """The reference and every instruction set level of this machine."""
    if importlib.util.find_spec("memos_engine._cpu") is None:
        return ["reference"]
    from memos_engine.ops import cpu

    return ["reference", *cpu.available()]


@pytest.fixture(params=levels())
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each backend of CPU tensors, forced to each level in turn."""
    if request.param == "reference":
        yield reference
        return
    from memos_engine.ops import cpu

    before = cpu.isa()
    cpu.select_isa(request.param)
    yield cpu
    cpu.select_isa(before)


@pytest.fixture
def all_backends() -> Callable[[], Iterator[Any]]:
    """The native levels as a loop, for property tests."""

    def loop() -> Iterator[Any]:
        for level in levels()[1:]:
            from memos_engine.ops import cpu

            before = cpu.isa()
            cpu.select_isa(level)
            try:
                yield cpu
            finally:
                cpu.select_isa(before)

    return loop


@dataclass
class Problem:
    """The arguments of one paged_attention call."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    q_pos: Tensor
    sm_scale: float
    window: int = 0

    def args(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def wide(self) -> tuple[Any, ...]:
        """The same values in float64: the already rounded inputs, seen exactly."""
        return tuple(
            t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self.args()
        )

    def request(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One request, dense: q and k, v `[heads, rows or keys, dim]`, visible `[rows, keys]`."""
        rows = slice(int(self.query_start[index]), int(self.query_start[index + 1]))
        length = int(self.seq_lens[index])
        blocks = self.block_table[index, : -(-length // self.k_pages.shape[1])].long()
        group = self.q.shape[1] // self.k_pages.shape[2]
        k, v = (
            pages[blocks].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(group, 0)
            for pages in (self.k_pages, self.v_pages)
        )
        keys, position = torch.arange(length), self.q_pos[rows, None]
        visible = keys <= position
        if self.window:
            visible &= keys > position - self.window
        return self.q[rows].transpose(0, 1), k, v, visible


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """Builds a Problem: requests of `lengths` keys with `rows` query rows each."""

    def build(
        lengths: Sequence[int],
        rows: Sequence[int],
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        page: int = 16,
        window: int = 0,
        scattered: bool = False,
        spread: float = 1.0,
        seed: int = 0,
    ) -> Problem:
        random = torch.Generator().manual_seed(seed)
        needed = [-(-length // page) for length in lengths]
        blocks = sum(needed) + 3
        k_pages = torch.full((blocks, page, kv_heads, dim), float("nan"), dtype=dtype)
        k_pages[0] = 0
        v_pages = k_pages.clone()
        free = (torch.randperm(blocks - 1, generator=random) + 1).tolist()
        # Unused table entries name no block at all.
        table = torch.full((len(lengths), max(needed, default=0) + 2), -1, dtype=torch.int32)
        for request, length in enumerate(lengths):
            for i in range(needed[request]):
                block, used = free.pop(), min(page, length - i * page)
                table[request, i] = block
                for pages in (k_pages, v_pages):
                    values = torch.randn(used, kv_heads, dim, generator=random) * spread
                    pages[block, :used] = values.to(dtype)
        position = []
        for length, count in zip(lengths, rows, strict=True):
            if scattered:
                position += [int(torch.randint(length, (1,), generator=random)) for _ in range(count)]
            else:
                position += list(range(length - count, length))
        starts = [0]
        for count in rows:
            starts.append(starts[-1] + count)
        q = torch.randn(starts[-1], heads, dim, generator=random) * spread
        return Problem(
            q=q.to(dtype),
            k_pages=k_pages,
            v_pages=v_pages,
            block_table=table,
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            q_pos=torch.tensor(position, dtype=torch.int32),
            sm_scale=dim**-0.5,
            window=window,
        )

    return build


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor, Tensor], None]:
    """The rule for every kernel: at most twice the error of plain torch in the same precision.

    `ours` and `plain` are compared with `exact` (float64); a floor stands for torch being exact by luck.
    """

    def check(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert torch.isfinite(ours).all()
        error = (ours.double() - exact).abs().max().item() if ours.numel() else 0.0
        allowed = 2 * (plain.double() - exact).abs().max().item() if ours.numel() else 0.0
        floor = 1e-6 * max(1.0, exact.abs().max().item()) if ours.numel() else 0.0
        assert error <= allowed + floor, f"error {error:.3g}, plain torch {allowed / 2:.3g}"

    return check
