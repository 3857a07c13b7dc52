"""What a model is: the numbers of its architecture, read from a Hugging Face config."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from memos_engine.errors import UnsupportedModelError

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
    def from_config(cls, config: Any, architecture: str | None = None) -> ModelSpec:
        """Reads a transformers `PretrainedConfig`; refuses by name what the decoder does not do.

        architecture: the class of a live model; by default the config's own word for it.
        """
        if architecture is None:
            architecture = (getattr(config, "architectures", None) or [f"model_type {config.model_type!r}"])[
                0
            ]
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModelError(
                f"{architecture} is not supported. Supported architectures: "
                f"{', '.join(SUPPORTED_ARCHITECTURES)} (SmolLM2, Llama 2 and 3, TinyLlama, ...)."
            )
        for flag in ("attention_bias", "mlp_bias"):
            if getattr(config, flag, False):
                raise UnsupportedModelError(f"{architecture} with {flag}=True is not supported.")
        if config.hidden_act != "silu":
            raise UnsupportedModelError(
                f"{architecture} with hidden_act={config.hidden_act!r}: only silu is supported."
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise UnsupportedModelError(
                f"{config.num_attention_heads} heads cannot share {config.num_key_value_heads} KV heads."
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rms_eps=float(config.rms_norm_eps),
            tie_embeddings=bool(config.tie_word_embeddings),
            max_positions=config.max_position_embeddings,
            rope=_rope_spec(config),
        )


def _rope_spec(config: Any) -> RopeSpec:
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedModelError(
            f"RoPE type {kind!r} is not supported. Supported: {', '.join(SUPPORTED_ROPE)}."
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("Partial rotary embedding is not supported.")
    theta = float(parameters.get("rope_theta", 10000.0))
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
