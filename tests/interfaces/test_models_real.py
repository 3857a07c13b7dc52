"""The real SmolLM2-135M-Instruct, where it was pulled: nothing is altered, and it talks."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memos_engine.models import check_folder, list_models, read_manifest, verify

pytestmark = pytest.mark.smollm2


def test_every_file_is_as_it_was_pulled(smollm2_path: Path) -> None:
    check_folder(smollm2_path)
    manifest = verify(smollm2_path, progress=False)
    assert len(manifest.sha256("model.safetensors")) == 64
    if read_manifest(smollm2_path) is not None:  # otherwise it lies in Hugging Face's own cache
        assert smollm2_path in [info.path for info in list_models() if info.complete]


def test_config_and_tokenizer(smollm2_path: Path) -> None:
    config = AutoConfig.from_pretrained(smollm2_path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (9, 3, 30)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.model_max_length == config.max_position_embeddings == 8192
    assert tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    # Two spaces before a digit are one token: digits are split off before the merges.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]


@pytest.mark.slow
def test_it_talks(smollm2_path: Path) -> None:
    """Wrong rotary order, norms or tying would still load, but not answer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id
