"""The Hugging Face drop-in against the model's own generate()."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TextStreamer,
)

from memos_engine import MemoryConfig, MemoryEngine, attach, detach
from memos_engine.errors import MemoryInputError, ModelError
from memos_engine.memory import embed


@pytest.fixture(autouse=True)
def _hashing(monkeypatch):
    monkeypatch.setattr("memos_engine.api.default_embedder", lambda: embed.HashingEmbedder(64))


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def model(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    yield model
    detach(model)


@pytest.fixture
def store(tiny_folder, tmp_path):
    with MemoryEngine.open(tiny_folder, tmp_path / "store", embedder=embed.HashingEmbedder(64)) as engine:
        alice = engine.user("alice")
        for fact in ("My dog is called Biscuit.", "My cat is called Tom."):
            alice.remember(fact)
    return tmp_path / "store"


def prompt(tokenizer, text="What is my dog called?", system=None):
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, return_tensors="pt", add_special_tokens=False)


CALLS = [
    {"max_new_tokens": 20, "do_sample": False},
    {"max_new_tokens": 20},
    {"max_length": 90, "do_sample": False},
    {"max_new_tokens": 30, "eos_token_id": [2, 17, 40]},
    {"max_new_tokens": 12, "do_sample": True},
    {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 12, "top_p": 0.8},
    {"max_new_tokens": 12, "do_sample": True, "top_k": 0},
    {"max_new_tokens": 12, "do_sample": True, "top_k": None},
    {"max_new_tokens": 30, "eos_token_id": torch.tensor([2, 17])},
    {"generation_config": GenerationConfig(max_new_tokens=15, do_sample=True, temperature=1.3)},
    {"generation_config": GenerationConfig(max_new_tokens=15, do_sample=True), "max_new_tokens": 4},
]


@pytest.mark.parametrize("call", CALLS, ids=[str(i) for i in range(len(CALLS))])
def test_the_same_ids_as_before(model, tokenizer, call, caplog):
    inputs = prompt(tokenizer)
    torch.manual_seed(5)
    expected = model.generate(**inputs, **call)
    assert attach(model, tokenizer) is model
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING, "memos_engine"):
        got = model.generate(**inputs, **call)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype
    assert "own generate" not in caplog.text


FALLBACKS = [
    ({"num_beams": 2}, "num_beams"),
    ({"repetition_penalty": 1.3}, "repetition_penalty"),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ({"min_new_tokens": 5}, "min_new_tokens"),
    ({"bad_words_ids": [[5]]}, "bad_words_ids"),
    ({"use_cache": False}, "use_cache"),
]


@pytest.mark.parametrize(("call", "reason"), FALLBACKS, ids=[name for _, name in FALLBACKS])
def test_what_does_not_run_here_runs_there_and_says_why(model, tokenizer, call, reason, caplog):
    inputs = prompt(tokenizer)
    torch.manual_seed(1)
    expected = model.generate(**inputs, max_new_tokens=8, **call)
    attach(model, tokenizer)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING, "memos_engine"):
        got = model.generate(**inputs, max_new_tokens=8, **call)
    if hasattr(got, "sequences"):
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)
    assert reason in caplog.text


def test_batches_streamers_and_padding_fall_back(model, tokenizer, caplog):
    attach(model, tokenizer)
    batch = tokenizer(["a", "longer"], return_tensors="pt", padding=True, padding_side="left")
    with caplog.at_level(logging.WARNING, "memos_engine"):
        assert model.generate(**batch, max_new_tokens=3).shape[0] == 2
        one = prompt(tokenizer)
        model.generate(**one, max_new_tokens=3, streamer=TextStreamer(tokenizer))
        one["attention_mask"][0, 0] = 0
        model.generate(**one, max_new_tokens=3)
        model.generate(torch.tensor([[7, 8, 2, 9]]), pad_token_id=2, eos_token_id=5, max_new_tokens=3)
        model.generate(inputs_embeds=torch.zeros(1, 3, 48), max_new_tokens=3)
    for reason in ("batch of 2", "streamer", "with padding", "pad tokens", "no input_ids"):
        assert reason in caplog.text


def test_detach_restores(model, tokenizer):
    own = model.generate
    attach(model, tokenizer)
    attach(model, tokenizer)  # twice is once
    assert model.generate != own
    assert detach(model) is model
    assert model.generate == own
    assert "_memos_engine" not in model.__dict__


def test_an_unsupported_architecture_keeps_its_own_generate(tokenizer, caplog):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300)).eval()
    attach(model, tokenizer)
    with caplog.at_level(logging.WARNING, "memos_engine"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)
    assert "GPT2LMHeadModel is not supported" in caplog.text


def test_changed_weights_are_followed(model, tokenizer):
    inputs = prompt(tokenizer)
    attach(model, tokenizer)
    before = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.normal_(std=0.5)
    after = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(-1.5)  # no counter changes
    merged = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    expected = detach(model).generate(**inputs, max_new_tokens=10, do_sample=False)
    assert torch.equal(merged, expected)
    attach(model, tokenizer)
    model.generate(**inputs, max_new_tokens=2)
    model.model.norm.weight = torch.nn.Parameter(torch.linspace(-1, 2, 48))  # another object
    replaced = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    detach(model)
    assert torch.equal(replaced, model.generate(**inputs, max_new_tokens=10, do_sample=False))
    model.model.norm.weight = torch.nn.Parameter(torch.ones(48))
    assert torch.equal(expected, model.generate(**inputs, max_new_tokens=10, do_sample=False))
    assert not torch.equal(before, after)
    assert not torch.equal(after, merged)


def test_a_changed_dtype_is_said(model, tokenizer):
    attach(model, tokenizer)
    model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="attach"):
        model.generate(**prompt(tokenizer), max_new_tokens=2)


def test_prompts_over_the_pool_go_to_the_models_own_generate(model, tokenizer, caplog):
    attach(model, tokenizer)
    with caplog.at_level(logging.WARNING, "memos_engine"):
        assert model.generate(torch.full((1, 1024), 9), max_new_tokens=2).shape == (1, 1026)
    assert "pool_tokens" in caplog.text
    assert model.generate(**prompt(tokenizer), max_new_tokens=2, do_sample=False).shape[1] > 2


# -- with a store --------------------------------------------------------------------------------


def test_memories_steer_the_answer_but_never_show(model, tokenizer, store):
    inputs = prompt(tokenizer)
    plain = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    attach(model, tokenizer, store, user="alice", memory=MemoryConfig(min_score=-1))
    engine = model._memos_engine.engine
    forms = []
    run = engine.run
    engine.run = lambda prepared, *rest: (
        forms.append([s.form for s in prepared.plan.segments]) or run(prepared, *rest)
    )
    first = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    second = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    size = inputs["input_ids"].shape[1]
    assert torch.equal(first[:, :size], inputs["input_ids"])
    assert first.shape[1] <= size + 16
    assert not torch.equal(first, plain)
    assert forms == [["text", "text"], ["kv", "kv"]]
    assert second.shape[1] <= size + 16
    engine.decoder.check_integrity()


def test_a_prompt_with_another_system_turn_takes_memories_behind_it(model, tokenizer, store):
    attach(model, tokenizer, store, user="alice", memory=MemoryConfig(min_score=-1, build=False))
    engine = model._memos_engine.engine
    seen = []
    run = engine.run
    engine.run = lambda prepared, *rest: seen.append(prepared.spans) or run(prepared, *rest)
    model.generate(**prompt(tokenizer, system="Be a pirate."), max_new_tokens=2)
    spans = [tokenizer.decode(list(s.token_ids)) for s in seen[0]]
    assert spans[0] == "<|im_start|>system\nBe a pirate.<|im_end|>\n"
    assert spans[1].startswith("<|im_start|>user\nMy ")
    assert spans[-1].endswith("What is my dog called?<|im_end|>\n<|im_start|>assistant\n")


LLAMA3_STYLE = (
    "{% for m in messages %}{% if loop.first %}<|endoftext|>{% if m['role'] != 'system' %}"
    "<|im_start|>system\nHelp.<|im_end|>{% endif %}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_prompt_without_a_system_turn_keeps_its_question_behind_the_memories(model, tokenizer, store):
    tokenizer.chat_template = LLAMA3_STYLE
    attach(model, tokenizer, store, user="alice", memory=MemoryConfig(min_score=-1, build=False))
    engine = model._memos_engine.engine
    seen = []
    run = engine.run
    engine.run = lambda prepared, *rest: seen.append(prepared.spans) or run(prepared, *rest)
    text = "<|endoftext|><|im_start|>user\nWhat is my dog?<|im_end|><|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model.generate(ids, max_new_tokens=2)
    assert tokenizer.decode(list(seen[0][-1].token_ids)) == text


@pytest.mark.parametrize("prompt_ids", [[[1]], [[1, 300 % 259, 1]]])
def test_a_prompt_that_names_nothing_still_runs(model, tokenizer, store, prompt_ids):
    attach(model, tokenizer, store, user="alice")
    assert model.generate(torch.tensor(prompt_ids), max_new_tokens=2).shape[1] >= len(prompt_ids[0]) + 1


def test_training_mode_after_attach_is_respected(model, tokenizer, caplog):
    attach(model, tokenizer)
    model.train()
    with caplog.at_level(logging.WARNING, "memos_engine"):
        model.generate(**prompt(tokenizer), max_new_tokens=2)
    assert "training mode" in caplog.text


def test_a_bare_prompt_takes_memories_in_front(model, tokenizer, store):
    attach(model, tokenizer, store, user="alice", memory=MemoryConfig(min_score=-1, build=False))
    ids = tokenizer("Once upon", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert torch.equal(model.generate(ids, max_new_tokens=3)[:, : ids.shape[1]], ids)


def test_a_user_without_memories_loses_nothing(model, tokenizer, store):
    inputs = prompt(tokenizer)
    plain = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    attach(model, tokenizer, store)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False, user="nobody"), plain)
    with pytest.raises(MemoryInputError, match="user"):
        model.generate(**inputs, max_new_tokens=2)


def test_records_are_shared_with_the_engine_that_made_them(model, tokenizer, tiny_folder, store):
    """The same weights, tokenizer, anchor and dtype are the same identity, whoever loads them."""
    from memos_engine import DecoderConfig

    exact, hashing = DecoderConfig(dtype="float32"), embed.HashingEmbedder(64)
    with MemoryEngine.open(tiny_folder, store, decoder=exact, embedder=hashing, system_prompt=None) as engine:
        assert engine.user("alice").warm() == 2
    attach(model, tokenizer, store, user="alice", memory=MemoryConfig(min_score=-1))
    assert model._memos_engine.engine.user("alice").warm() == 0
