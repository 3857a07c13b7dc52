"""What the kernels know of adapters: deltas packed for reading, slots that hold them, rows by adapter.

A slot is one pointer. What it leads to is complete before the pointer is written, so that exchanging an
adapter is one write, and a captured graph, which reads the pointer when it runs, sees the new one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memos_engine.errors import KernelContractError
from memos_engine.ops.pages import huge_zeros

PARTS = ("q", "k", "v", "o", "gate", "up", "down")
BLOCK = 32  # outputs of b that lie together
SEGMENT_ROWS = 16  # most rows of one segment
_WORDS = 3  # of a descriptor: address of a, address of b, rank and scale
_STEP = 32  # elements that matrices begin at multiples of, whatever their dtype


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
class LoraLayout:
    """Where deltas lie in one flat tensor, one after the other, a before b; the same in every dtype.

    modules `[n, 5] int64`: layer, index in `PARTS`, rank, inputs, outputs. scales `[n] float32`.
    """

    modules: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, modules: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]]) -> LoraLayout:
        """Of deltas `(a [rank, in], b [out, rank], scale)`."""
        rows = [(k[0], PARTS.index(k[1]), *a.shape, b.shape[0]) for k, (a, b, _) in modules.items()]
        scales = np.asarray([scale for *_, scale in modules.values()], dtype=np.float32)
        return cls(np.asarray(rows, dtype=np.int64).reshape(-1, 5), scales)

    @cached_property
    def offsets(self) -> np.ndarray:
        """`[n, 2] int64`, in elements: where each a and b begin."""
        _, _, rank, inputs, outputs = self.modules.T
        counts = np.stack([rank * inputs, -(-outputs // BLOCK) * rank * BLOCK], axis=1)
        ends = np.cumsum(-(-counts // _STEP) * _STEP)
        return np.concatenate([[0], ends])[:-1].reshape(-1, 2)

    @cached_property
    def size(self) -> int:
        """Elements of all."""
        if not len(self.modules):
            return 0
        rank, outputs = int(self.modules[-1, 2]), int(self.modules[-1, 4])
        return int(self.offsets[-1, 1]) + -(-outputs // BLOCK) * rank * BLOCK

    @cached_property
    def keys(self) -> dict[tuple[int, str], int]:
        """Row of `modules` by layer and part."""
        return {(layer, PARTS[part]): i for i, (layer, part) in enumerate(self.modules[:, :2].tolist())}

    def delta(self, flat: Tensor, row: int) -> LoraDelta:
        """Views of one delta."""
        _, _, rank, inputs, outputs = self.modules[row].tolist()
        to_a, to_b = self.offsets[row].tolist()
        blocks = -(-outputs // BLOCK)
        return LoraDelta(
            flat[to_a : to_a + rank * inputs].view(rank, inputs),
            flat[to_b : to_b + blocks * rank * BLOCK].view(blocks, rank, BLOCK),
            outputs,
            float(self.scales[row]),
        )

    def words(self, flat: Tensor, layers: int) -> Tensor:
        """Descriptors `[layers, 7, 3] int64` of deltas in `flat`, on its device."""
        words = np.zeros((layers, len(PARTS), _WORDS), dtype=np.int64)
        low = words.view(np.int32)  # little-endian: rank, then scale
        layer, part, rank = self.modules[:, 0], self.modules[:, 1], self.modules[:, 2]
        words[layer, part, :2] = self.offsets * flat.element_size() + flat.data_ptr()
        low[layer, part, 4], low[layer, part, 5] = rank, self.scales.view(np.int32)
        return torch.from_numpy(words).to(flat.device)


@dataclass(frozen=True)
class LoraFill:
    """An adapter ready for a slot. words `[layers, 7, 3] int64`: descriptors. buffer: flat, all deltas."""

    layout: LoraLayout
    words: Tensor
    buffer: Tensor

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes + self.words.nbytes

    @cached_property
    def deltas(self) -> Mapping[tuple[int, str], LoraDelta]:
        """By layer and part; views of `buffer`."""
        return {key: self.layout.delta(self.buffer, row) for key, row in self.layout.keys.items()}


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
    views: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)  # a backend's, by table


def pack(
    modules: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]],
    layers: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    buffer: Tensor | None = None,
) -> LoraFill:
    """Deltas `(a [rank, in], b [out, rank], scale)` by layer and part, rounded to `dtype`, in one buffer.

    buffer: flat, of this dtype and device, zeros; a new one by default.
    """
    device = torch.device(device)
    layout = LoraLayout.of(modules)
    if buffer is None:
        buffer = _room(layout.size, dtype, device)
    if buffer.numel() < layout.size or buffer.dtype != dtype:
        raise KernelContractError(
            f"An adapter of {layout.size} elements does not fit its buffer of {buffer.numel()}."
        )
    fill = LoraFill(layout, layout.words(buffer, layers), buffer)
    if not _pack_native(modules, fill, dtype, device):
        place(modules, layout, buffer)
    return fill


def place(
    modules: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]], layout: LoraLayout, flat: Tensor
) -> None:
    """Copies deltas to their places; gaps stay as they are."""
    for row, (a, b, _) in enumerate(modules.values()):
        delta = layout.delta(flat, row)
        delta.a.copy_(a)
        delta.b.copy_(_blocked(b))


def fill_from(
    layout: LoraLayout,
    flat: Tensor,
    layers: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    buffer: Tensor | None = None,
) -> LoraFill | None:
    """A slot's content from deltas that lie as `layout` says already: one copy. None where a number is NaN
    or infinite, or becomes so in `dtype`; the copy is zeroed then. buffer: zeros of this size; new ones by
    default."""
    if buffer is None:
        buffer = _room(layout.size, dtype, torch.device(device))
    if not _copied(flat[: layout.size], buffer):
        buffer.zero_()
        return None
    return LoraFill(layout, layout.words(buffer, layers), buffer)


def _room(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: with gaps, too, all can be summed."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return huge_zeros(size * dtype.itemsize).view(dtype)


def all_finite(flat: Tensor) -> bool:
    """One sum reads all; only a sum that overflows needs the closer look."""
    return bool(flat.sum(dtype=torch.float32).isfinite() or flat.isfinite().all())


def unblocked(delta: LoraDelta) -> Tensor:
    """b `[outputs, rank]` again."""
    return delta.b.transpose(1, 2).reshape(-1, delta.rank)[: delta.outputs]


def _blocked(b: Tensor) -> Tensor:
    outputs, rank = b.shape
    padded = torch.nn.functional.pad(b, (0, 0, 0, -outputs % BLOCK))
    return padded.view(-1, BLOCK, rank).transpose(1, 2)


def _pack_native(
    modules: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]],
    fill: LoraFill,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Packs in one native call, where the tensors and the build allow it."""
    dtypes = {t.dtype for a, b, _ in modules.values() for t in (a, b)}
    plain = all(t.is_contiguous() and t.device.type == "cpu" for a, b, _ in modules.values() for t in (a, b))
    source = dtypes.pop() if len(dtypes) == 1 else None
    if not plain or source is None or not _native(device, source, dtype):
        return False
    from memos_engine.ops.cpu_native import DTYPES, native

    jobs = np.empty((len(modules), 7), dtype=np.int64)
    jobs[:, :2] = [(a.data_ptr(), b.data_ptr()) for a, b, _ in modules.values()]
    jobs[:, 2:4] = fill.layout.offsets * dtype.itemsize + fill.buffer.data_ptr()
    jobs[:, 4:] = fill.layout.modules[:, 2:]
    threads = torch.get_num_threads()
    native.lora_pack(jobs.ctypes.data, len(jobs), DTYPES[source], DTYPES[dtype], threads)
    return True


def _copied(source: Tensor, to: Tensor) -> bool:
    """Copies and rounds; whether all that arrived is finite."""
    if source.device.type == "cpu" and _native(to.device, source.dtype, to.dtype):
        from memos_engine.ops.cpu_native import DTYPES, native

        dtypes = DTYPES[source.dtype], DTYPES[to.dtype]
        threads = torch.get_num_threads()
        return bool(native.lora_copy(source.data_ptr(), to.data_ptr(), source.numel(), *dtypes, threads))
    to.copy_(source)
    return all_finite(to)


def _native(device: torch.device, *dtypes: torch.dtype) -> bool:
    from memos_engine.ops.backend import backend_for

    if device.type != "cpu" or backend_for(device).NAME != "native":
        return False
    from memos_engine.ops.cpu_native import DTYPES

    return all(dtype in DTYPES for dtype in dtypes)
