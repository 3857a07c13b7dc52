"""Decoding with weights of eight bits: near the whole ones, and only where it may be."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import SamplingParams
from memos_engine.decoder.int8 import rounded
from memos_engine.decoder.sequence import TextSpan
from memos_engine.decoder.weights import Weights
from memos_engine.ops import backend_for, reference

native = pytest.mark.skipif(backend_for("cpu") is reference, reason="native code was not built")


def logits(engine, ids, steps=()):
    """The logits behind a prompt, then behind each further token."""
    seq = engine.add_request([TextSpan(ids)], SamplingParams(max_new_tokens=99), sampled=False)
    seen = []
    for token in (*steps, None):
        while seq.logits is None:
            engine.step()
        seen.append(seq.logits)
        if token is not None:
            engine.feed(seq, token)
    engine.finish(seq)
    engine.check_integrity()
    return torch.stack(seen)


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (64, 200)])
def test_rounding_is_to_the_nearest(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    made = rounded(weight)
    assert made.values.dtype == torch.int8
    error = (made.values * made.scale[:, None] - weight).abs()
    assert (error <= 0.5001 * made.scale[:, None]).all()
    assert not made.values[0].any()


@native
def test_decoding_is_near_and_prompts_are_whole(tiny_llama, make_engine, random_ids):
    model = tiny_llama(seed=1)
    whole, narrow = (make_engine(model, dtype="float32", int8_decode=on) for on in (False, True))
    steps = random_ids(12, 5)
    expected, got = (logits(e, random_ids(30), steps) for e in (whole, narrow))
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error[0] < 0.02  # the prompt's own row: only the output head is rounded
    assert 0 < error.max() < 0.1
    span = random_ids(9, 3)
    for a, b in zip(*(e.encode_span(random_ids(4), span) for e in (whole, narrow)), strict=True):
        assert torch.equal(a, b)  # records never see rounded weights


@native
def test_new_weights_are_rounded_anew(tiny_llama, make_engine, random_ids):
    first, second = tiny_llama(seed=1), tiny_llama(seed=2)
    engine = make_engine(first, dtype="float32", int8_decode=True)
    logits(engine, random_ids(20), random_ids(3, 1))
    engine.use_weights(Weights.from_model(second, engine.spec))
    fresh = make_engine(second, dtype="float32", int8_decode=True)
    ids, steps = random_ids(20), random_ids(3, 1)
    assert torch.equal(logits(engine, ids, steps), logits(fresh, ids, steps))


def test_without_native_code_nothing_changes(tiny_llama, make_engine, random_ids, monkeypatch):
    monkeypatch.setattr("memos_engine.decoder.model.layer_stack_of", lambda ops: None)
    model = tiny_llama(seed=1)
    results = [
        logits(make_engine(model, dtype="float32", int8_decode=on), random_ids(20), random_ids(3, 1))
        for on in (False, True)
    ]
    assert torch.equal(*results)
