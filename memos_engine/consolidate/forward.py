"""A decoder's forward that torch can differentiate, over the engine's own weights, for training small
adapters.

Tokens stand behind an anchor that is not adapted: its K and V are the base model's, as they are in requests,
where an adapter is active from behind the anchor on. In float32, whatever the engine computes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from memos_engine.decoder.adapter import LowRank
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.weights import LayerWeights
from memos_engine.errors import UnsupportedModelError

Deltas = Mapping[tuple[int, str], LowRank]


class TopLayers:
    """Layers from `first` on, in float32; `features` computes those below, once for each sequence."""

    def __init__(self, decoder: DecoderEngine, anchor: Sequence[int], first: int) -> None:
        """Raises UnsupportedModelError, naming what this simple forward does not do."""
        spec = decoder.spec
        odd = [
            name
            for name, found in (
                ("norms behind attention and MLP", spec.sandwich_norms),
                ("a scaled embedding", spec.embed_scale != 1.0),
                ("layers without RoPE, or several of it", any(layer.rope != 0 for layer in spec.layers)),
                ("sliding windows", any(layer.window for layer in spec.layers)),
            )
            if found
        ]
        if odd:
            raise UnsupportedModelError(
                f"Consolidation does not train {spec.architecture} with {', '.join(odd)}; Llama, Qwen2.5 and "
                "Qwen3 are supported. Train the adapter in PEFT and import it."
            )
        self.spec, self.first, self.behind = spec, first, len(anchor)
        self._weights = decoder.runner.model.weights
        self._device = decoder.runner.device
        self._table = spec.rope.table(spec.head_dim, spec.max_positions).to(self._device)
        heads, width = spec.num_kv_heads, spec.head_dim
        if anchor:
            k, v = (t.float() for t in decoder.encode_span((), tuple(anchor)))
        else:
            k = v = torch.zeros(spec.num_layers, 0, heads, width, device=self._device)
        self._anchor = [(self._rotated(k[i][None], 0), v[i][None]) for i in range(spec.num_layers)]
        self._top = [_float(layer) for layer in self._weights.layers[first:]]
        self._head = self._weights.lm_head.float()
        self._norm = self._weights.norm.float()

    @torch.no_grad()
    def features(self, ids: Tensor) -> Tensor:
        """What enters layer `first`, `[rows, tokens, hidden]`, of ids `[rows, tokens]` behind the anchor."""
        x = self._weights.embed[ids.to(self._device)].float()
        for index in range(self.first):
            x = self._layer(x, index, _float(self._weights.layers[index]), {})
        return x

    def hidden(self, features: Tensor, deltas: Deltas) -> Tensor:
        """The last norm's outcome `[rows, tokens, hidden]`, with these deltas added to the projections."""
        x = features
        for index, layer in enumerate(self._top, self.first):
            x = self._layer(x, index, layer, deltas)
        return self._rms(x, self._norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., vocabulary]` of `hidden`."""
        return functional.linear(hidden, self._head)

    def _layer(self, x: Tensor, index: int, weights: LayerWeights, deltas: Deltas) -> Tensor:
        rows, tokens, _ = x.shape

        def project(name: str, value: Tensor) -> Tensor:
            out = functional.linear(value, getattr(weights, name), getattr(weights, f"{name}_bias"))
            delta = deltas.get((index, name))
            if delta is None:
                return out
            return out + delta.scale * functional.linear(functional.linear(value, delta.a), delta.b)

        normed = self._rms(x, weights.input_norm)
        shape = (rows, tokens, -1, self.spec.head_dim)
        q, k, v = (project(name, normed).view(shape) for name in "qkv")
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = self._rms(q, weights.q_norm), self._rms(k, weights.k_norm)
        q, k = self._rotated(q, self.behind), self._rotated(k, self.behind)
        left_k, left_v = (side.expand(rows, -1, -1, -1) for side in self._anchor[index])
        k, v = torch.cat([left_k, k], dim=1), torch.cat([left_v, v], dim=1)
        places = torch.arange(tokens, device=x.device)[:, None] + self.behind
        seen = torch.arange(k.shape[1], device=x.device)[None] <= places
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen,
            scale=self.spec.sm_scale,
            enable_gqa=True,
        )
        x = x + project("o", mixed.transpose(1, 2).reshape(rows, tokens, -1))
        normed = self._rms(x, weights.post_norm)
        gate = project("gate", normed)
        gate = (
            functional.silu(gate)
            if self.spec.activation == "silu"
            else functional.gelu(gate, approximate="tanh")
        )
        return x + project("down", gate * project("up", normed))

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.spec.rms_eps)

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        """`x [rows, tokens, heads, head_dim]` at positions `start ...` (NeoX halves)."""
        half = self._table.shape[-1] // 2
        table = self._table[start : start + x.shape[1], None]
        cos, sin = table[..., :half], table[..., half:]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _float(layer: LayerWeights) -> LayerWeights:
    """The layer in float32; nothing is copied where it is already."""
    values = {
        name: value.float() if isinstance(value, Tensor) else value
        for name, value in vars(layer).items()
        if name not in ("qkv", "gate_up")
    }
    return LayerWeights(**values)
