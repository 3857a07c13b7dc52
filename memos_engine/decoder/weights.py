"""Model weights: memory-mapped from safetensors, converted in a stream, or shared with a live model."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memos_engine.decoder.spec import ModelSpec
from memos_engine.errors import ModelFilesError
from memos_engine.ops.pages import huge_zeros

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class LayerWeights:
    """One layer; None: this family has none. Projections are `[out, in]`, their biases `[out]`, norms
    `[hidden]` (`q_norm` and `k_norm` `[head_dim]`), ready to multiply with.

    post_norm stands before the MLP; attn_out_norm and mlp_out_norm behind attention and MLP.
    qkv and gate_up are views over neighbours in memory, where they are neighbours: one product for several.
    """

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attn_out_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    qkv: Tensor | None = None
    gate_up: Tensor | None = None


_PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "qkv": "self_attn.qkv_proj",
    "gate_up": "mlp.gate_up_proj",
}


class Weights:
    """All tensors of a model by their Hugging Face names, checked against its spec.

    Nothing is copied: tensors stay where they are (a memory map, or the live model's parameters).
    """

    def __init__(self, tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
        self.tensors = {name: _checked(tensors, name, shape) for name, shape in expected_shapes(spec).items()}
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        devices = {tensor.device for tensor in self.tensors.values()}
        if len(dtypes) != 1 or len(devices) != 1:
            raise ModelFilesError(
                f"Weights must have one dtype and one device, found {sorted(map(str, dtypes))} on "
                f"{sorted(map(str, devices))}. Move the model with `.to(device, dtype)` first."
            )
        self.dtype = dtypes.pop()
        self.device = devices.pop()
        self.embed = self.tensors["model.embed_tokens.weight"]
        self.norm = _ready_norm(self.tensors["model.norm.weight"], spec)
        self.lm_head = self.embed if spec.tie_embeddings else self.tensors["lm_head.weight"]
        self.layers = [self._layer(i, spec) for i in range(spec.num_layers)]

    def _layer(self, index: int, spec: ModelSpec) -> LayerWeights:
        parts: dict[str, Any] = {
            field: self.tensors[f"model.layers.{index}.{name}"]
            for field, (name, _) in _layer_parts(spec).items()
        }
        for field in parts:
            if field.endswith("norm"):
                parts[field] = _ready_norm(parts[field], spec)
        if spec.fused:
            sizes = [n * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
            parts["q"], parts["k"], parts["v"] = torch.split(parts["qkv"], sizes)
            parts["gate"], parts["up"] = parts["gate_up"].chunk(2)
        parts["qkv"] = _joined(parts["q"], parts["k"], parts["v"])
        parts["gate_up"] = _joined(parts["gate"], parts["up"])
        return LayerWeights(**parts)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and contents: the same for a folder and for a live model
        loaded from it. Computed at first use (about a second a gigabyte)."""
        names = sorted(self.tensors)
        with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
            parts = list(pool.map(lambda name: _tensor_digest(self.tensors[name]), names))
        total = hashlib.sha256()
        for name, part in zip(names, parts, strict=True):
            tensor = self.tensors[name]
            total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + part)
        return total.hexdigest()

    @classmethod
    def from_folder(cls, folder: Path, spec: ModelSpec, dtype: torch.dtype) -> Weights:
        """Loads `*.safetensors`. Tensors already in `dtype` stay memory-mapped; others are converted in a
        stream of small reads, so that peak memory is the converted model."""
        arena = _Arena(expected_shapes(spec), dtype)
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(_read_file(path, arena, dtype))
        return cls(tensors, spec)

    @classmethod
    def from_model(cls, model: Any, spec: ModelSpec) -> Weights:
        """Shares the parameters of a live transformers model."""
        return cls({name: tensor.detach() for name, tensor in model.named_parameters()}, spec)


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, in the order in which a forward reads them."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, spec.hidden_size),
        "model.norm.weight": (spec.hidden_size,),
    }
    if not spec.tie_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    for i in range(spec.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in _layer_parts(spec).values()}
    return shapes


def _layer_parts(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name within a layer and shape by the field of LayerWeights; q, k, v and gate, up are neighbours."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    products = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden)}
    gates = {"gate": (inner, hidden), "up": (inner, hidden)}
    if spec.fused:
        products, gates = {"qkv": (q + 2 * kv, hidden)}, {"gate_up": (2 * inner, hidden)}
    products |= {"o": (hidden, q), **gates, "down": (hidden, inner)}
    norms = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    if spec.sandwich_norms:
        norms |= {
            "attn_out_norm": "post_attention_layernorm",
            "post_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        field: (f"{name}.weight", (hidden,)) for field, name in norms.items()
    }
    parts |= {field: (f"{_PROJECTIONS[field]}.weight", shape) for field, shape in products.items()}
    parts |= {f"{field}_bias": (f"{_PROJECTIONS[field]}.bias", products[field][:1]) for field in spec.biases}
    if spec.qk_norm:
        parts |= {f"{x}_norm": (f"self_attn.{x}_norm.weight", (spec.head_dim,)) for x in ("q", "k")}
    return parts


def _ready_norm(weight: Tensor, spec: ModelSpec) -> Tensor:
    """The factor of a norm: `1 + w` in float32 where a family stores `w`. Norms are tiny; they are copied."""
    return weight.float() + spec.norm_offset if spec.norm_offset else weight


def _checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise ModelFilesError(f"The model lacks the tensor {name}; pull it again or check the folder.")
    if tuple(tensor.shape) != shape:
        raise ModelFilesError(f"{name} has shape {tuple(tensor.shape)}, the config asks for {shape}.")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _joined(*parts: Tensor) -> Tensor | None:
    """The tensors as one, stacked by rows, if they lie one behind the other in the same storage."""
    for left, right in pairwise(parts):
        same = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        if not same or left.data_ptr() + left.nbytes != right.data_ptr():
            return None
    rows = sum(part.shape[0] for part in parts)
    return parts[0].as_strided((rows, parts[0].shape[1]), parts[0].stride())


class _Arena:
    """Room for converted weights, in the order in which a forward reads them and in huge pages.

    Untouched room costs nothing, so tensors that stay in their file's map need not be known beforehand.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for name, shape in shapes.items():
            self.places[name] = end, shape
            end += -(-_count(shape) * dtype.itemsize // 64) * 64
        self.memory, self.dtype = huge_zeros(end), dtype

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def tensor(self, name: str) -> Tensor:
        start, shape = self.places[name]
        return self.memory[start : start + _count(shape) * self.dtype.itemsize].view(self.dtype).view(shape)


def _tensor_digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat.data).digest()


def _read_file(path: Path, arena: _Arena, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = int.from_bytes(head, "little")
            header = json.loads(file.read(size))
            base = 8 + size
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for name, entry in header.items():
                if name not in arena:
                    continue
                stored = _TORCH_DTYPES.get(entry["dtype"])
                if stored is None:
                    raise ModelFilesError(f"{path.name}: {name} is {entry['dtype']}; use F32, F16 or BF16.")
                begin, end = entry["data_offsets"]
                if base + end > len(mapped):
                    raise ModelFilesError(f"{path} is truncated; pull the model again.")
                shape = tuple(entry["shape"])
                if stored == dtype:
                    yield (
                        name,
                        torch.frombuffer(mapped, dtype=dtype, count=_count(shape), offset=base + begin).view(
                            shape
                        ),
                    )
                else:
                    out = arena.tensor(name)
                    if out.shape != shape:
                        raise ModelFilesError(f"{name} has shape {shape}, the config asks for {out.shape}.")
                    file.seek(base + begin)
                    _convert(file, stored, end - begin, out)
                    yield name, out
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFilesError(
            f"{path} cannot be read as safetensors ({error}); pull the model again."
        ) from error


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _convert(file: Any, stored: torch.dtype, nbytes: int, out: Tensor) -> None:
    flat = out.view(-1)
    buffer = bytearray(min(_CHUNK_BYTES, nbytes))
    done = 0
    while nbytes:
        view = memoryview(buffer)[: min(len(buffer), nbytes)]
        if file.readinto(view) != len(view):
            raise ModelFilesError(f"{file.name} is truncated; pull the model again.")
        part = torch.frombuffer(view, dtype=stored)
        flat[done : done + part.numel()] = part
        done += part.numel()
        nbytes -= len(view)
