"""The way into a backend's layer stack, with a stand-in: when it is asked for, taken and dropped."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.weights import Weights
from memos_engine.ops import backend_for, layer_stack_of, reference

FITTING = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 12}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"layers": 5}),
    "phi3": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5}),
}
OTHERS = {
    "gemma3": ("Gemma3ForCausalLM", {}),
    "output biases": ("LlamaForCausalLM", {"attention_bias": True}),
    "mlp biases": ("LlamaForCausalLM", {"mlp_bias": True}),
    "gelu": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
}


class StandIn:
    """All layers by the reference, from nothing but what a layer stack is given."""

    max_rows = 8

    def __init__(self, layers, final_norm, eps, sm_scale, k_pages, v_pages, *_):
        self.layers, self.final_norm, self.eps, self.sm_scale = layers, final_norm, eps, sm_scale
        self.pages = list(zip(k_pages, v_pages, strict=True))
        self.runs = 0

    def run(self, hidden, slot_mapping, positions, query_start, block_table, seq_lens, rows=None, lora=None):
        assert lora is None
        self.runs += 1
        for layer, (k_pages, v_pages) in zip(self.layers, self.pages, strict=True):
            dim = k_pages.shape[-1]
            x = reference.rms_norm(hidden, layer.input_norm, self.eps)
            parts = ((layer.q, layer.q_bias), (layer.k, layer.k_bias), (layer.v, layer.v_bias))
            q, k, v = (F.linear(x, weight, bias).unflatten(1, (-1, dim)) for weight, bias in parts)
            if layer.q_norm is not None:
                q = reference.rms_norm(q, layer.q_norm, self.eps)
                k = reference.rms_norm(k, layer.k_norm, self.eps)
            if layer.cos_sin is not None:
                reference.rope(q, positions, layer.cos_sin)
            reference.append_kv(k, v, k_pages, v_pages, slot_mapping, positions, layer.cos_sin)
            out = reference.paged_attention(
                q,
                k_pages,
                v_pages,
                block_table,
                query_start,
                seq_lens,
                positions,
                self.sm_scale,
                layer.window,
            )
            hidden = hidden + F.linear(out.flatten(1), layer.o)
            x = reference.rms_norm(hidden, layer.post_norm, self.eps)
            inner = reference.silu_mul(F.linear(x, layer.gate), F.linear(x, layer.up))
            hidden = hidden + F.linear(inner, layer.down)
        kept = hidden if rows is None else hidden[rows]
        return reference.rms_norm(kept, self.final_norm, self.eps)


@pytest.fixture
def with_stack():
    """with_stack(decoder) -> the list of stacks made for it from now on."""

    def make(decoder, answer=StandIn):
        made = []
        names = (
            "rope",
            "append_kv",
            "splice_kv",
            "paged_attention",
            "linear",
            "rms_norm",
            "silu_mul",
        )
        plain = {name: getattr(backend_for("cpu"), name) for name in names}
        decoder.ops = SimpleNamespace(
            NAME="stand-in", **plain, layer_stack=lambda *a: made.append(answer(*a)) or made[-1]
        )
        decoder.weights = decoder.weights  # as if it were new: nothing of before is kept
        return made

    return make


def without_stack(decoder):
    """The backend of a machine without one."""
    decoder.ops = reference
    decoder.weights = decoder.weights


@pytest.mark.parametrize("name", FITTING)
def test_tokens_and_logits_are_those_of_the_ops(tiny_model, paged_batch, random_ids, with_stack, name):
    architecture, fields = FITTING[name]
    model = tiny_model(architecture, **fields)
    prompts = [random_ids(n, seed=n) for n in (5, 19, 33)]
    plain, stacked = paged_batch(model, 3), paged_batch(model, 3)
    without_stack(plain.decoder)
    made = with_stack(stacked.decoder)
    tokens, logits = plain.greedy(prompts, 20, chunk=6)
    got_tokens, got_logits = stacked.greedy(prompts, 20, chunk=6)
    assert got_tokens == tokens
    for got, wanted in zip(got_logits, logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(made) == 1
    assert 19 <= made[0].runs < 19 + 6  # every decode step, and the last chunks of few rows


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_never_ask(tiny_model, paged_batch, random_ids, with_stack, name):
    architecture, fields = OTHERS[name]
    batch = paged_batch(tiny_model(architecture, **fields), 1)
    made = with_stack(batch.decoder)
    batch.greedy([random_ids(5)], 3)
    assert made == []


def test_many_rows_and_capture_go_op_by_op(tiny_model, paged_batch, random_ids, with_stack):
    batch = paged_batch(tiny_model("LlamaForCausalLM"), 1)
    made = with_stack(batch.decoder)
    batch.captured(random_ids(3))
    assert made == []
    for rows, runs in ((9, 0), (8, 1), (1, 2)):
        batch.forward([random_ids(rows)])
        assert (len(made), made[0].runs) == (1, runs)


def test_only_wanted_rows_come_back(tiny_model, paged_batch, random_ids, with_stack):
    batch = paged_batch(tiny_model("LlamaForCausalLM"), 2)
    made = with_stack(batch.decoder)
    step, rows = batch.step([random_ids(4), random_ids(3)]), torch.tensor([3, 6])
    some = batch.decoder.forward(step, batch.cache, rows=rows)
    everything = batch.decoder.forward(step, batch.cache)
    assert made[0].runs == 2
    assert torch.equal(some, everything[rows])


def test_a_stack_ends_with_its_weights_and_its_cache(tiny_model, paged_batch, random_ids, with_stack):
    model = tiny_model("Qwen2ForCausalLM")
    batch = paged_batch(model, 1)
    made = with_stack(batch.decoder)
    batch.forward([random_ids(2)])
    old_weights, old_stack = batch.decoder.weights, weakref.ref(made.pop())
    batch.decoder.weights = Weights.from_model(model, batch.spec)
    gc.collect()
    assert old_stack() is None  # at once: old weights are not kept alive
    batch.forward([random_ids(2)])
    assert made[0].layers[0].q is batch.decoder.weights.layers[0].q is not old_weights.layers[0].q
    cache = batch.cache
    batch.cache = KVCache(batch.spec, 20, 16, torch.float32, torch.device("cpu"))
    batch.forward([random_ids(2)])
    assert len(made) == 2
    assert made[1].pages[0][0].data_ptr() == batch.cache.k.data_ptr() != cache.k.data_ptr()


def test_a_backend_that_declines_is_asked_once(tiny_model, paged_batch, random_ids, with_stack):
    batch = paged_batch(tiny_model("LlamaForCausalLM"), 1)
    made = with_stack(batch.decoder, answer=lambda *_: None)
    tokens, _ = batch.greedy([random_ids(5)], 4)
    assert made == [None]
    assert len(tokens[0]) == 4


@pytest.mark.parametrize("name", FITTING)
def test_the_native_stack_agrees_with_the_ops(tiny_model, paged_batch, random_ids, name):
    """Every family it is given, in ragged batches: a chunk of one prompt beside decoding rows."""
    if backend_for("cpu") is reference:
        pytest.skip("native code was not built")
    architecture, fields = FITTING[name]
    model = tiny_model(architecture, **fields)
    plain, stacked = paged_batch(model, 3), paged_batch(model, 3)
    without_stack(plain.decoder)
    for lengths in ((1, 2, 3), (1, 1, 1), (1, 5, 1), (2, 0, 4), (0, 0, 8)):
        new = [random_ids(n, seed=n) for n in lengths]
        for got, wanted in zip(stacked.forward(new), plain.forward(new), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert stacked.decoder._stacks[False] is not None
    assert plain.decoder._stacks[False] is None


def test_the_reference_has_no_stack():
    assert layer_stack_of(reference) is None
    own = SimpleNamespace(NAME="x", layer_stack=len)
    assert layer_stack_of(own) is len
