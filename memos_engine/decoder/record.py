"""The KV record: one memory's keys and values as a safetensors file (docs/kv-record.md).

K is stored **before RoPE**, layer-major, so that it can be rotated once, in fp32, to wherever a request needs
it; in the model's dtype, or as int8 with scales. The file is self-describing: its header holds the identity
and a checksum per tensor. Reading it back copies nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from memos_engine.decoder.identity import FORMAT_VERSION, RecordIdentity
from memos_engine.errors import PayloadError
from memos_engine.ops.int8_kv import GROUP

if TYPE_CHECKING:
    from memos_engine.decoder.arrival import Arrival

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
}
_OPTIONAL = ("k_scale", "v_scale", "sigma_v", "rank")
_serials = itertools.count(1)


@dataclass(frozen=True)
class KVRecord:
    """k, v `[layers, tokens, kv_heads, head_dim]` (K unrotated); token_ids of the span; identity digest.

    left: digest of the exact token sequence the span was encoded behind, empty for an average over several:
    where a request has just that sequence to the left, the record is exact, but for int8. k_scale
    `[layers, ceil(tokens / 64), kv_heads, head_dim] float32` and v_scale `[layers, tokens, kv_heads] float32`
    go with int8 K and V. sigma_v `[layers, tokens, kv_heads]` and rank `[tokens]`, floats: see
    `averaging.AveragedKV`. serial: this object's own number in this process, by which pages of its rows are
    found again: tensors of a record are never written to. arrival: what K and V still wait for on their way
    to the device (`decoder.arrival`), None where they are there.
    """

    k: Tensor
    v: Tensor
    token_ids: tuple[int, ...]
    identity: str
    left: str
    sigma_v: Tensor | None = None
    rank: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    header: dict[str, Any] = field(default_factory=dict)
    arrival: Arrival | None = field(init=False, compare=False, repr=False, default=None)
    serial: int = field(init=False, compare=False, default_factory=_serials.__next__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, serial=next(_serials), arrival=None)  # another process counts anew

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def adapter(self) -> str:
        """The adapter state it was made under (`AdapterBinding.state`, hex), empty for the base model."""
        return "".join(self.header.get("identity_fields", {}).get("adapters", ()))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def quantized(self) -> bool:
        return self.k_scale is not None

    def moved(self, move: Callable[[Tensor], Tensor]) -> KVRecord:
        """The same record with its tensors elsewhere: equal numbers, so the same serial."""
        if self.arrival is not None:
            self.arrival.wait(self.k.shape[0] - 1)
        tensors: dict[str, Any] = {name: move(tensor) for name, tensor in self.tensors().items()}
        other = replace(self, **tensors)
        object.__setattr__(other, "serial", self.serial)
        return other

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {name: getattr(self, name) for name in ("k", "v", *_OPTIONAL)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def encode_record(record: KVRecord, identity: RecordIdentity) -> bytes:
    """Serialises a record under this identity, whatever its own says.

    Raises PayloadError: reason not_finite for NaN or infinity, which would poison every answer; format for
    tensors that do not belong together.
    """
    _require_whole(record)
    ids = torch.tensor(list(record.token_ids), dtype=torch.int32)
    tensors = {name: tensor.contiguous() for name, tensor in record.tensors().items()} | {"token_ids": ids}
    header = {
        "format": "memos_engine.kv_record",
        "format_version": FORMAT_VERSION,
        "identity": identity.digest(),
        "identity_fields": identity.public(),
        "left": record.left,
        "checksums": {name: _checksums(t) for name, t in tensors.items()},
    }
    text = json.dumps(header)
    metadata = {"memos_engine": text, "memos_engine_checksum": _header_checksum(text, tensors)}
    data: bytes = save(tensors, metadata=metadata)
    return data


def decode_record(data: memoryview, expected: RecordIdentity) -> KVRecord:
    """Views a serialised record, checked against the identity the caller needs.

    Raises PayloadError with reason format, checksum, identity or not_finite; the message names the field.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(bytes(data[8 : 8 + size]))
        metadata = entries.pop("__metadata__")
        tensors = {name: _view(data, 8 + size, entry) for name, entry in entries.items()}
        if metadata["memos_engine_checksum"] != _header_checksum(metadata["memos_engine"], tensors):
            raise PayloadError("The KV record's header is damaged.", "checksum")
        header = json.loads(metadata["memos_engine"])
        k, v, ids = tensors["k"], tensors["v"], tensors["token_ids"]
        checksums, fields = header["checksums"], header["identity_fields"]
        version, identity, left = header["format_version"], header["identity"], str(header["left"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise PayloadError(f"Not a KV record: {error}.", "format") from error
    if version != FORMAT_VERSION:
        raise PayloadError(f"KV record format {version}; this build reads {FORMAT_VERSION}.", "format")
    if identity != expected.digest():
        differing = [n for n, value in expected.public().items() if fields.get(n) != value]
        raise PayloadError(
            f"The KV record was made for another {' and '.join(differing) or 'identity'}.", "identity"
        )
    for name, tensor in tensors.items():
        if _fast(tensor) != checksums[name]["xxh3_128"]:
            raise PayloadError(f"The KV record's tensor {name} is damaged.", "checksum")
    optional = {name: tensors.get(name) for name in _OPTIONAL}
    record = KVRecord(k, v, tuple(ids.tolist()), identity, left, **optional, header=header)
    _require_whole(record)
    return record


def _require_whole(record: KVRecord) -> None:
    """Refuses shapes and dtypes that do not belong together, and values that are no numbers."""
    tensors = record.tensors()
    layers, tokens, heads, dim = (*record.k.shape, 0, 0, 0, 0)[:4]
    shapes = {
        "k": (layers, record.num_tokens, heads, dim),
        "v": (layers, record.num_tokens, heads, dim),
        "k_scale": (layers, -(-tokens // GROUP), heads, dim),
        "v_scale": (layers, tokens, heads),
        "sigma_v": (layers, tokens, heads),
        "rank": (tokens,),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise PayloadError(
                f"The KV record's shapes disagree: {name} is {tuple(tensor.shape)}, not {shapes[name]}.",
                "format",
            )
    scaled = record.k.dtype == torch.int8
    if record.v.dtype != record.k.dtype or {"k_scale", "v_scale"} & set(tensors) != (
        {"k_scale", "v_scale"} if scaled else set()
    ):
        raise PayloadError(
            "The KV record's dtypes disagree: int8 K and V have scales, others none.", "format"
        )
    if not all(_finite(tensor) for tensor in tensors.values() if tensor.is_floating_point()):
        raise PayloadError("The keys, values or scales of a KV record hold NaN or infinity.", "not_finite")


def _finite(tensor: Tensor) -> bool:
    """A sum reads once and writes nothing; only one that overflows needs the closer look."""
    total = tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _view(data: memoryview, base: int, entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    count = (end - begin) // dtype.itemsize
    if base + end > len(data) or count < 0:
        raise ValueError("a tensor reaches past the end of the file")
    return torch.frombuffer(data, dtype=dtype, count=count, offset=base + begin).view(entry["shape"])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _fast(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(_bytes(tensor))


def _header_checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """Covers the header and what the tensors claim to be; their contents have checksums of their own."""
    shapes = [[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())]
    return xxhash.xxh3_128_hexdigest((text + json.dumps(shapes)).encode())


def _checksums(tensor: Tensor) -> dict[str, str]:
    return {"xxh3_128": _fast(tensor), "sha256": hashlib.sha256(_bytes(tensor)).hexdigest()}
