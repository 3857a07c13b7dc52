"""The Triton kernels in Triton's interpreter, against the reference.

The interpreter truncates float32 to bfloat16 instead of rounding, so one bf16 step is allowed there.
"""

from __future__ import annotations

import pytest
import torch

from memos_engine import ops
from memos_engine.decoder.quantize import quantize_k, quantize_v
from memos_engine.ops import reference

pytest.importorskip("triton")
from memos_engine.ops import triton as backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(got, wanted):
    if got.dtype == torch.bfloat16:
        steps = got.view(torch.int16).int() - wanted.view(torch.int16).int()
        assert steps.abs().max() <= 1
    else:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (20, 12), (16, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_splice(source, target, dim, rotary, interleaved):
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 5, 3, dim, generator=random).to(source) for _ in range(2))
    slots = torch.tensor([17, -1, 3, 40, 16])
    positions = torch.tensor([5, 90, 0, 31, 2], dtype=torch.int32)
    table = ops.rope_table(torch.rand(rotary // 2, generator=random), 100) if rotary else None
    got = [torch.full((2, 4, 16, 3, dim), 9.0, dtype=target) for _ in range(2)]
    wanted = [pages.clone() for pages in got]
    backend.splice_kv(k, v, *got, slots, positions, table, interleaved)
    reference.splice_kv(k, v, *wanted, slots, positions, table, interleaved)
    same(got[0], wanted[0])
    same(got[1], wanted[1])
    appended = torch.full((2, 4, 16, 3, dim), 9.0, dtype=target)
    for layer in range(2):
        backend.append_kv(
            k[layer], v[layer], appended[layer], appended[layer].clone(), slots, positions, table, interleaved
        )
    assert torch.equal(appended, got[0])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (20, 12), (16, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("first", [0, 1, 62, 64, 90])
def test_splice_int8(target, dim, rotary, interleaved, first):
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(4, 100, 3, dim, generator=random) for _ in range(2))
    (k, k_scale), (v, v_scale) = quantize_k(k), quantize_v(v)
    slots = torch.tensor([17, -1, 3, 40, 16])
    positions = torch.tensor([5, 90, 0, 31, 2], dtype=torch.int32)
    table = ops.rope_table(torch.rand(rotary // 2, generator=random), 100) if rotary else None
    got = [torch.full((2, 4, 16, 3, dim), 9.0, dtype=target) for _ in range(2)]
    wanted = [pages.clone() for pages in got]
    rows, layers = slice(first, first + 5), slice(0, None, 2)
    for splice, pages in ((backend.splice_kv, got), (reference.splice_kv, wanted)):
        splice(
            k[layers, rows], v[layers, rows], *pages, slots, positions, table, interleaved,
            k_scale=k_scale[layers], v_scale=v_scale[layers, rows], first_token=first,
        )  # fmt: skip
    same(got[0], wanted[0])
    same(got[1], wanted[1])


def test_strides_and_no_tokens():
    k = torch.randn(2, 6, 4, 24)[:, ::2, 1:4, :16]
    both = torch.zeros(4, 2, 2, 3, 16, 16)
    got = [both[:, side].permute(1, 0, 3, 2, 4) for side in (0, 1)]
    wanted = [pages.clone() for pages in got]
    slots, positions = torch.tensor([1, 20, 50]), torch.tensor([3, 2, 1], dtype=torch.int32)
    table = ops.rope_table(torch.rand(8), 10)
    backend.splice_kv(k, k, *got, slots, positions, table)
    reference.splice_kv(k, k, *wanted, slots, positions, table)
    same(got[0], wanted[0])
    same(got[1], wanted[1])
    backend.splice_kv(k[:, :0], k[:, :0], *got, slots[:0], positions[:0], table)
    backend.append_kv(k[0, :0], k[0, :0], got[0][0], got[1][0], slots[:0], positions[:0], table)
    same(got[0], wanted[0])
