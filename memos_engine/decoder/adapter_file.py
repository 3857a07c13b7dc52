"""PEFT's adapter files, in and out: `adapter_config.json` and `adapter_model.safetensors`.

LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732), with rank and alpha patterns. What would be computed
differently here than in PEFT is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from memos_engine.decoder.adapter import PROJECTIONS, Adapter, LowRank
from memos_engine.decoder.adapter_record import made, projection_shapes
from memos_engine.decoder.safefile import parse, read_whole, shown, strict_json
from memos_engine.decoder.spec import ModelSpec
from memos_engine.errors import AdapterError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_MAX_CONFIG = 1 << 20
_KEY = re.compile(
    r"base_model\.model\.model\.(layers\.(0|[1-9][0-9]{0,3})\.(?:self_attn\.(q|k|v|o|qkv)|mlp\.(gate|up|down|"
    r"gate_up))_proj)\.lora_([AB])\.weight",
    re.ASCII,
)
_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.){1,200}\$?", re.ASCII)
_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
# Initialisations that leave the base weights alone; others change them, and the adapter fits no plain base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that change nothing here: names, training, and what only other methods read.
_HARMLESS = {
    "arrow_config", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_type", "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "megatron_core",
    "runtime_config", "loftq_config", "eva_config", "init_lora_weights", "qalora_group_size", "velora_config",
    "ensure_weight_tying", "bias",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA also rescales each row of the weights; merge it into the base model (merge_and_unload)",
    "modules_to_save": "it replaces whole modules of the model; train with LoRA on the projections only",
    "lora_bias": "it has biases of its own; train with lora_bias=False",
    "fan_in_fan_out": "its matrices are transposed (as for GPT-2); only linear projections are adapted here",
    "alora_invocation_tokens": "it starts at tokens of its own (aLoRA); clear this, and say active_from",
    "target_parameters": "it adapts bare parameters (mixtures of experts), which are not supported",
    "trainable_token_indices": "it changes token embeddings; train with LoRA on the projections only",
    "layer_replication": "it repeats layers of the model, which is not supported",
    "use_qalora": "QALoRA pools its inputs; train with plain LoRA",
    "use_bdlora": "BD-LoRA is not supported; train with plain LoRA",
    "megatron_config": "it is for Megatron's layers; convert it to plain LoRA",
    "corda_config": "it changes the base weights (CorDA); save it converted to plain LoRA",
    "lora_ga_config": "it changes the base weights (LoRA-GA); save it converted to plain LoRA",
}


@dataclass(frozen=True)
class AdapterLimits:
    """What a file may ask for, at most: the rank of a module, and the bytes of the file."""

    max_rank: int = 256
    max_bytes: int = 512 << 20


def import_peft(folder: Path, spec: ModelSpec, limits: AdapterLimits | None = None) -> Adapter:
    """Reads a PEFT adapter for this model; everything is checked first. Raises AdapterError."""
    limits = limits or AdapterLimits()
    if not folder.is_dir():
        raise AdapterError(
            f"{folder} is no folder; name the unpacked folder that holds {CONFIG} and {WEIGHTS} (archives "
            "are not opened)."
        )
    if not (folder / WEIGHTS).is_symlink() and not (folder / WEIGHTS).exists():
        if (folder / PICKLED).exists():
            raise AdapterError(
                f"{folder} holds {PICKLED}, a pickle: opening it can run code, so it is refused. Load it in "
                "PEFT where you trust it and save it with save_pretrained(..., safe_serialization=True)."
            )
        raise AdapterError(f"{folder} lacks {WEIGHTS}; name the folder that PEFT's save_pretrained() wrote.")
    config = checked_config(strict_json(read_whole(folder, CONFIG, _MAX_CONFIG), CONFIG), limits)
    tensors, _ = parse(read_whole(folder, WEIGHTS, limits.max_bytes), WEIGHTS)
    return from_peft(config, tensors, spec, limits)


def checked_config(config: Mapping[str, Any], limits: AdapterLimits) -> Mapping[str, Any]:
    """The settings themselves. Raises AdapterError, naming the first that is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {shown(config.get('peft_type'))}; only LORA adapters run here.")
    for name, why in _REFUSED.items():
        if config.get(name):
            raise AdapterError(f"{CONFIG} sets {name}: {why}.")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"bias is {shown(config['bias'])}: it changes the model's biases; train with 'none'."
        )
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise AdapterError(
            f"init_lora_weights is {shown(config['init_lora_weights'])}, which changes the base weights; "
            "save it with path_initial_model_for_weight_conversion."
        )
    unknown = [name for name, value in config.items() if value and name not in _HARMLESS]
    if unknown:
        raise AdapterError(f"{CONFIG} sets {shown(unknown[0])}, which is not known here; train without it.")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(_PATTERN.fullmatch(key) for key in pattern):
            raise AdapterError(
                f"{name} must map plain module names to numbers: write regular expressions out."
            )
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and 1 <= rank <= limits.max_rank for rank in ranks):
        raise AdapterError(
            f"the ranks of an adapter must be integers of 1 to {limits.max_rank} (r, rank_pattern)."
        )
    for alpha in (config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()):
        if type(alpha) not in (int, float) or not abs(alpha) <= 1e6:
            raise AdapterError("lora_alpha and alpha_pattern must be numbers between -1e6 and 1e6.")
    return config


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: ModelSpec, limits: AdapterLimits
) -> Adapter:
    """Modules of checked settings and parsed tensors. Raises AdapterError."""
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    paths: dict[tuple[int, str], str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{WEIGHTS} holds {shown(key)}, {_foreign(key)}")
        where = int(match[2]), match[3] or match[4]
        if where[0] >= spec.num_layers:
            raise AdapterError(
                f"{shown(key)}: the model has layers 0 to {spec.num_layers - 1}; the adapter is for another "
                "one."
            )
        if (where[1] in _FUSED) != spec.fused and where[1] not in ("o", "down"):
            raise AdapterError(
                f"{shown(key)}: this model has no such projection; the adapter is for another one."
            )
        pairs.setdefault(where, {})[match[5]] = tensor
        paths[where] = f"model.{match[1]}"
    modules: dict[tuple[int, str], LowRank] = {}
    shapes = projection_shapes(spec)
    for (layer, name), pair in pairs.items():
        path, parts = paths[layer, name], _FUSED.get(name, (name,))
        if len(pair) < 2:
            raise AdapterError(f"{path} has only lora_{next(iter(pair))}; the file is not whole.")
        a, b = pair["A"], pair["B"]
        rank = _patterned(config.get("rank_pattern"), path, config["r"])
        out, width = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
        if rank > limits.max_rank or tuple(a.shape) != (rank, width) or tuple(b.shape) != (out, rank):
            raise AdapterError(
                f"{path}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit; this model and the settings' "
                f"rank ask for {(rank, width)} and {(out, rank)}. The adapter is for another model, or "
                "damaged."
            )
        alpha = _patterned(config.get("alpha_pattern"), path, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        rows = torch.split(b, [shapes[part][0] for part in parts])
        modules |= {(layer, part): LowRank(a, row, scale) for part, row in zip(parts, rows, strict=True)}
    return made(modules)


def _foreign(key: str) -> str:
    if "lora_magnitude" in key:
        return "a part of DoRA; merge it into the base model (merge_and_unload)."
    if "modules_to_save" in key or "embed" in key or "lm_head" in key:
        return "which changes more than projections; train with LoRA on the projections only."
    return "which is no LoRA matrix of a projection of this family; the adapter is refused."


def _patterned(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The first entry whose name ends the module's path, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        name = key.replace("\\", "").rstrip("$")
        same = path == name.lstrip("^") or (not name.startswith("^") and path.endswith(f".{name}"))
        if same:
            return value
    return default


def export_peft(adapter: Adapter, folder: Path, spec: ModelSpec | None = None, base_model: str = "") -> None:
    """Writes what PeftModel.from_pretrained() reads; reading it back gives the same digest.

    spec: the model's, needed only where its projections are fused. Nothing is overwritten. Raises
    AdapterError.
    """
    modules = {_path(layer, name): m for (layer, name), m in adapter.modules.items()}
    if spec is not None and spec.fused:
        modules = _fused(adapter)
    ranks = Counter(module.rank for module in modules.values())
    alphas = Counter(module.scale * module.rank for module in modules.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": sorted(modules),
        "rank_pattern": {path: m.rank for path, m in modules.items() if m.rank != rank},
        "alpha_pattern": {
            path: _number(m.scale * m.rank) for path, m in modules.items() if m.scale * m.rank != alpha
        },
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "layers_to_transform": None,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": tensor.contiguous().cpu().clone()
        for path, module in modules.items()
        for side, tensor in (("A", module.a), ("B", module.b))
    }
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        for name, data in (
            (WEIGHTS, save(tensors, metadata={"format": "pt"})),
            (CONFIG, json.dumps(config, indent=2).encode()),
        ):
            path = folder / name
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                written.append(path)
                file.write(data)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise AdapterError(
            f"{folder} cannot take the adapter ({error.strerror}: {error.filename}); name a new folder."
        ) from error


def _path(layer: int, name: str) -> str:
    block = "self_attn" if name in PROJECTIONS[:4] or name == "qkv" else "mlp"
    return f"model.layers.{layer}.{block}.{name}_proj"


def _fused(adapter: Adapter) -> dict[str, LowRank]:
    """q, k, v (and gate, up) as the one matrix that such a model has; they must share A and scale."""
    found: dict[str, LowRank] = {}
    for layer in sorted({layer for layer, _ in adapter.modules}):
        here = {name: m for (one, name), m in adapter.modules.items() if one == layer}
        for fused, names in _FUSED.items():
            parts = [here.pop(name) for name in names if name in here]
            if not parts:
                continue
            first = parts[0]
            alike = all(torch.equal(p.a, first.a) and p.scale == first.scale for p in parts)
            if len(parts) < len(names) or not alike:
                raise AdapterError(
                    f"layer {layer}: this model holds {', '.join(names)} in one matrix, but the adapter "
                    "adapts them apart; PEFT cannot hold that."
                )
            found[_path(layer, fused)] = LowRank(first.a, torch.cat([p.b for p in parts]), first.scale)
        found |= {_path(layer, name): module for name, module in here.items()}
    return found


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
