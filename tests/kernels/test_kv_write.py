"""append_kv, splice_kv and rope: every level must give the reference's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_engine import ops
from memos_engine.errors import KernelContractError
from memos_engine.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS, TOKENS, BLOCKS, PAGE = 3, 21, 4, 16


def record(heads, dim, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (LAYERS, TOKENS, heads, dim)
    k, v = (torch.randn(shape, generator=random).mul(3).to(dtype) for _ in range(2))
    slots = torch.randperm(BLOCKS * PAGE, generator=random)[:TOKENS]
    slots[[2, 9]] = -1
    positions = torch.randint(0, 300, (TOKENS,), generator=random, dtype=torch.int32)
    return k, v, slots, positions


def pages(heads, dim, dtype):
    empty = torch.full((LAYERS, BLOCKS, PAGE, heads, dim), 9.0, dtype=dtype)
    return empty, empty.clone()


def table(rotary_dim):
    return ops.rope_table(1.0 / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim), 300)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (16, 16), (80, 32), (7, 6), (128, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_splice_is_the_reference(backend, source, target, dim, rotary, interleaved):
    k, v, slots, positions = record(2, dim, source)
    cos_sin = table(rotary) if rotary else None
    ours, theirs = pages(2, dim, target), pages(2, dim, target)
    backend.splice_kv(k, v, *ours, slots, positions, cos_sin, interleaved)
    reference.splice_kv(k, v, *theirs, slots, positions, cos_sin, interleaved)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    written = torch.zeros(BLOCKS * PAGE, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    untouched = ours[0].flatten(1, 2)[:, ~written]
    assert (untouched == 9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_the_rotation_in_float64(assert_close, dtype, interleaved):
    """By complex numbers, so that the sign convention is checked as well."""
    k, v, slots, positions = record(2, 16, dtype)
    cos_sin = table(12)
    ours = pages(2, 16, dtype)
    reference.append_kv(k[0], v[0], ours[0][0], ours[1][0], slots, positions, cos_sin, interleaved)
    x = k[0].double()
    turned, rest = x[..., :12], x[..., 12:]
    paired = turned.unflatten(-1, (6, 2)) if interleaved else turned.unflatten(-1, (2, 6)).transpose(-1, -2)
    angle = torch.complex(cos_sin[:, :6].double(), cos_sin[:, 6:].double())[positions.long(), None]
    product = torch.view_as_real(torch.view_as_complex(paired.contiguous()) * angle)
    exact = (product if interleaved else product.transpose(-1, -2)).flatten(-2)
    kept = slots >= 0
    exact = torch.cat((exact, rest), -1)[kept]
    got = ours[0][0].flatten(0, 1)[slots[kept]]
    assert_close(got, exact.to(dtype), exact)
    assert torch.equal(ours[1][0].flatten(0, 1)[slots[kept]], v[0][kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_splice_equals_append_equals_rope(backend, dtype, interleaved):
    k, v, slots, positions = record(3, 64, dtype)
    cos_sin = table(48)
    spliced, appended = pages(3, 64, dtype), pages(3, 64, dtype)
    backend.splice_kv(k, v, *spliced, slots, positions, cos_sin, interleaved)
    for layer in range(LAYERS):
        backend.append_kv(
            k[layer], v[layer], appended[0][layer], appended[1][layer], slots, positions, cos_sin, interleaved
        )
    assert torch.equal(spliced[0], appended[0])
    assert torch.equal(spliced[1], appended[1])
    rotated = k[0].clone()
    backend.rope(rotated, positions, cos_sin, interleaved)
    kept = slots >= 0
    assert torch.equal(appended[0][0].flatten(0, 1)[slots[kept]], rotated[kept])


def test_a_record_in_two_pieces_is_the_same(backend):
    k, v, slots, positions = record(2, 16, torch.bfloat16)
    cos_sin = table(16)
    whole, halves = pages(2, 16, torch.bfloat16), pages(2, 16, torch.bfloat16)
    backend.splice_kv(k, v, *whole, slots, positions, cos_sin)
    for part in (slice(0, 10), slice(10, None)):
        # Slices of a record are strided views.
        backend.splice_kv(k[:, part], v[:, part], *halves, slots[part], positions[part], cos_sin)
    assert torch.equal(whole[0], halves[0])
    assert torch.equal(whole[1], halves[1])


def test_strided_pages_and_sources(backend):
    k, v, slots, positions = record(2, 16, torch.float32)
    wide = torch.zeros(LAYERS, TOKENS, 5, 20)
    k2, v2 = wide[:, :, :2, :16], wide[:, :, 2:4, 4:]
    k2.copy_(k)
    v2.copy_(v)
    both = torch.full((BLOCKS, 2, LAYERS, 2, PAGE, 16), 9.0)  # HND, layers inside
    k_pages, v_pages = (both[:, side].permute(1, 0, 3, 2, 4) for side in (0, 1))
    plain = pages(2, 16, torch.float32)
    backend.splice_kv(k, v, *plain, slots, positions, table(16))
    backend.splice_kv(k2, v2, k_pages, v_pages, slots, positions, table(16))
    assert torch.equal(k_pages, plain[0])
    assert torch.equal(v_pages, plain[1])


def test_no_tokens(backend):
    k, v, slots, positions = record(2, 16, torch.float32)
    empty = pages(2, 16, torch.float32)
    backend.splice_kv(k[:, :0], v[:, :0], *empty, slots[:0], positions[:0], table(16))
    assert (empty[0] == 9).all()
    backend.rope(k[0, :0], positions[:0], table(16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_every_value(backend, dtype):
    """All 65,536 half-precision values widen exactly; float32 of all sizes narrow as torch narrows them."""
    every = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).reshape(1, 1024, 1, 64)
    wide = torch.zeros(1, 64, 16, 1, 64)
    slots, zeros = torch.arange(1024), torch.zeros(1024, dtype=torch.int32)
    backend.splice_kv(every, every, wide, wide.clone(), slots, zeros, None)
    torch.testing.assert_close(wide.flatten(), every.float().flatten(), rtol=0, atol=0, equal_nan=True)

    random = torch.Generator().manual_seed(0)
    shape = (1, 1024, 1, 64)
    bits = torch.randint(-(2**31), 2**31 - 1, shape, generator=random, dtype=torch.int64).int()
    scale = torch.exp2(torch.randint(-30, 20, shape, generator=random).float())
    for source in (bits.view(torch.float32), torch.randn(shape, generator=random) * scale):
        narrow = torch.zeros(1, 64, 16, 1, 64, dtype=dtype)
        backend.splice_kv(source, source, narrow, narrow.clone(), slots, zeros, None)
        wanted = source.to(dtype).flatten()
        torch.testing.assert_close(narrow.flatten(), wanted, rtol=0, atol=0, equal_nan=True)


def test_index_values_are_checked(backend):
    if backend is reference:
        pytest.skip("torch checks the reference's indices")
    k, v, slots, positions = record(2, 16, torch.float32)
    target = pages(2, 16, torch.float32)
    too_far, early = positions.clone(), positions.clone()
    too_far[5], early[5] = 300, -1
    outside = slots.clone()
    outside[4] = BLOCKS * PAGE
    for slot, position, words in [
        (outside, positions, "slot outside"),
        (slots, too_far, "no row in cos_sin"),
        (slots, early, "no row in cos_sin"),
    ]:
        with pytest.raises(KernelContractError, match=words):
            backend.splice_kv(k, v, *target, slot, position, table(16))
        assert (target[0] == 9).all()
    with pytest.raises(KernelContractError, match="no row in cos_sin"):
        backend.rope(k[0], too_far, table(16))
    skipped = positions.clone()
    skipped[2] = 12345  # slot -1: its position does not matter
    backend.splice_kv(k, v, *target, slots, skipped, table(16))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 5),
    dim=st.integers(1, 70),
    half=st.integers(0, 35),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_geometry(all_backends, heads, dim, half, source, target, interleaved, seed):
    half = min(half, dim // 2)
    k, v, slots, positions = record(heads, dim, source, seed)
    cos_sin = table(2 * half) if half else None
    wanted = pages(heads, dim, target)
    reference.splice_kv(k, v, *wanted, slots, positions, cos_sin, interleaved)
    for backend in all_backends():
        got = pages(heads, dim, target)
        backend.splice_kv(k, v, *got, slots, positions, cos_sin, interleaved)
        assert torch.equal(got[0], wanted[0]), backend
        assert torch.equal(got[1], wanted[1]), backend


def test_table_is_that_of_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2))
    cos, sin = rotary(torch.zeros(1), torch.arange(500)[None])
    ours = ops.rope_table(rotary.inv_freq, 500, rotary.attention_scaling)
    assert torch.equal(ours, torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=-1))
    assert torch.equal(ops.rope_table(rotary.inv_freq, 4, 2.0), ours[:4] * 2)
