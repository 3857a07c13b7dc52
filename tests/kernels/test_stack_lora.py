"""Deltas in the native layer stack: every request of a batch against float64 with its delta in the weights,
at every level, for one row and for many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memos_engine import ops
from memos_engine.ops import cpu
from memos_engine.ops.lora import PARTS, LoraTable, pack
from tests.kernels.test_lora import rows_of
from tests.kernels.test_stack import SHAPES, by_ops, make_layers, make_pages, make_step

cpu_stack = pytest.importorskip("memos_engine.ops.cpu_stack", reason="native code was not built")
LEVELS = cpu.available() if ops.describe()["cpu"]["native"] else []
RANKS = (16, 4, 33, 1)  # of the adapters; the last has no delta for some parts


@pytest.fixture(params=LEVELS)
def level(request):
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


def deltas_of(layers, rank, seed, dtype):
    make = torch.Generator().manual_seed(seed)
    made = {}
    for i, layer in enumerate(layers):
        for part in PARTS:
            if rank == 1 and part in ("k", "gate", "o"):
                continue
            outputs, inputs = getattr(layer, part).shape
            a = (torch.randn(rank, inputs, generator=make) / inputs**0.5).to(dtype)
            b = (torch.randn(outputs, rank, generator=make) * 0.3 / rank**0.5).to(dtype)
            made[i, part] = (a, b, 0.5)
    return made


def merged(layers, deltas, factor):
    return [
        replace(
            layer,
            **{
                part: getattr(layer, part).double() + scale * factor * (b.double() @ a.double())
                for part in PARTS
                if (i, part) in deltas
                for a, b, scale in [deltas[i, part]]
            },
        )
        for i, layer in enumerate(layers)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["smollm2", "odd", "bias"])
def test_every_request_has_its_own_delta(level, shape, dtype):
    fields = dict(SHAPES[shape])
    layers, final = make_layers(2, dtype=dtype, **fields)
    kv_heads, dim = fields["kv_heads"], fields["dim"]
    adapters = [deltas_of(layers, rank, seed, dtype) for seed, rank in enumerate(RANKS)]
    table = LoraTable(len(RANKS), 2, 64)
    for slot, made in enumerate(adapters):
        table.publish(slot, pack(made, 2, dtype))
    factors = [1.0, -0.5, 2.0, 1.0]
    for count in (1, 2, 3, 5, 8, 9, 17):
        step, used = make_step([(5 + i, 1) for i in range(count)], seed=count)
        pages = make_pages(2, kv_heads, dim, dtype, used, seed=count)
        stack = cpu_stack.layer_stack(layers, final, 1e-5, dim**-0.5, *pages)
        if stack is None:
            pytest.skip("this level leaves such shapes to the single ops")
        slots = [[0, 1, -1, 2, 0, 3, 1, 2][i % 8] for i in range(count)]
        hidden = torch.randn(count, fields["hidden"], generator=torch.Generator().manual_seed(count)).to(
            dtype
        )
        plain = stack.run(hidden.clone(), *step)
        ours = stack.run(hidden.clone(), *step, None, (table, rows_of(slots, factors)))
        for row, slot in enumerate(slots):
            if slot < 0:
                assert torch.equal(ours[row], plain[row])
                continue
            own = slice(row, row + 1)
            alone = (
                step[0][own],
                step[1][own],
                torch.tensor([0, 1], dtype=torch.int32),
                step[3][own],
                step[4][own],
            )
            truth, *_ = by_ops(
                merged(layers, adapters[slot], factors[slot]), final, 1e-5, dim**-0.5, *pages, hidden[own],
                alone, None, wide=True,
            )  # fmt: skip
            off = float((ours[own].double() - truth).norm() / truth.norm())
            assert off <= (1e-5 if dtype == torch.float32 else 2e-2), (count, row, slot)


def test_rows_of_one_adapter_share_its_delta(level):
    fields = dict(SHAPES["smollm2"])
    layers, final = make_layers(2, dtype=torch.float32, **fields)
    table = LoraTable(1, 2, 64)
    table.publish(0, pack(deltas_of(layers, 16, 0, torch.float32), 2, torch.float32))
    step, used = make_step([(20, 1)] * 6)
    stack = cpu_stack.layer_stack(layers, final, 1e-5, 0.125, *make_pages(2, 3, 64, torch.float32, used))
    hidden = torch.randn(6, fields["hidden"], generator=torch.Generator().manual_seed(1))
    together = stack.run(hidden.clone(), *step, None, (table, rows_of([0] * 6)))
    for row in range(6):
        own = [0 if i == row else -1 for i in range(6)]
        assert torch.equal(stack.run(hidden.clone(), *step, None, (table, rows_of(own)))[row], together[row])
