"""LoRA slots: adapters are packed beforehand, published by one pointer write, and zeroed when they go.

A request holds its adapter from when it is queued to its end; what is held or pinned is never evicted. The
binding says from which position on an adapter acts: K and V before it are the base model's, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from memos_engine.decoder.adapter import PROJECTIONS, Adapter, PackedModules
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import AdapterError, AdapterInUseError, MemoryInputError
from memos_engine.ops.lora import PARTS, LoraFill, LoraLayout, LoraTable, all_finite, fill_from, pack

if TYPE_CHECKING:
    from memos_engine.decoder.sequence import Sequence

_DOMAIN = b"memos_engine.adapter_state"


@dataclass(frozen=True)
class AdapterBinding:
    """An adapter for one request. scale: factor on its deltas. active_from: position of the first token that
    it acts on. approximate: may act over stored spans that were made without it; the result is then marked
    and nothing of it is stored."""

    adapter: Adapter
    scale: float = 1.0
    active_from: int = 0
    approximate: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise MemoryInputError(f"An adapter's scale must be a finite number, not {self.scale}.")
        if self.active_from < 0:
            raise MemoryInputError(f"active_from is a position, 0 or more, not {self.active_from}.")

    def state(self, layers: int) -> bytes:
        """What K and V from `active_from` on depend on; empty where they are the base model's in all layers.

        Typed and length-prefixed: content digest, scale, offset. Never a name.
        """
        floor = self.adapter.kv_floor
        if floor is None or floor >= layers or self.scale == 0.0:
            return b""
        total = hashlib.sha256(_DOMAIN)
        for part in (self.adapter.digest, self.scale.hex(), str(self.active_from)):
            total.update(f"{len(part)}:".encode() + part.encode())
        return total.digest()


@dataclass
class _Resident:
    fill: LoraFill
    slot: int = -1  # not published
    users: int = 0
    pinned: bool = False
    doomed: bool = False  # goes with its last user


class AdapterSlots:
    """Adapters of one model in device memory. max_bytes: of all that are resident, published or not."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        slots: int = 64,
        max_rank: int = 64,
        max_bytes: int = 512 << 20,
    ) -> None:
        self.spec, self.max_bytes = spec, max_bytes
        self.dtype, self.device = weights.dtype, weights.device
        self.table = LoraTable(slots, spec.num_layers, max_rank, self.device)
        self._shapes = {name: tuple(getattr(weights.layers[0], name).shape) for name in PROJECTIONS}
        self._sizes = np.asarray([self._shapes[name] for name in PARTS], dtype=np.int64)
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._spare: list[Tensor] = []  # of those that went: fresh memory may take longer than the copy
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of all resident adapters."""
        with self._lock:
            return sum(r.fill.nbytes for r in self._resident.values())

    def resident(self) -> list[str]:
        """Digests, least recently used first."""
        with self._lock:
            return list(self._resident)

    def prefetch(self, adapter: Adapter) -> None:
        """Packs an adapter, so that publishing it is one pointer write; where bytes run out, adapters that
        nobody uses go first. Raises AdapterError for one that does not fit the model, the rank limit or the
        bytes."""
        with self._lock:
            if adapter.digest in self._resident:
                self._resident.move_to_end(adapter.digest)
                return
            self._require_fitting(adapter)
            modules = adapter.modules
            fill: LoraFill | None
            if isinstance(modules, PackedModules):
                self._make_room(self._bytes_of(modules.layout))
                buffer = self._spare_of(modules.layout)
                fill = fill_from(
                    modules.layout, modules.flat, self.spec.num_layers, self.dtype, self.device, buffer
                )
            else:
                deltas = {key: (m.a.detach(), m.b.detach(), m.scale) for key, m in modules.items()}
                layout = LoraLayout.of(deltas)
                self._make_room(self._bytes_of(layout))
                buffer = self._spare_of(layout)
                fill = pack(deltas, self.spec.num_layers, self.dtype, self.device, buffer)
                fill = fill if all_finite(fill.buffer) else None
            if fill is None:
                raise AdapterError(f"Adapter {adapter.digest[:12]} holds NaN or infinity.")
            self._resident[adapter.digest] = _Resident(fill)

    def publish(self, digest: str) -> int:
        """The slot of a prefetched adapter, filled by one pointer write where it was not.

        Raises AdapterError where it was not prefetched, AdapterInUseError where every slot is in use.
        """
        with self._lock:
            found = self._get(digest)
            self._resident.move_to_end(digest)
            if found.slot < 0:
                slot = self._free_slot()
                self.table.publish(slot, found.fill)
                found.slot = slot
            return found.slot

    def acquire(self, adapter: Adapter) -> int:
        """Prefetches, publishes and holds an adapter; returns its slot, which is its own until `release`."""
        with self._lock:
            self.prefetch(adapter)
            slot = self.publish(adapter.digest)
            self._resident[adapter.digest].users += 1
            return slot

    def bind(self, request: Sequence) -> None:
        """Holds a request's adapter, if it has one, until the request returns it."""
        if request.adapter is not None:
            digest = request.adapter.adapter.digest
            request.slot = self.acquire(request.adapter.adapter)
            request.on_return = lambda: self.release(digest)

    def release(self, digest: str) -> None:
        with self._lock:
            found = self._get(digest)
            found.users -= 1
            if found.doomed and not found.users:
                self.evict(digest)

    def forget(self) -> None:
        """Takes all adapters out, those in use with their last request: what one was made from may have
        ended."""
        with self._lock:
            for digest, found in list(self._resident.items()):
                found.doomed = True
                if not found.users:
                    self.evict(digest)
            self._spare.clear()

    def pin(self, digest: str, pinned: bool = True) -> None:
        """Keeps an adapter resident whatever else comes."""
        with self._lock:
            self._get(digest).pinned = pinned

    def evict(self, digest: str) -> None:
        """Takes an adapter out and zeroes its memory. Raises AdapterInUseError while a request uses it."""
        with self._lock:
            found = self._get(digest)
            if found.users:
                raise AdapterInUseError(
                    f"Adapter {digest[:12]} is used by {found.users} request(s); wait for them or abort them."
                )
            if found.slot >= 0:
                self.table.publish(found.slot, None)
            del self._resident[digest]
            found.fill.buffer.zero_()
            found.fill.words.zero_()
            self._spare.append(found.fill.buffer)

    def follow(self, weights: Weights) -> None:
        """Other weights come: whatever no request uses is evicted, pinned or not. Raises AdapterInUseError,
        and changes nothing, where what is in use would be read in another dtype."""
        with self._lock:
            used = [digest for digest, found in self._resident.items() if found.users]
            if used and weights.dtype != self.dtype:
                raise AdapterInUseError(
                    f"{len(used)} adapter(s) are in use as {self.dtype}; weights that are {weights.dtype} "
                    "have to wait for their requests, or abort them."
                )
            for digest in [d for d in self._resident if d not in used]:
                self.evict(digest)
            self.dtype = weights.dtype
            self._spare.clear()

    def _get(self, digest: str) -> _Resident:
        found = self._resident.get(digest)
        if found is None:
            raise AdapterError(f"Adapter {digest[:12]} is not resident; prefetch it first.")
        return found

    def _free_slot(self) -> int:
        for slot, fill in enumerate(self.table.fills):
            if fill is None:
                return slot
        for found in self._resident.values():
            if found.slot >= 0 and not found.users and not found.pinned:
                slot, found.slot = found.slot, -1
                self.table.publish(slot, None)
                return slot
        raise AdapterInUseError(
            f"All {len(self.table.fills)} adapter slots are in use; wait for a request to end."
        )

    def _spare_of(self, layout: LoraLayout) -> Tensor | None:
        """Zeros of this size that an adapter left, if there are any; of the others, those stay for which
        there is room beside it."""
        place = next((i for i, spare in enumerate(self._spare) if spare.numel() == layout.size), None)
        found = None if place is None else self._spare.pop(place)
        room = self.max_bytes - self.nbytes - self._bytes_of(layout)
        while self._spare and sum(spare.nbytes for spare in self._spare) > room:
            self._spare.pop(0)
        return found

    def _make_room(self, size: int) -> None:
        idle = [d for d, r in self._resident.items() if not r.users and not r.pinned]
        while self.nbytes + size > self.max_bytes:
            if not idle:
                raise AdapterError(
                    f"An adapter of {size} bytes does not fit: {self.nbytes} of {self.max_bytes} bytes are "
                    "in use or pinned. Wait for requests to end, unpin adapters, or raise the limit."
                )
            self.evict(idle.pop(0))

    def _fits(self, layout: LoraLayout) -> bool:
        layer, part, rank, inputs, outputs = layout.modules.T
        sizes = self._sizes[part]
        return bool(
            (layer < self.spec.num_layers).all()
            and (rank <= self.table.max_rank).all()
            and (sizes[:, 0] == outputs).all()
            and (sizes[:, 1] == inputs).all()
        )

    def _bytes_of(self, layout: LoraLayout) -> int:
        return layout.size * self.dtype.itemsize + self.spec.num_layers * len(PROJECTIONS) * 24

    def _require_fitting(self, adapter: Adapter) -> None:
        if isinstance(adapter.modules, PackedModules) and self._fits(adapter.modules.layout):
            return  # all modules at once; the loop says what is wrong with which
        short = adapter.digest[:12]
        for (layer, name), module in adapter.modules.items():
            if name not in self._shapes or not 0 <= layer < self.spec.num_layers:
                raise AdapterError(
                    f"Adapter {short} has a delta for layer {layer} {name}, which is not there."
                )
            outputs, inputs = self._shapes[name]
            a, b = tuple(module.a.shape), tuple(module.b.shape)
            if a != (module.rank, inputs) or b != (outputs, module.rank):
                raise AdapterError(
                    f"Adapter {short}: layer {layer} {name} has a {list(a)} and b {list(b)}; the model's "
                    f"projection is {[outputs, inputs]}. It was made for another model."
                )
            if not 0 < module.rank <= self.table.max_rank:
                raise AdapterError(
                    f"Adapter {short}: layer {layer} {name} has rank {module.rank}; the limit is "
                    f"{self.table.max_rank}."
                )
            if not math.isfinite(module.scale):
                raise AdapterError(f"Adapter {short}: the scale of layer {layer} {name} is NaN or infinity.")
