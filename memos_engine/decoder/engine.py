"""The decoder's engine: `step()` is the whole life of a request in five lines.

It knows token ids and KV records; not text, users or stores.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from memos_engine.config import DecoderConfig, SamplingParams
from memos_engine.decoder.batcher import Batcher
from memos_engine.decoder.blocks import BlockPool
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import KVCapture
from memos_engine.decoder.model import LlamaDecoder
from memos_engine.decoder.runner import ModelRunner
from memos_engine.decoder.sampler import Sampler
from memos_engine.decoder.sequence import Sequence, Span, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import MemoryInputError


@dataclass(frozen=True)
class StepOutput:
    """One new token of a request; `finish_reason` is stop, length or None (it goes on)."""

    sequence: Sequence
    token: int
    finish_reason: str | None


class DecoderEngine:
    """Paged-attention decoding of requests made of text spans and stored KV spans.

    One request runs at a time; calls from several threads take turns.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, config: DecoderConfig | None = None) -> None:
        self.config = config or DecoderConfig()
        self.spec = spec
        page = self.config.page
        tokens = self.config.pool_tokens or min(spec.max_positions, 4096)
        num_blocks = -(-tokens // page) + 1  # one more: the null block
        self.pool = BlockPool(num_blocks, page)
        cache = KVCache(spec, num_blocks, page, weights.dtype, weights.device)
        self.runner = ModelRunner(LlamaDecoder(spec, weights), cache)
        self.batcher = Batcher(self.pool, spec.max_positions, self.config.prefill_chunk)
        self._samplers: dict[int, Sampler] = {}
        self._lock = threading.RLock()

    @property
    def pool_tokens(self) -> int:
        """Tokens the KV pool holds."""
        return (self.pool.num_blocks - 1) * self.pool.page

    # -- requests --------------------------------------------------------------------------------

    def add_request(
        self, spans: Seq[Span], params: SamplingParams | None = None, root: bytes = b""
    ) -> Sequence:
        """Queues a request. root: salts the prefix index (one per tenant)."""
        vocab = self.spec.vocab_size
        for span in spans:
            if isinstance(span, TextSpan) and any(not 0 <= t < vocab for t in span.token_ids):
                raise MemoryInputError(f"A token id is outside the model's vocabulary of {vocab}.")
        seq = Sequence(spans, params or SamplingParams(), root)
        with self._lock:
            sampler = Sampler(seq.params, self.runner.device)
            self.batcher.add(seq)
            self._samplers[seq.id] = sampler
        return seq

    def step(self) -> StepOutput | None:
        """Admit, run, sample, publish. Returns a token, or None when there is nothing to do.

        An error ends the request it belongs to (`sequence.error`) and is raised; the others go on.
        """
        with self._lock:
            self._admit()
            seq = self.batcher.running
            if seq is None:
                return None
            try:
                logits = self._forward(seq)
                token = self._samplers[seq.id](logits)
                return self._advance(seq, token)
            except BaseException as error:
                self._fail(seq, error)
                raise

    def generate(
        self, spans: Seq[Span], params: SamplingParams | None = None, root: bytes = b""
    ) -> Iterator[StepOutput]:
        """Streams one request's tokens. Closing the iterator early frees its pages.

        Several threads may do so at once: whoever steps, everybody reads their own request.
        """
        seq = self.add_request(spans, params, root)
        seen = 0
        try:
            while seq.finish_reason is None or seen < len(seq.output):
                for token in seq.output[seen:]:
                    seen += 1
                    last = seen == len(seq.output)
                    yield StepOutput(seq, token, seq.finish_reason if last else None)
                if seq.finish_reason is None:
                    with contextlib.suppress(Exception):  # if it is ours, it is in seq.error
                        self.step()
            if seq.error is not None:
                raise seq.error
        finally:
            self.abort(seq)

    def _fail(self, seq: Sequence, error: BaseException) -> None:
        seq.error = error
        self.abort(seq)

    def abort(self, seq: Sequence) -> None:
        """Ends a request now, if it has not ended, and returns its pages. Safe to repeat."""
        with self._lock:
            seq.finish_reason = seq.finish_reason or "abort"
            self._samplers.pop(seq.id, None)
            self.batcher.drop(seq)

    # -- records ---------------------------------------------------------------------------------

    def encode_span(self, left: Seq[int], span: Seq[int]) -> tuple[Tensor, Tensor]:
        """K before RoPE and V of `span` behind the tokens `left`: `[layers, tokens, kv_heads, head_dim]`.

        A forward of its own: nothing computed inside a request ever becomes a memory's KV.
        """
        seq = Sequence([TextSpan((*left, *span))], SamplingParams())
        with self._lock:
            self.batcher.check(seq)
            seq.blocks = self.pool.allocate(-(-seq.prompt_len // self.pool.page))
            try:
                pages = self.runner.cache.k
                shape = (pages.shape[0], seq.prompt_len, *pages.shape[3:])
                capture = KVCapture(pages.new_empty(shape), pages.new_empty(shape), first=0)
                for start in range(0, seq.prompt_len, self.config.prefill_chunk):
                    capture.first = start
                    end = min(start + self.config.prefill_chunk, seq.prompt_len)
                    self.runner.run(seq, list(range(start, end)), capture)
            finally:
                self.batcher.drop(seq)
        return capture.k[:, len(left) :].contiguous(), capture.v[:, len(left) :].contiguous()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page is accounted for and the null block is still zero."""
        with self._lock:
            held = [self.batcher.running.blocks] if self.batcher.running else []
            self.pool.check_integrity(held)

    # -- the parts of a step ---------------------------------------------------------------------

    def _admit(self) -> None:
        first = self.batcher.waiting[0] if self.batcher.waiting else None
        try:
            admitted = self.batcher.admit()
        except BaseException as error:
            assert first is not None
            self._fail(first, error)
            raise
        if admitted is None:
            return
        seq, splices, copies = admitted
        start = time.perf_counter()
        try:
            self.runner.copy_pages(copies)
            self.runner.splice(seq, splices)
        except BaseException as error:
            self._fail(seq, error)
            raise
        seq.stats.splice_ms = (time.perf_counter() - start) * 1e3

    def _forward(self, seq: Sequence) -> Tensor:
        """All remaining chunks of a prompt, or one decode row; returns the logits that follow."""
        first = seq.stats.ttft_ms == 0.0
        start = time.perf_counter()
        while True:
            logits = self.runner.run(seq, self.batcher.next_rows(seq))
            if not seq.pending:
                break
        if first:
            seq.stats.prefill_ms = (time.perf_counter() - start) * 1e3
        return logits

    def _advance(self, seq: Sequence, token: int) -> StepOutput:
        if seq.stats.ttft_ms == 0.0:
            seq.stats.ttft_ms = seq.stats.since_created()
        computed = len(seq.tokens)
        seq.tokens.append(token)
        if token in seq.params.stop_token_ids:
            seq.finish_reason = "stop"
        elif len(seq.output) >= seq.params.max_new_tokens or len(seq.tokens) >= self._longest():
            seq.finish_reason = "length"
        if seq.finish_reason is not None:
            seq.stats.total_ms = seq.stats.since_created()
            self._samplers.pop(seq.id, None)
            self.batcher.finish(seq, computed)
        return StepOutput(seq, token, seq.finish_reason)

    def _longest(self) -> int:
        return min(self.spec.max_positions, self.pool_tokens)

    def use_weights(self, weights: Weights) -> None:
        """Exchanges the weights between two steps; pages made with the old ones are not reused."""
        with self._lock:
            self.runner.model.weights = weights
            self.pool.forget()

    def forget_prefixes(self) -> None:
        """Drops all reusable pages: the weights changed, or an owner's memories must go."""
        with self._lock:
            self.pool.forget()
