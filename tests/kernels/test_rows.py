"""rms_norm, silu_mul and linear on every level, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from memos_engine.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 16, 33, 64, 576, 1000]


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(backend, assert_close, dtype, width):
    x, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(backend.rms_norm(x, weight, 1e-5), functional.rms_norm(x, (width,), weight, 1e-5), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_with_residual(backend, assert_close, dtype, width):
    x, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    residual = random(5, width, dtype=dtype, seed=2)
    total = x + residual  # torch adds in float32 and rounds once
    exact = reference.rms_norm(total.double(), weight.double(), 1e-5)
    out = torch.empty_like(x)
    assert backend.rms_norm(x, weight, 1e-5, residual, out) is out
    assert torch.equal(residual, total)
    assert_close(out, functional.rms_norm(total, (width,), weight, 1e-5), exact)


def test_rms_norm_layouts(backend):
    """Strided rows, a weight of another dtype, in place."""
    x, weight = random(6, 40, dtype=torch.bfloat16), random(40, dtype=torch.bfloat16)
    wanted = backend.rms_norm(x, weight, 1e-6)
    wide = random(6, 100, dtype=torch.bfloat16)
    rows = wide[:, 30:70]
    rows.copy_(x)
    assert torch.equal(backend.rms_norm(rows, weight, 1e-6), wanted)
    assert torch.equal(backend.rms_norm(rows, weight.float(), 1e-6), wanted)
    before = wide.clone()
    backend.rms_norm(rows, weight, 1e-6, None, rows)
    assert torch.equal(rows, wanted)
    assert torch.equal(wide[:, :30], before[:, :30])
    assert torch.equal(wide[:, 70:], before[:, 70:])


def test_rms_norm_of_zeros_and_many_rows(backend):
    weight = torch.ones(64)
    assert not backend.rms_norm(torch.zeros(3, 64), weight, 1e-5).any()
    x = random(700, 64, dtype=torch.float32)
    assert torch.equal(backend.rms_norm(x, weight, 1e-5)[650:], backend.rms_norm(x[650:], weight, 1e-5))
    assert backend.rms_norm(x[:0], weight, 1e-5).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(backend, assert_close, dtype, width):
    gate, up = random(5, width, dtype=dtype) * 4, random(5, width, dtype=dtype, seed=1)
    exact = reference.silu_mul(gate.double(), up.double())
    assert_close(backend.silu_mul(gate, up), functional.silu(gate) * up, exact)
    both = torch.cat((gate, up), dim=1)
    assert_close(backend.silu_mul(both[:, :width], both[:, width:]), functional.silu(gate) * up, exact)
    out = gate.clone()
    assert backend.silu_mul(out, up, out) is out
    assert_close(out, functional.silu(gate) * up, exact)


def test_silu_mul_extremes(backend):
    gate = torch.tensor([[-1e4, -200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 200.0, 1e4]])
    result = backend.silu_mul(gate, torch.ones_like(gate))
    wanted = functional.silu(gate.double()).float()
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-36)
    odd = torch.tensor([[float("nan"), float("inf")]])
    result = backend.silu_mul(odd, torch.ones_like(odd))
    assert result[0, 0].isnan()
    assert result[0, 1] == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 37), (33, 576), (64, 65), (130, 1536)])
def test_linear(backend, assert_close, dtype, tokens, outputs, inputs):
    x, weight = random(tokens, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    exact, plain = functional.linear(x.double(), weight.double()), functional.linear(x, weight)
    assert_close(backend.linear(x, weight), plain, exact)
    if backend is not reference:
        assert_close(backend.native_linear(x, weight), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 19])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 37), (33, 576), (130, 1536)])
def test_linear_of_int8_weights(backend, assert_close, dtype, tokens, outputs, inputs):
    x = random(tokens, inputs, dtype=dtype)
    weight = random(outputs, inputs, dtype=torch.float32, seed=1).mul(40).clamp(-127, 127).to(torch.int8)
    scale = random(outputs, 1, dtype=torch.float32, seed=2)[:, 0].abs() / 40
    exact = functional.linear(x.double(), weight.double() * scale.double()[:, None])
    plain = functional.linear(x, (weight * scale[:, None]).to(dtype))
    assert_close(backend.linear(x, weight, scale=scale), plain, exact)
    wide = torch.full((tokens, outputs + 9), 7.0, dtype=dtype)
    backend.linear(x, weight, wide[:, 4 : 4 + outputs], scale)
    assert torch.equal(wide[:, 4 : 4 + outputs], backend.linear(x, weight, scale=scale))
    assert (wide[:, :4] == 7).all()
    assert (wide[:, 4 + outputs :] == 7).all()


def test_linear_of_int8_weights_keeps_nan(backend):
    weight, scale = torch.ones(3, 70, dtype=torch.int8), torch.ones(3)
    for odd in (float("nan"), float("inf")):
        x = torch.ones(2, 70)
        x[1, 69] = odd
        out = backend.linear(x, weight, scale=scale)
        assert torch.isfinite(out[0]).all()
        assert not torch.isfinite(out[1]).any()
    assert not backend.linear(torch.zeros(1, 70), weight, scale=scale).any()


def test_linear_layouts(backend):
    x, weight = random(4, 40, dtype=torch.float32), random(50, 40, dtype=torch.float32, seed=1)
    wanted = backend.linear(x, weight)
    wide_x, wide_weight, out = torch.zeros(4, 60), torch.zeros(50, 90), torch.full((4, 70), 5.0)
    wide_x[:, 10:50], wide_weight[:, 20:60] = x, weight
    backend.linear(wide_x[:, 10:50], wide_weight[:, 20:60], out[:, 10:60])
    assert torch.equal(out[:, 10:60], wanted)
    assert (out[:, :10] == 5).all()
    assert (out[:, 60:] == 5).all()
    assert backend.linear(x[:0], weight).shape == (0, 50)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_over_threads(backend, dtype):
    """Large enough for several threads: every output is there, and none depends on the division."""
    x, weight = random(1, 256, dtype=dtype), random(1003, 256, dtype=dtype, seed=1)
    linear = backend.linear if backend is reference else backend.native_linear
    whole = linear(x, weight)
    if backend is not reference:
        assert torch.equal(whole[:, 500:700], linear(x, weight[500:700]))
    torch.testing.assert_close(whole, functional.linear(x, weight), rtol=2e-2, atol=0.2)


TILE_SHAPES = [(16, 32), (32, 64), (48, 96), (176, 576), (608, 1536)]  # outputs, inputs


@pytest.mark.parametrize("tokens", [2, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65, 130])
@pytest.mark.parametrize(("outputs", "inputs"), TILE_SHAPES)
def test_linear_of_many_rows(backend, assert_close, tokens, outputs, inputs):
    """Through the seam on every level; where there are tiles this is the native kernel."""
    x = random(tokens, inputs, dtype=torch.bfloat16)
    weight = random(outputs, inputs, dtype=torch.bfloat16, seed=1)
    exact, plain = functional.linear(x.double(), weight.double()), functional.linear(x, weight)
    assert_close(backend.linear(x, weight), plain, exact)
    wide = torch.full((tokens, outputs + 24), 7.0, dtype=torch.bfloat16)
    backend.linear(x, weight, wide[:, 8 : 8 + outputs])
    assert torch.equal(wide[:, 8 : 8 + outputs], backend.linear(x, weight))
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 8 + outputs :] == 7).all()


def test_linear_on_tiles_does_not_depend_on_the_other_rows(backend):
    x = random(40, 576, dtype=torch.bfloat16)
    weight = random(192, 576, dtype=torch.bfloat16, seed=1)
    parts = {"amx": ((0, 2), (3, 20), (16, 40)), "avx512bf16": ((0, 16), (3, 30), (1, 40), (26, 40))}
    if backend is reference or backend.isa() not in parts:
        pytest.skip("no tiles at this level")
    whole = backend.native_linear(x, weight)
    for first, last in parts[backend.isa()]:
        assert torch.equal(backend.native_linear(x[first:last], weight), whole[first:last])
    strided = torch.zeros(40, 1200, dtype=torch.bfloat16)
    strided[:, 300:876] = x
    assert torch.equal(backend.native_linear(strided[:, 300:876], weight), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [9, 16, 23, 65])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (17, 33), (50, 40), (192, 576)])
def test_the_native_product_takes_any_number_of_rows(backend, assert_close, dtype, tokens, outputs, inputs):
    if backend is reference:
        pytest.skip("the reference has one product")
    x, weight = random(tokens, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    exact, plain = functional.linear(x.double(), weight.double()), functional.linear(x, weight)
    assert_close(backend.native_linear(x, weight), plain, exact)
