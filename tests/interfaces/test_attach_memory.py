"""Memories in an attached generate(): whose, where, in which calls; and that their ids never show."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    StoppingCriteria,
)

from memos_engine import MemoryConfig, MemoryEngine, attach, detach
from memos_engine.errors import MemoryInputError
from memos_engine.memory import embed

HASHING = embed.HashingEmbedder(64)
FACTS = {"alice": "My dog is called Biscuit.", "bob": "My dog is called Tom and he likes the sea."}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def own(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture
def store(tiny_folder, tmp_path):
    with MemoryEngine.open(tiny_folder, tmp_path / "store", embedder=HASHING) as engine:
        for user, fact in FACTS.items():
            engine.user(user).remember(fact)
    return tmp_path / "store"


@pytest.fixture
def make(tiny_folder, tokenizer, store):
    """make(model=None, **attach arguments) -> an attached model; its pages are accounted for in the end."""
    made = []

    def build(model=None, memory=None, **arguments):
        model = model or AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
        memory = memory or MemoryConfig(min_score=-1.0, distraction=0.0)
        made.append(attach(model, tokenizer, store, memory=memory, embedder=HASHING, **arguments))
        return model

    yield build
    for model in made:
        engine = model._memos_engine.engine
        if engine is not None:
            engine.decoder.check_integrity()
            assert not engine.decoder.batcher.running
        detach(model)


def prompt(tokenizer, text="What is my dog called?"):
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]


def long(tokenizer, ids, user):
    """The prompt with the memory as text, put together by hand."""
    text = tokenizer.decode(ids[0])
    cut = text.index("<|im_start|>user")
    full = f"{text[:cut]}<|im_start|>user\n{FACTS[user]}<|im_end|>\n{text[cut:]}"
    return tokenizer(full, return_tensors="pt", add_special_tokens=False)["input_ids"]


def pad_left(rows, pad=2):
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[1] :] = row[0]
        mask[i, width - row.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Watcher(LogitsProcessor):
    """Sees what a processor sees, and bans the token before last, so that seeing matters."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores.scatter(1, input_ids[:, -2:-1], -1e9)


class Watch(StoppingCriteria):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Stream:
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.values.append("end")


# Calls that run here, and calls that the model's own generate() runs: memories enter both.
CALLS = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "dict": {"return_dict_in_generate": True, "output_scores": True},
    "beams": {"num_beams": 3},
    "beams penalised": {"num_beams": 2, "length_penalty": 0.3, "early_stopping": True},
    "beams dict": {
        "num_beams": 2,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    },
    "no cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rows", [1, 2])
def test_memories_enter_and_never_show(make, own, tokenizer, name, rows):
    call, users = {"max_new_tokens": 8, **CALLS[name]}, ["alice", "bob"][:rows]
    if name == "lookup" and rows == 2:
        pytest.skip("assisted generation takes one prompt")
    prompts = [prompt(tokenizer, q) for q in ("What is my dog called?", "Dog?")][:rows]
    inputs, model = pad_left(prompts), make()
    width = inputs["input_ids"].shape[1]
    watched = name not in ("penalties", "lookup")
    for _ in range(2):  # as text, then from stored KV
        watcher, watch = Watcher(), Watch()
        extra = {"logits_processor": [watcher], "stopping_criteria": [watch]} if watched else {}
        got = model.generate(**inputs, user=users, **call, **extra)
        sequences = got if torch.is_tensor(got) else got.sequences
        assert getattr(got, "past_key_values", None) is None
        copies = call.get("num_return_sequences", 1)
        assert torch.equal(sequences[:, :width], inputs["input_ids"].repeat_interleave(copies, 0))
        for ids in (*watcher.seen, *watch.seen):
            assert torch.equal(ids[:, :width], inputs["input_ids"].repeat_interleave(len(ids) // rows, 0))
        if name == "penalties":
            continue  # the reference's penalties would count the memory's ids
        reference = pad_left([long(tokenizer, p, u) for p, u in zip(prompts, users, strict=True)])
        extra = {"logits_processor": [Watcher()]} if watched else {}
        expected = own.generate(**reference, **call, **extra)
        expected = expected if torch.is_tensor(expected) else expected.sequences
        assert torch.equal(sequences[:, width:], expected[:, reference["input_ids"].shape[1] :])
        plain = own.generate(**inputs, **call, **({"logits_processor": [Watcher()]} if watched else {}))
        plain = plain if torch.is_tensor(plain) else plain.sequences
        assert sequences.shape != plain.shape or not torch.equal(sequences, plain)


def test_beams_take_stored_kv(make, tokenizer, caplog):
    """The loop of transformers gets the spliced prompt, all but its last token, as a cache."""
    model, widths = make(), []
    ids = prompt(tokenizer)
    model.generate(ids, user="alice", max_new_tokens=2)  # makes the record
    forward = type(model).forward

    def spy(self, input_ids=None, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    type(model).forward = spy
    try:
        model.generate(ids, user="alice", num_beams=2, max_new_tokens=3)
    finally:
        type(model).forward = forward
    assert widths == [1, 1, 1]


def test_penalties_count_the_callers_ids_only(make, tokenizer):
    """A ban of the prompt's ids by a processor of transformers leaves the memory's words allowed."""
    model, ids = make(), prompt(tokenizer)
    only_memory = set(long(tokenizer, ids, "bob")[0].tolist()) - set(ids[0].tolist())
    assert only_memory
    call = {"max_new_tokens": 12, "repetition_penalty": 1e9, "suppress_tokens": None}
    allowed = sorted(only_memory)
    for extra in ({}, {"num_beams": 2}):
        out = model.generate(
            ids,
            user="bob",
            prefix_allowed_tokens_fn=lambda row, seen: allowed,
            eos_token_id=None,
            **call,
            **extra,
        )
        assert out[0, ids.shape[1]].item() in only_memory
    bias = {"sequence_bias": [[[t], 30.0] for t in allowed]}
    out = model.generate(ids, user="bob", max_new_tokens=1, no_repeat_ngram_size=1, **bias)
    assert out[0, -1].item() in only_memory  # as an ngram of the memory it would have been banned


@pytest.mark.parametrize("call", [{}, {"use_cache": False}])
def test_streamers_see_the_prompt_and_the_answer(make, tokenizer, call):
    model, ids, stream = make(), prompt(tokenizer), Stream()
    out = model.generate(ids, user="bob", max_new_tokens=5, streamer=stream, eos_token_id=None, **call)
    assert torch.equal(stream.values[0], ids)
    assert [int(v) for v in stream.values[1:-1]] == out[0, ids.shape[1] :].tolist()
    assert stream.values[-1] == "end"


def test_lengths_count_the_callers_ids(make, tokenizer):
    model, ids = make(), prompt(tokenizer)
    for call in ({"num_beams": 2}, {}, {"use_cache": False}):
        out = model.generate(ids, user="bob", max_length=ids.shape[1] + 4, eos_token_id=None, **call)
        assert out.shape[1] == ids.shape[1] + 4
        out = model.generate(
            ids, user="bob", max_new_tokens=9, min_new_tokens=7, eos_token_id=list(range(3, 250)), **call
        )
        assert out.shape[1] >= ids.shape[1] + 7


def test_return_sequences_share_their_users_memories(make, own, tokenizer):
    model = make()
    prompts = [prompt(tokenizer), prompt(tokenizer, "Dog?")]
    call = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(2)
    got = model.generate(**pad_left(prompts), user=["bob", "alice"], **call)
    torch.manual_seed(2)
    reference = pad_left([long(tokenizer, p, u) for p, u in zip(prompts, ("bob", "alice"), strict=True)])
    expected = own.generate(**reference, **call)
    assert torch.equal(got[:, -6:], expected[:, -6:])


def test_queries_by_row(make, tokenizer):
    model = make(user="alice")
    asked = []
    recall = model._memos_engine.engine.operator.recall
    model._memos_engine.engine.operator.recall = lambda who, query, **k: (
        asked.append((who.user, query)) or recall(who, query, **k)
    )
    batch = pad_left([prompt(tokenizer), prompt(tokenizer, "Dog?")])
    model.generate(**batch, max_new_tokens=1, user=["bob", "alice"], memory_query=["first", None])
    model.generate(**batch, max_new_tokens=1, memory_query="both")
    model.generate(**batch, max_new_tokens=1, memory_form="none")
    assert [(who, query) for who, query in asked[:1]] == [("bob", "first")]
    assert asked[1][0] == "alice"
    assert "Dog?" in asked[1][1]
    assert asked[2:] == [("alice", "both")] * 2
    for wrong in ({"user": ["bob"]}, {"memory_query": ["a", "b", "c"]}):
        with pytest.raises(MemoryInputError, match="batch of 2"):
            model.generate(**batch, max_new_tokens=1, **wrong)


ELSEWHERE = [
    {},
    {"num_beams": 2},
    {"use_cache": False},
    {"output_attentions": True, "return_dict_in_generate": True},
]


@pytest.mark.parametrize("call", ELSEWHERE, ids=str)
def test_several_users_and_none_named_is_refused(make, tokenizer, call):
    model = make()
    model.set_attn_implementation("eager")
    with pytest.raises(MemoryInputError, match="user="):
        model.generate(prompt(tokenizer), max_new_tokens=2, **call)
    model.generate(prompt(tokenizer), max_new_tokens=2, memory_form="none", **call)


def test_a_stores_only_user_is_taken(tiny_folder, own, tokenizer, tmp_path):
    with MemoryEngine.open(tiny_folder, tmp_path / "one", embedder=HASHING) as engine:
        engine.user("alice").remember(FACTS["alice"])
    for store, same in ((tmp_path / "empty", True), (tmp_path / "one", False)):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
        attach(
            model, tokenizer, store, memory=MemoryConfig(min_score=-1.0, distraction=0.0), embedder=HASHING
        )
        ids = prompt(tokenizer)
        got = model.generate(ids, max_new_tokens=8)
        assert torch.equal(got, own.generate(ids, max_new_tokens=8)) == same
        detach(model)


def test_what_shows_memories_goes_without(make, own, tokenizer, caplog):
    model, ids = make(user="alice"), prompt(tokenizer)
    for m in (model, own):
        m.set_attn_implementation("eager")
    past = DynamicCache(config=own.config)
    own(ids[:, :-1], past_key_values=past)
    calls = [
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"past_key_values": past},
        {"custom_generate": lambda model, input_ids, **rest: input_ids[:, :1]},
    ]
    for call in calls:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "memos_engine"):
            got = model.generate(ids, max_new_tokens=4, **call)
        past.crop(ids.shape[1] - 1 - past.get_seq_length()) if past.get_seq_length() >= ids.shape[1] else None
        expected = own.generate(ids, max_new_tokens=4, **call)
        past.crop(ids.shape[1] - 1 - past.get_seq_length()) if past.get_seq_length() >= ids.shape[1] else None
        same = (got, expected) if torch.is_tensor(got) else (got.sequences, expected.sequences)
        assert torch.equal(*same)
        assert "no memories enter" in caplog.text
    own.set_attn_implementation("sdpa")


# -- models that do not run here -----------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [{}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str
)
def test_other_architectures_get_text(make, tokenizer, caplog, call):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=259, initializer_range=0.4, bos_token_id=1, eos_token_id=2
    )
    model = make(GPT2LMHeadModel(config).eval())
    ids = prompt(tokenizer)
    with caplog.at_level(logging.WARNING, "memos_engine"):
        torch.manual_seed(1)
        got = model.generate(ids, user="bob", max_new_tokens=8, **call)
    assert "GPT2LMHeadModel is not supported" in caplog.text
    text = long(tokenizer, ids, "bob")
    torch.manual_seed(1)
    expected = detach(model).generate(text, max_new_tokens=8, **call)
    assert torch.equal(got[:, : ids.shape[1]], ids)
    assert torch.equal(got[:, ids.shape[1] :], expected[:, text.shape[1] :])
    attach(model, tokenizer)


def test_a_small_window_leaves_memories_out(make, tokenizer):
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=259, n_positions=120, bos_token_id=1, eos_token_id=2
    )
    model = make(GPT2LMHeadModel(config).eval())
    ids = prompt(tokenizer)
    assert (
        model.generate(ids, user="bob", max_new_tokens=120 - ids.shape[1], min_new_tokens=1).shape[1] <= 120
    )


def test_training_mode_gets_text(make, own, tokenizer):
    model, ids = make(user="bob"), prompt(tokenizer)
    model.train()  # a Llama without dropout computes the same
    got, text = model.generate(ids, max_new_tokens=8), long(tokenizer, ids, "bob")
    expected = own.generate(text, max_new_tokens=8)
    assert torch.equal(got[:, ids.shape[1] :], expected[:, text.shape[1] :])


def test_an_assistant_gets_text(make, own, tiny_folder, tokenizer):
    assistant = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    model, ids = make(user="bob"), prompt(tokenizer)
    got, text = model.generate(ids, max_new_tokens=8, assistant_model=assistant), long(tokenizer, ids, "bob")
    expected = own.generate(text, max_new_tokens=8)
    assert torch.equal(got[:, ids.shape[1] :], expected[:, text.shape[1] :])
