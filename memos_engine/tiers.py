"""Where records that were used wait to be used again: on the device, in host memory, else on disk.

A record is in one tier at a time. Use brings it to the device, where there is one; what there is no room for
sinks, least recently used first, to host memory and from there out of it: its file in the vault remains.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from memos_engine.config import MemoryConfig
from memos_engine.decoder.arrival import send
from memos_engine.decoder.record import KVRecord

Move = Callable[[KVRecord], KVRecord]


class Tier:
    """Records by key, bounded by bytes. Not thread-safe by itself."""

    def __init__(self, most: int) -> None:
        self.most = most  # bytes
        self.nbytes = 0
        self.records: OrderedDict[str, KVRecord] = OrderedDict()  # least recently used first

    def put(self, key: str, record: KVRecord) -> list[tuple[str, KVRecord]]:
        """Takes a record; returns those that there is no room for, which may be the record itself."""
        self.take(key)
        if record.nbytes > self.most:
            return [(key, record)]
        self.records[key] = record
        self.nbytes += record.nbytes
        gone = []
        while self.nbytes > self.most:
            oldest = next(iter(self.records))
            gone.append((oldest, self.records[oldest]))
            self.take(oldest)
        return gone

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
    ) -> None:
        self.device = Tier(0 if to_device is None else device_bytes)
        self.host = Tier(host_bytes)
        self._to_device, self._to_host = to_device, to_host
        self._lock = threading.Lock()

    @classmethod
    def beside(cls, device: torch.device, config: MemoryConfig) -> RecordTiers:
        """The tiers for an engine on this device; host memory is pinned for CUDA, so that records travel
        beside other work, a layer at a time."""
        if device.type != "cuda":
            return cls(config.host_bytes)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        def to_device(record: KVRecord) -> KVRecord:
            return send(record.moved(_pinned), device, stream)

        return cls(config.host_bytes, config.device_bytes, to_device, lambda record: record.moved(_pinned))

    def get(self, key: str) -> KVRecord | None:
        """The record, from the best tier that it fits into from now on; None where only its file is left."""
        with self._lock:
            record = self.device.take(key)
            if record is not None:
                self.device.put(key, record)
                return record
            record = self.host.take(key)
            return None if record is None else self._put(key, record, pinned=True)

    def where(self, key: str) -> str:
        """The tier that holds a record: device, host, or disk where only its file is left."""
        with self._lock:
            return "device" if key in self.device.records else "host" if key in self.host.records else "disk"

    def put(self, key: str, record: KVRecord) -> KVRecord:
        """Takes a record that was read or built; returns it as it is held now."""
        with self._lock:
            self.device.take(key)
            self.host.take(key)
            return self._put(key, record, pinned=False)

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
