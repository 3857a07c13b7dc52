"""Eight bits for K and V: within half a scale of the values, whatever their size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.decoder.quantize import GROUP, dequantize_k, dequantize_v, quantize_k, quantize_v

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize(
    ("quantize", "dequantize"), [(quantize_k, dequantize_k), (quantize_v, dequantize_v)], ids=["k", "v"]
)
LARGEST = torch.finfo(torch.float32).max


def check(x, values, scale, spread, dequantize):
    """`spread` is the scale of each value."""
    assert values.dtype == torch.int8
    assert values.shape == x.shape
    assert scale.dtype == torch.float32
    assert torch.isfinite(scale).all()
    assert not (values == -128).any()
    back, wide = dequantize(values, scale), x.float()
    assert back.dtype == torch.float32
    assert torch.isfinite(back).all()
    step = torch.nextafter(wide.abs(), torch.tensor(torch.inf)).double() - wide.abs().double()
    step = torch.where(step.isfinite(), step, 2.0**104)
    assert ((back.double() - wide.double()).abs() <= spread.double() / 2 + step).all()
    assert (values.sign() * wide.sign() >= 0).all()
    assert not values[wide == 0].any()


def spread_k(scale, tokens):
    return torch.stack([scale[:, token // GROUP] for token in range(tokens)], dim=1)


@settings(max_examples=80, deadline=None)
@given(
    layers=st.integers(1, 3),
    tokens=st.integers(1, 2 * GROUP + 5),
    heads=st.integers(1, 3),
    dim=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-150, 127),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_errors_are_within_half_a_scale(layers, tokens, heads, dim, dtype, power, wide, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, tokens, heads, dim, generator=random).clamp(-3, 3).double()
    if wide:  # sizes far apart beside one another
        x *= torch.exp2(torch.randint(-12, 12, x.shape, generator=random).double())
    largest = torch.finfo(dtype).max
    x = (x * 2.0**power).clamp(-largest, largest).to(dtype)
    values, scale = quantize_k(x)
    assert scale.shape == (layers, -(-tokens // GROUP), heads, dim)
    check(x, values, scale, spread_k(scale, tokens), dequantize_k)
    values, scale = quantize_v(x)
    assert scale.shape == (layers, tokens, heads)
    check(x, values, scale, scale[..., None].expand(x.shape), dequantize_v)


@BOTH
def test_the_largest_is_127_and_ties_go_to_even(quantize, dequantize):
    x = torch.tensor([127, -127, 0.5, 1.5, -2.5, 3.49, 64, 0])
    x = x[None, :, None, None] if quantize is quantize_k else x[None, None, None]
    values, scale = quantize(x)
    assert values.flatten().tolist() == [127, -127, 0, 2, -2, 3, 64, 0]
    assert scale.flatten().tolist() == [1]
    assert torch.equal(dequantize(values, scale), values.float())


@BOTH
def test_zeros(quantize, dequantize):
    x = torch.zeros(2, GROUP + 1, 2, 3)
    x[0, 0, 0, 1] = -5
    values, scale = quantize(x)
    assert not torch.isnan(scale).any()
    assert torch.count_nonzero(scale) == 1
    assert torch.count_nonzero(values) == 1
    assert values[0, 0, 0, 1] == -127
    assert torch.equal(dequantize(values, scale) == 0, x == 0)


@BOTH
@pytest.mark.parametrize("size", [2.0**-149, 190 * 2.0**-149, 2.0**-126, 1e-36, 3e38, LARGEST])
def test_extremes(quantize, dequantize, size):
    """The smallest subnormal to the largest number, some of which overflow or vanish in a naive scale."""
    x = torch.tensor([1, -1, 0.5, -0.25, 0]).mul(size)[None, None, None].expand(1, 3, 2, 5)
    values, scale = quantize(x)
    spread = spread_k(scale, 3) if quantize is quantize_k else scale[..., None].expand(x.shape)
    check(x, values, scale, spread, dequantize)


def test_groups_do_not_see_one_another():
    x = torch.randn(2, GROUP + 20, 2, 3)
    values, scale = quantize_k(x)
    for part, group in ((slice(0, GROUP), 0), (slice(GROUP, None), 1)):
        alone, its_scale = quantize_k(x[:, part])
        assert torch.equal(alone, values[:, part])
        assert torch.equal(its_scale[:, 0], scale[:, group])
        assert torch.equal(its_scale[:, 0], x[:, part].abs().amax(1) / 127)


@pytest.mark.parametrize("first", [0, 1, 63, 64, 70, 83])
def test_from_the_middle_of_a_record(first):
    values, scale = quantize_k(torch.randn(2, GROUP + 20, 2, 3))
    assert torch.equal(dequantize_k(values[:, first:], scale, first), dequantize_k(values, scale)[:, first:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_input_stays_as_it_is(dtype):
    x = torch.randn(1, 70, 2, 4).to(dtype)
    before = x.clone()
    quantize_k(x)
    quantize_v(x)
    assert torch.equal(x, before)


@BOTH
def test_no_tokens(quantize, dequantize):
    values, scale = quantize(torch.zeros(2, 0, 3, 4))
    assert values.shape == (2, 0, 3, 4)
    assert scale.shape == ((2, 0, 3, 4) if quantize is quantize_k else (2, 0, 3))
    assert dequantize(values, scale).shape == (2, 0, 3, 4)
