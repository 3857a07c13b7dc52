"""A BERT encoder in the few lines that inference needs, for the sentence embedder.

transformers' own model classes bring 150 MB of compiler and training machinery into every process, more than
this encoder's weights, and two seconds to import it. The tests hold the two against each other.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from memos_engine.errors import UnsupportedModelError


class BertEncoder:
    """Post-norm encoder with learned positions and exact GELU. Weights stay memory-mapped.

    Source: Devlin et al., BERT, arXiv 1810.04805; names as in Hugging Face's BertModel.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` holds config.json and model.safetensors. Raises UnsupportedModelError by name."""
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise UnsupportedModelError(
                f"{folder} is a {config.get('model_type')!r} with {config.get('hidden_act')!r}; the embedder "
                "takes a BERT with gelu, such as all-MiniLM-L6-v2."
            )
        self.hidden = int(config["hidden_size"])
        self.heads = int(config["num_attention_heads"])
        self.layers = int(config["num_hidden_layers"])
        self.eps = float(config["layer_norm_eps"])
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            self.weights = {n.removeprefix("bert."): file.get_tensor(n).float() for n in file.keys()}  # noqa: SIM118

    @torch.inference_mode()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask `[batch, tokens] int64` (mask 1 = token, 0 = padding) -> `[batch, tokens, hidden]`."""
        w, tokens = self.weights, ids.shape[1]
        x = F.embedding(ids, w["embeddings.word_embeddings.weight"])
        x = x + w["embeddings.position_embeddings.weight"][:tokens]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        visible = mask.bool()[:, None, None, :]
        for i in range(self.layers):
            at = f"encoder.layer.{i}"
            q, k, v = (
                self._heads(self._dense(x, f"{at}.attention.self.{n}")) for n in ("query", "key", "value")
            )
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            seen = self._dense(seen.transpose(1, 2).flatten(2), f"{at}.attention.output.dense")
            x = self._norm(x + seen, f"{at}.attention.output.LayerNorm")
            inner = F.gelu(self._dense(x, f"{at}.intermediate.dense"))
            x = self._norm(x + self._dense(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return x

    def _dense(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (self.hidden,), weight, bias, self.eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
