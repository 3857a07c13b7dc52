"""What the kernels know of adapters: deltas packed for reading, slots that hold them, rows by adapter.

A slot is one pointer. What it leads to is complete before the pointer is written, so that exchanging an
adapter is one write, and a captured graph, which reads the pointer when it runs, sees the new one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memos_engine.errors import KernelContractError

PARTS = ("q", "k", "v", "o", "gate", "up", "down")
BLOCK = 32  # outputs of b that lie together
SEGMENT_ROWS = 16  # most rows of one segment
_WORDS = 3  # of a descriptor: address of a, address of b, rank and scale
_ALIGN = 64  # bytes


@dataclass(frozen=True)
class LoraDelta:
    """a `[rank, in]`, b `[ceil(outputs / 32), rank, 32]`, zeros behind the last output: it adds
    `scale * (x @ a.T) @ b.T` for b as `[outputs, rank]`."""

    a: Tensor
    b: Tensor
    outputs: int
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoraFill:
    """An adapter ready for a slot. deltas: by layer and part. words `[layers, 7, 3] int64`: the same for
    kernels. buffer: holds all deltas, one after the other."""

    deltas: Mapping[tuple[int, str], LoraDelta]
    words: Tensor
    buffer: Tensor

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes + self.words.nbytes


class LoraTable:
    """Slots. pointers `[slots] int64`: address of each slot's descriptors, 0 for an empty one; the tensor
    stays where it is. max_rank: no delta has a larger one."""

    def __init__(self, slots: int, layers: int, max_rank: int, device: torch.device | str = "cpu") -> None:
        self.pointers = torch.zeros(slots, dtype=torch.int64, device=device)
        self.fills: list[LoraFill | None] = [None] * slots
        self.layers, self.max_rank = layers, max_rank
        self._host = None
        if self.pointers.device.type == "cpu":
            self._host = (ctypes.c_int64 * slots).from_address(self.pointers.data_ptr())

    def publish(self, slot: int, fill: LoraFill | None) -> None:
        """One pointer write; None empties the slot."""
        self.fills[slot] = fill
        address = 0 if fill is None else fill.words.data_ptr()
        if self._host is not None:
            self._host[slot] = address
        else:
            self.pointers[slot] = address


@dataclass(frozen=True)
class LoraRows:
    """Rows of a step by adapter; rows that are in no segment have none.

    order `[n] int32`: rows of x, segment by segment, each at most once. start `[S + 1] int32`: range of each
    segment in `order`, ascending from 0. slot `[S] int32`: of its adapter, negative for none. scale
    `[S] float32`: factor on that adapter's deltas. A segment has at most `SEGMENT_ROWS` rows.
    """

    order: Tensor
    start: Tensor
    slot: Tensor
    scale: Tensor


def pack(
    modules: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]],
    layers: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    buffer: Tensor | None = None,
) -> LoraFill:
    """Deltas `(a [rank, in], b [out, rank], scale)` by layer and part, rounded to `dtype`, in one buffer.

    buffer: flat, of this dtype and device; a new one by default.
    """
    device = torch.device(device)
    size = packed_size({key: (a.shape, b.shape) for key, (a, b, _) in modules.items()}, dtype)
    if buffer is None:
        buffer = torch.zeros(size, dtype=dtype, device=device)  # gaps included: it can be summed
    if buffer.numel() < size or buffer.dtype != dtype:
        raise KernelContractError(
            f"An adapter of {size} elements does not fit its buffer of {buffer.numel()}."
        )
    step = _ALIGN // dtype.itemsize
    words = np.zeros((layers, len(PARTS), _WORDS), dtype=np.int64)
    low, base = words.view(np.int32), buffer.data_ptr()  # little-endian: rank, then scale
    deltas: dict[tuple[int, str], LoraDelta] = {}
    at = 0
    for (layer, part), (a, b, scale) in modules.items():
        (rank, inputs), outputs = a.shape, b.shape[0]
        blocks = -(-outputs // BLOCK)
        end = at + rank * inputs
        to_b = -(-end // step) * step
        end_b = to_b + blocks * rank * BLOCK
        delta = LoraDelta(
            buffer[at:end].view(rank, inputs), buffer[to_b:end_b].view(blocks, rank, BLOCK), outputs, scale
        )
        deltas[layer, part] = delta
        index = PARTS.index(part)
        words[layer, index, :2] = base + at * dtype.itemsize, base + to_b * dtype.itemsize
        low[layer, index, 4] = rank
        low[layer, index, 5] = np.float32(scale).view(np.int32)
        at = -(-end_b // step) * step
    if not _pack_native(modules, deltas, dtype, device):
        for key, (a, b, _) in modules.items():
            deltas[key].a.copy_(a)
            deltas[key].b.copy_(_blocked(b))
    return LoraFill(deltas, torch.from_numpy(words).to(device), buffer)


def packed_size(
    shapes: Mapping[tuple[int, str], tuple[Sequence[int], Sequence[int]]], dtype: torch.dtype
) -> int:
    """Elements that `pack` needs for these shapes of a and b."""
    step = _ALIGN // dtype.itemsize
    total = 0
    for (rank, inputs), (outputs, _) in shapes.values():
        for count in (rank * inputs, -(-outputs // BLOCK) * rank * BLOCK):
            total += -(-count // step) * step
    return total


def unblocked(delta: LoraDelta) -> Tensor:
    """b `[outputs, rank]` again."""
    return delta.b.transpose(1, 2).reshape(-1, delta.rank)[: delta.outputs]


def _blocked(b: Tensor) -> Tensor:
    outputs, rank = b.shape
    padded = torch.nn.functional.pad(b, (0, 0, 0, -outputs % BLOCK))
    return padded.view(-1, BLOCK, rank).transpose(1, 2)


def _pack_native(
    modules: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]],
    deltas: Mapping[tuple[int, str], LoraDelta],
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Packs in one native call, where the tensors and the build allow it."""
    from memos_engine.ops.backend import backend_for

    dtypes = {t.dtype for a, b, _ in modules.values() for t in (a, b)}
    plain = all(t.is_contiguous() and t.device.type == "cpu" for a, b, _ in modules.values() for t in (a, b))
    if device.type != "cpu" or len(dtypes) != 1 or not plain or backend_for(device).NAME != "native":
        return False
    from memos_engine.ops.cpu_native import DTYPES, native

    source = dtypes.pop()
    if source not in DTYPES or dtype not in DTYPES:
        return False
    jobs = np.empty((len(modules), 7), dtype=np.int64)
    for job, (key, (a, b, _)) in zip(jobs, modules.items(), strict=True):
        to = deltas[key]
        job[:] = (
            *(a.data_ptr(), b.data_ptr(), to.a.data_ptr(), to.b.data_ptr()),
            *(a.shape[0], a.shape[1], b.shape[0]),
        )
    threads = torch.get_num_threads()
    native.lora_pack(jobs.ctypes.data, len(jobs), DTYPES[source], DTYPES[dtype], threads)
    return True
