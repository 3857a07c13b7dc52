"""Pages of int8 in Triton's interpreter: written with the reference's bits, read as float64 reads them.

The interpreter truncates float32 to bfloat16 instead of rounding, so results in bf16 may be one step off.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memos_engine import ops
from memos_engine.decoder.quantize import quantize_k, quantize_v
from memos_engine.ops import reference

pytest.importorskip("triton")
from memos_engine.kernels.paged_attention_launch import Shape, paged_attention

from memos_engine.ops import triton as backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = (Shape(4, 16, 4, 16, 4), Shape(20, 16, 2, 32, 4), Shape(0, 32, 1, 1, 4))


def pages(dim):
    values, scale = torch.full((2, 4, 16, 3, dim), 9, dtype=torch.int8), torch.full((2, 4, 16, 3), 9.0)
    return [values, values.clone(), scale, scale.clone()]


def named(target):
    return {"k_page_scale": target[2], "v_page_scale": target[3]}


def place(rotary):
    """Slots, positions and a table."""
    random = torch.Generator().manual_seed(0)
    table = ops.rope_table(torch.rand(rotary // 2, generator=random), 100) if rotary else None
    slots = torch.tensor([17, -1, 3, 40, 16])
    return slots, torch.tensor([5, 90, 0, 31, 2], dtype=torch.int32), table


def equal(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (20, 12), (16, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_splice_equals_append_equals_reference(dtype, dim, rotary, interleaved):
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 5, 3, dim, generator=random).to(dtype) for _ in range(2))
    k[0, 2], v[1, 3, 1] = 0, 0
    got, wanted, appended = pages(dim), pages(dim), pages(dim)
    for splice, target in ((backend.splice_kv, got), (reference.splice_kv, wanted)):
        splice(k, v, *target[:2], *place(rotary), interleaved, **named(target))
    assert equal(got, wanted)
    assert got[2][0].flatten(0, 1)[3].eq(0).all()
    for layer in range(2):
        own = [part[layer] for part in appended]
        backend.append_kv(k[layer], v[layer], *own[:2], *place(rotary), interleaved, **named(own))
    assert equal(appended, wanted)


@pytest.mark.parametrize("first", [0, 62, 90])
@pytest.mark.parametrize("interleaved", [False, True])
def test_records_of_int8_and_strided_layers(first, interleaved):
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 100, 3, 20, generator=random) for _ in range(2))
    (k, k_scale), (v, v_scale) = quantize_k(k), quantize_v(v)
    rows = slice(first, first + 5)
    wide = [torch.cat((part, part)) for part in pages(20)]
    got, wanted = [part[::2] for part in wide], pages(20)
    for splice, target in ((backend.splice_kv, got), (reference.splice_kv, wanted)):
        splice(
            k[:, rows], v[:, rows], *target[:2], *place(12), interleaved,
            k_scale=k_scale, v_scale=v_scale[:, rows], first_token=first, **named(target),
        )  # fmt: skip
    assert equal(got, wanted)
    assert all((part[1::2] == 9).all() for part in wide)


def test_values_of_all_sizes():
    sizes = torch.cat((torch.exp2(torch.linspace(-149, 127, 40)), torch.tensor([torch.finfo().max])))
    v = (sizes[:, None, None] * torch.linspace(-1, 1, 16)).expand(41, 3, 16).contiguous()
    slots, positions = torch.arange(41) + 16, torch.zeros(41, dtype=torch.int32)
    got, wanted = ([part[0] for part in pages(16)] for _ in range(2))
    for append, target in ((backend.append_kv, got), (reference.append_kv, wanted)):
        append(v, v, *target[:2], slots, positions, None, **named(target))
    assert equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (9, 3, 20), (8, 1, 16)])
@pytest.mark.parametrize("window", [0, 30])
def test_attention(make_int8_problem, plain_attention, assert_close, dtype, heads, kv_heads, dim, window):
    """Requests of every shape of program, and page edges among their lengths."""
    narrow = make_int8_problem(
        [90, 17, 64, 1, 15], [1, 5, 24, 1, 15], heads, kv_heads, dim, dtype=dtype, window=window
    )
    lse, wide = torch.full(narrow.problem.q.shape[:2], float("nan")), narrow.floats(torch.float64)
    exact_lse = torch.empty(lse.shape, dtype=torch.float64)
    exact = reference.paged_attention(*wide.args(), lse=exact_lse)
    out = paged_attention(*narrow.problem.args(), lse=lse, shapes=SMALL, **narrow.scales)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-5)
    else:
        assert_close(out, plain_attention(narrow.floats()), exact)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probe(make_int8_probe, assert_close, dtype):
    probe, narrow = make_int8_probe([70, 33], [20, 33], 6, 2, 16, dtype=dtype)
    exact = replace(probe, problem=narrow.floats(torch.float64)).exact()
    plain = replace(probe, problem=narrow.floats(), scores=probe.scores.clone())
    reference.attention_probe(*plain.args())
    backend.attention_probe(*probe.args(), k_page_scale=narrow.scales["k_page_scale"])
    assert_close(probe.scores, plain.scores, exact)
