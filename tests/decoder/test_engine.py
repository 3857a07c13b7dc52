"""The engine's manners: refusals, aborts, streams cut short; all pages come back every time."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import ConfigError, DecoderConfig, SamplingParams
from memos_engine.decoder.sampler import Sampler
from memos_engine.decoder.sequence import NO_TOKEN, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import (
    ContextLengthError,
    MemoryInputError,
    ModelError,
    ModelFilesError,
    OutOfPagesError,
    UnsupportedModelError,
)


@pytest.fixture
def engine(tiny_llama, make_engine):
    engine = make_engine(tiny_llama(), dtype="float32", pool_tokens=128)
    yield engine
    engine.check_integrity()
    assert engine.pool.available == engine.pool.num_blocks - 1


def test_a_prompt_over_the_window_is_refused(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32", pool_tokens=1024)
    with pytest.raises(ContextLengthError, match="512"):
        engine.add_request([TextSpan(random_ids(512))])
    (*_, last) = engine.generate([TextSpan(random_ids(510))], SamplingParams(max_new_tokens=50))
    assert last.finish_reason == "length"
    assert len(last.sequence.tokens) == 512


def test_a_prompt_over_the_pool_is_refused(engine, random_ids):
    with pytest.raises(OutOfPagesError, match="pool_tokens"):
        engine.add_request([TextSpan(random_ids(128))])


def test_an_answer_ends_where_the_pool_ends(engine, random_ids):
    outputs = list(engine.generate([TextSpan(random_ids(120))], SamplingParams(max_new_tokens=100)))
    assert outputs[-1].finish_reason == "length"
    assert len(outputs) == 8


@pytest.mark.parametrize("spans", [[], [TextSpan(())]])
def test_an_empty_prompt_is_refused(engine, spans):
    with pytest.raises(MemoryInputError, match="at least one token"):
        engine.add_request(spans)


@pytest.mark.parametrize("token", [-1, 211])
def test_token_ids_outside_the_vocabulary_are_refused(engine, token):
    with pytest.raises(MemoryInputError, match="vocabulary of 211"):
        engine.add_request([TextSpan((token,))])


def test_a_stop_token_ends_the_answer(engine, random_ids):
    free = [o.token for o in engine.generate([TextSpan(random_ids(10))], SamplingParams(max_new_tokens=20))]
    stop = free[7]
    outputs = list(
        engine.generate([TextSpan(random_ids(10))], SamplingParams(max_new_tokens=20, stop_token_ids=(stop,)))
    )
    assert [o.token for o in outputs] == free[: free.index(stop) + 1]
    assert outputs[-1].finish_reason == "stop"


def test_a_stream_abandoned_half_way_returns_its_pages(engine, random_ids):
    stream = engine.generate([TextSpan(random_ids(40))], SamplingParams(max_new_tokens=50))
    for _ in range(3):
        next(stream)
    stream.close()
    assert not engine.batcher.running


def test_requests_run_side_by_side(engine, random_ids):
    first = engine.add_request([TextSpan(random_ids(20, 1))], SamplingParams(max_new_tokens=5))
    second = engine.add_request([TextSpan(random_ids(20, 2))], SamplingParams(max_new_tokens=5))
    steps = []
    while outputs := engine.step():
        steps.append([out.sequence.id for out in outputs])
    assert steps == [[first.id, second.id]] * 5
    assert engine.idle
    assert engine.step() == []


def test_two_threads_each_get_their_own_tokens(engine, random_ids):
    from concurrent.futures import ThreadPoolExecutor

    def tokens(seed):
        params = SamplingParams(max_new_tokens=15, temperature=1.0, seed=seed)
        return [out.token for out in engine.generate([TextSpan(random_ids(20, seed))], params)]

    alone = [tokens(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokens, range(6))) == alone


def test_an_error_reaches_only_the_request_it_belongs_to(engine, random_ids):
    good = engine.add_request([TextSpan(random_ids(20, 1))], SamplingParams(max_new_tokens=3))
    bad = engine.generate([TextSpan(random_ids(20, 2))], SamplingParams(max_new_tokens=3))
    run = engine.runner.run
    engine.runner.run = lambda batch: 1 / 0 if any(seq is not good for seq, _ in batch) else run(batch)
    with pytest.raises(ZeroDivisionError):
        list(bad)
    while not engine.idle:
        engine.step()
    assert len(good.output) == 3
    assert good.error is None


def test_forgetting_prefixes_holds_for_requests_under_way(engine, random_ids):
    ids = random_ids(50)
    stream = engine.generate([TextSpan(ids)], SamplingParams(max_new_tokens=4))
    next(stream)
    engine.forget_prefixes()
    list(stream)
    (out,) = engine.generate([TextSpan(ids)], SamplingParams(max_new_tokens=1))
    assert out.sequence.stats.prefix_tokens == 0


@pytest.mark.parametrize("place", ["publish", "allocate", "writable"])
def test_an_interrupt_leaves_the_engine_sound(engine, random_ids, monkeypatch, place):
    once = SamplingParams(max_new_tokens=1)
    list(engine.generate([TextSpan(random_ids(32))], once))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.pool, place, interrupted)
    with pytest.raises(KeyboardInterrupt):  # a prompt that matches cached pages first
        list(engine.generate([TextSpan(random_ids(32))], once))
    monkeypatch.undo()
    engine.check_integrity()
    assert not engine.batcher.running
    assert len(list(engine.generate([TextSpan(random_ids(40))], SamplingParams(max_new_tokens=3)))) == 3


def test_an_aborted_waiting_request_never_runs(engine, random_ids):
    first = engine.add_request([TextSpan(random_ids(20, 1))], SamplingParams(max_new_tokens=2))
    second = engine.add_request([TextSpan(random_ids(20, 2))])
    engine.abort(second)
    while engine.step():
        pass
    assert first.finish_reason == "length"
    assert second.output == []


def test_a_failing_forward_frees_the_request(engine, random_ids, monkeypatch):
    seq = engine.add_request([TextSpan(random_ids(20))])
    monkeypatch.setattr(engine.runner, "run", lambda *a: (_ for _ in ()).throw(RuntimeError("no")))
    (out,) = engine.step()
    assert (out.sequence, out.token, out.finish_reason) == (seq, NO_TOKEN, "error")
    assert str(seq.error) == "no"
    with pytest.raises(RuntimeError, match="no"):
        list(engine.generate([TextSpan(random_ids(20))]))
    monkeypatch.undo()
    assert len(list(engine.generate([TextSpan(random_ids(20))], SamplingParams(max_new_tokens=3)))) == 3


def test_the_null_block_stays_zero(engine, random_ids):
    list(engine.generate([TextSpan(random_ids(50))], SamplingParams(max_new_tokens=5)))
    assert not engine.runner.cache.k[:, 0].any()
    assert not engine.runner.cache.v[:, 0].any()


def test_a_repeated_prompt_reuses_its_pages_and_its_answer(engine, random_ids):
    params = SamplingParams(max_new_tokens=12)
    for length in (31, 32, 33):  # 32: the whole prompt is in pages, the last one is copied on write
        ids = random_ids(length, seed=length)
        (*_, first) = engine.generate([TextSpan(ids)], params)
        (*_, again) = engine.generate([TextSpan(ids)], params)
        assert again.sequence.stats.prefix_tokens == min(length // 16 * 16, length - 1)
        assert again.sequence.output == first.sequence.output


def test_shared_pages_are_never_written(engine, random_ids):
    ids = random_ids(32)
    once = SamplingParams(max_new_tokens=1)
    list(engine.generate([TextSpan(ids)], once))
    before = engine.runner.cache.k.clone()
    published = set(engine.pool._key_of)
    list(engine.generate([TextSpan(ids)], SamplingParams(max_new_tokens=9)))
    for block in published:
        assert torch.equal(engine.runner.cache.k[:, block], before[:, block])


# -- what a model may be -------------------------------------------------------------------------


def test_an_unsupported_architecture_names_the_supported_ones():
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        ModelSpec.from_dict({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})


def test_older_folders_say_rope_in_other_words():
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    sizes = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    base = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, **sizes}
    old = ModelSpec.from_dict({**base, "rope_theta": 5e5, "rope_scaling": llama3})
    new = ModelSpec.from_dict({**base, "rope_parameters": {**llama3, "rope_theta": 5e5}})
    assert old == new
    assert (old.rope.theta, old.num_kv_heads, old.head_dim) == (5e5, 4, 16)
    assert ModelSpec.from_dict(base).rope.kind == "default"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_broken_config_is_an_error_of_files_or_model(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ModelFilesError, UnsupportedModelError)):
        ModelSpec.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_unsupported_features_are_refused_by_name(tiny_llama, change, words):
    config = tiny_llama().config.__class__(**{**tiny_llama().config.to_dict(), **change})
    with pytest.raises(UnsupportedModelError, match=words):
        ModelSpec.from_config(config, "LlamaForCausalLM")


def test_inverse_frequencies_equal_transformers(tiny_llama):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    for parameters in (rope, None):
        model = tiny_llama(rope=parameters, head_dim=64)
        ours = ModelSpec.from_config(model.config, "LlamaForCausalLM").rope.inv_freq(64)
        assert torch.equal(ours, model.model.rotary_emb.inv_freq)


def test_missing_and_misshapen_tensors_are_named(tiny_llama):
    model = tiny_llama()
    spec = ModelSpec.from_config(model.config, "LlamaForCausalLM")
    tensors = dict(model.named_parameters())
    missing = {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(ModelFilesError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Weights(missing, spec)
    with pytest.raises(ModelFilesError, match="shape"):
        Weights({**tensors, "model.norm.weight": torch.ones(3)}, spec)
    mixed = {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.bfloat16)}
    with pytest.raises(ModelFilesError, match="one dtype"):
        Weights(mixed, spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_and_the_live_model_are_the_same_weights(tiny_llama, tmp_path, dtype):
    model = tiny_llama(tied=False)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    spec = ModelSpec.from_config(model.config, "LlamaForCausalLM")
    loaded = Weights.from_folder(tmp_path, spec, dtype)
    live = Weights.from_model(model.to(dtype), spec)
    for name, tensor in live.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor), name
    assert loaded.digest == live.digest
    with torch.no_grad():
        live.tensors["model.norm.weight"][0] += 1
    assert Weights(live.tensors, spec).digest != loaded.digest


def test_a_live_models_parameters_are_shared(tiny_llama):
    model = tiny_llama()
    weights = Weights.from_model(model, ModelSpec.from_config(model.config, "LlamaForCausalLM"))
    assert weights.embed.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamplingParams(max_new_tokens=0),
        lambda: SamplingParams(temperature=-1),
        lambda: SamplingParams(temperature=float("nan")),
        lambda: SamplingParams(top_k=-1),
        lambda: SamplingParams(seed=2**63),
        lambda: SamplingParams(top_p=0),
        lambda: SamplingParams(top_p=1.1),
        lambda: DecoderConfig(dtype="int4"),
        lambda: DecoderConfig(page_dtype="float16"),
        lambda: DecoderConfig(page=0),
        lambda: DecoderConfig(prefill_chunk=0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(temperature, value):
    logits = torch.zeros(9)
    logits[4] = value
    with pytest.raises(ModelError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature, seed=0))(logits)


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    sampler = Sampler(SamplingParams(temperature=0.7, top_k=4, top_p=0.95, seed=3))
    expected = torch.softmax(sampler.filtered(logits), -1)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[sampler(logits)] += 1
    assert (counts[expected == 0] == 0).all()
    live = expected > 0
    chi2 = ((counts[live] - 4000 * expected[live]) ** 2 / (4000 * expected[live])).sum()
    assert chi2 < 20  # four cells at most: far beyond any chance value with this seed fixed
