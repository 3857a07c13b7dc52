"""Tiny random Llamas: fast, and merciless about positions and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """tiny_llama(heads=4, kv_heads=2, tied=True, rope=None, seed=0) -> LlamaForCausalLM in fp32."""

    def make(
        heads: int = 4,
        kv_heads: int = 2,
        tied: bool = True,
        rope: dict[str, Any] | None = None,
        seed: int = 0,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=211,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., tuple[int, ...]]:
    """random_ids(count, seed) -> token ids of the tiny vocabulary."""

    def make(count: int, seed: int = 0) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(5, 211, (count,), generator=generator).tolist())

    return make


@pytest.fixture
def make_engine() -> Callable[..., Any]:
    """make_engine(hf_model, **DecoderConfig fields) -> DecoderEngine sharing the model's weights."""
    from memos_engine.config import DecoderConfig
    from memos_engine.decoder.engine import DecoderEngine
    from memos_engine.decoder.spec import ModelSpec
    from memos_engine.decoder.weights import Weights

    def make(model: Any, **fields: Any) -> DecoderEngine:
        spec = ModelSpec.from_config(model.config, type(model).__name__)
        return DecoderEngine(spec, Weights.from_model(model, spec), DecoderConfig(**fields))

    return make
