"""Records on their way to the device: layer after layer, while the layers before them compute.

The link from host memory to a GPU is an order of magnitude slower than the GPU's own memory. A forward needs
a layer's K and V only when that layer attends, so the copies run on a stream of their own and each layer
waits for its own part alone.
"""

from __future__ import annotations

from typing import Protocol

import torch

from memos_engine.decoder.record import KVRecord


class Arrival(Protocol):
    """What a record's K and V wait for. Everything else of the record is there already."""

    def wait(self, layer: int) -> None:
        """Makes whatever is computed from now on wait until this layer, and all before it, are there."""

    @property
    def done(self) -> bool:
        """Whether all layers are there."""


class StreamArrival:
    """Copies on a CUDA stream, with an event behind each layer."""

    def __init__(self, source: KVRecord) -> None:
        self._source: KVRecord | None = source  # lives until its last byte is read
        self.events: list[torch.cuda.Event] = []

    def wait(self, layer: int) -> None:
        torch.cuda.current_stream().wait_event(self.events[layer])

    @property
    def done(self) -> bool:
        if self._source is not None and self.events[-1].query():  # type: ignore[no-untyped-call]
            self._source = None
        return self._source is None


def send(record: KVRecord, device: torch.device, stream: torch.cuda.Stream) -> KVRecord:
    """Starts to bring a record from pinned memory to a device; returns it as it will be there.

    K and V follow by layers; the small rest is there for all that is computed from now on.
    """
    layers, now = record.k.shape[0], torch.cuda.current_stream(device)
    arrival = StreamArrival(record)
    moved = record.moved(lambda tensor: torch.empty_like(tensor, device=device))
    stream.wait_stream(now)  # this memory may have been in use for something else until now
    with torch.cuda.stream(stream):
        for name, tensor in moved.tensors().items():
            tensor.record_stream(stream)
            if name not in ("k", "v"):
                tensor.copy_(getattr(record, name), non_blocking=True)
        rest = torch.cuda.Event()  # type: ignore[no-untyped-call]
        rest.record(stream)
        for layer in range(layers):
            moved.k[layer].copy_(record.k[layer], non_blocking=True)
            moved.v[layer].copy_(record.v[layer], non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            arrival.events.append(event)
    now.wait_event(rest)
    object.__setattr__(moved, "arrival", arrival)
    return moved
