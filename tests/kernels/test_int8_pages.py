"""append_kv and splice_kv into pages of int8: one rounding, the same bits from both and on every level."""

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
LAYERS, BLOCKS, PAGE = 2, 12, 16


def source(tokens, heads=2, dim=16, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(LAYERS, tokens, heads, dim, generator=random) * 3).to(dtype) for _ in range(2)]


def places(tokens, seed=0):
    random = torch.Generator().manual_seed(seed)
    slots = torch.randperm((BLOCKS - 1) * PAGE, generator=random)[:tokens] + PAGE  # never the null block
    if tokens > 3:
        slots[[1, tokens - 1]] = -1
    return slots, torch.randint(0, 300, (tokens,), generator=random, dtype=torch.int32)


def pages(heads=2, dim=16):
    """K and V, then their scales; all full of something, but for the null block."""
    values = torch.full((LAYERS, BLOCKS, PAGE, heads, dim), 9, dtype=torch.int8)
    scale = torch.full((LAYERS, BLOCKS, PAGE, heads), 7.0)
    values[:, 0], scale[:, 0] = 0, 0
    return [values, values.clone(), scale, scale.clone()]


def table(rotary_dim):
    if not rotary_dim:
        return None
    return ops.rope_table(1.0 / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim), 300)


def named(target, layer=None):
    """The scales of pages as keyword arguments."""
    return dict(zip(("k_page_scale", "v_page_scale"), of_layer(target, layer)[2:], strict=True))


def of_layer(target, layer):
    return target if layer is None else [part[layer] for part in target]


def spliced(backend, k, v, *place, target=None, **scales):
    target = pages(*k.shape[2:]) if target is None else target
    backend.splice_kv(k, v, *target[:2], *place, **scales, **named(target))
    return target


def appended(backend, k, v, *place):
    target = pages(*k.shape[2:])
    for layer in range(LAYERS):
        own = of_layer(target, layer)
        backend.append_kv(k[layer], v[layer], *own[:2], *place, **named(target, layer))
    return target


def equal(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (7, 6), (128, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_splice_equals_append_equals_reference(backend, dtype, tokens, dim, rotary, interleaved):
    (k, v), place = source(tokens, 3, dim, dtype), (*places(tokens), table(rotary), interleaved)
    wanted = appended(reference, k, v, *place)
    assert equal(appended(backend, k, v, *place), wanted)
    assert equal(spliced(backend, k, v, *place), wanted)


@pytest.mark.parametrize("first", [0, 1, 63, 64, 90])
@pytest.mark.parametrize("interleaved", [False, True])
def test_records_of_int8(backend, first, interleaved):
    """Dequantised, rotated and rounded once: what a splice of the float32 products writes."""
    (k, v), tokens = source(150), 60
    (k, k_scale), (v, v_scale) = quantize_k(k), quantize_v(v)
    rows, place = slice(first, first + tokens), (*places(tokens), table(12), interleaved)
    scales = {"k_scale": k_scale, "v_scale": v_scale[:, rows], "first_token": first}
    floats = dequantize_k(k, k_scale)[:, rows], dequantize_v(v, v_scale)[:, rows]
    wanted = spliced(reference, *floats, *place)
    assert equal(spliced(backend, k[:, rows], v[:, rows], *place, **scales), wanted)


def test_values_are_within_half_a_scale(backend):
    k, v = source(100, dim=64)
    slots, positions = places(100)
    k_pages, v_pages, k_scale, v_scale = spliced(backend, k, v, slots, positions, table(64))
    kept = slots >= 0
    rotated = k.double()
    for layer in rotated:
        reference.rope(layer, positions, table(64))
    for exact, values, scale in ((rotated, k_pages, k_scale), (v.double(), v_pages, v_scale)):
        at = slots[kept]
        scale = scale.flatten(1, 2)[:, at, :, None].double()
        found = values.flatten(1, 2)[:, at].double() * scale
        assert ((found - exact[:, kept]).abs() <= 0.5001 * scale).all()
        assert (values.flatten(1, 2)[:, at].abs().amax(-1) == 127).all()


def test_untouched_slots_stay(backend):
    k, v = source(20)
    slots, positions = places(20)
    target = spliced(backend, k, v, slots, positions, table(16))
    written = torch.zeros(BLOCKS * PAGE, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    for part, before in zip(target, pages(), strict=True):
        assert torch.equal(part.flatten(1, 2)[:, ~written], before.flatten(1, 2)[:, ~written])
    assert not (target[2].flatten(1, 2)[:, written] == 7).any()
    assert not any(part[:, 0].any() for part in target)  # the null block


def test_a_head_of_zeros_has_scale_0(backend):
    k, v = source(10)
    slots, positions = torch.arange(10) + 16, torch.arange(10, dtype=torch.int32)
    k[:, 3], v[:, 5, 1] = 0, -0.0
    k_pages, v_pages, k_scale, v_scale = (
        part.flatten(1, 2)[:, slots] for part in spliced(backend, k, v, slots, positions, table(16))
    )
    for part in (k_pages[:, 3], k_scale[:, 3], v_pages[:, 5, 1], v_scale[:, 5, 1]):
        assert not part.any()
    assert (v_scale[:, 5, 0] > 0).all()


def test_values_of_all_sizes(backend):
    """From subnormal to the largest: what the pages stand for is finite and near, or 0."""
    sizes = torch.cat((torch.exp2(torch.linspace(-149, 127, 140)), torch.tensor([torch.finfo().max])))
    v = sizes[None, :, None, None] * torch.linspace(-1, 1, 16)
    slots, positions = torch.arange(141) + 16, torch.zeros(141, dtype=torch.int32)
    target = [part[:1, ..., :1, :] if part.dim() == 5 else part[:1, ..., :1] for part in pages()]
    target = [part.contiguous() for part in target]
    spliced(backend, v, v, slots, positions, None, target=target)
    wanted = [part.clone() for part in target]
    spliced(reference, v, v, slots, positions, None, target=wanted)
    assert equal(target, wanted)
    values, scale = (part.flatten(1, 2)[:, slots] for part in (target[1], target[3]))
    found = values.float() * scale[..., None]
    assert torch.isfinite(found).all()
    assert ((found - v).abs() <= 0.5001 * scale[..., None]).all()


def test_layers_may_be_strided(backend):
    """Every second layer's pages and scales, as for models whose layers rotate by turns."""
    (k, v), place = source(50), (*places(50), table(16))
    whole = spliced(backend, k, v, *place)
    wide = [torch.zeros(2 * LAYERS, *part.shape[1:], dtype=part.dtype) for part in whole]
    views = [part[1::2] for part in wide]
    for view, start in zip(views, pages(), strict=True):
        view.copy_(start)
    ops.splice_kv(k, v, *views[:2], *place, **named(views))
    for view, start in zip(views, pages(), strict=True):
        view.copy_(start)
    spliced(backend, k, v, *place, target=views)
    assert equal(views, whole)
    assert not any(part[::2].any() for part in wide)


def test_pages_may_be_strided(backend):
    (k, v), place = source(50), (*places(50), table(16))
    whole = spliced(backend, k, v, *place)
    both = torch.zeros(BLOCKS, 2, LAYERS, 2, PAGE, 16, dtype=torch.int8)  # HND, layers inside
    views = [both[:, side].permute(1, 0, 3, 2, 4) for side in (0, 1)]
    views += pages()[2:]
    for view, start in zip(views[:2], pages()[:2], strict=True):
        view.copy_(start)
    assert equal(spliced(backend, k, v, *place, target=views), whole)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 5),
    dim=st.integers(1, 70),
    half=st.integers(0, 35),
    tokens=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_geometry(all_backends, heads, dim, half, tokens, dtype, interleaved, seed):
    half = min(half, dim // 2)
    (k, v), place = source(tokens, heads, dim, dtype, seed), (*places(tokens, seed), table(2 * half))
    wanted = spliced(reference, k, v, *place, interleaved)
    for backend in all_backends():
        assert equal(spliced(backend, k, v, *place, interleaved), wanted), backend
        assert equal(appended(backend, k, v, *place, interleaved), wanted), backend


def test_float64_sources_and_queries_go_to_the_reference(backend):
    k, v = (part.double() for part in source(20))
    place = (*places(20), table(16))
    assert equal(spliced(backend, k, v, *place), spliced(reference, k, v, *place))


def test_what_breaks_the_contract_is_named():
    (k, v), place, target = source(20), (*places(20), table(16)), pages()

    def splice(**changed):
        given = {"k_pages": target[0], "v_pages": target[1], **named(target)} | changed
        ops.splice_kv(k, v, given.pop("k_pages"), given.pop("v_pages"), *place, **given)

    for words, changed in (
        ("int8 pages need k_page_scale", {"k_page_scale": None}),
        ("int8 pages need v_page_scale", {"v_page_scale": None}),
        ("k_page_scale must be float32", {"k_page_scale": target[2].half()}),
        ("v_page_scale must be float32", {"v_page_scale": target[3][..., :1]}),
        ("k_page_scale must be contiguous", {"k_page_scale": torch.empty(2, 12, 2, 16).mT}),
        ("v_pages must have k_pages's shape and dtype", {"v_pages": target[1].float()}),
        ("k_page_scale belongs to int8", {"k_pages": target[0].float(), "v_pages": target[1].float()}),
        ("on one device", {"v_page_scale": target[3].to("meta")}),
    ):  # fmt: skip
        with pytest.raises(KernelContractError, match=words):
            splice(**changed)
    assert equal(target, pages())
    with pytest.raises(KernelContractError, match="int8 pages need k_page_scale"):
        ops.append_kv(k[0], v[0], target[0][0], target[1][0], *place)
    index = [torch.tensor(x, dtype=torch.int32) for x in ([[1]], [0, 1], [1], [0])]
    q, layer = torch.zeros(1, 2, 16), [part[0] for part in target]
    with pytest.raises(KernelContractError, match="int8 pages need v_page_scale"):
        ops.paged_attention(q, *layer[:2], *index, 0.25, k_page_scale=layer[2])
    with pytest.raises(KernelContractError, match="belongs to int8 pages"):
        ops.paged_attention(q, layer[0].float(), layer[1].float(), *index, 0.25, **named(target, 0))
