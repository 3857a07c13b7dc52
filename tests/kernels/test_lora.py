"""lora_apply: every level and dtype against float64, mixed ranks, rows without one, strided outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine import ops
from memos_engine.errors import KernelContractError
from memos_engine.ops import cpu, lora, reference
from memos_engine.ops.lora import LoraRows, LoraTable, pack, unblocked

LEVELS = cpu.available() if ops.describe()["cpu"]["native"] else []


def modules(seed, shapes, ranks, dtype, scale=0.5):
    """One layer's deltas: shapes and ranks by part."""
    make = torch.Generator().manual_seed(seed)
    return {
        (0, part): (
            (torch.randn(rank, inputs, generator=make) / inputs**0.5).to(dtype),
            torch.randn(outputs, rank, generator=make).to(dtype),
            scale,
        )
        for (part, (inputs, outputs)), rank in zip(shapes.items(), ranks, strict=True)
        if rank
    }


def rows_of(slots, scales=None):
    """LoraRows for a slot per token, -1 for none; each run of a slot's tokens is a segment of up to 16."""
    order, start, segment, scale = [], [0], [], []
    for slot in sorted(set(slots) - {-1}):
        mine = [i for i, s in enumerate(slots) if s == slot]
        for at in range(0, len(mine), 16):
            order += mine[at : at + 16]
            start.append(len(order))
            segment.append(slot)
            scale.append(1.0 if scales is None else scales[slot])
    int32 = [torch.tensor(x, dtype=torch.int32) for x in (order, start, segment)]
    return LoraRows(*int32, torch.tensor(scale, dtype=torch.float32))


def wanted(x, outs, fills, parts, slots, scales):
    """In float64, row by row."""
    results = [out.double() for out in outs]
    for row, slot in enumerate(slots):
        for part, result in zip(parts, results, strict=True):
            delta = None if slot < 0 else fills[slot].deltas.get((0, part))
            if delta is not None:
                b = unblocked(delta).double()
                result[row] += delta.scale * scales[slot] * (b @ (delta.a.double() @ x[row].double()))
    return results


def case(dtype, tokens=7, inputs=100, outputs=(70, 33, 33), ranks=((4, 8, 16), (64, 0, 5)), seed=0):
    parts = ("q", "k", "v")[: len(outputs)]
    shapes = {part: (inputs, n) for part, n in zip(parts, outputs, strict=True)}
    table = LoraTable(4, 1, 64)
    for slot, own in enumerate(ranks):
        table.publish(slot, pack(modules(seed + slot, shapes, own, dtype), 1, dtype))
    make = torch.Generator().manual_seed(seed + 99)
    x = torch.randn(tokens, inputs, generator=make).to(dtype)
    outs = [torch.randn(tokens, n, generator=make).to(dtype) for n in outputs]
    slots = [int(s) for s in torch.randint(-1, len(ranks), (tokens,), generator=make)]
    return x, outs, table, parts, slots


@pytest.fixture(params=LEVELS or ["reference"])
def level(request):
    if request.param != "reference":
        before = cpu.isa()
        cpu.select_isa(request.param)
        yield request.param
        cpu.select_isa(before)
    else:
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
@pytest.mark.parametrize("inputs", [96, 100, 31])
def test_every_level_against_float64(level, dtype, tokens, inputs):
    x, outs, table, parts, slots = case(dtype, tokens, inputs)
    scales = [1.0, -0.25]
    expected = wanted(x, outs, table.fills, parts, slots, scales)
    plain = [out.clone() for out in outs]
    reference.lora_apply(x, plain, table, 0, parts, rows_of(slots, scales))
    before = [out.clone() for out in outs]
    ops.lora_apply(x, outs, table, 0, parts, rows_of(slots, scales))
    for out, ours, torchs, want in zip(before, outs, plain, expected, strict=True):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (ours - want).abs().max() <= 2 * (torchs - want).abs().max() + 2 * floor
        none = [i for i, s in enumerate(slots) if s < 0]
        assert torch.equal(ours[none], out[none])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_mixture_of_ranks_and_rows(data):
    ranks = data.draw(st.lists(st.lists(st.integers(0, 20), min_size=2, max_size=2), min_size=1, max_size=4))
    tokens, inputs = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70))
    outputs = tuple(data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=2)))
    x, outs, table, parts, slots = case(torch.float32, tokens, inputs, outputs, ranks)
    scales = [1.0] * len(ranks)
    expected = wanted(x, outs, table.fills, parts, slots, scales)
    ops.lora_apply(x, outs, table, 0, parts, rows_of(slots))
    for ours, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)


def test_a_rows_bits_do_not_depend_on_its_batch():
    x, outs, table, parts, _ = case(torch.bfloat16, tokens=11)
    alone = [out.clone() for out in outs]
    ops.lora_apply(x, outs, table, 0, parts, rows_of([0, 1] * 5 + [0]))
    for row in range(11):
        ops.lora_apply(x, alone, table, 0, parts, rows_of([row % 2 if i == row else -1 for i in range(11)]))
    assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))


def test_strided_outputs_and_their_neighbours():
    x, outs, table, parts, slots = case(torch.float32)
    wide = torch.full((7, 70 + 33 + 33), 7.0)
    views = list(torch.split(wide, [70, 33, 33], dim=1))
    for view, out in zip(views, outs, strict=True):
        view.copy_(out)
    ops.lora_apply(x, outs, table, 0, parts, rows_of(slots))
    ops.lora_apply(x, views, table, 0, parts, rows_of(slots))
    assert torch.equal(wide, torch.cat(outs, dim=1))
    wide[:] = 7.0
    ops.lora_apply(x, views[1:2], table, 0, ("k",), rows_of(slots))
    assert (wide[:, :70] == 7.0).all()
    assert (wide[:, 103:] == 7.0).all()


def test_an_empty_slot_and_an_empty_call_change_nothing():
    x, outs, table, parts, _ = case(torch.float32)
    before = [out.clone() for out in outs]
    ops.lora_apply(x, outs, table, 0, parts, rows_of([3] * 7))  # nothing was ever published there
    table.publish(0, None)
    ops.lora_apply(x, outs, table, 0, parts, rows_of([0] * 7))
    ops.lora_apply(x, outs, table, 0, parts, rows_of([-1] * 7))
    assert all(torch.equal(a, b) for a, b in zip(outs, before, strict=True))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_packing_rounds_once_and_pads_with_zeros(source, target):
    made = modules(3, {"q": (45, 37), "k": (45, 64)}, (5, 16), source)
    fill = pack(made, 1, target)
    for key, (a, b, scale) in made.items():
        delta = fill.deltas[key]
        assert torch.equal(delta.a, a.to(target))
        assert torch.equal(unblocked(delta), b.to(target))
        assert not delta.b.transpose(1, 2).reshape(-1, delta.rank)[delta.outputs :].any()
        assert delta.scale == scale


@pytest.mark.skipif(not LEVELS, reason="native code was not built")
def test_bad_rows_are_refused_before_anything_is_written():
    x, outs, table, parts, _ = case(torch.float32)
    good = rows_of([0] * 7)
    for name, tensor in (
        ("order", good.order + 1),
        ("order", good.order - 1),
        ("slot", good.slot + 4),
        ("start", good.start + 1),
        ("start", good.start.flip(0)),
    ):
        bad = LoraRows(**{n: getattr(good, n) for n in ("order", "start", "slot", "scale")} | {name: tensor})
        before = [out.clone() for out in outs]
        with pytest.raises(KernelContractError, match="segments"):
            ops.lora_apply(x, outs, table, 0, parts, bad)
        assert all(torch.equal(a, b) for a, b in zip(outs, before, strict=True))


def test_contracts():
    x, outs, table, parts, slots = case(torch.float32)
    rows = rows_of(slots)
    for args, match in (
        ((x, outs, table, 1, parts, rows), "layer 1"),
        ((x, outs, table, 0, ("q",), rows), "as many"),
        ((x, outs, table, 0, ("q", "k", "z"), rows), "as many"),
        ((x[:, :50], outs, table, 0, parts, rows), "inputs"),
        ((x.bfloat16(), [o.bfloat16() for o in outs], table, 0, parts, rows), "pack it"),
        ((x, [o[:3] for o in outs], table, 0, parts, rows), "out must be"),
    ):
        with pytest.raises(KernelContractError, match=match):
            ops.lora_apply(*args)


def triton_kernel():
    """The Triton module, which runs in the interpreter here."""
    pytest.importorskip("triton")
    from memos_engine.kernels import lora_apply

    assert (lora_apply.PARTS, lora_apply.BLOCK) == (lora.PARTS, lora.BLOCK)
    assert lora_apply.SEGMENT_ROWS == lora.SEGMENT_ROWS
    return lora_apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 35])
def test_triton_against_the_reference(monkeypatch, dtype, fused, tokens):
    kernel = triton_kernel()
    monkeypatch.setattr(kernel, "FUSED_ROWS", 1000 if fused else 0)
    x, outs, table, parts, slots = case(dtype, tokens)
    rows = rows_of(slots, [1.0, -0.25])
    wanted = [out.clone() for out in outs]
    reference.lora_apply(x, wanted, table, 0, parts, rows)
    table.publish(2, None)
    kernel.lora_apply(x, outs, table, 0, parts, rows)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, want in zip(outs, wanted, strict=True):
        torch.testing.assert_close(ours, want, **tolerance)


def test_triton_leaves_an_empty_slot_alone():
    x, outs, table, parts, _ = case(torch.float32)
    before = [out.clone() for out in outs]
    triton_kernel().lora_apply(x, outs, table, 0, parts, rows_of([3] * 7))
    assert all(torch.equal(a, b) for a, b in zip(outs, before, strict=True))
