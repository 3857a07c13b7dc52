"""splice_kv from int8 records: scales, groups that begin anywhere, and the reference's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_engine import ops
from memos_engine.decoder.quantize import dequantize_k, dequantize_v, quantize_k, quantize_v
from memos_engine.errors import KernelContractError
from memos_engine.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS, BLOCKS, PAGE, LENGTH = 3, 12, 16, 150


def record(heads=2, dim=16, seed=0):
    """A whole record: int8 K and V and their scales."""
    random = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(LAYERS, LENGTH, heads, dim, generator=random) * 3 for _ in range(2))
    return *quantize_k(k), *quantize_v(v)


def places(tokens, seed=0):
    random = torch.Generator().manual_seed(seed)
    slots = torch.randperm(BLOCKS * PAGE, generator=random)[:tokens]
    if tokens > 3:
        slots[[1, tokens - 1]] = -1
    return slots, torch.randint(0, 300, (tokens,), generator=random, dtype=torch.int32)


def pages(heads=2, dim=16, dtype=torch.float32):
    empty = torch.full((LAYERS, BLOCKS, PAGE, heads, dim), 9.0, dtype=dtype)
    return empty, empty.clone()


def table(rotary_dim):
    return ops.rope_table(1.0 / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim), 300)


def spliced(backend, parts, first, tokens, dtype, cos_sin, interleaved=False):
    k, k_scale, v, v_scale = parts
    rows = slice(first, first + tokens)
    target = pages(k.shape[2], k.shape[3], dtype)
    slots, positions = places(tokens)
    backend.splice_kv(
        k[:, rows],
        v[:, rows],
        *target,
        slots,
        positions,
        cos_sin,
        interleaved,
        k_scale=k_scale,
        v_scale=v_scale[:, rows],
        first_token=first,
    )
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (16, 16), (80, 32), (7, 6), (128, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_level_gives_the_reference_s_bits(backend, dtype, dim, rotary, interleaved):
    parts = record(3, dim)
    cos_sin = table(rotary) if rotary else None
    for first, tokens in ((0, LENGTH), (1, 70), (63, 2), (64, 64), (100, 50), (149, 1)):
        ours = spliced(backend, parts, first, tokens, dtype, cos_sin, interleaved)
        theirs = spliced(reference, parts, first, tokens, dtype, cos_sin, interleaved)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 63, 64, 100])
def test_the_reference_is_the_dequantised_record(assert_close, dtype, first):
    """In float64 from the int8 values, through a splice that has its own tests."""
    k, k_scale, v, v_scale = record()
    wide_k = k.double() * k_scale.double().repeat_interleave(64, dim=1)[:, :LENGTH]
    wide_v = v.double() * v_scale.double()[..., None]
    torch.testing.assert_close(dequantize_k(k, k_scale).double(), wide_k, rtol=1e-6, atol=0)
    torch.testing.assert_close(dequantize_v(v, v_scale).double(), wide_v, rtol=1e-6, atol=0)
    tokens, cos_sin = LENGTH - first, table(12)
    ours = spliced(reference, (k, k_scale, v, v_scale), first, tokens, dtype, cos_sin)
    exact, plain = pages(dtype=torch.float64), pages(dtype=dtype)
    slots, positions = places(tokens)
    reference.splice_kv(wide_k[:, first:], wide_v[:, first:], *exact, slots, positions, cos_sin)
    narrow = wide_k[:, first:].to(dtype), wide_v[:, first:].to(dtype)
    reference.splice_kv(*narrow, *plain, slots, positions, cos_sin)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_close(a, b, c)


def test_untouched_slots_stay(backend):
    k_pages, _ = spliced(backend, record(), 0, 20, torch.float32, table(16))
    slots, _ = places(20)
    written = torch.zeros(BLOCKS * PAGE, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    assert (k_pages.flatten(1, 2)[:, ~written] == 9).all()
    assert not (k_pages.flatten(1, 2)[:, written] == 9).all(-1).any()


def test_layers_may_be_strided(backend):
    k, k_scale, v, v_scale = record()
    whole = spliced(backend, (k, k_scale, v, v_scale), 10, 90, torch.bfloat16, table(16))
    target = pages(dtype=torch.bfloat16)
    slots, positions = places(90)
    for layers in (slice(0, None, 2), slice(1, None, 2)):
        views = target[0][layers], target[1][layers]
        scales = {"k_scale": k_scale[layers], "v_scale": v_scale[layers, 10:100], "first_token": 10}
        sources = k[layers, 10:100], v[layers, 10:100]
        backend.splice_kv(*sources, *views, slots, positions, table(16), **scales)
    assert torch.equal(target[0], whole[0])
    assert torch.equal(target[1], whole[1])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, LENGTH - 1), data=st.data())
def test_a_record_in_two_pieces_is_the_same(backend, first, data):
    parts = record()
    tokens = data.draw(st.integers(1, LENGTH - first))
    cut = data.draw(st.integers(0, tokens))
    k, k_scale, v, v_scale = parts
    slots, positions = places(tokens)
    target = pages()
    for a, b in ((0, cut), (cut, tokens)):
        rows = slice(first + a, first + b)
        backend.splice_kv(
            k[:, rows], v[:, rows], *target, slots[a:b], positions[a:b], table(16),
            k_scale=k_scale, v_scale=v_scale[:, rows], first_token=first + a,
        )  # fmt: skip
    whole = spliced(backend, parts, first, tokens, torch.float32, table(16))
    assert torch.equal(target[0], whole[0])
    assert torch.equal(target[1], whole[1])


def test_what_breaks_the_contract_is_named():
    k, k_scale, v, v_scale = record()
    slots, positions = places(LENGTH)

    def call(**changed):
        given = {"src_k": k, "src_v": v, "k_scale": k_scale, "v_scale": v_scale, "first_token": 0} | changed
        first = given.pop("src_k"), given.pop("src_v")
        ops.splice_kv(*first, *pages(), slots, positions, table(16), **given)

    call()
    for changed in (
        {"k_scale": None},
        {"v_scale": None},
        {"k_scale": k_scale.double()},
        {"v_scale": v_scale[:, :-1]},
        {"k_scale": k_scale[:, :1]},
        {"k_scale": k_scale[..., :8]},
        {"first_token": -1},
        {"first_token": 64},
        {"src_k": k.float(), "src_v": v.float()},
        {"k_scale": None, "v_scale": None},
    ):
        with pytest.raises(KernelContractError):
            call(**changed)
