"""Inputs for kernel tests: ragged requests over shuffled pages whose unused slots are NaN."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memos_engine.ops import reference
from memos_engine.ops.int8_kv import quantize_heads


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


@dataclass
class Probe:
    """The arguments of one attention_probe call: keys of a Problem, by position and in any order."""

    problem: Problem
    lse: Tensor
    key_slots: Tensor
    key_pos: Tensor
    key_start: Tensor
    weight: Tensor
    scores: Tensor

    def args(self) -> tuple[Any, ...]:
        p = self.problem
        keys = (self.key_slots, self.key_pos, self.key_start, self.weight, self.scores)
        return p.q, p.k_pages, p.query_start, p.q_pos, self.lse, *keys, p.sm_scale, p.window

    def wide(self) -> tuple[Any, ...]:
        return tuple(
            t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self.args()
        )

    def exact(self) -> Tensor:
        """The scores in float64, out of each request's whole matrix of softmax weights."""
        scores = self.scores.double()
        for i in range(len(self.problem.seq_lens)):
            keys = torch.arange(int(self.key_start[i]), int(self.key_start[i + 1]))
            keys = keys[self.key_slots[keys] >= 0]
            weights, _ = softmax_of(self.problem, i)
            paid = weights[:, :, self.key_pos[keys].long()].sum(1)  # [heads, keys]
            group = paid.shape[0] // self.weight.shape[1]
            share = self.weight.double()[keys].T.repeat_interleave(group, 0)
            scores[keys] += torch.where(paid > 0, paid * share, 0).sum(0)
        return scores

    def request(self, i: int) -> Probe:
        """A call with one of the requests alone."""
        p = self.problem
        rows = slice(int(p.query_start[i]), int(p.query_start[i + 1]))
        keys = slice(int(self.key_start[i]), int(self.key_start[i + 1]))
        starts = [torch.tensor([0, part.stop - part.start], dtype=torch.int32) for part in (rows, keys)]
        alone = replace(
            p, q=p.q[rows], q_pos=p.q_pos[rows], query_start=starts[0],
            block_table=p.block_table[i : i + 1], seq_lens=p.seq_lens[i : i + 1],
        )  # fmt: skip
        of_keys = (t[keys].clone() for t in (self.key_slots, self.key_pos, self.weight, self.scores))
        slots, pos, weight, scores = of_keys
        return Probe(alone, self.lse[rows].contiguous(), slots, pos, starts[1], weight, scores)


def softmax_of(problem: Problem, index: int) -> tuple[Tensor, Tensor]:
    """One request's softmax weights `[heads, rows, keys]` and lse `[rows, heads]`, float64."""
    q, k, _, visible = problem.request(index)
    scores = (q.double() @ k.double().transpose(1, 2) * problem.sm_scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(), scores.logsumexp(-1).T


@pytest.fixture
def make_probe(make_problem: Callable[..., Problem]) -> Callable[..., Probe]:
    """Builds a Probe: `keys` probed keys of each request of a Problem (all by default), in any order."""

    def build(
        lengths: Sequence[int],
        rows: Sequence[int],
        *shape: Any,
        keys: Sequence[int] | None = None,
        **more: Any,
    ) -> Probe:
        problem = make_problem(lengths, rows, *shape, **more)
        random = torch.Generator().manual_seed(more.get("seed", 0) + 1)
        page, starts, slots, positions = problem.k_pages.shape[1], [0], [], []
        for i, (length, count) in enumerate(zip(lengths, keys or lengths, strict=True)):
            chosen = torch.randperm(length, generator=random)[:count]
            slots.append(problem.block_table[i, chosen // page].long() * page + chosen % page)
            positions.append(chosen.int())
            starts.append(starts[-1] + len(chosen))
        lse = [softmax_of(problem, i)[1].float() for i in range(len(lengths))]
        total, kv_heads = starts[-1], problem.k_pages.shape[2]
        return Probe(
            problem,
            torch.cat(lse).contiguous(),
            torch.cat(slots),
            torch.cat(positions),
            torch.tensor(starts, dtype=torch.int32),
            torch.randn(total, kv_heads, generator=random),
            torch.randn(total, generator=random),
        )

    return build


@dataclass
class Int8Problem:
    """A Problem with pages of int8, and their scales as keyword arguments; those of unused slots are NaN."""

    problem: Problem
    scales: dict[str, Tensor]

    def attend(self, backend: Any, **more: Any) -> Tensor:
        result: Tensor = backend.paged_attention(*self.problem.args(), **self.scales, **more)
        return result

    def floats(self, dtype: torch.dtype | None = None) -> Problem:
        """The same with pages of floats, rounded to the dtype of q, or all of it in another dtype."""
        problem = self.problem
        k, v = (
            (pages.double() * scale.double()[..., None]).to(dtype or problem.q.dtype)
            for pages, scale in zip((problem.k_pages, problem.v_pages), self.scales.values(), strict=True)
        )
        return replace(problem, q=problem.q.to(dtype or problem.q.dtype), k_pages=k, v_pages=v)


def to_int8(problem: Problem, dtype: torch.dtype = torch.float32) -> Int8Problem:
    """A float32 Problem with its pages quantised, and q in a dtype."""
    sides = []
    for pages in (problem.k_pages, problem.v_pages):
        unused = pages.isnan().all(-1)
        values, scale = quantize_heads(pages.nan_to_num())
        sides.append((values.masked_fill(unused[..., None], 99), scale.masked_fill(unused, float("nan"))))
    (k, k_scale), (v, v_scale) = sides
    narrow = replace(problem, q=problem.q.to(dtype), k_pages=k, v_pages=v)
    return Int8Problem(narrow, {"k_page_scale": k_scale, "v_page_scale": v_scale})


@pytest.fixture
def make_int8_problem(make_problem: Callable[..., Problem]) -> Callable[..., Int8Problem]:
    """Builds an Int8Problem from the arguments of make_problem."""

    def build(*shape: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Int8Problem:
        return to_int8(make_problem(*shape, **more), dtype)

    return build


@pytest.fixture
def make_int8_probe(make_probe: Callable[..., Probe]) -> Callable[..., tuple[Probe, Int8Problem]]:
    """Builds a Probe over int8 pages; its `exact` is asked of the pages' values in float64."""

    def build(*shape: Any, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Probe, Int8Problem]:
        probe = make_probe(*shape, **more)
        narrow = to_int8(probe.problem, dtype)
        wide = narrow.floats(torch.float64)
        lse = [softmax_of(wide, i)[1].float() for i in range(len(wide.seq_lens))]
        return replace(probe, problem=narrow.problem, lse=torch.cat(lse).contiguous()), narrow

    return build


@pytest.fixture
def plain_attention() -> Callable[[Problem], Tensor]:
    """Each request densely by torch's own attention, in the inputs' dtype."""

    def attend(problem: Problem) -> Tensor:
        out = torch.zeros_like(problem.q)
        for i in range(len(problem.seq_lens)):
            rows = slice(int(problem.query_start[i]), int(problem.query_start[i + 1]))
            if rows.start < rows.stop:
                q, k, v, visible = problem.request(i)
                y = scaled_dot_product_attention(q, k, v, visible, scale=problem.sm_scale)
                # torch gives NaN to rows that see nothing.
                out[rows] = y.masked_fill(~visible.any(-1)[:, None], 0).transpose(0, 1)
        return out

    return attend


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
