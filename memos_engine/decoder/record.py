"""The KV record: one memory's keys and values as a safetensors file, and the identity that guards it.

K is stored **before RoPE** and in the model's dtype, layer-major, so that it can be rotated once, in fp32, to
wherever a request needs it. The file is self-describing: its header holds the identity and a checksum per
tensor. Reading it back copies nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from memos_engine.errors import PayloadError

FORMAT_VERSION = 1
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


def ids_digest(token_ids: Sequence[int]) -> str:
    """SHA-256 over token ids, each as four little-endian bytes."""
    return hashlib.sha256(b"".join(int(t).to_bytes(4, "little") for t in token_ids)).hexdigest()


@dataclass(frozen=True)
class RecordIdentity:
    """Everything a stored KV depends on. Two records may be swapped for one another only if all of it agrees.

    left_contexts: digests of the token sequences that stood to the left when it was built (the anchor alone
    here). tenant_salt: keeps tenants apart. Names of models or adapters never identify anything.
    """

    weights: str
    tokenizer: str
    geometry: str
    dtype: str
    anchor: str
    left_contexts: tuple[str, ...]
    tokens: str
    tenant_salt: bytes
    adapters: tuple[str, ...] = ()
    quantizer: str = "none"
    format_version: int = FORMAT_VERSION

    def digest(self) -> str:
        """Typed, length-prefixed SHA-256: no two different identities share an encoding."""
        total = hashlib.sha256(b"memos_engine.kv_record")
        for name in sorted(self.__dataclass_fields__):
            value = getattr(self, name)
            items = value if isinstance(value, tuple) else (value,)
            total.update(_prefixed("f", name.encode()) + _prefixed("n", str(len(items)).encode()))
            for item in items:
                raw = item if isinstance(item, bytes) else str(item).encode()
                total.update(_prefixed(type(item).__name__, raw))
        return total.hexdigest()

    def public(self) -> dict[str, Any]:
        """The identity as the file's header shows it; the salt only as a digest."""
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__}
        shown["tenant_salt"] = hashlib.sha256(self.tenant_salt).hexdigest()
        return json.loads(json.dumps(shown))  # type: ignore[no-any-return]


def _prefixed(kind: str, raw: bytes) -> bytes:
    return f"{kind}:{len(raw)}:".encode() + raw


@dataclass(frozen=True)
class KVRecord:
    """k, v `[layers, tokens, kv_heads, head_dim]` (K unrotated); token_ids of the span; identity digest.

    left: digest of the exact token sequence the span was encoded behind: where a request has just that
    sequence to the left, splicing the record is exact.
    """

    k: Tensor
    v: Tensor
    token_ids: tuple[int, ...]
    identity: str
    left: str
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def encode_record(k: Tensor, v: Tensor, token_ids: Sequence[int], identity: RecordIdentity) -> bytes:
    """Serialises a record. Refuses NaN and infinity: they would poison every answer."""
    if not (torch.isfinite(k).all() and torch.isfinite(v).all()):
        raise PayloadError(
            "The keys or values hold NaN or infinity; the record was not stored.", "not_finite"
        )
    ids = torch.tensor(list(token_ids), dtype=torch.int32)
    tensors = {"k": k.contiguous(), "v": v.contiguous(), "token_ids": ids}
    header = {
        "format": "memos_engine.kv_record",
        "format_version": FORMAT_VERSION,
        "identity": identity.digest(),
        "identity_fields": identity.public(),
        "left": identity.left_contexts[0],
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
    if k.dim() != 4 or k.shape != v.shape or k.shape[1] != ids.numel():
        raise PayloadError(f"The KV record's shapes disagree: {tuple(k.shape)}, {tuple(v.shape)}.", "format")
    if not (torch.isfinite(k).all() and torch.isfinite(v).all()):
        raise PayloadError("The KV record holds NaN or infinity.", "not_finite")
    return KVRecord(k, v, tuple(ids.tolist()), identity, left, header)


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
