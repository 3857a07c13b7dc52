"""An adapter as one payload file, named by its content; and adapters joined by rank.

The file is safetensors with a header of our own and one flat tensor for each dtype, which holds the matrices
as a slot does (`ops.lora.LoraLayout`): loading is one read, one checksum and one copy. The digest covers
modules, shapes, dtypes, scales and numbers as PEFT has them, and no name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from memos_engine.decoder.adapter import PROJECTIONS, Adapter, LowRank, PackedModules
from memos_engine.decoder.safefile import DTYPES, parse, strict_json
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import AdapterError
from memos_engine.ops.lora import PARTS, LoraLayout, place

FORMAT, FORMAT_VERSION = "memos_engine.adapter", 2
_DOMAIN = b"memos_engine.adapter.1"  # of digests, whatever the file's format is
_MOST = 1 << 20  # of any size in a header
_SAMPLE = 256
Modules = Mapping[tuple[int, str], LowRank]


def projection_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """`(out, in)` of a layer's projections, by the names of `PROJECTIONS`."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }


def model_print(spec: ModelSpec, weights: Weights) -> str:
    """Which model an adapter is for: SHA-256 (hex) of the geometry and of samples of every tensor, rounded to
    bfloat16, so that it is the same in each dtype that the model is opened in; takes milliseconds."""
    total = hashlib.sha256(spec.geometry().encode())
    for name in sorted(weights.tensors):
        flat = weights.tensors[name].detach().reshape(-1)
        middle = flat.numel() // 2
        sample = torch.cat([flat[:_SAMPLE], flat[middle : middle + _SAMPLE]]).to(torch.bfloat16).cpu()
        total.update(f"{name}:{flat.numel()}:".encode() + _bytes(sample))
    return total.hexdigest()


def made(modules: Modules) -> Adapter:
    """An adapter of these modules, under the digest of their content. Scales are rounded to float32, in which
    they are used. Raises AdapterError for what belongs nowhere or is no number."""
    kept: dict[tuple[int, str], LowRank] = {}
    for key in sorted(modules):
        module = modules[key]
        a, b = module.a.detach().contiguous(), module.b.detach().contiguous()
        scale = float(torch.tensor(module.scale, dtype=torch.float32))
        where = f"layer {key[0]} {key[1]}"
        if (
            key[1] not in PROJECTIONS
            or a.dim() != 2
            or b.dim() != 2
            or a.shape[0] != b.shape[1]
            or not len(a)
        ):
            raise AdapterError(
                f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} are no low-rank pair [rank, in], [out, "
                "rank]."
            )
        if a.dtype != b.dtype:
            raise AdapterError(f"{where}: A is {a.dtype}, B is {b.dtype}; store both in one dtype.")
        if not math.isfinite(scale) or not (_finite(a) and _finite(b)):
            raise AdapterError(
                f"{where} holds NaN or infinity, which would poison every answer; train it again."
            )
        kept[key] = LowRank(a, b, scale)
    if not kept:
        raise AdapterError("the adapter changes no projection of the model; check what it was trained on.")
    return Adapter(content_digest(kept), kept)


def content_digest(modules: Modules) -> str:
    """SHA-256 (hex) over modules, dtypes, shapes, scales and numbers, each with its length in front."""
    total = hashlib.sha256(_DOMAIN)
    for layer, name in sorted(modules):
        module = modules[layer, name]
        shapes = [list(module.a.shape), list(module.b.shape)]
        about = json.dumps([layer, name, str(module.a.dtype), shapes, float(module.scale).hex()]).encode()
        total.update(len(about).to_bytes(8, "little") + about)
        for tensor in (module.a, module.b):
            total.update(_bytes(tensor))
    return total.hexdigest()


def encode_adapter(adapter: Adapter) -> bytes:
    """The payload file of an adapter that `made` has checked."""
    tensors: dict[str, Tensor] = {}
    rows = []
    for kind, dtype in DTYPES.items():
        some = {
            key: (m.a.cpu(), m.b.cpu(), m.scale)
            for key, m in sorted(adapter.modules.items())
            if m.a.dtype == dtype
        }
        if not some:
            continue
        layout = LoraLayout.of(some)
        tensors[kind] = torch.zeros(layout.size, dtype=dtype)
        place(some, layout, tensors[kind])
        for (layer, part, *sizes), (_, _, scale) in zip(layout.modules.tolist(), some.values(), strict=True):
            rows.append([kind, layer, PARTS[part], *sizes, scale])
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "digest": adapter.digest,
        "modules": rows,  # dtype, layer, projection, rank, inputs, outputs, scale
    }
    data: bytes = save(tensors, metadata={"memos_engine": json.dumps(header)})
    return data


def decode_adapter(data: memoryview, digest: str, *, whole: bool = False) -> Adapter:
    """Views a payload that the vault has verified against its checksum. whole: hash the content, too.

    Raises AdapterError where it is no adapter, or not the one of this digest.
    """
    tensors, metadata = parse(data, "the stored adapter")
    header = strict_json(metadata.get("memos_engine", "").encode(), "the header of the stored adapter")
    if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"this stored adapter has format {header.get('format_version')!r}; this build reads "
            f"{FORMAT_VERSION}."
        )
    if header.get("digest") != digest:
        raise AdapterError("the stored adapter is another one than the store says; import it again.")
    try:
        parts = [_packed(kind, flat, header["modules"]) for kind, flat in tensors.items()]
        if sum(map(len, parts)) != len(header["modules"]) or not parts:
            raise ValueError("modules without numbers")
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise AdapterError(f"the stored adapter is damaged ({error}); import it again.") from error
    modules: Modules = parts[0]
    if len(parts) > 1:
        modules = {key: part[key] for part in parts for key in part}
    adapter = Adapter(digest, modules)
    if whole and (content_digest(modules) != digest or encode_adapter(adapter) != data):
        raise AdapterError("the stored adapter's content is not that of its digest; import it again.")
    return adapter


def _packed(kind: str, flat: Tensor, rows: Sequence[Sequence[Any]]) -> PackedModules:
    """The modules whose numbers `flat` holds. Raises ValueError and the like for what does not fit it."""
    mine = [row for row in rows if row[0] == kind]
    sizes = [(layer, PARTS.index(part), *rest) for _, layer, part, *rest, _ in mine]
    modules = np.asarray(sizes, dtype=np.int64).reshape(len(mine), 5)
    with np.errstate(over="ignore"):  # what overflows is refused below
        scales = np.asarray([row[-1] for row in mine], dtype=np.float32)
    layout = LoraLayout(modules, scales)
    if (modules < (0, 0, 1, 1, 1)).any() or (modules > _MOST).any() or not np.isfinite(scales).all():
        raise ValueError("sizes or scales that cannot be")
    if len(layout.keys) != len(modules) or flat.dim() != 1 or layout.size != flat.numel():
        raise ValueError("modules that are not those of its numbers")
    return PackedModules(layout, flat)


def concatenated(adapters: Sequence[Adapter], scales: Sequence[float]) -> Adapter:
    """One adapter whose delta is the sum of `scale * delta`: `[B1 s1 | B2 s2] [A1; A2]`. Ranks add up.

    Exact: scales go into B only where they differ; those that are no power of two apart make the module
    float32, so that nothing is rounded to a shorter dtype. Raises AdapterError.
    """
    if not adapters or len(adapters) != len(scales):
        raise AdapterError(
            f"{len(adapters)} adapters need as many scales, not {len(scales)}, and at least one."
        )
    parts: dict[tuple[int, str], list[LowRank]] = {}
    for adapter, factor in zip(adapters, scales, strict=True):
        for key, module in adapter.modules.items():
            parts.setdefault(key, []).append(LowRank(module.a, module.b, module.scale * factor))
    return made({key: _joined(some) for key, some in parts.items()})


def _joined(parts: Sequence[LowRank]) -> LowRank:
    scale = next((part.scale for part in parts if part.scale), 1.0)
    ratios = [part.scale / scale for part in parts]
    whole = all(ratio == 0 or abs(math.frexp(ratio)[0]) == 0.5 for ratio in ratios)
    dtypes = {part.a.dtype for part in parts}
    dtype = dtypes.pop() if whole and len(dtypes) == 1 else torch.float32
    b = [part.b.to(dtype) * ratio for part, ratio in zip(parts, ratios, strict=True)]
    return LowRank(torch.cat([part.a.to(dtype) for part in parts]), torch.cat(b, dim=1), scale)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
