"""CUDA graphs: a forward's hundreds of launches recorded once for each size of batch, and replayed as one.

A step is copied into fixed buffers, padded to the next size that has a graph. Padding computes and writes
nothing that anybody reads: its slots are negative, and it looks at the null block or at the keys of its own
request. Steps with adapters have graphs of their own, so that others launch nothing for them; which rows have
which slot is copied in with the rest, and what a slot holds is read when the graph runs.
"""

from __future__ import annotations

import bisect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import StepInput
from memos_engine.decoder.model import PagedDecoder
from memos_engine.decoder.weights import Weights
from memos_engine.ops.lora import SEGMENT_ROWS, LoraRows, LoraTable

log = logging.getLogger("memos_engine")

VARIABLE = "MEMOS_ENGINE_CUDA_GRAPHS"
PREFILL_ROWS = (16, 32, 64, 128, 256)
Replay = Callable[[], object]


@dataclass(frozen=True)
class Graph:
    """One recorded forward. step: its inputs, which must live as long as it does; out `[rows, hidden]`."""

    replay: Replay
    step: StepInput
    out: Tensor


class Recorder(Protocol):
    """The seam to CUDA."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Records `work`; returns what replays it, and the tensor that each replay fills anew."""


class CudaRecorder:
    """Graphs of one device, all in one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        with torch.cuda.device(self.device):
            # Once beside the graph: kernels are compiled and libraries make their workspaces.
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                work()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = work()
        return graph.replay, result


def graph_runner(model: PagedDecoder, cache: KVCache, max_batch: int = 32) -> GraphRunner | None:
    """A GraphRunner where device and kernels allow one, unless `MEMOS_ENGINE_CUDA_GRAPHS=0` forbids it."""
    device = model.weights.device
    allowed = os.environ.get(VARIABLE, "1").strip() != "0"
    if not allowed or device.type != "cuda" or not getattr(model.ops, "CAPTURABLE", False):
        return None
    return GraphRunner(model, cache, max_batch)


class GraphRunner:
    """Runs decoding steps of up to `max_batch` requests, and short prefills of one request, as graphs.

    A size's graph is recorded when a step first needs it, or by `record_all`. New weights or a new `cache`
    drop all graphs, another table of adapters those with adapters; values written into the same tensors need
    no new ones.
    """

    def __init__(
        self,
        model: PagedDecoder,
        cache: KVCache,
        max_batch: int = 32,
        prefill_rows: tuple[int, ...] = PREFILL_ROWS,
        recorder: Recorder | None = None,
    ) -> None:
        device = model.weights.device
        self.model, self.cache = model, cache
        self.batches = _batches(max_batch)
        self.prefill_rows = tuple(sorted(prefill_rows))
        self._recorder = recorder
        self._graphs: dict[tuple[bool, bool, int], Graph] = {}  # by prefill, adapters, rows
        self._recorded_for: tuple[Weights, KVCache] | None = None
        self._table: LoraTable | None = None  # the one that graphs with adapters read
        self._broken: set[bool] = set()  # recording failed, without and with adapters
        rows = max(self.batches[-1], *self.prefill_rows, 1)
        self._buffers = _buffers(
            requests=self.batches[-1],
            rows=rows,
            width=-(-model.spec.max_positions // cache.page),
            device=device,
        )
        self._lora = _lora_buffers(rows, device)
        self._lora_loaded: tuple[Graph, LoraRows] | None = None  # what `_lora` holds

    @torch.inference_mode()
    def run(self, step: StepInput, rows: Tensor | None = None) -> Tensor | None:
        """As `model.forward(step, cache, rows)`; None where no graph fits, so that the caller runs eagerly.

        Every request of a step has a row: as many rows as requests is decoding. A step whose K and V are
        captured for a record must run eagerly.
        """
        requests, tokens = step.seq_lens.shape[0], step.token_ids.shape[0]
        table, adapted = step.lora or (None, None)
        prefill = requests != tokens
        size = _fitting(self.prefill_rows if prefill else self.batches, tokens)
        too_wide = step.block_table.shape[1] > self._buffers.block_table.shape[1]
        if size is None or too_wide or (prefill and requests != 1):
            return None
        if adapted is not None and adapted.slot.shape[0] > _segments(prefill, size):
            return None
        graph = self._graph(prefill, size, table)
        if graph is None:
            return None
        self._load(step, prefill, size)
        if adapted is not None:
            self._load_adapters(graph, adapted)
        graph.replay()
        # A copy: the next step writes over `out`.
        return graph.out[:tokens].clone() if rows is None else graph.out[rows]

    @torch.inference_mode()
    def record_all(self, table: LoraTable | None = None) -> None:
        """Records every size, the largest first: smaller ones then fit into its memory. table: adapters, for
        a second set of graphs where it has slots."""
        for adapters in (None, table) if table is not None and table.fills else (None,):
            for size in reversed(self.prefill_rows):
                self._graph(True, size, adapters)
            for size in reversed(self.batches):
                self._graph(False, size, adapters)

    def drop(self) -> None:
        """Forgets all graphs and their memory."""
        self._graphs.clear()
        self._recorded_for = self._lora_loaded = None

    def _drop_adapted(self) -> None:
        self._graphs = {key: graph for key, graph in self._graphs.items() if not key[1]}
        self._lora_loaded = None

    def _graph(self, prefill: bool, size: int, table: LoraTable | None) -> Graph | None:
        """The graph of one size, recorded if need be; None once recording has failed."""
        now = self._recorded_for
        if now is None or now[0] is not self.model.weights or now[1] is not self.cache:
            self.drop()
            self._recorded_for = (self.model.weights, self.cache)
        with_adapters = table is not None
        if with_adapters and self._table is not table:
            self._drop_adapted()
            self._table = table
        key = (prefill, with_adapters, size)
        if key not in self._graphs and with_adapters not in self._broken:
            try:
                self._graphs[key] = self._record(prefill, size, table)
            except RuntimeError as error:
                off = (
                    "CUDA graphs are off for steps with adapters" if with_adapters else "CUDA graphs are off"
                )
                log.warning("memos_engine: %s, a step could not be recorded: %s", off, error)
                self._broken |= {True} if with_adapters else {True, False}
                self._drop_adapted() if with_adapters else self.drop()
        return self._graphs.get(key)

    def _record(self, prefill: bool, size: int, table: LoraTable | None) -> Graph:
        if self._recorder is None:
            self._recorder = CudaRecorder(self.model.weights.device)
        buffers = self._buffers
        # Nothing is written while recording: every slot is skipped, every row looks at the null block.
        for tensor, idle in zip(_tensors(buffers), (0, 0, -1, 0, 1), strict=True):
            tensor.fill_(idle)
        requests = 1 if prefill else size
        lora = None if table is None else (table, self._idle_adapters(prefill, size))
        device = buffers.token_ids.device
        step = StepInput(
            token_ids=buffers.token_ids[:size],
            positions=buffers.positions[:size],
            slot_mapping=buffers.slot_mapping[:size],
            query_start=torch.arange(0, size + 1, size // requests, dtype=torch.int32, device=device),
            block_table=buffers.block_table[:requests],
            seq_lens=buffers.seq_lens[:requests],
            max_query_len=size // requests,
            lora=lora,
        )
        model, cache = self.model, self.cache
        replay, out = self._recorder.record(lambda: model.forward(step, cache))
        return Graph(replay, step, out)

    def _load(self, step: StepInput, prefill: bool, size: int) -> None:
        """The step into the buffers, and padding up to `size` behind it."""
        buffers = self._buffers
        requests, tokens = step.seq_lens.shape[0], step.token_ids.shape[0]
        buffers.token_ids[:tokens] = step.token_ids
        buffers.positions[:tokens] = step.positions
        buffers.slot_mapping[:tokens] = step.slot_mapping
        buffers.seq_lens[:requests] = step.seq_lens
        buffers.block_table[:requests, : step.block_table.shape[1]] = step.block_table
        if tokens == size:
            return
        padding = slice(tokens, size)
        buffers.token_ids[padding] = 0
        buffers.slot_mapping[padding] = -1
        if prefill:  # more rows of the one request, which see what its last one sees
            buffers.positions[padding] = step.positions[-1:]
        else:  # requests of one key, the null block's
            buffers.positions[padding] = 0
            buffers.seq_lens[padding] = 1
            buffers.block_table[padding, :1] = 0

    def _idle_adapters(self, prefill: bool, size: int) -> LoraRows:
        """Views for one graph, that say that no row has an adapter."""
        lora, segments = self._lora, _segments(prefill, size)
        self._lora_loaded = None
        lora.slot.fill_(-1)
        for tensor in (lora.order, lora.start, lora.scale):
            tensor.zero_()
        return LoraRows(
            lora.order[:size], lora.start[: segments + 1], lora.slot[:segments], lora.scale[:segments]
        )

    def _load_adapters(self, graph: Graph, rows: LoraRows) -> None:
        """The rows by adapter into a graph's views, and segments of nothing behind them. The same ones are
        there already: the runner keeps them while steps have the same."""
        there = self._lora_loaded
        if graph.step.lora is None or (there is not None and there[0] is graph and there[1] is rows):
            return
        into, segments, count = graph.step.lora[1], rows.slot.shape[0], rows.order.shape[0]
        into.order[:count] = rows.order
        into.start[: segments + 1] = rows.start
        into.start[segments + 1 :] = count
        into.slot[:segments] = rows.slot
        into.slot[segments:] = -1
        into.scale[:segments] = rows.scale
        self._lora_loaded = graph, rows


def _batches(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8 and so on up to `most`, which is one of them."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return (*powers, most)


def _fitting(sizes: tuple[int, ...], count: int) -> int | None:
    at = bisect.bisect_left(sizes, count)
    return sizes[at] if count and at < len(sizes) else None


def _segments(prefill: bool, rows: int) -> int:
    """Most segments of a step: each request may have an adapter of its own."""
    return -(-rows // SEGMENT_ROWS) if prefill else rows


def _lora_buffers(rows: int, device: torch.device) -> LoraRows:
    order, start, slot = (torch.zeros(n, dtype=torch.int32, device=device) for n in (rows, rows + 1, rows))
    return LoraRows(order, start, slot, torch.zeros(rows, device=device))


def _buffers(requests: int, rows: int, width: int, device: torch.device) -> StepInput:
    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return StepInput(
        token_ids=empty(torch.int64, rows),
        positions=empty(torch.int32, rows),
        slot_mapping=empty(torch.int64, rows),
        query_start=empty(torch.int32, 0),  # each graph has its own
        block_table=empty(torch.int32, requests, width),
        seq_lens=empty(torch.int32, requests),
    )


def _tensors(step: StepInput) -> tuple[Tensor, ...]:
    return (step.token_ids, step.positions, step.slot_mapping, step.block_table, step.seq_lens)
