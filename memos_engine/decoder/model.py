"""A decoder over paged K/V. It knows tensors; not requests, not memories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memos_engine.decoder import layers
from memos_engine.decoder.int8 import Int8Weights
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import KVCapture, StepInput
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.ops import backend_for, layer_stack_of
from memos_engine.ops.stack import LayerStack, StackLayer

# What a layer stack takes, by the names of LayerWeights.
_STACK_WEIGHTS = (
    *("input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down"),
    *("q_bias", "k_bias", "v_bias", "q_norm", "k_norm"),
)
TableGroups = list[tuple[slice, Tensor | None]]


class PagedDecoder:
    """Weights plus the order in which to use them.

    tables: cosines and sines of each layer, None where it does not rotate. table_groups: slices of layers
    that share a table, which together are all layers: a record is spliced in as many calls.
    int8: whether steps of a few rows read weights of eight bits, where the backend can (`decoder.int8`).
    """

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec = spec
        self.ops = backend_for(weights.device)
        made = [rope.table(spec.head_dim, spec.max_positions).to(weights.device) for rope in spec.ropes]
        self.tables = [None if layer.rope is None else made[layer.rope] for layer in spec.layers]
        self.table_groups = _groups([layer.rope for layer in spec.layers], self.tables)
        self.int8 = False
        self.weights = weights

    @property
    def weights(self) -> Weights:
        return self._weights

    @weights.setter
    def weights(self, weights: Weights) -> None:
        scale = torch.tensor(self.spec.embed_scale, dtype=weights.dtype)  # rounded, as transformers does
        self._weights, self._embed_scale = weights, float(scale)
        self._stacks: dict[bool, LayerStack | None] = {}  # by whether its weights are int8
        self._stack_cache: KVCache | None = None  # the one that they were asked for
        self._int8: Int8Weights | None = None

    @torch.inference_mode()
    def forward(
        self,
        step: StepInput,
        cache: KVCache,
        rows: Tensor | None = None,
        capture: KVCapture | None = None,
        before: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Runs one step and writes its K and V into the cache.

        rows: rows `[n] int64` whose hidden state is wanted (all by default). before: called with the number
        of each layer before it runs.
        Returns final hidden states `[n, hidden]`, normalised.
        """
        spec, ops, eps, all_layers = self.spec, self.ops, self.spec.rms_eps, self.weights.layers
        hidden = F.embedding(step.token_ids, self.weights.embed)
        if spec.embed_scale != 1.0:
            hidden *= self._embed_scale
        plain = capture is None and step.probe is None and before is None
        stack = self._layer_stack(cache, hidden.shape[0]) if plain else None
        if stack is not None:
            return stack.run(
                hidden,
                step.slot_mapping,
                step.positions,
                step.query_start,
                step.block_table,
                step.seq_lens,
                rows,
                step.lora,
            )
        x = ops.rms_norm(hidden, all_layers[0].input_norm, eps)
        for index, weights in enumerate(all_layers):
            table = self.tables[index]
            if before is not None:
                before(index)
            out, k, v = layers.attention(ops, spec, index, weights, x, step, cache.layer(index), table)
            if capture is not None:
                taken = slice(capture.first, capture.first + k.shape[0])
                capture.k[index, taken], capture.v[index, taken] = k, v
            if weights.attn_out_norm is not None:
                out = ops.rms_norm(out, weights.attn_out_norm, eps)
            x = ops.rms_norm(out, weights.post_norm, eps, residual=hidden)
            out = layers.mlp(ops, spec, index, weights, x, step)
            if weights.mlp_out_norm is not None:
                out = ops.rms_norm(out, weights.mlp_out_norm, eps)
            if index + 1 < spec.num_layers:
                x = ops.rms_norm(out, all_layers[index + 1].input_norm, eps, residual=hidden)
        if rows is not None:
            out, hidden = out[rows], hidden[rows]
        return ops.rms_norm(out, self.weights.norm, eps, residual=hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab] float32` of hidden states `[n, hidden]`."""
        narrow = self._stacks.get(True)
        if self.int8 and self._int8 is not None and narrow is not None and hidden.shape[0] <= narrow.max_rows:
            head = self._int8.lm_head
            return self.ops.linear(hidden, head.values, scale=head.scale).float()
        return self.ops.linear(hidden, self.weights.lm_head).float()

    def _layer_stack(self, cache: KVCache, rows: int) -> LayerStack | None:
        """The backend's one call for all layers, made once for these weights and this cache; None where the
        backend has none, it does not do this family, or so many rows are not for it."""
        if self._stack_cache is not cache:
            self._stack_cache = cache
            self._stacks = {}
        for int8 in (True, False) if self.int8 else (False,):
            if int8 not in self._stacks:
                self._stacks[int8] = self._new_stack(cache, int8) if _fits_stack(self.spec) else None
            stack = self._stacks[int8]
            if stack is not None and rows <= stack.max_rows:
                return stack
        return None

    def _new_stack(self, cache: KVCache, int8: bool) -> LayerStack | None:
        make = layer_stack_of(self.ops)
        if make is None:
            return None
        if int8 and self._int8 is None:
            self._int8 = Int8Weights(self.weights)
        parts = []
        for i, weights in enumerate(self.weights.layers):
            fields = {name: getattr(weights, name) for name in _STACK_WEIGHTS}
            if int8 and self._int8 is not None:
                fields |= self._int8.layers[i]
            parts.append(StackLayer(**fields, cos_sin=self.tables[i], window=self.spec.layers[i].window))
        pages = (cache.k, cache.v, cache.k_scale, cache.v_scale, self.weights.dtype)
        return make(parts, self.weights.norm, self.spec.rms_eps, self.spec.sm_scale, *pages)


def _fits_stack(spec: ModelSpec) -> bool:
    """A layer stack does the plain layer: norms before, SwiGLU, biases of q, k and v alone."""
    return spec.activation == "silu" and not spec.sandwich_norms and set(spec.biases) <= {"q", "k", "v"}


def _groups(ropes: Sequence[int | None], tables: Sequence[Tensor | None]) -> TableGroups:
    """Layers by table. Tables repeat with a period, of which each member is one slice: a model with a
    single table has one group."""
    count = len(ropes)
    period = next(p for p in range(1, count + 1) if all(ropes[i] == ropes[i - p] for i in range(p, count)))
    return [(slice(first, None, period), tables[first]) for first in range(period)]
