"""Activation memory: finds, checks and builds the KV records of memories.

Here the control plane (which memory, whose) and the decoder (which tensors) meet. A memory has two records:
*anchored*, encoded behind just the anchor, which is exact in the first slot; and *averaged* over several left
contexts, which is near wherever else it stands. Any doubt about a record is a reason to do without it; the
memory then goes in as text and the answer is right, only slower.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from memos_engine.config import MemoryConfig
from memos_engine.contexts import LeftContext, LeftContexts
from memos_engine.decoder.averaging import encode_averaged
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import RecordIdentity, ids_digest
from memos_engine.decoder.quantize import INT8, quantize_record
from memos_engine.decoder.record import KVRecord, decode_record, encode_record
from memos_engine.decoder.sequence import KVSpan
from memos_engine.decoder.weights import Weights
from memos_engine.errors import OutOfPagesError, PayloadError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.vault import BlobRef
from memos_engine.prompt import PromptLayout
from memos_engine.tiers import RecordTiers

log = logging.getLogger("memos_engine")

ANCHORED, AVERAGED = "anchored", "averaged"
# A record to build: the memory, its span, the identity.
Missing = tuple[MemCube, tuple[int, ...], RecordIdentity]


@dataclass(frozen=True)
class StoredKV:
    """Which records of a memory exist: identity and file by form. reason: why there is none at all. whole:
    none is missing. tier: where the record for a later slot waits; nbytes: its size."""

    records: dict[str, tuple[RecordIdentity, BlobRef]]
    reason: str = ""
    whole: bool = False
    tier: str = "disk"
    nbytes: int = 0

    def form_for(self, first: bool) -> str:
        """The better form there is. first: it stands right behind the anchor."""
        wanted = ANCHORED if first else AVERAGED
        return wanted if wanted in self.records else next(iter(self.records))


class ActivationMemory:
    """KV records of one model over one store, with bounded tiers in front of the vault."""

    def __init__(
        self, decoder: DecoderEngine, layout: PromptLayout, store: MemoryStore, config: MemoryConfig
    ) -> None:
        self.decoder = decoder
        self.layout = layout
        self.store = store
        self.config = config
        self.left = LeftContexts(layout, store, config.contexts)
        self.tiers = RecordTiers.beside(decoder.runner.device, config)
        self._anchor: tuple[Weights, KVSpan] | None = None
        self._said = False  # that averages do not fit into the pool
        self._evictions = 0

    @property
    def _int8(self) -> bool:
        return self.config.kv_dtype == "int8"

    def anchor(self) -> KVSpan:
        """The anchor as a span: exact at the head of any prompt, computed once per process and weights."""
        weights = self.decoder.runner.model.weights
        if self._anchor is None or self._anchor[0] is not weights:
            ids = self.layout.anchor
            k, v = self.decoder.encode_span((), ids)
            self._anchor = (weights, KVSpan(KVRecord(k, v, ids, "anchor", ids_digest(())), memory=False))
        return self._anchor[1]

    def salt(self, principal: Principal) -> bytes:
        """Keeps tenants, and users inside one, apart: equal texts of two users have records of their own."""
        return self.store.keys.tenant_salt(f"{principal.tenant}\x1f{principal.user}")

    @property
    def model(self) -> str:
        """Digest of what decides how well this model bears splicing: weights, layout, quantiser, and pages
        where they are rounded."""
        parts = [self.decoder.runner.model.weights.digest, self.layout.digest, self.config.kv_dtype]
        parts += [] if self.decoder.config.page_dtype == "auto" else [self.decoder.kv_dtype]
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()

    def turn(self, off: str | None) -> None:
        """Turns the use of stored KV off for this model, for a reason, or on again (None). It stays so."""
        self.store.turn_splicing(self.model, off)

    # -- identity --------------------------------------------------------------------------------

    def _room(self, tokens: int) -> int:
        """Tokens that a left context may have before a span of so many in the model's window."""
        return self.decoder.spec.max_positions - len(self.layout.anchor) - tokens - 1

    def identities(
        self, principal: Principal, cube_id: str, token_ids: tuple[int, ...]
    ) -> dict[str, RecordIdentity]:
        """The identity that each form's record of this memory's span must have here and now."""
        anchor = ids_digest(self.layout.anchor)
        anchored = RecordIdentity(
            weights=self.decoder.runner.model.weights.digest,
            tokenizer=self.layout.digest,
            geometry=self.decoder.spec.geometry(),
            dtype=self.decoder.kv_dtype,
            anchor=anchor,
            left_contexts=(anchor,),
            tokens=ids_digest(token_ids),
            tenant_salt=self.salt(principal),
            quantizer=INT8 if self._int8 else "none",
        )
        left = tuple(
            context.digest for context in self.left.of(principal, cube_id, self._room(len(token_ids)))
        )
        return {ANCHORED: anchored} | ({AVERAGED: replace(anchored, left_contexts=left)} if left else {})

    # -- use -------------------------------------------------------------------------------------

    def find(self, principal: Principal, cube: MemCube, token_ids: tuple[int, ...]) -> StoredKV:
        """Which records of a memory there are; nothing is read. token_ids: its span in this layout."""
        off = self.store.splicing_off(self.model)
        if off is not None:
            return StoredKV({}, f"splicing is turned off for this model: {off}")
        records = {}
        identities = self.identities(principal, cube.id, token_ids)
        for form, identity in identities.items():
            key = identity.digest()
            blob = self.store.find_kv(principal, cube.id, key)
            if blob is None:
                self.tiers.drop(key)  # ended elsewhere: nothing of it stays here
            else:
                records[form] = (identity, blob)
        if records:
            identity, blob = records.get(AVERAGED) or next(iter(records.values()))
            tier = self.tiers.holds(identity.digest())
            return StoredKV(records, whole=len(records) == len(identities), tier=tier, nbytes=blob.size)
        if self.store.kv_identities(principal, cube.id):
            return StoredKV({}, "its stored KV belongs to another model, dtype, template or wording")
        return StoredKV({}, "no KV stored yet")

    def load(self, stored: StoredKV, form: str) -> KVRecord:
        """A record from the tiers or the vault, verified.

        Raises PayloadError; the record is then audited and dropped, so that it is built afresh.
        """
        record = self.at_hand(stored, form)
        if record is not None:
            return record
        try:
            return self.read(stored, form)
        except PayloadError as error:
            self.refuse(stored, form, error)
            raise

    def at_hand(self, stored: StoredKV, form: str) -> KVRecord | None:
        """A record from the tiers; None where only its file is left."""
        return self.tiers.get(stored.records[form][0].digest())

    def read(self, stored: StoredKV, form: str) -> KVRecord:
        """A record from the vault, verified, and in the tiers from now on. Touches no database, so that any
        thread may wait for it. Raises PayloadError."""
        identity, blob = stored.records[form]
        evictions = self._evictions
        record = decode_record(self.store.vault.read(blob), identity)
        if evictions != self._evictions:  # its memory may have ended meanwhile: it stays nowhere
            return record
        return self.tiers.put(identity.digest(), record)

    def refuse(self, stored: StoredKV, form: str, error: PayloadError) -> None:
        """Drops a record that proved damaged: audited, and built afresh when it is wanted again."""
        self.store.drop_kv(stored.records[form][0].digest(), error.reason)

    # -- building --------------------------------------------------------------------------------

    def build(self, principal: Principal, cubes: Sequence[MemCube]) -> int:
        """Encodes and stores the records that these memories lack; left contexts are computed once for all of
        them. Returns how many memories got any; none where splicing is turned off."""
        if self.store.splicing_off(self.model) is not None:
            return 0
        self.left.refresh(principal)
        built = set()
        lacking: dict[tuple[LeftContext, ...], list[Missing]] = {}  # averages, by what they are made behind
        for cube in cubes:
            ids = () if cube.body is None else self.layout.memory(cube.body)
            for form, identity in (self.identities(principal, cube.id, ids) if ids else {}).items():
                if self.store.find_kv(principal, cube.id, identity.digest()) is not None:
                    continue
                if form == AVERAGED:
                    contexts = tuple(self.left.of(principal, cube.id, self._room(len(ids))))
                    lacking.setdefault(contexts, []).append((cube, ids, identity))
                    continue
                k, v = self.decoder.encode_span(self.layout.anchor, ids)
                self._put(principal, cube, KVRecord(k, v, ids, "", identity.anchor), identity)
                built.add(cube.id)
        for contexts, group in lacking.items():
            built |= self._build_averaged(principal, contexts, group)
        return len(built)

    def _build_averaged(
        self, principal: Principal, contexts: Sequence[LeftContext], group: Sequence[Missing]
    ) -> set[str]:
        """For memories that take the same left contexts. A pool that is too small for one leaves them out."""
        spans, left = [ids for _, ids, _ in group], [context.token_ids for context in contexts]
        needed = len(self.layout.anchor) + max(map(len, left)) + max(map(len, spans))
        if needed >= self.decoder.pool_tokens:
            if not self._said:
                log.warning(
                    "memos_engine: the KV pool of %d tokens is too small for averaged records (%d); memories "
                    "behind the first are spliced less exactly. Open the engine with a larger pool_tokens.",
                    self.decoder.pool_tokens,
                    needed,
                )
            self._said = True
            return set()
        try:
            averages = encode_averaged(self.decoder, self.layout.anchor, spans, left)
        except OutOfPagesError as error:  # requests under way hold the pages; another reply will try again
            log.debug("memos_engine: no averaged KV was made now: %s", error)
            return set()
        sources = sorted(frozenset().union(*(context.sources for context in contexts)))
        for (cube, ids, identity), made in zip(group, averages, strict=True):
            record = KVRecord(made.k, made.v, ids, "", "", made.sigma_v.to(torch.float16), made.rank)
            self._put(principal, cube, record, identity, sources)
            former = tuple(c.digest for c in self.left.former(principal, cube.id, self._room(len(ids))))
            if former and former != identity.left_contexts:
                self.store.drop_kv(replace(identity, left_contexts=former).digest(), "made anew")
        return {cube.id for cube, _, _ in group}

    def _put(
        self,
        principal: Principal,
        cube: MemCube,
        record: KVRecord,
        identity: RecordIdentity,
        sources: Sequence[str] = (),
    ) -> None:
        """Stores a record, and keeps it at hand: a memory is mostly built because it was just asked for.
        sources: the memories whose text it saw; it goes with any of them."""
        if self._int8:
            record = quantize_record(record)
        key = identity.digest()
        blob = self.store.vault.write(encode_record(record, identity))
        self.store.put_kv(principal, cube.id, cube.version, key, blob, record.num_tokens, sources)
        self.tiers.put(key, replace(record, identity=key))

    def evict(self) -> None:
        """Empties the tiers: what is needed again is read from the vault."""
        self._evictions += 1
        self.tiers.clear()
