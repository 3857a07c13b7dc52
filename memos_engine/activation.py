"""Activation memory: finds, checks and builds the KV records of memories.

Here the control plane (which memory, whose) and the decoder (which tensors) meet. Any doubt about a record is
a `Miss` with its reason; the memory then goes in as text and the answer is right, only slower.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.record import KVRecord, RecordIdentity, decode_record, encode_record, ids_digest
from memos_engine.decoder.sequence import KVSpan
from memos_engine.decoder.weights import Weights
from memos_engine.errors import PayloadError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore
from memos_engine.prompt import PromptLayout


@dataclass(frozen=True)
class Miss:
    """Why a memory has no usable record."""

    reason: str


class ActivationMemory:
    """KV records of one model over one store, with a bounded host-memory tier in front of the vault."""

    def __init__(
        self, decoder: DecoderEngine, layout: PromptLayout, store: MemoryStore, host_bytes: int
    ) -> None:
        self.decoder = decoder
        self.layout = layout
        self.store = store
        self.host_bytes = host_bytes
        self._host: OrderedDict[str, KVRecord] = OrderedDict()
        self._lock = threading.Lock()
        self._anchor: tuple[Weights, KVSpan] | None = None

    def anchor(self) -> KVSpan:
        """The anchor as a span: exact at the head of any prompt, computed once per process and weights."""
        weights = self.decoder.runner.model.weights
        if self._anchor is None or self._anchor[0] is not weights:
            ids = self.layout.anchor
            k, v = self.decoder.encode_span((), ids)
            self._anchor = (weights, KVSpan(KVRecord(k, v, ids, "anchor", ids_digest(()))))
        return self._anchor[1]

    def salt(self, principal: Principal) -> bytes:
        """Keeps tenants, and users inside one, apart: equal texts of two users have records of their own."""
        return self.store.keys.tenant_salt(f"{principal.tenant}\x1f{principal.user}")

    def identity(self, principal: Principal, token_ids: tuple[int, ...]) -> RecordIdentity:
        """The identity a record of this span must have here and now."""
        anchor = ids_digest(self.layout.anchor)
        return RecordIdentity(
            weights=self.decoder.runner.model.weights.digest,
            tokenizer=self.layout.digest,
            geometry=self.decoder.spec.geometry(),
            dtype=str(self.decoder.runner.cache.k.dtype),
            anchor=anchor,
            left_contexts=(anchor,),
            tokens=ids_digest(token_ids),
            tenant_salt=self.salt(principal),
        )

    def lookup(self, principal: Principal, cube: MemCube, token_ids: tuple[int, ...]) -> KVRecord | Miss:
        """The record of a memory, from host memory or the vault, verified; or why there is none.

        token_ids: the memory's span in this layout. A record that fails its check is audited and dropped, so
        that it is built afresh.
        """
        identity = self.identity(principal, token_ids)
        key = identity.digest()
        blob = self.store.find_kv(principal, cube.id, key)
        if blob is None:
            self._take(key)
            if self.store.kv_identities(principal, cube.id):
                return Miss("its stored KV belongs to another model, dtype, template or wording")
            return Miss("no KV stored yet")
        resident = self._take(key)
        if resident is not None:
            self._keep(key, resident)
            return resident
        try:
            record = decode_record(self.store.vault.read(blob), identity)
        except PayloadError as error:
            self.store.drop_kv(key, error.reason)
            return Miss(f"its stored KV was refused ({error.reason}): {error}")
        self._keep(key, record)
        return record

    def build(self, principal: Principal, cube: MemCube) -> bool:
        """Encodes a memory behind the anchor and stores the record. False if it is already there."""
        if cube.body is None:
            return False
        token_ids = self.layout.memory(cube.body)
        identity = self.identity(principal, token_ids)
        if self.store.find_kv(principal, cube.id, identity.digest()) is not None:
            return False
        k, v = self.decoder.encode_span(self.layout.anchor, token_ids)
        blob = self.store.vault.write(encode_record(k, v, token_ids, identity))
        self.store.put_kv(principal, cube.id, cube.version, identity.digest(), blob, len(token_ids))
        return True

    def evict(self) -> None:
        """Empties the host tier."""
        with self._lock:
            self._host.clear()

    def _take(self, key: str) -> KVRecord | None:
        with self._lock:
            return self._host.pop(key, None)

    def _keep(self, key: str, record: KVRecord) -> None:
        if record.nbytes > self.host_bytes:
            return
        with self._lock:
            self._host[key] = record
            while sum(r.nbytes for r in self._host.values()) > self.host_bytes:
                self._host.popitem(last=False)
