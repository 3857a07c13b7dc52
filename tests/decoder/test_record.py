"""KV records: the identity refuses every change by name, damage is always found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.decoder.identity import RecordIdentity, ids_digest
from memos_engine.decoder.record import KVRecord, decode_record, encode_record
from memos_engine.errors import PayloadError

IDENTITY = RecordIdentity(
    weights="w" * 64,
    tokenizer="t" * 64,
    geometry='{"layers":2}',
    dtype="torch.float32",
    anchor="a" * 64,
    left_contexts=("a" * 64,),
    tokens="i" * 64,
    tenant_salt=b"salt",
)
OTHER = {
    "weights": "x" * 64,
    "tokenizer": "x" * 64,
    "geometry": '{"layers":3}',
    "dtype": "torch.bfloat16",
    "anchor": "x" * 64,
    "left_contexts": ("a" * 64, "b" * 64),
    "tokens": "x" * 64,
    "tenant_salt": b"other",
    "adapters": ("lora",),
    "quantizer": "int8",
    "format_version": 3,
}


def a_record(dtype=torch.float32, tokens=5, **fields) -> KVRecord:
    """One with everything that a record can hold."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    k, v = draw(2, tokens, 3, 8), draw(2, tokens, 3, 8)
    scales = {}
    if dtype == torch.int8:
        k, v = (k * 40).clamp(-127, 127), (v * 40).clamp(-127, 127)
        scales = {"k_scale": draw(2, -(-tokens // 64), 3, 8).abs(), "v_scale": draw(2, tokens, 3).abs()}
    sigma_v, rank = draw(2, tokens, 3).abs().half(), draw(tokens)
    made = {"sigma_v": sigma_v, "rank": rank, **scales, **fields}
    return KVRecord(
        k.to(dtype), v.to(dtype), tuple(range(7, 7 + tokens)), "", IDENTITY.left_contexts[0], **made
    )


def data(dtype=torch.float32, **fields) -> bytes:
    return encode_record(a_record(dtype, **fields), IDENTITY)


def decoded(raw: bytes, identity: RecordIdentity = IDENTITY) -> KVRecord:
    return decode_record(memoryview(bytearray(raw)), identity)


def same(one: KVRecord, other: KVRecord) -> bool:
    a, b = one.tensors(), other.tensors()
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal and (one.token_ids, one.left) == (other.token_ids, other.left)


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_record_comes_back_bit_for_bit(dtype, tokens):
    record = a_record(dtype, tokens)
    read = decoded(encode_record(record, IDENTITY))
    assert same(read, record)
    assert read.identity == IDENTITY.digest()
    assert read.nbytes == record.nbytes


def test_what_a_record_need_not_have_stays_away():
    read = decoded(data(sigma_v=None, rank=None))
    assert set(read.tensors()) == {"k", "v"}


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": torch.zeros(4)},
        {"sigma_v": torch.zeros(2, 5, 2)},
        {"v": torch.zeros(2, 4, 3, 8)},
        {"v": torch.zeros(2, 5, 3, 8, dtype=torch.float16)},
        {"k_scale": torch.ones(2, 1, 3, 8)},
        {"k_scale": torch.ones(2, 1, 3, 8), "v_scale": torch.ones(2, 5, 3)},
        {"token_ids": (1, 2)},
        {"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)},
    ],
)
def test_tensors_that_do_not_belong_together(fields):
    with pytest.raises(PayloadError, match="disagree") as caught:
        encode_record(dataclasses.replace(a_record(), **fields), IDENTITY)
    assert caught.value.reason == "format"


@pytest.mark.parametrize("missing", ["k_scale", "v_scale"])
def test_int8_needs_both_scales(missing):
    with pytest.raises(PayloadError, match="scales"):
        encode_record(dataclasses.replace(a_record(torch.int8), **{missing: None}), IDENTITY)


@pytest.mark.parametrize("name", OTHER)
def test_every_field_of_the_identity_is_refused_by_name(name):
    assert set(OTHER) == {f.name for f in dataclasses.fields(RecordIdentity)}
    expected = dataclasses.replace(IDENTITY, **{name: OTHER[name]})
    with pytest.raises(PayloadError, match=name) as caught:
        decoded(data(), expected)
    assert caught.value.reason == "identity"


def test_fields_cannot_run_into_each_other():
    one = dataclasses.replace(IDENTITY, adapters=("ab",), left_contexts=("c",))
    two = dataclasses.replace(IDENTITY, adapters=("a", "b"), left_contexts=("c",))
    three = dataclasses.replace(IDENTITY, adapters=(), left_contexts=("c", "ab"))
    assert len({i.digest() for i in (one, two, three)}) == 3


def test_the_file_does_not_hold_the_salt():
    secret = dataclasses.replace(IDENTITY, tenant_salt=b"this salt must stay secret")
    assert b"must stay secret" not in encode_record(a_record(), secret)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_a_flipped_bit_is_never_used(dtype, draw):
    """The record's own checks alone (the vault checks the whole file as well): refused, or the flip was in a
    place that does not change what is read."""
    good = decoded(data(dtype))
    raw = bytearray(data(dtype))
    position = draw.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        read = decode_record(memoryview(raw), IDENTITY)
    except PayloadError:
        return
    assert same(read, good)
    assert read.identity == good.identity


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(data(torch.int8)) - 1))
def test_a_truncated_file_is_refused(length):
    with pytest.raises(PayloadError):
        decoded(data(torch.int8)[:length])


@pytest.mark.parametrize("name", ["k", "v", "sigma_v", "rank", "k_scale", "v_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_when_storing(name, value):
    record = a_record(torch.int8 if name.endswith("scale") else torch.float32)
    broken = getattr(record, name).clone()
    broken.view(-1)[3] = value
    with pytest.raises(PayloadError, match="NaN") as caught:
        encode_record(dataclasses.replace(record, **{name: broken}), IDENTITY)
    assert caught.value.reason == "not_finite"


def test_values_whose_sum_overflows_are_still_numbers():
    record = a_record(torch.float32)
    large = dataclasses.replace(record, v=torch.full_like(record.v, 3e38))
    read = decode_record(memoryview(encode_record(large, IDENTITY)), IDENTITY)
    assert torch.equal(read.v, large.v)


def test_ids_digest_tells_sequences_apart():
    assert ids_digest([1, 256]) != ids_digest([257]) != ids_digest([1, 0, 1])
