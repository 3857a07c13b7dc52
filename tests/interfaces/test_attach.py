"""attach() and detach(), what sends a call elsewhere, and models that change."""

from __future__ import annotations

import copy
import io
import logging
from types import MethodType

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from memos_engine import attach, detach
from memos_engine.memory import embed

pytestmark = pytest.mark.usefixtures("one_thread")

HASHING = embed.HashingEmbedder(64)


# -- attach and detach ---------------------------------------------------------------------------


def test_detach_restores(model, tokenizer):
    before = dict(model.__dict__)
    own = model.generate
    assert attach(model, tokenizer) is model
    attach(model, tokenizer)  # twice is once
    assert model.generate != own
    assert detach(model) is model
    assert model.generate == own
    assert model.__dict__.keys() == before.keys()
    detach(model)


def test_a_generate_of_the_callers_comes_back(model, tokenizer):
    mine = MethodType(lambda self, *args, **kwargs: "mine", model)
    model.generate = mine
    attach(model, tokenizer)
    detach(model)
    assert model.generate is mine


def test_attaching_twice_exchanges_the_store(model, tokenizer, store, tmp_path):
    attach(model, tokenizer, store, "alice", embedder=HASHING)
    first = model._memos_engine.engine.store
    attach(model, tokenizer, tmp_path / "other", "alice", embedder=HASHING)
    assert model._memos_engine.engine.store is not first
    assert model._memos_engine.original.__func__ is type(model).generate


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_are_not_attached(model, tokenizer, how, ids_of, load):
    attach(model, tokenizer)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        other.model.norm.weight.mul_(torch.linspace(-2, 2, 48))
    ids = ids_of()
    expected = type(other).generate(other, ids, max_new_tokens=6)
    assert torch.equal(other.generate(ids, max_new_tokens=6), expected)
    assert not torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert attach(other, tokenizer)._memos_engine.model is other
    assert torch.equal(other.generate(ids, max_new_tokens=6), expected)
    assert torch.equal(detach(other).generate(ids, max_new_tokens=6), expected)


# -- elsewhere -----------------------------------------------------------------------------------

FALLBACKS = [
    ({"num_beams": 2}, "beam_search"),
    ({"use_cache": False}, "use_cache"),
    ({"prompt_lookup_num_tokens": 3}, "assisted"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ({"custom_generate": lambda model, input_ids, **_: input_ids}, "custom_generate"),
    ({"cache_implementation": "static", "return_dict_in_generate": True}, "StaticCache"),
    ({"position_ids": torch.arange(12)[None] + 3}, "position_ids"),
    ({"attention_mask": torch.tensor([[1] * 11 + [0]])}, "padded on the right"),
    ({"max_new_tokens": 1100}, "window is 1024"),
]


@pytest.mark.parametrize(("call", "reason"), FALLBACKS, ids=[reason for _, reason in FALLBACKS])
def test_what_does_not_run_here_runs_there_and_says_why(
    model, tokenizer, call, reason, caplog, ids_of, runs_here
):
    if "output" in reason:
        model.set_attn_implementation("eager")
    call = {"max_new_tokens": 6, "eos_token_id": list(range(3, 30)), **call}
    expected = model.generate(ids_of(), **call)
    attach(model, tokenizer)
    with caplog.at_level(logging.WARNING, "memos_engine"):
        got = [model.generate(ids_of(), **call) for _ in range(2)]
    for result in got:
        same = (result, expected) if torch.is_tensor(result) else (result.sequences, expected.sequences)
        assert torch.equal(*same)
    assert caplog.text.count("own generate") == 1  # said once
    assert reason in caplog.text
    assert "memories" not in caplog.text
    assert runs_here(model)


def test_a_cache_of_the_callers_goes_on_there(model, tokenizer, ids_of):
    ids, results = ids_of(), []
    for attached in (False, True):
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-2], past_key_values=past)
        if attached:
            attach(model, tokenizer)
        results.append(model.generate(ids, past_key_values=past, max_new_tokens=6))
    assert torch.equal(*results)


def test_embeddings_go_there(model, tokenizer, caplog, ids_of):
    attach(model, tokenizer)
    with caplog.at_level(logging.WARNING, "memos_engine"):
        out = model.generate(inputs_embeds=model.model.embed_tokens(ids_of()), max_new_tokens=3)
    assert out.shape == (1, 3)
    assert "inputs_embeds" in caplog.text


def test_a_streamer_gets_the_prompt_once_when_the_call_goes_there(model, tokenizer, ids_of):
    seen = []

    class Stream:
        def put(self, value):
            seen.append(value.shape)

        def end(self):
            seen.append("end")

    attach(model, tokenizer)
    model.generate(ids_of(), max_new_tokens=3, use_cache=False, streamer=Stream(), eos_token_id=None)
    assert [tuple(s) for s in seen[:-1]] == [(1, 12), (1,), (1,), (1,)]


def test_unsupported_models_keep_their_own_generate(tokenizer, caplog):
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300)).eval()
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    ).eval()
    for model in (gpt, t5):
        expected = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, pad_token_id=0)
        attach(model, tokenizer)
        with caplog.at_level(logging.WARNING, "memos_engine"):
            got = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, pad_token_id=0)
        assert torch.equal(got, expected)
    assert "GPT2LMHeadModel is not supported" in caplog.text
    assert "encoder-decoder" in caplog.text


def test_an_unsupported_dtype_keeps_its_own_generate(tokenizer, caplog, runs_here, load):
    model = load().to(torch.float64)
    attach(model, tokenizer)
    assert not runs_here(model)
    assert "float64" in caplog.text


def test_training_mode_comes_and_goes(model, tokenizer, caplog, runs_here):
    model.train()
    attach(model, tokenizer)
    assert not runs_here(model)
    assert "training mode" in caplog.text
    model.eval()
    assert runs_here(model)


# -- a model that changes ------------------------------------------------------------------------


def _step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _data(model):
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(-1.5)  # no counter changes


def _merge(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data += 0.3 * torch.randn(80, 2) @ torch.randn(2, 48)


def _replace(model):
    model.model.norm.weight = torch.nn.Parameter(torch.linspace(-1, 2, 48))


def _swap_data(model):
    model.model.layers[2].mlp.down_proj.weight.data = torch.randn(48, 80)


def _new_module(model):
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(48, 96, bias=False)


def _load(model):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


CHANGES = [_step, _data, _merge, _replace, _swap_data, _new_module, _load]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changed_weights_are_followed(model, tokenizer, change, ids_of, runs_here):
    attach(model, tokenizer)
    before = model.generate(ids_of(), max_new_tokens=6)
    assert runs_here(model)
    change(model)
    assert runs_here(model)
    assert not torch.equal(before, model.generate(ids_of(), max_new_tokens=6))


def _hook(model):
    return model.model.layers[0].register_forward_hook(lambda module, args, out: out * 0.5).remove


def _pre_hook(model):
    return model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] * -1,)).remove


def _forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x * 2
    return lambda: mlp.__dict__.pop("forward")


def _buffer(model):
    rotary = model.model.rotary_emb
    rotary.inv_freq.mul_(1.5)
    return lambda: rotary.inv_freq.copy_(rotary.original_inv_freq)


class Adapter(torch.nn.Linear):
    """As adapter libraries put them in."""

    def forward(self, x):
        return super().forward(x) * 0.3


def _adapter(model):
    mlp = model.model.layers[0].mlp
    old, mlp.up_proj = mlp.up_proj, Adapter(48, 80, bias=False)
    return lambda: setattr(mlp, "up_proj", old)


def _activation(model):
    mlp = model.model.layers[0].mlp
    old, mlp.act_fn = mlp.act_fn, torch.nn.Tanh()
    return lambda: setattr(mlp, "act_fn", old)


def _dtype(model):
    model.to(torch.bfloat16)
    return


ALTERATIONS = [_hook, _pre_hook, _forward, _buffer, _adapter, _activation, _dtype]


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_weights_do_not_say_goes_there(model, tokenizer, alter, when, runs_here):
    if when == "after":
        attach(model, tokenizer)
        assert runs_here(model)
    undo = alter(model)
    if when == "before":
        attach(model, tokenizer)
    if when == "before" and alter in (_activation, _dtype):
        return  # a config cannot say so: attach() believes it; bfloat16 runs here
    assert not runs_here(model)
    if undo is not None and not (when == "before" and alter is _buffer):
        undo()
        if when == "before" and alter is _adapter:
            attach(model, tokenizer)  # it knows the modules that were there
        assert runs_here(model)


def test_hooks_of_transformers_own_are_no_reason(model, tokenizer, ids_of, runs_here):
    """Asking for attentions once leaves hooks that record nothing afterwards."""
    attach(model, tokenizer)
    model.set_attn_implementation("eager")
    model.generate(ids_of(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert runs_here(model)


def test_meta_tensors_keep_their_own_generate(tokenizer, load):
    model = load()
    model.model.layers[0].mlp.to("meta")
    attach(model, tokenizer)
    assert "meta" in model._memos_engine.reason
