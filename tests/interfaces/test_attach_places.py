"""Where memories go in the prompt of an attached generate(), and in which form."""

from __future__ import annotations

import pytest
import torch

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine, attach
from memos_engine.memory import embed

pytestmark = pytest.mark.usefixtures("one_thread")

HASHING = embed.HashingEmbedder(64)


def prompt(tokenizer, text="What is my dog called?", system=None):
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, return_tensors="pt", add_special_tokens=False)


def spans_of(model):
    """The spans of each request that runs from now on, as lists of ids."""
    engine = model._memos_engine.engine.decoder
    seen, add = [], engine.add_request
    engine.add_request = lambda spans, *rest, **named: (
        seen.append([list(s.token_ids) for s in spans]) or add(spans, *rest, **named)
    )
    return seen


def attach_all(model, tokenizer, store, **memory):
    return attach(
        model,
        tokenizer,
        store,
        "alice",
        memory=MemoryConfig(min_score=-1.0, distraction=0.0, **memory),
        embedder=HASHING,
    )


def test_memories_enter_as_text_then_as_kv(model, tokenizer, store, assert_clean):
    inputs = prompt(tokenizer)
    plain = model.generate(**inputs, max_new_tokens=16)
    attach_all(model, tokenizer, store)
    engine = model._memos_engine.engine
    plans, prepare = [], engine.prepare

    def spy(*args, **kwargs):
        plans.append(prepare(*args, **kwargs))
        return plans[-1]

    engine.prepare = spy
    first, second = (model.generate(**inputs, max_new_tokens=16) for _ in range(2))
    size = inputs["input_ids"].shape[1]
    for out in (first, second):
        assert torch.equal(out[:, :size], inputs["input_ids"])
        assert out.shape[1] <= size + 16
    assert not torch.equal(first, plain)
    assert [[s.form for s in p.plan.segments] for p in plans] == [["text", "text"], ["kv", "kv"]]
    assert_clean(model)


def test_a_prompt_with_another_system_turn_takes_memories_behind_it(model, tokenizer, store):
    attach_all(model, tokenizer, store, build=False)
    seen = spans_of(model)
    model.generate(**prompt(tokenizer, system="Be a pirate."), max_new_tokens=2)
    spans = [tokenizer.decode(ids) for ids in seen[0]]
    assert spans[0] == "<|im_start|>system\nBe a pirate.<|im_end|>\n"
    assert spans[1].startswith("<|im_start|>user\nMy ")
    assert spans[-1].endswith("What is my dog called?<|im_end|>\n<|im_start|>assistant\n")


LLAMA3_STYLE = (
    "{% for m in messages %}{% if loop.first %}<|endoftext|>{% if m['role'] != 'system' %}"
    "<|im_start|>system\nHelp.<|im_end|>{% endif %}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_prompt_without_a_system_turn_keeps_its_question_behind_the_memories(
    model, tokenizer, store, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", LLAMA3_STYLE)
    attach_all(model, tokenizer, store, build=False)
    seen = spans_of(model)
    text = "<|endoftext|><|im_start|>user\nWhat is my dog?<|im_end|><|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model.generate(ids, max_new_tokens=2)
    assert tokenizer.decode(seen[0][-1]) == text


@pytest.mark.parametrize("ids", [[[1]], [[1, 41, 1]]])
def test_a_prompt_that_names_nothing_still_runs(model, tokenizer, store, ids):
    attach_all(model, tokenizer, store)
    for call in ({}, {"num_beams": 2}, {"use_cache": False}):
        out = model.generate(torch.tensor(ids), max_new_tokens=2, **call)
        assert out.shape[1] >= len(ids[0]) + 1


def test_a_bare_prompt_takes_memories_in_front(model, tokenizer, store):
    attach_all(model, tokenizer, store, build=False)
    ids = tokenizer("Once upon", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert torch.equal(model.generate(ids, max_new_tokens=3)[:, : ids.shape[1]], ids)


def test_a_user_without_memories_loses_nothing(model, tokenizer, store):
    inputs = prompt(tokenizer)
    plain = model.generate(**inputs, max_new_tokens=16)
    attach(model, tokenizer, store, embedder=HASHING)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, user="nobody"), plain)


def test_records_are_shared_with_the_engine_that_made_them(model, tokenizer, tiny_folder, store):
    """The same weights, tokenizer, anchor and dtype are the same identity, whoever loads them."""
    exact = DecoderConfig(dtype="float32")
    with MemoryEngine.open(tiny_folder, store, decoder=exact, embedder=HASHING, system_prompt=None) as engine:
        assert engine.user("alice").warm() == 2
    attach_all(model, tokenizer, store)
    assert model._memos_engine.engine.user("alice").warm() == 0
