"""Triton's rms_norm, rope and silu_mul in the interpreter, against the reference.

The interpreter truncates where a GPU rounds to bfloat16, so there one step is allowed.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from memos_engine import ops
from memos_engine.ops import reference

pytest.importorskip("triton")
from memos_engine.ops import triton as backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)


def close(got, wanted):
    """Equal but for the last place: sums run in another order."""
    assert got.dtype == wanted.dtype
    step = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.float(), wanted.float(), rtol=2 * max(step, 1e-6), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 576, 1500])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_rms_norm(dtype, width, weight_dtype):
    x, weight = random(5, width, dtype=dtype), random(width, dtype=weight_dtype or dtype, seed=1)
    close(backend.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    # Sums that the interpreter truncates as torch rounds them: small whole numbers.
    x, residual = x.round(), random(5, width, dtype=dtype, seed=2).round()
    total, out = residual.clone(), torch.empty_like(x)
    wanted = reference.rms_norm(x, weight, 1e-5, total)
    assert backend.rms_norm(x, weight, 1e-5, residual, out) is out
    assert torch.equal(residual, total)
    close(out, wanted)


def test_rms_norm_layouts():
    x, weight = random(6, 40), random(40)
    wanted = reference.rms_norm(x, weight, 1e-6)
    wide, rest = random(6, 100), random(6, 90)
    rows, residual = wide[:, 30:70], rest[:, 5:45]
    rows.copy_(x)
    before, sums = wide.clone(), rest.clone()
    close(backend.rms_norm(rows, weight, 1e-6), wanted)
    summed = backend.rms_norm(rows, weight, 1e-6, residual)
    close(summed, reference.rms_norm(x, weight, 1e-6, sums[:, 5:45]))
    assert torch.equal(rest, sums)
    backend.rms_norm(rows, weight, 1e-6, None, rows)
    close(rows, wanted)
    assert torch.equal(wide[:, :30], before[:, :30])
    assert torch.equal(wide[:, 70:], before[:, 70:])
    assert not backend.rms_norm(torch.zeros(3, 64), torch.ones(64), 1e-5).any()
    assert backend.rms_norm(x[:0], weight, 1e-5).shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rotary"), [(4, 16, 16), (9, 20, 12), (3, 64, 2), (1, 24, 24)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dtype, heads, dim, rotary, interleaved):
    table = ops.rope_table(torch.rand(rotary // 2, generator=torch.Generator().manual_seed(1)), 100)
    positions = torch.tensor([0, 99, 7, 7, 31], dtype=torch.int32)
    projected = random(5, heads + 2, dim, dtype=dtype)  # q is a slice of a fused projection
    wanted = projected.clone()
    backend.rope(projected[:, :heads], positions, table, interleaved)
    reference.rope(wanted[:, :heads], positions, table, interleaved)
    if dtype == torch.bfloat16:
        steps = projected.view(torch.int16).int() - wanted.view(torch.int16).int()
        assert steps.abs().max() <= 1
    else:
        assert torch.equal(projected, wanted)
    backend.rope(projected[:0], positions[:0], table, interleaved)


def test_rope_is_append_kvs_rotation():
    """Bit for bit, so that a key turned either way is the same key."""
    table = ops.rope_table(torch.rand(8, generator=torch.Generator().manual_seed(1)), 50)
    k, positions = random(6, 2, 16), torch.tensor([3, 0, 49, 8, 8, 21], dtype=torch.int32)
    pages = torch.zeros(2, 16, 2, 16)
    backend.append_kv(k, k, pages, pages.clone(), torch.arange(6), positions, table)
    backend.rope(k, positions, table)
    assert torch.equal(pages[0, :6], k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 1024, 1100])
def test_silu_mul(dtype, width):
    both = random(3, 2 * width, dtype=dtype) * 4
    gate, up = both.chunk(2, dim=1)
    wanted = reference.silu_mul(gate, up)
    close(backend.silu_mul(gate, up), wanted)
    assert backend.silu_mul(gate, up, gate) is gate
    close(gate.contiguous(), wanted)
    assert backend.silu_mul(gate[:0], up[:0]).shape == (0, width)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_silu_mul_extremes():
    gate = torch.tensor([[-1e4, -200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 200.0, 1e4, float("inf")]])
    result = backend.silu_mul(gate, torch.ones_like(gate))
    wanted = functional.silu(gate.double()).float()
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-36)
    assert backend.silu_mul(gate[:, :1] * float("nan"), gate[:, :1]).isnan().all()
