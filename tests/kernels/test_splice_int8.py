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


def test_everything_may_be_strided(backend):
    """Pages, sources and scales that are parts of something larger, along every dimension but the last."""
    k, k_scale, v, v_scale = record()
    whole = spliced(backend, (k, k_scale, v, v_scale), 0, LENGTH, torch.float16, table(16))
    wide = torch.zeros(2 * LAYERS + 1, LENGTH, 5, 20, dtype=torch.int8)
    k2, v2 = wide[1::2, :, :2, :16], wide[1::2, :, 2:4, 4:]
    k_scale2 = torch.zeros(2 * LAYERS + 1, 7, 3, 18)[1::2, ::3, 1:, 2:]
    v_scale2 = torch.zeros(LENGTH, 2, 2 * LAYERS + 1).permute(2, 0, 1)[1::2]
    for view, values in ((k2, k), (v2, v), (k_scale2, k_scale), (v_scale2, v_scale)):
        view.copy_(values)
    both = torch.full((BLOCKS, 2, 2 * LAYERS, 2, PAGE, 16), 9.0, dtype=torch.float16)  # HND, layers inside
    target = [both[:, side].permute(1, 0, 3, 2, 4)[::2] for side in (0, 1)]
    scales = {"k_scale": k_scale2, "v_scale": v_scale2}
    ops.splice_kv(k2, v2, *target, *places(LENGTH), table(16), **scales)  # within the contract
    for part in target:
        part.fill_(9)
    backend.splice_kv(k2, v2, *target, *places(LENGTH), table(16), **scales)
    assert torch.equal(target[0], whole[0])
    assert torch.equal(target[1], whole[1])
    assert (both[:, :, 1::2] == 9).all()


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 64), (8, 16)])
def test_grouped_queries_over_it(backend, assert_close, heads, dim):
    """Attention on what was spliced, against float64 from the int8 values on."""
    k, k_scale, v, v_scale = record(heads, dim)
    blocks, at = torch.randperm(BLOCKS)[:10].int(), torch.arange(LENGTH)
    place = (blocks[at // PAGE].long() * PAGE + at % PAGE, at.int(), table(dim), False)
    q = torch.randn(2, 3 * heads, dim, generator=torch.Generator().manual_seed(0))
    starts, lengths, q_pos = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2], [LENGTH], [80, 149]))
    rest = (blocks[None], starts, lengths, q_pos, dim**-0.5)
    ours, plain, exact = pages(heads, dim), pages(heads, dim), pages(heads, dim, torch.float64)
    backend.splice_kv(k, v, *ours, *place, k_scale=k_scale, v_scale=v_scale)
    floats = dequantize_k(k, k_scale), dequantize_v(v, v_scale)
    reference.splice_kv(*floats, *plain, *place)
    reference.splice_kv(*(t.double() for t in floats), *exact, *place)
    assert_close(
        backend.paged_attention(q, ours[0][1], ours[1][1], *rest),
        reference.paged_attention(q, plain[0][1], plain[1][1], *rest),
        reference.paged_attention(q.double(), exact[0][1], exact[1][1], *rest),
    )


def test_every_value_of_eight_bits(backend):
    """In every lane, with scales of all sizes, subnormal ones too."""
    every = torch.arange(-128, 128, dtype=torch.int8).repeat(64).view(1, 1024, 1, 16)
    k_scale = torch.exp2(torch.linspace(-149, 119, 256)).view(1, 16, 1, 16)
    v_scale = torch.exp2(torch.linspace(-149, 119, 1024)).view(1, 1024, 1)
    slots, zeros = torch.arange(1024), torch.zeros(1024, dtype=torch.int32)
    k, v = (torch.zeros(1, 64, 16, 1, 16) for _ in range(2))
    backend.splice_kv(every, every, k, v, slots, zeros, None, False, k_scale, v_scale)
    assert torch.equal(k.view(16, 64, 16), every.view(16, 64, 16).float() * k_scale.view(16, 1, 16))
    assert torch.equal(v.view(1024, 16), every.view(1024, 16).float() * v_scale.view(1024, 1))


def test_the_bits_are_those_of_the_float32_products(backend):
    """Zero scales among them, which must give zeros; float64 pages take the same products."""
    k, k_scale, v, v_scale = record()
    k_scale[:, 0, 0, 0] = v_scale[0, 0] = 0
    floats, wide = pages(), pages(dtype=torch.float64)
    place = (*places(LENGTH), table(16), True)
    backend.splice_kv(dequantize_k(k, k_scale), dequantize_v(v, v_scale), *floats, *place)
    backend.splice_kv(k, v, *wide, *place, k_scale, v_scale)
    ours = spliced(backend, (k, k_scale, v, v_scale), 0, LENGTH, torch.float32, table(16), True)
    for a, b, c in zip(ours, floats, wide, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)
        assert torch.equal(a.double(), c)


def test_no_tokens(backend):
    k, k_scale, v, v_scale = record()
    empty, place = pages(), (*places(0), table(16), False)
    backend.splice_kv(k[:, :0], v[:, :0], *empty, *place, k_scale, v_scale[:, :0], LENGTH)
    ops.splice_kv(k[:, :0], v[:, :0], *empty, *place, k_scale[:, :0], v_scale[:, :0])
    assert (empty[0] == 9).all()


@pytest.mark.parametrize("first", [-1, 43, 2**62])
def test_native_code_checks_the_groups(backend, first):
    if backend is reference:
        pytest.skip("torch checks the reference's indices")
    k, k_scale, v, v_scale = record()
    target, place = pages(), (*places(LENGTH), table(16), False)
    with pytest.raises(KernelContractError, match="k_scale has no group"):
        backend.splice_kv(k, v, *target, *place, k_scale, v_scale, first)
    assert (target[0] == 9).all()
    backend.splice_kv(k, v, *target, *place, k_scale, v_scale, 42)  # 192 tokens are three groups


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 5),
    dim=st.integers(1, 70),
    half=st.integers(0, 35),
    first=st.integers(0, LENGTH - 1),
    tokens=st.integers(1, LENGTH),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_geometry(all_backends, heads, dim, half, first, tokens, dtype, interleaved, seed):
    half, tokens = min(half, dim // 2), min(tokens, LENGTH - first)
    cos_sin = table(2 * half) if half else None
    arguments = (record(heads, dim, seed), first, tokens, dtype, cos_sin, interleaved)
    wanted = spliced(reference, *arguments)
    for backend in all_backends():
        got = spliced(backend, *arguments)
        assert torch.equal(got[0], wanted[0]), backend
        assert torch.equal(got[1], wanted[1]), backend


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
    target = pages()

    def call(**changed):
        given = {"src_k": k, "src_v": v, "k_scale": k_scale, "v_scale": v_scale, "first_token": 0} | changed
        first = given.pop("src_k"), given.pop("src_v")
        ops.splice_kv(*first, *target, slots, positions, table(16), **given)

    for words, changed in (
        ("need both k_scale and v_scale", {"k_scale": None}),
        ("need both k_scale and v_scale", {"v_scale": None}),
        ("k must be float32", {"k_scale": None, "v_scale": None}),
        ("k with scales must be int8", {"src_k": k.float(), "src_v": v.float()}),
        ("k with scales must be int8", {"src_k": k.to(torch.uint8)}),
        ("v with scales must be int8", {"src_v": v.half()}),
        ("v with scales must be int8", {"src_v": v[:, 1:]}),
        ("k must have 4 dimensions", {"src_k": k[0]}),
        ("last dimension of k must", {"src_k": k.transpose(1, 3).contiguous().transpose(1, 3)}),
        ("k_scale must be float32", {"k_scale": k_scale.double()}),
        ("k_scale must be float32", {"k_scale": k_scale[..., :8]}),
        ("k_scale must be float32", {"k_scale": k_scale[:2]}),
        ("k_scale must have 4 dimensions", {"k_scale": k_scale[0]}),
        ("last dimension of k_scale must", {"k_scale": k_scale.transpose(1, 3).contiguous().transpose(1, 3)}),
        ("k_scale has 1 groups", {"k_scale": k_scale[:, :1]}),
        ("v_scale must be float32", {"v_scale": v_scale[:, :-1]}),
        ("v_scale must be float32", {"v_scale": v_scale[..., None]}),
        ("v_scale must be float32", {"v_scale": v_scale.half()}),
        ("on one device", {"v_scale": v_scale.to("meta")}),
        ("first_token must be 0 or positive", {"first_token": -1}),
        ("token 192 of the record is in group 3", {"first_token": 43}),
    ):
        with pytest.raises(KernelContractError, match=words):
            call(**changed)
    assert all((part == 9).all() for part in target)
    call(first_token=42)
