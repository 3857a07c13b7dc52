"""Rotary position embedding: what a config says of it, and the frequencies it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memos_engine.errors import UnsupportedModelError
from memos_engine.ops import rope_table

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeSpec:
    """One table of rotations.

    kind: `default`; `linear` (all frequencies divided by `factor`); `llama3` (the low ones, with a smooth
    passage); `yarn` (the same by dimension, arXiv 2309.00071; its `attention_factor` scales cos and sin).
    partial: the share of each head's channels that is rotated, from the first one on.
    """

    kind: str = "default"
    theta: float = 10000.0
    partial: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def inv_freq(self, head_dim: int) -> Tensor:
        """Inverse frequencies `[rotary_dim / 2] float32`, bit for bit as transformers computes them."""
        dim = int(head_dim * self.partial)
        wavelengths = self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        plain = 1.0 / wavelengths
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            kept = 1 - self._yarn_ramp(dim)
            return 1.0 / (self.factor * wavelengths) * (1 - kept) + plain * kept
        return plain

    def table(self, head_dim: int, length: int) -> Tensor:
        """Cosines and sines of positions 0..length-1, `[length, rotary_dim] float32` (docs/kernels.md)."""
        return rope_table(self.inv_freq(head_dim), length, self.attention_factor)

    def _llama3(self, plain: Tensor) -> Tensor:
        turns = 2 * math.pi / plain
        low = self.original_max_positions / self.low_freq_factor
        high = self.original_max_positions / self.high_freq_factor
        scaled = torch.where(turns > low, plain / self.factor, plain)
        smooth = (self.original_max_positions / turns - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * scaled / self.factor + smooth * scaled
        medium = ~(turns < high) & ~(turns > low)
        return torch.where(medium, between, scaled)

    def _yarn_ramp(self, dim: int) -> Tensor:
        """0 for channels that turn fast and keep their frequency, 1 for those that are interpolated."""

        def channel(rotations: float) -> float:
            """The channel that makes so many rotations within the original window."""
            ratio = self.original_max_positions / (rotations * 2 * math.pi)
            return (dim * math.log(ratio)) / (2 * math.log(self.theta))

        first, last = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        width = last - first if first != last else 0.001
        return torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - first) / width, 0, 1)


def flat_rope(config: dict[str, Any], theta: float, partial: bool = False) -> RopeSpec:
    """The only table of a model: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`.

    theta: what the architecture takes where the config is silent. partial: whether it rotates only a part of
    each head where `partial_rotary_factor` says so.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(
            "rope_parameters by layer type are supported for Gemma3ForCausalLM only; give one set."
        )
    for name, default in (("rope_theta", theta), ("partial_rotary_factor", 1.0)):
        value = config.get(name)
        parameters.setdefault(name, default if value is None else value)
    if parameters["partial_rotary_factor"] != 1.0 and not partial:
        raise UnsupportedModelError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported here; "
            "Phi3ForCausalLM may rotate a part of each head, the others rotate it whole."
        )
    return rope_spec(parameters, config)


def rope_spec(parameters: dict[str, Any], config: dict[str, Any]) -> RopeSpec:
    """One set of RoPE parameters, `rope_theta` included. Raises UnsupportedModelError by name."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedModelError(
            f"RoPE type {kind!r} is not supported. Supported: {', '.join(SUPPORTED_ROPE)}."
        )
    plain = RopeSpec(
        kind, float(parameters["rope_theta"]), float(parameters.get("partial_rotary_factor", 1.0))
    )
    if kind == "default":
        return plain
    if kind == "linear":
        return replace(plain, factor=float(parameters["factor"]))
    original = config.get("original_max_position_embeddings") or parameters.get(
        "original_max_position_embeddings", config.get("max_position_embeddings")
    )
    if original is None:
        raise KeyError("original_max_position_embeddings")
    if kind == "llama3":
        return replace(
            plain,
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(original),
        )
    given = parameters.get("factor")
    factor = float(config["max_position_embeddings"] / original if given is None else given)
    return replace(
        plain,
        factor=factor,
        original_max_positions=int(original),
        attention_factor=_yarn_attention_factor(parameters, factor),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
    )


def _yarn_attention_factor(parameters: dict[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(mscale) / scale(of_all) if mscale and of_all else scale(1.0)
