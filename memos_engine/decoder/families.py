"""The architectures the decoder runs: what each one fixes beside the numbers in its config.

A family is read from a `config.json` as transformers reads it, its defaults included. What is not listed here
is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memos_engine.decoder.rope import RopeSpec, flat_rope, rope_spec
from memos_engine.errors import UnsupportedModelError

Config = dict[str, Any]
_BIAS_FLAGS = {"attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")}
SUPPORTED_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class LayerSpec:
    """One layer's attention. window: keys a row sees, its own included; 0: all. rope: the index of its table
    in `ModelSpec.ropes`; None: no rotation."""

    window: int = 0
    rope: int | None = 0


Layers = tuple[tuple[RopeSpec, ...], tuple[LayerSpec, ...]]


@dataclass(frozen=True)
class Family:
    """layers: reads RoPE tables and layers. biases: projections that always have one. bias_flags: which of
    `attention_bias` and `mlp_bias` the architecture heeds. qk_norm: RMS norm over each head of q and k. tied:
    the default of `tie_word_embeddings`. fused: weights come as one `qkv_proj` and one `gate_up_proj`. gemma:
    norms multiply by `1 + w` and stand before and behind attention and MLP, the embedding is scaled, scores
    go by `query_pre_attn_scalar`."""

    layers: Callable[[Config], Layers]
    biases: tuple[str, ...] = ()
    bias_flags: tuple[str, ...] = ()
    qk_norm: bool = False
    tied: bool = False
    fused: bool = False
    gemma: bool = False


def family_of(config: Config) -> tuple[str, Family]:
    """Name and family of a config. Raises UnsupportedModelError, naming what is supported."""
    names = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
    name = str(names[0])
    family = FAMILIES.get(name)
    if family is None:
        raise UnsupportedModelError(
            f"{name} is not supported. Supported architectures: {', '.join(SUPPORTED_ARCHITECTURES)} "
            "(SmolLM2, SmolLM3, Llama 2 and 3, Mistral, Qwen2.5, Qwen3, Gemma 3 text, Phi-3, ...)."
        )
    return name, family


def biases_of(family: Family, config: Config) -> tuple[str, ...]:
    """The projections with a bias, in the order of a layer."""
    asked = (_BIAS_FLAGS[flag] for flag in family.bias_flags if config.get(flag))
    return family.biases + tuple(field for fields in asked for field in fields)


def activation_of(name: str, family: Family, config: Config) -> str:
    """The MLP's activation, by its name in a config."""
    key, default = ("hidden_activation", "gelu_pytorch_tanh") if family.gemma else ("hidden_act", "silu")
    activation = str(config.get(key) or default)
    if activation not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{name} with {key}={activation!r} is not supported. Supported: "
            f"{', '.join(SUPPORTED_ACTIVATIONS)}."
        )
    return activation


# -- layers --------------------------------------------------------------------------------------


def _count(config: Config) -> int:
    return int(config["num_hidden_layers"])


def _llama(config: Config) -> Layers:
    return (flat_rope(config, 1e4),), (LayerSpec(),) * _count(config)


def _mistral(config: Config) -> Layers:
    """One window for all layers."""
    window = int(config.get("sliding_window", 4096) or 0)
    return (flat_rope(config, 1e4),), (LayerSpec(window),) * _count(config)


def _phi3(config: Config) -> Layers:
    """One window for all layers; only the first part of each head may be rotated."""
    rope = flat_rope(config, 1e4, partial=True)
    if rope.kind != "default":  # there, other names mean longrope
        raise UnsupportedModelError(
            f"Phi3ForCausalLM with RoPE type {rope.kind!r} is not supported. Supported: default."
        )
    window = int(config.get("sliding_window") or 0)
    return (rope,), (LayerSpec(window),) * _count(config)


def _qwen(config: Config) -> Layers:
    """The layers from `max_window_layers` on slide, if `use_sliding_window` says so."""
    window = int(config.get("sliding_window", 4096) or 0) if config.get("use_sliding_window") else 0
    first = int(config.get("max_window_layers", 28))
    types = config.get("layer_types") or [
        "sliding_attention" if window and i >= first else "full_attention" for i in range(_count(config))
    ]
    return (flat_rope(config, 1e4),), tuple(LayerSpec(w) for w in _windows(types, window, config))


def _smollm3(config: Config) -> Layers:
    """Every fourth layer has no RoPE, unless `no_rope_layers` (1: RoPE) says otherwise."""
    interval = int(config.get("no_rope_layer_interval", 4))
    rotated = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(_count(config))]
    if len(rotated) < _count(config):
        raise UnsupportedModelError(f"no_rope_layers has {len(rotated)} entries for {_count(config)} layers.")
    window = int(config.get("sliding_window") or 0)
    slides = bool(config.get("use_sliding_window")) and window > 0
    types = config.get("layer_types") or [
        "sliding_attention" if slides and not has else "full_attention" for has in rotated[: _count(config)]
    ]
    windows = _windows(types, window, config)
    layers = (LayerSpec(w, 0 if has else None) for w, has in zip(windows, rotated, strict=False))
    return (flat_rope(config, 2e6),), tuple(layers)


def _gemma3(config: Config) -> Layers:
    """Local layers with a window and a RoPE of their own; every sixth is global."""
    for flag in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(flag):
            raise UnsupportedModelError(f"Gemma3ForCausalLM with {flag}={config[flag]} is not supported.")
    pattern = int(config.get("sliding_window_pattern") or 6)
    types = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(_count(config))
    ]
    windows = _windows(types, int(config.get("sliding_window", 4096) or 0), config)
    sets = config.get("rope_parameters") or {}
    full = {**(sets.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local = dict(sets.get("sliding_attention") or {})
    full.setdefault("rope_theta", config.get("rope_theta") or 1e6)
    local.setdefault("rope_theta", config.get("rope_local_base_freq") or 1e4)
    for parameters in (full, local):
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError("Gemma3ForCausalLM with partial_rotary_factor is not supported.")
    ropes = (rope_spec(local, config), rope_spec(full, config))
    layers = (LayerSpec(w, int(t == "full_attention")) for w, t in zip(windows, types, strict=False))
    return ropes, tuple(layers)


def _windows(types: Sequence[str], window: int, config: Config) -> list[int]:
    """The window of each layer by its type. Raises UnsupportedModelError for other types."""
    if len(types) != _count(config):
        raise UnsupportedModelError(f"layer_types has {len(types)} entries for {_count(config)} layers.")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"A layer of type {kind!r} is not supported. Supported: full_attention, sliding_attention."
            )
        if kind == "sliding_attention" and window <= 0:
            raise UnsupportedModelError("layer_types has sliding_attention, but there is no sliding_window.")
    return [window if kind == "sliding_attention" else 0 for kind in types]


_BOTH = ("attention_bias", "mlp_bias")
FAMILIES = {
    "LlamaForCausalLM": Family(_llama, bias_flags=_BOTH),
    "MistralForCausalLM": Family(_mistral),
    "Qwen2ForCausalLM": Family(_qwen, biases=("q", "k", "v")),
    "Qwen3ForCausalLM": Family(_qwen, bias_flags=("attention_bias",), qk_norm=True),
    "SmolLM3ForCausalLM": Family(_smollm3, bias_flags=_BOTH, tied=True),
    "Gemma3ForCausalLM": Family(_gemma3, bias_flags=("attention_bias",), qk_norm=True, tied=True, gemma=True),
    "Phi3ForCausalLM": Family(_phi3, fused=True),
}
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
