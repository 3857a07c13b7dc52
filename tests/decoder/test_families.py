"""Every model family against transformers: tokens, logits, stored K and V, weights and configs."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import SamplingParams
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, Splice, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.splice import splice
from memos_engine.decoder.weights import Weights

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _with_theta(rope, theta=1e4):
    return {"rope_parameters": {"rope_theta": theta, **rope}}


FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_untied_biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 24}),
    "llama_gelu": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_linear": ("LlamaForCausalLM", _with_theta({"rope_type": "linear", "factor": 3.0})),
    "llama_llama3": ("LlamaForCausalLM", _with_theta(LLAMA3)),
    "llama_yarn": ("LlamaForCausalLM", _with_theta(YARN)),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral_window": ("MistralForCausalLM", {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_window_biases": (
        "Qwen3ForCausalLM",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "qwen3_yarn": ("Qwen3ForCausalLM", _with_theta(YARN | {"attention_factor": 1.3})),
    "smollm3": ("SmolLM3ForCausalLM", {"layers": 5}),
    "smollm3_listed": (
        "SmolLM3ForCausalLM",
        {"layers": 4, "no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 20},
    ),
    "gemma3": ("Gemma3ForCausalLM", {"layers": 7, "sliding_window": 20}),
    "gemma3_scaled": (
        "Gemma3ForCausalLM",
        {
            "layers": 4,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 20,
            "rope_parameters": TWO_ROPES,
            "attention_bias": True,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 40}),
    "phi3_partial": (
        "Phi3ForCausalLM",
        _with_theta({"rope_type": "default", "partial_rotary_factor": 0.75}) | {"tie_word_embeddings": True},
    ),
}
PLAIN = ["llama", "mistral_window", "qwen2", "qwen3", "smollm3", "gemma3", "phi3_partial"]


@pytest.fixture
def family(tiny_model):
    def make(name, **more):
        architecture, fields = FAMILIES[name]
        return tiny_model(architecture, **(fields | more))

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_logits_equal_transformers(family, paged_batch, random_ids, name):
    """A ragged batch whose prompts end around page edges, 64 new tokens each, decoded together."""
    model = family(name, seed=3)
    prompts = [random_ids(length, seed=length) for length in (1, 15, 16, 17, 33, 70)]
    batch = paged_batch(model, len(prompts))
    tokens, logits = batch.greedy(prompts, 64, chunk=29)
    for prompt, answer, ours in zip(prompts, tokens, logits, strict=True):
        whole = torch.tensor([[*prompt, *answer[:-1]]])
        with torch.inference_mode():
            theirs = model(whole, use_cache=False).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert answer == theirs[len(prompt) - 1 :].argmax(-1).tolist()
    again = model.generate(torch.tensor([prompts[-1]]), max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert again[0, len(prompts[-1]) :].tolist() == tokens[-1]


@pytest.mark.parametrize("name", ["qwen3_window_biases", "gemma3", "smollm3_listed", "phi3_partial"])
@pytest.mark.parametrize(("page", "chunk"), [(1, 7), (7, 5), (64, 1), (16, 16)])
def test_pages_and_chunks_do_not_change_tokens(family, paged_batch, random_ids, name, page, chunk):
    model = family(name)
    prompts = [random_ids(45, seed=9), random_ids(3, seed=8)]
    whole, _ = paged_batch(model, 2).greedy(prompts, 12)
    assert paged_batch(model, 2, page=page).greedy(prompts, 12, chunk)[0] == whole


@pytest.mark.parametrize("name", FAMILIES)
def test_a_request_does_not_depend_on_its_neighbours(family, paged_batch, random_ids, name):
    model = family(name, seed=1)
    prompts = [random_ids(n, seed=n) for n in (5, 31, 48)]
    together, _ = paged_batch(model, 3).greedy(prompts, 16)
    assert together == [paged_batch(model, 1).greedy([p], 16)[0][0] for p in prompts]


@pytest.mark.parametrize("name", PLAIN)
def test_the_engine_runs_every_family_with_text_and_records(family, make_engine, random_ids, name):
    model = family(name, seed=5)
    engine = make_engine(model, dtype="float32")
    left, right = random_ids(35, 1), random_ids(10, 2)
    theirs = model.generate(torch.tensor([left + right]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    k, v = engine.encode_span((), left)
    stored = KVSpan(KVRecord(k, v, left, "test", ids_digest(())))
    for spans in ([TextSpan(left + right)], [stored, TextSpan(right)]):
        engine.forget_prefixes()
        out = list(engine.generate(spans, SamplingParams(max_new_tokens=20)))
        assert [o.token for o in out] == theirs[0, 45:].tolist()
    assert out[0].sequence.stats.spliced_tokens == 35
    engine.check_integrity()


# -- stored K and V ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_splice_equals_an_append_bit_for_bit(family, paged_batch, random_ids, name, dtype):
    """Whatever shapes K (QK-norm, biases, a table for each layer), the record holds it before RoPE."""
    model = family(name, dtype=dtype)
    source, target = paged_batch(model, 1), paged_batch(model, 1, page=7)
    ids = random_ids(23)
    k, v = source.captured(ids)
    slots = target.step([ids]).slot_mapping
    splice(target.decoder, target.cache, Splice(KVRecord(k, v, ids, "test", ids_digest(())), 0), slots)
    for stored, appended in zip(target.pages(0, slice(0, 23)), source.pages(0, slice(0, 23)), strict=True):
        assert torch.equal(stored, appended)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_moved_splice_rotates_each_layer_by_its_own_table(family, paged_batch, random_ids, name):
    batch = paged_batch(family(name), 1)
    ids = random_ids(9)
    k, v = batch.captured(ids)
    batch.lengths = [50]
    step = batch.step([ids])
    record = KVRecord(k, v, ids, "test", ids_digest(()))
    splice(batch.decoder, batch.cache, Splice(record, 52, skip=2), step.slot_mapping[2:])
    moved, _ = batch.pages(0, slice(52, 59))
    for layer, table in enumerate(batch.decoder.tables):
        wanted = k[layer, 2:].clone()
        if table is not None:
            batch.decoder.ops.rope(wanted, step.positions[2:], table)
        assert torch.equal(moved[layer], wanted)
    assert (batch.spec.layers[0].rope is None) == (name == "smollm3_listed")


@pytest.mark.parametrize("name", PLAIN)
def test_an_exact_prefix_from_a_record_gives_the_same_answer(family, paged_batch, random_ids, name):
    model = family(name)
    left, right = random_ids(37, 1), random_ids(12, 2)
    full = paged_batch(model, 1)
    wanted, _ = full.greedy([left + right], 16)
    k, v = paged_batch(model, 1).captured(left)
    spliced = paged_batch(model, 1)
    record = KVRecord(k, v, left, "test", ids_digest(()))
    splice(spliced.decoder, spliced.cache, Splice(record, 0), spliced.step([left]).slot_mapping)
    assert spliced.greedy([right], 16)[0] == wanted


def test_a_single_table_is_a_single_call(family, paged_batch):
    groups = {name: len(paged_batch(family(name), 1).decoder.table_groups) for name in PLAIN}
    assert groups == {
        "llama": 1,
        "mistral_window": 1,
        "qwen2": 1,
        "qwen3": 1,
        "smollm3": 4,
        "gemma3": 6,
        "phi3_partial": 1,
    }


# -- low precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_a_bf16_batch_stays_within_the_noise_of_its_rounding(family, paged_batch, random_ids, name):
    """Root mean square error of all logits against fp32, ours in a batch and transformers' alone. Both round
    the same weights; ours may not be noisier than a share, whatever else is in the batch."""
    half = family(name, seed=2, dtype=torch.bfloat16)
    exact = family(name, seed=2).to(torch.bfloat16).float()
    prompts = [random_ids(n, seed=n) for n in (50, 17, 32, 90)]
    batch = paged_batch(half, len(prompts))
    ours, theirs, truth = torch.cat(batch.forward(prompts)), [], []
    with torch.inference_mode():
        for prompt in prompts:
            theirs.append(half(torch.tensor([prompt])).logits[0].float())
            truth.append(exact(torch.tensor([prompt])).logits[0])

    def rms(logits):
        return float((logits - torch.cat(truth)).square().mean().sqrt())

    floor = rms(torch.cat(theirs))
    assert rms(ours) <= 1.5 * floor
    alone = torch.cat([paged_batch(half, 1).forward([p])[0] for p in prompts])
    assert float((alone - ours).square().mean().sqrt()) <= 1.5 * floor


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_and_the_live_model_are_the_same_weights(family, tmp_path, name, dtype):
    model = family(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    spec = ModelSpec.from_folder(tmp_path)
    assert spec == ModelSpec.from_config(model.config, type(model).__name__)
    loaded = Weights.from_folder(tmp_path, spec, dtype)
    live = Weights.from_model(model.to(dtype), spec)
    assert loaded.tensors.keys() == live.tensors.keys() == dict(model.named_parameters()).keys()
    for tensor_name, tensor in live.tensors.items():
        assert torch.equal(loaded.tensors[tensor_name], tensor), tensor_name
    assert loaded.digest == live.digest
    if dtype == torch.bfloat16:  # converted, so in the arena: neighbours are one product
        layer = loaded.layers[-1]
        assert torch.equal(layer.qkv, torch.cat((layer.q, layer.k, layer.v)))
        assert torch.equal(layer.gate_up, torch.cat((layer.gate, layer.up)))
        assert layer.qkv.data_ptr() == layer.q.data_ptr()


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3"])
def test_exchanged_weights_are_used(family, paged_batch, random_ids, name):
    """Norms of `1 + w` are made once for each Weights, not once for each model."""
    model, batch = family(name), paged_batch(family(name), 1)
    ids = random_ids(20)
    batch.forward([ids])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.01)
    batch.decoder.weights = Weights.from_model(model, batch.spec)
    batch.lengths = [0]
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(batch.forward([ids])[0], theirs, rtol=1e-3, atol=1e-3)
