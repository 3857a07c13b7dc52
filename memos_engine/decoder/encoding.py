"""Encodes spans for KV records: forwards of their own, so that nothing computed inside a request ever becomes
a memory's KV."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch
from torch import Tensor

from memos_engine.config import DecoderConfig, SamplingParams
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.batcher import Batcher, Rows
from memos_engine.decoder.layers import KVCapture
from memos_engine.decoder.runner import ModelRunner
from memos_engine.decoder.sequence import Sequence, TextSpan
from memos_engine.errors import AdapterError

# Left contexts have a corner of the prefix index to themselves: no request's pages are found by it.
ROOT = b"memos_engine.left_context"


def require_base(adapter: AdapterBinding | None, end: int, layers: int) -> None:
    """Raises AdapterError where an adapter would change K or V of positions before `end`: what is stored of a
    memory is the base model's, so that it serves whatever adapter acts behind it."""
    if adapter is None or adapter.active_from >= end or not adapter.state(layers):
        return
    raise AdapterError(
        f"K and V are stored as the base model computes them, but adapter {adapter.adapter.digest[:12]} acts "
        f"from position {adapter.active_from} on, and the span ends at {end}. Encode it without, and let "
        f"requests bind theirs behind it (active_from={end} or more), or give the memory as text."
    )


class SpanEncoder:
    """Encodes with whole weights, whatever decoding reads (a capture keeps eight-bit ones out)."""

    def __init__(self, batcher: Batcher, runner: ModelRunner, config: DecoderConfig) -> None:
        self.batcher, self.runner, self.config = batcher, runner, config
        self.pool = batcher.pool

    def encode_alone(self, left: Seq[int], span: Seq[int]) -> tuple[Tensor, Tensor]:
        """K before RoPE and V of `span` behind `left`, all computed as one prompt: the very bits of a full
        prefill. Raises as `encode_behind`."""
        seq = Sequence([TextSpan((*left, *span))], SamplingParams())
        self.batcher.check(seq)
        try:
            self._room(seq, seq.prompt_len)
            ((k, v),) = self._captured([seq], 0)
        finally:
            self.batcher.drop(seq)
        return k[:, len(left) :].contiguous(), v[:, len(left) :].contiguous()

    def encode_behind(self, left: Seq[int], spans: Seq[Seq[int]]) -> list[tuple[Tensor, Tensor]]:
        """K before RoPE and V of each span behind the tokens `left`: `[layers, tokens, kv_heads, head_dim]`.

        Spans share the pages of `left`, which stay in the prefix index while there is room, and forwards.
        Raises ContextLengthError or OutOfPagesError for what can never run.
        """
        whole = [Sequence([TextSpan((*left, *span))], SamplingParams()) for span in spans]
        for seq in whole:
            self.batcher.check(seq)
        out: list[tuple[Tensor, Tensor]] = []
        with self._held(left) as blocks:
            waiting = whole[:]
            while waiting:
                group = self._start(waiting, blocks, len(left))
                try:
                    out += self._captured(group, len(left))
                finally:
                    for seq in group:
                        self.batcher.drop(seq)
        return out

    @contextmanager
    def _held(self, left: Seq[int]) -> Iterator[list[int]]:
        """Pages that hold the left context, computed where the prefix index lacks them."""
        if not left:
            yield []
            return
        seq = Sequence([TextSpan(tuple(left))], SamplingParams(), ROOT)
        try:
            reused = self.batcher.take_over(seq)
            self._room(seq, len(left))
            self._captured([seq], reused)
            self.batcher.publish(seq)
            yield seq.blocks
        finally:
            self.batcher.drop(seq)

    def _start(self, waiting: list[Sequence], left: list[int], length: int) -> list[Sequence]:
        """Takes as many spans as one forward and the pool can hold off the list, at least one."""
        group: list[Sequence] = []
        page, rows = self.pool.page, 0
        whole = length // page  # the left context's last page goes on with the span: it is copied
        while waiting:
            seq = waiting[0]
            rows += seq.prompt_len - length
            pages = -(-seq.prompt_len // page) - whole
            if group and (rows > self.config.prefill_chunk or pages > self.pool.available):
                break
            self.pool.acquire(left[:whole])
            seq.blocks = left[:whole]
            group.append(waiting.pop(0))
            try:
                self._room(seq, seq.prompt_len)
                if length % page:
                    self.runner.copy_pages([(left[whole], seq.blocks[whole])])
            except BaseException:
                for taken in group:
                    self.batcher.drop(taken)
                raise
        return group

    def _captured(self, group: list[Sequence], length: int) -> list[tuple[Tensor, Tensor]]:
        """Computes each sequence from position `length` on; the K and V of just those positions."""
        model, sizes = self.runner.model, [seq.prompt_len - length for seq in group]
        capture = KVCapture.empty(model.spec, model.weights, sum(sizes))
        self._run([(seq, list(range(length, seq.prompt_len))) for seq in group], capture)
        k, v = (torch.split(side, sizes, dim=1) for side in (capture.k, capture.v))
        return [(a.contiguous(), b.contiguous()) for a, b in zip(k, v, strict=True)]

    def _run(self, rows: list[Rows], capture: KVCapture) -> None:
        """All rows in their order, `prefill_chunk` of them a forward."""
        todo = [(seq, wanted) for seq, wanted in rows if wanted]
        while todo:
            step: list[Rows] = []
            room = self.config.prefill_chunk
            while todo and room:
                seq, wanted = todo.pop(0)
                step.append((seq, wanted[:room]))
                if wanted[room:]:
                    todo.insert(0, (seq, wanted[room:]))
                room -= len(step[-1][1])
            self.runner.run(step, capture)
            capture.first += sum(len(wanted) for _, wanted in step)

    def _room(self, seq: Sequence, tokens: int) -> None:
        """Gives a sequence the pages it lacks; idle sessions' pages go first where there are too few."""
        wanted = -(-tokens // self.pool.page) - len(seq.blocks)
        while wanted > self.pool.available and self.batcher.give_session_away():
            pass
        seq.blocks = seq.blocks + self.pool.allocate(wanted)
