"""Turns requests into tensors and runs the model. The only place that builds index tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import KVCapture, StepInput
from memos_engine.decoder.model import LlamaDecoder
from memos_engine.decoder.sequence import Sequence, Splice
from memos_engine.decoder.splice import splice


class ModelRunner:
    """A model and its pages."""

    def __init__(self, model: LlamaDecoder, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.device = model.weights.device

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            self.cache.copy_block(source, target)

    def splice(self, seq: Sequence, parts: list[Splice]) -> None:
        """Puts stored K and V where the request wants them."""
        blocks = np.asarray(seq.blocks, dtype=np.int64)
        for part in parts:
            end = part.start + part.record.num_tokens - part.skip
            slots = self._slots(blocks, np.arange(part.start, end))
            splice(self.model, self.cache, part, self._put(slots))

    def run(self, seq: Sequence, rows: list[int], capture: KVCapture | None = None) -> Tensor:
        """Computes the given positions of a request; returns logits `[vocab] float32` of the last row."""
        step = self.step_input(seq, rows)
        last = torch.tensor([len(rows) - 1], device=self.device) if len(rows) > 1 else None
        hidden = self.model.forward(step, self.cache, rows=last, capture=capture)
        return self.model.logits(hidden)[0]

    def step_input(self, seq: Sequence, rows: list[int]) -> StepInput:
        """Index tensors for one request's rows (ascending positions)."""
        positions = np.asarray(rows, dtype=np.int64)
        blocks = np.asarray(seq.blocks, dtype=np.int64)
        tokens = np.asarray([seq.tokens[p] for p in rows], dtype=np.int64)
        return StepInput(
            token_ids=self._put(tokens),
            positions=self._put(positions.astype(np.int32)),
            slot_mapping=self._put(self._slots(blocks, positions)),
            query_start=self._put(np.asarray([0, len(rows)], dtype=np.int32)),
            block_table=self._put(blocks.astype(np.int32)[None, :]),
            seq_lens=self._put(np.asarray([rows[-1] + 1], dtype=np.int32)),
        )

    def _slots(self, blocks: np.ndarray, positions: np.ndarray) -> np.ndarray:
        page = self.cache.page
        slots: np.ndarray = blocks[positions // page] * page + positions % page
        return slots

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
