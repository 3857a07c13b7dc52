"""Turns requests into tensors and runs the model. The only place that builds index tensors."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from memos_engine.decoder.batcher import Rows
from memos_engine.decoder.graphs import graph_runner
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import KVCapture, ProbeInput, StepInput
from memos_engine.decoder.model import PagedDecoder
from memos_engine.decoder.recompute import Probe
from memos_engine.decoder.sequence import Sequence, Splice
from memos_engine.decoder.splice import require_fitting, splice
from memos_engine.ops.lora import SEGMENT_ROWS, LoraRows, LoraTable


class ModelRunner:
    """A model and its pages. max_batch: most requests of a step that is worth a CUDA graph."""

    def __init__(self, model: PagedDecoder, cache: KVCache, max_batch: int = 32) -> None:
        self.model = model
        self.cache = cache
        self.graphs = graph_runner(model, cache, max_batch)
        self.device = model.weights.device
        self.adapters: LoraTable | None = None  # slots that requests' `slot` counts in
        self._lora_kept: tuple[list[tuple[int, float, int, int]], LoraRows] | None = None
        self._arriving: list[tuple[Splice, Tensor]] = []  # with their slots; the next forward writes them

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            self.settle()
        for source, target in copies:
            self.cache.copy_block(source, target)

    def splice(self, seq: Sequence, parts: list[Splice]) -> None:
        """Puts stored K and V where the request wants them; of records that are still on their way to the
        device, the next forward does it layer by layer."""
        blocks = np.asarray(seq.blocks, dtype=np.int64)
        for part in parts:
            slots = self._slots(blocks, np.arange(part.start, part.start + part.count))
            require_fitting(self.model, part.record)
            if part.record.arrival is None or part.record.arrival.done:
                splice(self.model, self.cache, part, self._put(slots))
            else:
                self._arriving.append((part, self._put(slots)))

    def settle(self) -> None:
        """Whatever was to be spliced is in its pages after this: before anything but a forward uses them."""
        for layer in range(self.model.spec.num_layers if self._arriving else 0):
            self._splice_layer(layer)
        self._arriving.clear()

    def _splice_layer(self, layer: int) -> None:
        for part, slots in self._arriving:
            if part.record.arrival is not None:
                part.record.arrival.wait(layer)
            splice(self.model, self.cache, part, slots, layer)

    def run(self, batch: Seq[Rows], capture: KVCapture | None = None) -> Tensor:
        """Computes rows of several requests in one forward.

        Returns logits `[n, vocab] float32` of the last row of each of the n requests. Rows of a request's
        query add to its probe's scores, where it has one.
        """
        step = self.step_input(batch)
        probed = self._probe(step, batch)
        single = len(batch) == step.token_ids.shape[0]  # one row each: all of them are last ones
        last = None if single else step.query_start[1:].long() - 1
        hidden = None
        before = self._splice_layer if self._arriving else None
        if self.graphs is not None and capture is None and step.probe is None and before is None:
            hidden = self.graphs.run(step, last)
        if hidden is None:
            hidden = self.model.forward(step, self.cache, rows=last, capture=capture, before=before)
        self._arriving.clear()
        if step.probe is not None:  # added only now: a forward that failed leaves nothing behind
            sizes = [len(probe.positions) for probe in probed]
            for probe, scores in zip(probed, torch.split(step.probe.scores, sizes), strict=True):
                probe.scores += scores.to(probe.scores.device)
        return self.model.logits(hidden)

    def _probe(self, step: StepInput, batch: Seq[Rows]) -> list[Probe]:
        """Fills `step.probe` for requests whose query runs while they still probe; returns their probes."""
        query = [s.probe is not None and rows[-1] >= s.probe.first_row for s, rows in batch]
        if not any(query):
            return []
        probes, slots, starts, counted = [], [], [0], []
        for (seq, rows), probing in zip(batch, query, strict=True):
            probe = seq.probe if probing else None
            positions = np.asarray([] if probe is None else probe.positions, dtype=np.int64)
            slots.append(self._slots(np.asarray(seq.blocks, dtype=np.int64), positions))
            starts.append(starts[-1] + len(positions))
            counted += [probe is not None and p >= probe.first_row for p in rows]
            probes += [] if probe is None else [probe]
        weights = [probe.weight.to(self.device) for probe in probes]
        weight = weights[0] if len(probes) == 1 else torch.cat(weights, dim=1)
        key_pos = np.asarray([p for probe in probes for p in probe.positions], dtype=np.int32)
        step.probe = ProbeInput(
            q_pos=torch.where(self._put(np.asarray(counted)), step.positions, -1),
            key_slots=self._put(np.concatenate(slots)),
            key_pos=self._put(key_pos),
            key_start=self._put(np.asarray(starts, dtype=np.int32)),
            weight=weight,
            scores=torch.zeros(len(key_pos), dtype=torch.float32, device=self.device),
        )
        return probes

    def step_input(self, batch: Seq[Rows]) -> StepInput:
        """Index tensors for rows (ascending positions) of several requests; shorter block tables end in the
        null block."""
        counts = [len(rows) for _, rows in batch]
        lists = [seq.blocks for seq, _ in batch]
        table = np.zeros((len(batch), max(map(len, lists))), dtype=np.int32)
        for row, blocks in zip(table, lists, strict=True):
            row[: len(blocks)] = blocks
        positions = np.asarray([p for _, rows in batch for p in rows], dtype=np.int64)
        request = np.repeat(np.arange(len(batch)), counts)
        page = self.cache.page
        slots = table[request, positions // page].astype(np.int64) * page + positions % page
        start = np.zeros(len(batch) + 1, dtype=np.int32)
        np.cumsum(counts, out=start[1:])
        return StepInput(
            token_ids=self._put(np.asarray([s.tokens[p] for s, rows in batch for p in rows], dtype=np.int64)),
            positions=self._put(positions.astype(np.int32)),
            slot_mapping=self._put(slots),
            query_start=self._put(start),
            block_table=self._put(table),
            seq_lens=self._put(np.asarray([rows[-1] + 1 for _, rows in batch], dtype=np.int32)),
            max_query_len=max(counts),
            dense=len(batch) == 1 and batch[0][1][-1] + 1 == counts[0],  # ascending: all from 0 on
            lora=self._lora(batch),
        )

    def _lora(self, batch: Seq[Rows]) -> tuple[LoraTable, LoraRows] | None:
        """Rows by adapter and scale, in segments; None where no row has one. Kept while the next steps have
        the same: in decoding, until a request comes, ends, or passes its `active_from`."""
        spans: list[tuple[int, float, int, int]] = []  # slot, scale, first and last row
        first = 0
        for seq, rows in batch:
            if seq.adapter is not None and seq.slot >= 0 and rows[-1] >= seq.adapter.active_from:
                active = first + bisect_left(rows, seq.adapter.active_from)  # rows ascend
                spans.append((seq.slot, seq.adapter.scale, active, first + len(rows)))
            first += len(rows)
        if not spans or self.adapters is None:
            return None
        if self._lora_kept is None or self._lora_kept[0] != spans:
            self._lora_kept = spans, self._lora_rows(spans)
        return self.adapters, self._lora_kept[1]

    def _lora_rows(self, spans: Seq[tuple[int, float, int, int]]) -> LoraRows:
        groups: dict[tuple[int, float], list[int]] = {}
        for slot, scale, begin, end in spans:
            groups.setdefault((slot, scale), []).extend(range(begin, end))
        segments = [
            (slot, scale, rows[at : at + SEGMENT_ROWS])
            for (slot, scale), rows in groups.items()
            for at in range(0, len(rows), SEGMENT_ROWS)
        ]
        start = np.cumsum([0, *(len(rows) for _, _, rows in segments)])
        return LoraRows(
            order=self._put(np.asarray([row for *_, rows in segments for row in rows], dtype=np.int32)),
            start=self._put(start.astype(np.int32)),
            slot=self._put(np.asarray([slot for slot, _, _ in segments], dtype=np.int32)),
            scale=self._put(np.asarray([scale for _, scale, _ in segments], dtype=np.float32)),
        )

    def grow(self, num_blocks: int, used: list[int]) -> None:
        """Moves to a larger cache; the content of the `used` blocks goes along."""
        self.settle()
        old = self.cache
        self.cache = KVCache(self.model.spec, num_blocks, old.page, old.k.dtype, old.k.device)
        self.cache.take(old, used)
        if self.graphs is not None:
            self.graphs.cache = self.cache

    def _slots(self, blocks: np.ndarray, positions: np.ndarray) -> np.ndarray:
        page = self.cache.page
        slots: np.ndarray = blocks[positions // page] * page + positions % page
        return slots

    def _put(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor if self.device.type == "cpu" else tensor.to(self.device)
