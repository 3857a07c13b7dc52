"""A Llama-family decoder over paged K/V. It knows tensors; not requests, not memories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memos_engine.decoder import layers
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import KVCapture, StepInput
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.ops import backend_for, rope_table


class LlamaDecoder:
    """Weights plus the order in which to use them."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.ops = backend_for(weights.device)
        self.cos_sin = rope_table(spec.rope.inv_freq(spec.head_dim), spec.max_positions).to(weights.device)

    @torch.inference_mode()
    def forward(
        self, step: StepInput, cache: KVCache, rows: Tensor | None = None, capture: KVCapture | None = None
    ) -> Tensor:
        """Runs one step and writes its K and V into the cache.

        rows: rows `[n] int64` whose hidden state is wanted (all by default).
        Returns final hidden states `[n, hidden]`, normalised.
        """
        spec, ops, eps = self.spec, self.ops, self.spec.rms_eps
        hidden = F.embedding(step.token_ids, self.weights.embed)
        x = ops.rms_norm(hidden, self.weights.layers[0].input_norm, eps)
        for index, weights in enumerate(self.weights.layers):
            out, k, v = layers.attention(
                ops, weights, x, step, cache.layer(index), self.cos_sin, spec.head_dim
            )
            if capture is not None:
                taken = slice(capture.first, capture.first + k.shape[0])
                capture.k[index, taken], capture.v[index, taken] = k, v
            x = ops.rms_norm(out, weights.post_norm, eps, residual=hidden)
            out = layers.mlp(ops, weights, x)
            if index + 1 < spec.num_layers:
                x = ops.rms_norm(out, self.weights.layers[index + 1].input_norm, eps, residual=hidden)
        if rows is not None:
            out, hidden = out[rows], hidden[rows]
        return ops.rms_norm(out, self.weights.norm, eps, residual=hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab] float32` of hidden states `[n, hidden]`."""
        return self.ops.linear(hidden, self.weights.lm_head).float()
