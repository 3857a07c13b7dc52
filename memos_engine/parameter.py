"""Parameter memory: an owner's adapters (LoRA), from the store to the decoder.

Here the control plane (whose, which version, made from what) and the decoder (which matrices) meet. What is
bound is named by its content. Any doubt about a stored adapter is a reason to answer without it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memos_engine.decoder.adapter import Adapter
from memos_engine.decoder.adapter_file import AdapterLimits, export_peft, import_peft
from memos_engine.decoder.adapter_record import concatenated, decode_adapter, encode_adapter, model_print
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.weights import Weights
from memos_engine.errors import AdapterError, PayloadError
from memos_engine.memory.adapters import (
    AdapterChoice,
    AdapterOption,
    AdapterVersion,
    NewAdapter,
    choose_adapter,
)
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

log = logging.getLogger("memos_engine")

CACHE_BYTES = 256 << 20
Findings = list[tuple[AdapterVersion, str]]


@dataclass(frozen=True)
class AdapterUse:
    """An adapter for one request. whole: it is active from the first token on, so that no stored KV fits;
    else from behind the memories. label: how a reply names it."""

    adapter: Adapter
    label: str
    scale: float = 1.0
    whole: bool = False
    version: AdapterVersion | None = None

    def bound(self, active_from: int) -> AdapterBinding:
        """For a request whose tokens from `active_from` on see it."""
        return AdapterBinding(self.adapter, self.scale, 0 if self.whole else active_from)


class ParameterMemory:
    """The adapters of one store for one model, with those used last in memory. Safe for several threads."""

    def __init__(
        self,
        decoder: DecoderEngine,
        store: MemoryStore,
        *,
        limits: AdapterLimits | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.decoder, self.store = decoder, store
        self.limits = limits or AdapterLimits()
        self._most = cache_bytes
        self._cache: OrderedDict[str, Adapter] = OrderedDict()  # by digest, least recently used first
        self._lock = threading.Lock()
        self._print: tuple[Weights, str] | None = None

    @property
    def model(self) -> str:
        """Which model adapters must be for; follows changed weights."""
        weights = self.decoder.runner.model.weights
        if self._print is None or self._print[0] is not weights:
            self._print = weights, model_print(self.decoder.spec, weights)
        return self._print[1]

    # -- in and out ------------------------------------------------------------------------------

    def put(
        self,
        principal: Principal,
        name: str,
        adapter: Adapter,
        *,
        how: str = "imported",
        report: Mapping[str, Any] | None = None,
        sources: Sequence[str] = (),
        promote: bool = True,
    ) -> AdapterVersion:
        """Stores a checked adapter as a version of the owner's adapter of that name. Raises as
        `MemoryStore.put_adapter` does."""
        new = NewAdapter(
            digest=adapter.digest,
            model=self.model,
            rank=adapter.rank,
            nbytes=adapter.nbytes,
            kv_floor=adapter.kv_floor,
            how=how,
            report=report or {},
            sources=sources,
        )
        return self.store.put_adapter(principal, name, encode_adapter(adapter), new, promote=promote)

    def bring(
        self,
        principal: Principal,
        folder: Path,
        name: str | None = None,
        *,
        sources: Sequence[str] = (),
        promote: bool = True,
    ) -> AdapterVersion:
        """Imports a PEFT folder, under its own name unless another is given. Raises AdapterError, and as
        `put`."""
        adapter = import_peft(folder, self.decoder.spec, self.limits)
        return self.put(principal, name or folder.resolve().name, adapter, sources=sources, promote=promote)

    def export(self, principal: Principal, given: str, folder: Path, version: int | None = None) -> None:
        """Writes a version (default: the current one) as a PEFT folder. Raises AdapterError, and as
        `load`."""
        found = self.store.adapter(principal, given, version)
        export_peft(self.load(principal, found), folder, self.decoder.spec)

    # -- use -------------------------------------------------------------------------------------

    def load(self, principal: Principal, found: AdapterVersion) -> Adapter:
        """A version's matrices, from memory or the vault, after everything that may speak against it was
        asked.

        Raises AdapterError where it is for another model or damaged (which is audited),
        `MemoryNotFoundError` or `AccessError` where it is not the caller's to use now.
        """
        found = self.store.adapter_in_use(principal, found.cube_id, found.version)
        if found.model != self.model:
            raise AdapterError(
                f"adapter {found.name!r} was made for another model than the one that runs; open that one, "
                "or train it for this one."
            )
        with self._lock:
            adapter = self._cache.get(found.digest)
            if adapter is not None:
                self._cache.move_to_end(found.digest)
                return adapter
        return self._keep(read_adapter(self.store, found))

    def _keep(self, adapter: Adapter) -> Adapter:
        with self._lock:
            self._cache[adapter.digest] = adapter
            while sum(one.nbytes for one in self._cache.values()) > self._most and len(self._cache) > 1:
                self._cache.popitem(last=False)
        return adapter

    def warm(self, digest: str) -> bool:
        """Whether this adapter is in memory."""
        with self._lock:
            return digest in self._cache

    def evict(self) -> None:
        """Lets go of everything in memory: an owner's memories may have ended."""
        with self._lock:
            self._cache.clear()

    def use(
        self,
        principal: Principal,
        wanted: str | Path | Adapter | AdapterUse | AdapterOption,
        *,
        scale: float = 1.0,
        whole: bool = False,
    ) -> AdapterUse:
        """The adapter that a request asks for: by name or id, as it was chosen, a PEFT folder, or itself.

        Raises as `load`, and AdapterError where what was chosen is another version by now.
        """
        if isinstance(wanted, AdapterOption):
            found = self.store.adapter_in_use(principal, wanted.cube_id, wanted.version)
            if not found.current or found.digest != wanted.digest:
                raise AdapterError(f"adapter {found.name!r} was changed since it was chosen; choose again.")
            label = f"{found.name} version {found.version}"
            return AdapterUse(self.load(principal, found), label, scale, whole, found)
        if isinstance(wanted, AdapterUse):
            if wanted.version is None:
                return wanted
            return AdapterUse(
                self.load(principal, wanted.version),
                *(wanted.label, wanted.scale, wanted.whole, wanted.version),
            )
        if isinstance(wanted, str):
            found = self.store.adapter(principal, wanted)
            label = f"{found.name} version {found.version}"
            return AdapterUse(self.load(principal, found), label, scale, whole, found)
        return use_file(wanted, self.decoder, self.limits, scale=scale, whole=whole)

    def compose(self, principal: Principal, given: Sequence[str], scales: Sequence[float]) -> AdapterUse:
        """Several of one owner's adapters as one, exactly: their ranks add up. Sums of adapters do not
        reliably know what each knows; measure before you rely on one. Raises as `load`."""
        found = [self.store.adapter(principal, one) for one in given]
        adapters = [self.load(principal, one) for one in found]
        joined = concatenated(adapters, scales)
        if joined.rank > self.limits.max_rank:
            raise AdapterError(
                f"together they have rank {joined.rank}, more than {self.limits.max_rank}; compose fewer."
            )
        return AdapterUse(joined, " + ".join(f"{one.name} version {one.version}" for one in found))

    # -- choosing --------------------------------------------------------------------------------

    def options(
        self, principal: Principal, found: Sequence[tuple[str, float]], query: str | None = None
    ) -> tuple[list[AdapterOption], list[tuple[str, str]]]:
        """The adapters that stand for memories which retrieval found, `(id, score)`, a score of 0 to 1 saying
        how well a memory fits; and those left out, `(id, why)`. One database query; nothing is loaded.

        An adapter's probability is the best score among its memories, less where a memory that it does not
        know fits better. Adapters that name subjects are offered only where the query names one of them.
        """
        scores = {cube_id: min(max(score, 0.0), 1.0) for cube_id, score in found}
        top = max(scores.values(), default=0.0)
        offered, left = [], []
        for one in self.store.adapters(principal):
            covers = tuple(source for source, _ in one.sources if source in scores)
            why = self._against(one, covers, query)
            if why:
                left.append((one.cube_id, why))
                continue
            best = max(scores[source] for source in covers)
            offered.append(
                AdapterOption(
                    cube_id=one.cube_id,
                    version=one.version,
                    digest=one.digest,
                    probability=best * best / top if top > 0 else 0.0,
                    nbytes=one.nbytes,
                    warm=self.warm(one.digest),
                    policy="exclusive" if one.how == "trained" else "procedural",
                    covers=covers,
                    reason=f"made from {len(covers)} of the memories found",
                )
            )
        return offered, left

    def _against(self, one: AdapterVersion, covers: Sequence[str], query: str | None) -> str:
        if one.model != self.model:
            return "it was made for another model"
        if one.stale:
            return one.stale
        if not covers:
            return "none of the memories found is among those that it was made from"
        subjects = one.report.get("subjects") or []
        if query is not None and subjects and not names_subject(query, subjects):
            return "the question names none of its subjects"
        return ""

    def choose(
        self, principal: Principal, found: Sequence[tuple[str, float]], query: str | None = None
    ) -> AdapterChoice:
        """At most one adapter for a request, or none and why."""
        offered, left = self.options(principal, found, query)
        choice = choose_adapter(offered)
        return AdapterChoice(choice.option, choice.reason, (*choice.rejected, *left))


def read_adapter(store: MemoryStore, found: AdapterVersion, *, whole: bool = False) -> Adapter:
    """A version's payload, checked against its checksum; whole: its content against its digest, too. Raises
    AdapterError, and audits, where it is damaged."""
    if found.blob is None:
        raise AdapterError(f"version {found.version} of adapter {found.name!r} was revoked; nothing is left.")
    try:
        if whole:
            store.vault.verify(found.blob)
        return decode_adapter(store.vault.read(found.blob), found.digest, whole=whole)
    except (PayloadError, AdapterError) as error:
        store.note_damaged_adapter(found, getattr(error, "reason", "format"))
        raise AdapterError(f"adapter {found.name!r} is damaged ({error}) import it again.") from error


def verify_adapters(store: MemoryStore, principal: Principal) -> Findings:
    """Every version that is not revoked, and what is wrong with it; needs no model."""
    results = []
    for found in store.adapters(principal, everything=True):
        if found.revoked_at is not None:
            continue
        try:
            adapter = read_adapter(store, found, whole=True)
            same = (adapter.rank, adapter.nbytes, adapter.kv_floor) == (
                found.rank,
                found.nbytes,
                found.kv_floor,
            )
            results.append((found, "" if same else "its description is not that of its content"))
        except AdapterError as error:
            results.append((found, str(error)))
    return results


def use_file(
    wanted: Path | Adapter,
    decoder: DecoderEngine,
    limits: AdapterLimits | None = None,
    *,
    scale: float = 1.0,
    whole: bool = True,
) -> AdapterUse:
    """An adapter that is in no store: a PEFT folder, or one in memory. Raises AdapterError."""
    adapter = wanted if isinstance(wanted, Adapter) else import_peft(Path(wanted), decoder.spec, limits)
    label = f"adapter {adapter.digest[:12]}" if isinstance(wanted, Adapter) else Path(wanted).name
    return AdapterUse(adapter, label, scale, whole)


def names_subject(query: str, subjects: Sequence[str]) -> bool:
    """Whether a text names one of these subjects, as whole words, in any case."""
    return any(
        re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", query, re.IGNORECASE)
        for subject in subjects
        if subject
    )
