"""The paged decoder against transformers, token for token, in fp32."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import SamplingParams
from memos_engine.decoder.sequence import TextSpan

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "mha": {"heads": 4, "kv_heads": 4},
    "gqa2": {"heads": 4, "kv_heads": 2},
    "gqa3": {"heads": 6, "kv_heads": 2},
    "mqa8": {"heads": 8, "kv_heads": 1},
    "untied": {"tied": False},
    "llama3": {"rope": LLAMA3},
    "wide_heads": {"heads": 3, "kv_heads": 1, "head_dim": 80},
}


def greedy_hf(model, ids, count):
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def ours(engine, ids, count=64, **params):
    spans = [TextSpan(tuple(ids))]
    return [out.token for out in engine.generate(spans, SamplingParams(max_new_tokens=count, **params))]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_transformers(tiny_llama, make_engine, random_ids, shape):
    model = tiny_llama(**SHAPES[shape], seed=3)
    engine = make_engine(model, dtype="float32")
    for length in (1, 15, 16, 17, 33, 70):  # across page edges
        ids = random_ids(length, seed=length)
        assert ours(engine, ids) == greedy_hf(model, ids, 64), f"prompt of {length} tokens"
    engine.check_integrity()


@pytest.mark.parametrize("page", [1, 7, 16, 64])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_pages_and_chunks_do_not_change_tokens(tiny_llama, make_engine, random_ids, page, chunk):
    model = tiny_llama(heads=6, kv_heads=2)
    ids = random_ids(45, seed=9)
    whole = ours(make_engine(model, dtype="float32"), ids, 20)
    assert ours(make_engine(model, dtype="float32", page=page, prefill_chunk=chunk), ids, 20) == whole


def test_logits_equal_transformers(tiny_llama, make_engine, random_ids):
    model = tiny_llama()
    ids = random_ids(40)
    engine = make_engine(model, dtype="float32")
    seen = []
    engine.runner.run, run = lambda batch: seen.append(run(batch)[0]) or run(batch), engine.runner.run
    ours(engine, ids, 1)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_sampling_with_the_global_generator_equals_transformers(tiny_llama, make_engine, random_ids):
    model = tiny_llama(seed=5)
    engine = make_engine(model, dtype="float32")
    ids = random_ids(21)
    for settings in (
        {"temperature": 0.8},
        {"top_k": 7},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    ):
        full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
        torch.manual_seed(11)
        hf = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=True, pad_token_id=0, **full)
        torch.manual_seed(11)
        assert ours(engine, ids, 24, **full) == hf[0, len(ids) :].tolist(), settings


def test_a_seed_repeats_and_does_not_touch_the_global_generator(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = ours(engine, random_ids(9), 30, temperature=1.0, seed=4)
    assert ours(engine, random_ids(9), 30, temperature=1.0, seed=4) == first
    assert ours(engine, random_ids(9), 30, temperature=1.0, seed=5) != first
    assert torch.equal(before, torch.random.get_rng_state())


def test_bf16_stays_within_the_noise_of_its_rounding(tiny_llama, make_engine, random_ids):
    exact = tiny_llama(seed=2)
    half = tiny_llama(seed=2, dtype=torch.bfloat16)
    ids = random_ids(50)
    with torch.inference_mode():
        truth = exact(torch.tensor([ids])).logits[0, -1]
        torch_error = (half(torch.tensor([ids])).logits[0, -1].float() - truth).abs().max()
    engine = make_engine(half, dtype="bfloat16")
    seen = []
    engine.runner.run, run = lambda batch: seen.append(run(batch)[0]) or run(batch), engine.runner.run
    ours(engine, ids, 1)
    assert (seen[0] - truth).abs().max() <= 2 * torch_error + 1e-3
