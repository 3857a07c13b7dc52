"""What a model is: the numbers of its architecture, read from a Hugging Face config."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from memos_engine.errors import ModelFilesError, UnsupportedModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
SUPPORTED_ROPE = ("default", "llama3")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: `default`, or `llama3` frequency scaling (Llama 3.1)."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def inv_freq(self, head_dim: int) -> torch.Tensor:
        """Inverse frequencies `[head_dim / 2] float32`, as transformers computes them."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inv = 1.0 / (self.theta**exponent)
        if self.kind == "default":
            return inv
        wavelength = 2 * math.pi / inv
        low = self.original_max_positions / self.low_freq_factor
        high = self.original_max_positions / self.high_freq_factor
        scaled = torch.where(wavelength > low, inv / self.factor, inv)
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * scaled / self.factor + smooth * scaled
        medium = ~(wavelength < high) & ~(wavelength > low)
        return torch.where(medium, between, scaled)


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of one decoder."""

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
    rope: RopeSpec

    def geometry(self) -> str:
        """Everything that shapes K and V, as canonical JSON; part of a KV record's identity."""
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
        names = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
        architecture = str(names[0])
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModelError(
                f"{architecture} is not supported. Supported architectures: "
                f"{', '.join(SUPPORTED_ARCHITECTURES)} (SmolLM2, Llama 2 and 3, TinyLlama, ...)."
            )
        for flag in ("attention_bias", "mlp_bias", "quantization_config"):
            if config.get(flag):
                raise UnsupportedModelError(f"{architecture} with {flag}={config[flag]} is not supported.")
        act = config.get("hidden_act", "silu")
        if act != "silu":
            raise UnsupportedModelError(f"{architecture} with hidden_act={act!r}: only silu is supported.")
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise UnsupportedModelError(f"{heads} heads cannot share {kv_heads} KV heads evenly.")
        return cls(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            rope=_rope_spec(config),
        )


def _rope_spec(config: dict[str, Any]) -> RopeSpec:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older folders."""
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    parameters: dict[str, Any] = {**old, **(config.get("rope_parameters") or {})}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedModelError(
            f"RoPE type {kind!r} is not supported. Supported: {', '.join(SUPPORTED_ROPE)}."
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("Partial rotary embedding is not supported.")
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return RopeSpec("default", theta)
    return RopeSpec(
        kind,
        theta,
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_positions=int(parameters["original_max_position_embeddings"]),
    )
