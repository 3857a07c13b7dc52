"""attach() on the real SmolLM2-135M: the same tokens as transformers, and memories of a store."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memos_engine import attach, detach

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def pair(smollm2_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path, padding_side="left")
    own, attached = (
        AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval() for _ in range(2)
    )
    attach(attached, tokenizer)
    yield tokenizer, own, attached
    detach(attached)


@pytest.mark.parametrize("sample", [False, True])
def test_a_padded_batch_gives_the_same_tokens(pair, sample, caplog):
    tokenizer, own, attached = pair
    questions = ("What is the capital of France?", "Hi!")
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    results = []
    for model in (own, attached):
        torch.manual_seed(3)
        results.append(model.generate(**inputs, max_new_tokens=8, do_sample=sample, repetition_penalty=1.1))
    assert torch.equal(*results)
    assert "own generate" not in caplog.text
    attached._memos_engine.engine.decoder.check_integrity()
