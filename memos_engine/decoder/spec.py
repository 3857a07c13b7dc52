"""What a model is: the numbers of its architecture, read from a Hugging Face config."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memos_engine.decoder.families import (
    SUPPORTED_ARCHITECTURES,
    LayerSpec,
    activation_of,
    biases_of,
    family_of,
)
from memos_engine.decoder.rope import SUPPORTED_ROPE, RopeSpec
from memos_engine.errors import ModelFilesError, UnsupportedModelError

__all__ = ["SUPPORTED_ARCHITECTURES", "SUPPORTED_ROPE", "LayerSpec", "ModelSpec", "RopeSpec"]


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of one decoder.

    ropes: its tables of rotations, which `layers` name by index. sm_scale: factor on the attention scores.
    biases: projections with a bias, by the fields of `LayerWeights`. qk_norm: RMS norm over each head of
    q and k. sandwich_norms: norms behind attention and MLP as well. norm_offset: added to every norm's
    weight. fused: the weights hold q, k, v in one tensor, and gate, up in another.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    tie_embeddings: bool
    max_positions: int
    ropes: tuple[RopeSpec, ...]
    layers: tuple[LayerSpec, ...]
    sm_scale: float
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    sandwich_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    fused: bool = False

    @property
    def rope(self) -> RopeSpec:
        """The first table of rotations: the only one, but for Gemma 3."""
        return self.ropes[0]

    def geometry(self) -> str:
        """Everything that shapes K and V, as canonical JSON; part of a KV record's identity."""
        return self._geometry

    @cached_property
    def _geometry(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def kv_bytes_per_token(self, element_size: int) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size

    @classmethod
    def from_folder(cls, folder: Path) -> ModelSpec:
        """Reads `config.json`, without importing transformers' model code (150 MB and two seconds)."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
            if not isinstance(config, dict):
                raise ValueError("not an object")
            return cls.from_dict(config)
        except (OSError, ValueError) as error:
            raise ModelFilesError(f"{path} cannot be read ({error}); pull the model again.") from error
        except KeyError as error:
            raise ModelFilesError(f"{path} lacks {error}; pull the model again.") from error

    @classmethod
    def from_config(cls, config: Any, architecture: str | None = None) -> ModelSpec:
        """Reads a transformers `PretrainedConfig`; `architecture` is the class of a live model."""
        values = config.to_dict()
        if architecture is not None:
            values["architectures"] = [architecture]
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelSpec:
        """Reads the contents of a `config.json`; refuses by name what the decoder does not do."""
        architecture, family = family_of(config)
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                f"{architecture} with quantization_config={config['quantization_config']} is not supported. "
                "Use the unquantised weights."
            )
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise UnsupportedModelError(f"{heads} heads cannot share {kv_heads} KV heads evenly.")
        hidden = int(config["hidden_size"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        ropes, layers = family.layers(config)
        return cls(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=len(layers),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", family.tied)),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            ropes=ropes,
            layers=layers,
            sm_scale=float(config.get("query_pre_attn_scalar", 256) if family.gemma else head_dim) ** -0.5,
            activation=activation_of(architecture, family, config),
            biases=biases_of(family, config),
            qk_norm=family.qk_norm,
            sandwich_norms=family.gemma,
            norm_offset=1.0 if family.gemma else 0.0,
            embed_scale=hidden**0.5 if family.gemma else 1.0,
            fused=family.fused,
        )
