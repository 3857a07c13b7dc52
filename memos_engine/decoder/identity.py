"""What a stored KV depends on: the identity that guards every record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 2


def ids_digest(token_ids: Sequence[int]) -> str:
    """SHA-256 over token ids, each as four little-endian bytes."""
    return hashlib.sha256(b"".join(int(t).to_bytes(4, "little") for t in token_ids)).hexdigest()


@dataclass(frozen=True)
class RecordIdentity:
    """Everything a stored KV depends on. Two records may be swapped for one another only if all of it agrees.

    dtype: of the model, and of its pages where they have another. quantizer: how K and V were made smaller,
    "none" for that dtype as it is. left_contexts: digests of the token sequences that stood to the left when
    it was built: the anchor alone, or each of those that were averaged over. tenant_salt: keeps tenants
    apart. Names of models or adapters never identify anything.
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
