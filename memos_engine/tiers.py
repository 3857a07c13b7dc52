"""Where records that were used wait to be used again: on the device, in host memory, else on disk.

A record is in one tier at a time. Use brings it to the device, where there is one; what there is no room for
sinks to host memory and from there out of it: its file in the vault remains. What sinks is decided by value
(`memory/value.py`): how often a record is used, for what it saves by the byte. A record that is worth less
than what it would push out goes past a tier. Or, with eviction lru, what was unused longest sinks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from memos_engine.config import MemoryConfig
from memos_engine.decoder.arrival import send
from memos_engine.decoder.record import KVRecord
from memos_engine.memory.value import LOOKED_AT, Keeper, Pace

Move = Callable[[KVRecord], KVRecord]


class Worths:
    """How often records were used, in any tier; time is counted in uses. A use of a record saves milliseconds
    with its tokens, so that tokens for a byte are what records differ in beside their use."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.keeper: Keeper[str] = Keeper(0, pace)  # its use counts alone; tiers hold the records
        self.now = 0

    def used(self, key: str) -> None:
        self.now += 1
        self.keeper.used(key, self.now)

    def of(self, key: str, record: KVRecord) -> float:
        return self.keeper.rate(key, self.now) * record.num_tokens

    def leaving(
        self, records: OrderedDict[str, KVRecord], key: str, record: KVRecord, needed: int
    ) -> list[str] | None:
        """The records of least worth for their bytes among those longest unused, which free `needed` bytes;
        None where they are worth more than the newcomer, with the margin."""
        if needed <= 0:
            return []
        some = list(islice(records, LOOKED_AT))
        if sum(records[k].nbytes for k in some) < needed:
            some = list(records)
        some.sort(key=lambda k: self.of(k, records[k]) / max(records[k].nbytes, 1))
        leaving, lost = [], 0.0
        for old in some:
            if needed <= 0:
                break
            leaving.append(old)
            lost += self.of(old, records[old])
            needed -= records[old].nbytes
        return leaving if self.of(key, record) >= lost * (1.0 + self.keeper.pace.margin) else None


class Tier:
    """Records by key, bounded by bytes. by: whose worth decides what makes way; None: the longest unused
    does. Not thread-safe by itself."""

    def __init__(self, most: int, by: Worths | None = None) -> None:
        self.most = most  # bytes
        self.by = by
        self.hits = 0
        self.nbytes = 0
        self.records: OrderedDict[str, KVRecord] = OrderedDict()  # least recently used first

    def put(self, key: str, record: KVRecord) -> list[tuple[str, KVRecord]]:
        """Takes a record; returns those that there is no room for, which may be the record itself."""
        self.take(key)
        if record.nbytes > self.most:
            return [(key, record)]
        leaving = self.leaving(key, record)
        if leaving is None:
            return [(key, record)]
        gone = [(old, self.records[old]) for old in leaving]
        for old in leaving:
            self.take(old)
        self.records[key] = record
        self.nbytes += record.nbytes
        return gone

    def leaving(self, key: str, record: KVRecord) -> list[str] | None:
        """Which records make way, worst first; None where this one is worth less than they are."""
        needed = self.nbytes + record.nbytes - self.most
        if self.by is not None:
            return self.by.leaving(self.records, key, record, needed)
        leaving: list[str] = []
        for old, held in self.records.items():
            if needed <= 0:
                break
            leaving.append(old)
            needed -= held.nbytes
        return leaving

    def take(self, key: str) -> KVRecord | None:
        """The record, which is no longer here."""
        record = self.records.pop(key, None)
        self.nbytes -= 0 if record is None else record.nbytes
        return record


class RecordTiers:
    """The device and the host tier. to_device, to_host: how a record gets there; without a way to the device
    that tier is unused, without one to the host records stay as they are. Safe for several threads."""

    def __init__(
        self,
        host_bytes: int,
        device_bytes: int = 0,
        to_device: Move | None = None,
        to_host: Move | None = None,
        eviction: str = "value",
    ) -> None:
        self.worths = Worths() if eviction == "value" else None
        self.device = Tier(0 if to_device is None else device_bytes, self.worths)
        self.host = Tier(host_bytes, self.worths)
        self.asked = 0
        self._to_device, self._to_host = to_device, to_host
        self._lock = threading.Lock()

    @classmethod
    def beside(cls, device: torch.device, config: MemoryConfig) -> RecordTiers:
        """The tiers for an engine on this device; host memory is pinned for CUDA, so that records travel
        beside other work, a layer at a time."""
        if device.type != "cuda":
            return cls(config.host_bytes, eviction=config.eviction)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        def to_device(record: KVRecord) -> KVRecord:
            return send(record.moved(_pinned), device, stream)

        def to_host(record: KVRecord) -> KVRecord:
            return record.moved(_pinned)

        return cls(config.host_bytes, config.device_bytes, to_device, to_host, config.eviction)

    def get(self, key: str) -> KVRecord | None:
        """The record, from the best tier that it fits into from now on; None where only its file is left."""
        with self._lock:
            self.asked += 1
            self._used(key)
            record = self.device.records.get(key)
            if record is not None:
                self.device.records.move_to_end(key)
                self.device.hits += 1
                return record
            record = self.host.take(key)
            if record is None:
                return None
            self.host.hits += 1
            return self._put(key, record, pinned=True)

    def put(self, key: str, record: KVRecord) -> KVRecord:
        """Takes a record that was read or built; returns it as it is held now, or as it came where it is
        worth less than all that would make way."""
        with self._lock:
            self.device.take(key)
            self.host.take(key)
            if self.worths is not None and self.worths.keeper.rate(key, self.worths.now) == 0.0:
                self._used(key)  # built because it was just asked for
            return self._put(key, record, pinned=False)

    def holds(self, key: str) -> str:
        """Where a record is: device, host or disk (which is to say, in no tier)."""
        with self._lock:
            if key in self.device.records:
                return "device"
            return "host" if key in self.host.records else "disk"

    def demote(self, key: str) -> str:
        """Moves a record a tier down, on purpose; returns where it is now."""
        with self._lock:
            record = self.device.take(key)
            if record is not None:
                self._sink(key, record, pinned=False)
            else:
                self.host.take(key)
        return self.holds(key)

    def occupancy(self) -> dict[str, dict[str, float]]:
        """By tier: records, bytes, most bytes, and the share of what was asked for that it had."""
        with self._lock:
            return {
                name: {
                    "records": len(tier.records),
                    "nbytes": tier.nbytes,
                    "most": tier.most,
                    "hit_share": tier.hits / self.asked if self.asked else 0.0,
                }
                for name, tier in (("device", self.device), ("host", self.host))
            }

    def _used(self, key: str) -> None:
        if self.worths is not None:
            self.worths.used(key)

    def drop(self, key: str) -> None:
        """Forgets a record that has ended."""
        with self._lock:
            self.device.take(key)
            self.host.take(key)

    def clear(self) -> None:
        """Forgets all of them."""
        with self._lock:
            for tier in (self.device, self.host):
                tier.records.clear()
                tier.nbytes = 0

    def _put(self, key: str, record: KVRecord, pinned: bool) -> KVRecord:
        if self._to_device is None or record.nbytes > self.device.most:
            return self._sink(key, record, pinned)
        if self.device.leaving(key, record) is None:  # others are worth more
            return self._sink(key, record, pinned)
        moved = self._to_device(record)
        for other, old in self.device.put(key, moved):
            self._sink(other, old, pinned=False)
        return moved

    def _sink(self, key: str, record: KVRecord, pinned: bool) -> KVRecord:
        """Into host memory, if it fits at all."""
        if record.nbytes <= self.host.most:
            if self._to_host is not None and not pinned:
                record = self._to_host(record)
            self.host.put(key, record)
        return record


def _pinned(tensor: Tensor) -> Tensor:
    if tensor.is_pinned():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
