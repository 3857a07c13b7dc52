"""KV records: the identity refuses every change by name, damage is always found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.decoder.record import RecordIdentity, decode_record, encode_record, ids_digest
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
    "format_version": 2,
}


def data(dtype=torch.float32) -> bytes:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 5, 3, 8, generator=generator).to(dtype) for _ in range(2))
    return encode_record(k, v, [7, 8, 9, 10, 11], IDENTITY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_record_comes_back_bit_for_bit(dtype):
    k = torch.randn(2, 5, 3, 8).to(dtype)
    v = torch.randn(2, 5, 3, 8).to(dtype)
    record = decode_record(memoryview(bytearray(encode_record(k, v, [1, 2, 3, 4, 5], IDENTITY))), IDENTITY)
    assert torch.equal(record.k, k)
    assert torch.equal(record.v, v)
    assert record.token_ids == (1, 2, 3, 4, 5)
    assert record.left == IDENTITY.left_contexts[0]


@pytest.mark.parametrize("name", OTHER)
def test_every_field_of_the_identity_is_refused_by_name(name):
    assert set(OTHER) == {f.name for f in dataclasses.fields(RecordIdentity)}
    expected = dataclasses.replace(IDENTITY, **{name: OTHER[name]})
    with pytest.raises(PayloadError, match=name) as caught:
        decode_record(memoryview(bytearray(data())), expected)
    assert caught.value.reason == "identity"


def test_fields_cannot_run_into_each_other():
    one = dataclasses.replace(IDENTITY, adapters=("ab",), left_contexts=("c",))
    two = dataclasses.replace(IDENTITY, adapters=("a", "b"), left_contexts=("c",))
    three = dataclasses.replace(IDENTITY, adapters=(), left_contexts=("c", "ab"))
    assert len({i.digest() for i in (one, two, three)}) == 3


def test_the_file_does_not_hold_the_salt():
    secret = dataclasses.replace(IDENTITY, tenant_salt=b"this salt must stay secret")
    assert b"must stay secret" not in encode_record(
        torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), [1], secret
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_never_used(draw):
    """The record's own checks alone (the vault checks the whole file as well): refused, or the flip was in a
    place that does not change what is read."""
    good = decode_record(memoryview(bytearray(data())), IDENTITY)
    raw = bytearray(data())
    position = draw.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        read = decode_record(memoryview(raw), IDENTITY)
    except PayloadError:
        return
    assert torch.equal(read.k, good.k)
    assert torch.equal(read.v, good.v)
    assert (read.token_ids, read.left, read.identity) == (good.token_ids, good.left, good.identity)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(data()) - 1))
def test_a_truncated_file_is_refused(length):
    with pytest.raises(PayloadError):
        decode_record(memoryview(bytearray(data()[:length])), IDENTITY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_when_storing(value):
    k = torch.zeros(1, 2, 1, 4)
    v = k.clone()
    v[0, 1, 0, 2] = value
    with pytest.raises(PayloadError, match="NaN") as caught:
        encode_record(k, v, [1, 2], IDENTITY)
    assert caught.value.reason == "not_finite"


def test_ids_digest_tells_sequences_apart():
    assert ids_digest([1, 256]) != ids_digest([257]) != ids_digest([1, 0, 1])
