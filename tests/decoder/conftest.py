"""Tiny random models: fast, and merciless about positions and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import KVCapture, StepInput
from memos_engine.decoder.model import PagedDecoder
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights

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
def tiny_model() -> Callable[..., Any]:
    """tiny_model(architecture, seed=0, **config fields) -> a model whose norms and biases matter, in fp32."""

    def make(
        architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 3, **fields: Any
    ) -> Any:
        torch.manual_seed(seed)
        kind = getattr(transformers, architecture)
        sizes = {
            "vocab_size": 211,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        model = kind(kind.config_class(**(sizes | fields)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms begin as ones or zeros and biases as zeros
                    parameter += 0.3 * torch.randn_like(parameter)
        return model.to(dtype).eval()

    return make


class PagedBatch:
    """Several prompts through one decoder, page tables shuffled, each forward one ragged batch."""

    def __init__(self, model: Any, requests: int, page: int = 16, longest: int = 192) -> None:
        self.spec = ModelSpec.from_config(model.config, type(model).__name__)
        self.decoder = PagedDecoder(self.spec, Weights.from_model(model, self.spec))
        self.page, each = page, -(-longest // page)
        weights = self.decoder.weights
        self.cache = KVCache(self.spec, requests * each + 1, page, weights.dtype, weights.device)
        order = torch.randperm(requests * each, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = order.view(requests, each).int()
        self.lengths = [0] * requests

    def step(self, new: Sequence[Sequence[int]]) -> StepInput:
        """Index tensors that append `new` tokens to each request."""
        positions, slots, total = [], [], [0]
        for i, tokens in enumerate(new):
            where = torch.arange(self.lengths[i], self.lengths[i] + len(tokens))
            positions.append(where)
            slots.append(self.tables[i][where // self.page].long() * self.page + where % self.page)
            total.append(total[-1] + len(tokens))
            self.lengths[i] += len(tokens)
        return StepInput(
            token_ids=torch.tensor([t for tokens in new for t in tokens]),
            positions=torch.cat(positions).int(),
            slot_mapping=torch.cat(slots),
            query_start=torch.tensor(total, dtype=torch.int32),
            block_table=self.tables,
            seq_lens=torch.tensor(self.lengths, dtype=torch.int32),
        )

    def forward(self, new: Sequence[Sequence[int]], capture: KVCapture | None = None) -> list[Tensor]:
        """Appends `new` tokens to each request; returns each one's logits `[tokens, vocab]`."""
        step = self.step(new)
        logits = self.decoder.logits(self.decoder.forward(step, self.cache, capture=capture))
        return list(logits.split([len(tokens) for tokens in new]))

    def captured(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Appends to the only request; returns its K (unrotated) and V of those tokens, for all layers."""
        shape = (self.spec.num_layers, len(tokens), self.spec.num_kv_heads, self.spec.head_dim)
        capture = KVCapture(self.cache.k.new_empty(shape), self.cache.v.new_empty(shape), 0)
        self.forward([tokens], capture)
        return capture.k, capture.v

    def pages(self, request: int, where: slice) -> tuple[Tensor, Tensor]:
        """K and V of some positions, `[layers, tokens, kv_heads, head_dim]`."""
        blocks = self.tables[request].long()
        k, v = (side[:, blocks].flatten(1, 2)[:, where].clone() for side in (self.cache.k, self.cache.v))
        return k, v

    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, chunk: int = 1000
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Prefills in chunks, then decodes all together: tokens, and logits of every row of each request."""
        seen: list[list[Tensor]] = [[] for _ in prompts]
        left = [list(p) for p in prompts]
        while any(left):
            for rows, logits in zip(seen, self.forward([tokens[:chunk] for tokens in left]), strict=True):
                rows.append(logits)
            left = [tokens[chunk:] for tokens in left]
        out: list[list[int]] = [[] for _ in prompts]
        while True:
            for tokens, rows in zip(out, seen, strict=True):
                tokens.append(int([r for r in rows if len(r)][-1][-1].argmax()))
            if len(out[0]) == count:
                return out, [torch.cat(rows) for rows in seen]
            for rows, logits in zip(seen, self.forward([tokens[-1:] for tokens in out]), strict=True):
                rows.append(logits)


@pytest.fixture(scope="session")
def paged_batch() -> type[PagedBatch]:
    """PagedBatch(hf_model, requests, page=16): a decoder without the engine, sharing the model's weights."""
    return PagedBatch


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

    def make(model: Any, **fields: Any) -> DecoderEngine:
        spec = ModelSpec.from_config(model.config, type(model).__name__)
        return DecoderEngine(spec, Weights.from_model(model, spec), DecoderConfig(**fields))

    return make
