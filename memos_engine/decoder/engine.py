"""The decoder's engine: `step()` is the whole life of a batch in four lines.

It knows token ids and KV records; not text, users or stores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from memos_engine.config import DecoderConfig, Recompute, SamplingParams
from memos_engine.decoder.adapters import AdapterBinding, AdapterSlots
from memos_engine.decoder.batcher import Batcher, Rows
from memos_engine.decoder.blocks import BlockPool
from memos_engine.decoder.deciding import Decider
from memos_engine.decoder.encoding import SpanEncoder, require_base
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.model import PagedDecoder
from memos_engine.decoder.runner import ModelRunner
from memos_engine.decoder.sampler import Sampler
from memos_engine.decoder.sequence import NOTHING, Sequence, Span, StepOutput, require_known_ids
from memos_engine.decoder.session import Session
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import MemoryInputError

__all__ = ["DecoderEngine", "StepOutput"]


class DecoderEngine:
    """Continuous batching over requests made of text spans and stored KV spans.

    Every method may be called from any thread; whoever calls `step` steps for all.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, config: DecoderConfig | None = None) -> None:
        self.config = config or DecoderConfig()
        self.spec = spec
        page = self.config.page
        tokens = self.config.pool_tokens or min(spec.max_positions, 4096)
        num_blocks = -(-tokens // page) + 1  # one more: the null block
        self.pool = BlockPool(num_blocks, page)
        page_dtype = torch.int8 if self.config.page_dtype == "int8" else weights.dtype
        cache = KVCache(spec, num_blocks, page, page_dtype, weights.device)
        model = PagedDecoder(spec, weights)
        model.int8 = self.config.int8_decode
        self.runner = ModelRunner(model, cache, self.config.max_batch)
        self.adapters = AdapterSlots(spec, weights)
        self.runner.adapters = self.adapters.table
        self.batcher = Batcher(self.pool, spec.max_positions, self.config)
        self._encoder = SpanEncoder(self.batcher, self.runner, self.config)
        self._decider = Decider(self.batcher, self.abort)
        self._lock = threading.RLock()

    @property
    def pool_tokens(self) -> int:
        """Tokens the KV pool holds."""
        return (self.pool.num_blocks - 1) * self.pool.page

    @property
    def kv_dtype(self) -> str:
        """What K and V depend on, as a record's identity names it: the model's dtype, and that of pages where
        it is another, as all layers but the first are computed from what they hold."""
        dtype, pages = self.runner.model.weights.dtype, self.runner.cache.k.dtype
        return str(dtype) if pages == dtype else f"{dtype}, pages {pages}"

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing: no request, or all wait for their callers' tokens."""
        with self._lock:
            return not self.batcher.waiting and all(s.logits is not None for s in self.batcher.running)

    # -- requests --------------------------------------------------------------------------------

    def add_request(
        self,
        spans: Seq[Span],
        params: SamplingParams | None = None,
        root: bytes = b"",
        *,
        sampled: bool = True,
        session: Session | None = None,
        on_output: Callable[[StepOutput], None] | None = None,
        recompute: Recompute = NOTHING,
        start_by: float | None = None,
        adapter: AdapterBinding | None = None,
    ) -> Sequence:
        """Queues a request.

        root: salts the prefix index (one per tenant). sampled: False where the caller chooses the tokens: the
        request then stops at each `logits` until `feed`, and ends by `finish`. session: goes on behind the
        conversation so far; its root counts. on_output: called with each StepOutput, by whichever thread
        steps. recompute: the part of the spliced memories to compute again; earlier requests of a session
        keep what they chose. start_by: on the clock of `time.perf_counter`, when it must be admitted for its
        first token to come in time; who has to start sooner goes first. adapter: acts on its tokens from
        `active_from` on.

        Raises AdapterError for an adapter that does not fit, or stored spans not made under it,
        ContextLengthError or OutOfPagesError for a prompt that can never run, MemoryInputError for ids
        outside the vocabulary, an empty prompt, or a session that is busy or closed.
        """
        require_known_ids(spans, self.spec.vocab_size)
        with self._lock:
            if session is not None:
                session.require_idle()
            seq = Sequence(
                spans,
                params or SamplingParams(),
                session.root if session else root,
                sampled=sampled,
                session=session,
                on_output=on_output,
                recompute=recompute,
                start_by=start_by,
                adapter=adapter,
                layers=self.spec.num_layers,
            )
            sampler = Sampler(seq.params, self.runner.device)
            self.batcher.check(seq)
            self.adapters.bind(seq)
            self.batcher.add(seq)
            self._decider.add(seq, sampler)
            if session is not None:
                session.request = seq
        return seq

    def step(self) -> list[StepOutput]:
        """Admit, run, sample, publish: one forward for all requests that have something to compute.

        An error ends the request it belongs to (finish_reason "error", `sequence.error`); the others go on.
        Empty where nothing was decided: a long prompt's chunk ran, or the engine is idle.
        """
        with self._lock:
            failed = self._admit()
            ready, logits, more = self._forward(self.batcher.next_rows())
            return failed + more + self._decider.decide(ready, logits)

    def generate(
        self,
        spans: Seq[Span],
        params: SamplingParams | None = None,
        root: bytes = b"",
        session: Session | None = None,
        recompute: Recompute = NOTHING,
        start_by: float | None = None,
        adapter: AdapterBinding | None = None,
    ) -> Iterator[StepOutput]:
        """Streams one request's tokens. Closing the iterator early frees its pages. Several threads may do so
        at once: whoever steps, everybody reads their own request."""
        seq = self.add_request(
            spans, params, root, session=session, recompute=recompute, start_by=start_by, adapter=adapter
        )
        seen = 0
        try:
            while seq.finish_reason is None or seen < len(seq.output):
                for token in seq.output[seen:]:
                    seen += 1
                    last = seen == len(seq.output)
                    yield StepOutput(seq, token, seq.finish_reason if last else None)
                if seq.finish_reason is None:
                    self.step()
            if seq.error is not None:
                raise seq.error
        finally:
            self.abort(seq)

    def feed(self, seq: Sequence, token: int) -> None:
        """The caller's choice for a request that waits for a token (`sampled=False`)."""
        with self._lock:
            if seq.logits is None or seq.finish_reason is not None:
                raise MemoryInputError("The request does not wait for a token; step until it has logits.")
            if not 0 <= token < self.spec.vocab_size:
                raise MemoryInputError(f"Token {token} is outside the vocabulary of {self.spec.vocab_size}.")
            if len(seq.tokens) >= self._decider.longest:
                raise MemoryInputError(
                    f"The request has {len(seq.tokens)} tokens, all that the window holds."
                )
            seq.logits = None
            seq.tokens.append(token)
            self.batcher.fed(seq)

    def finish(self, seq: Sequence, reason: str = "stop") -> None:
        """Ends a request of the caller's sampling as a success: its exact pages may be reused."""
        with self._lock:
            if seq.finish_reason is None:
                self._decider.finish(seq, reason)

    def abort(self, seq: Sequence) -> None:
        """Ends a request now, if it has not ended, and returns its pages. Safe to repeat."""
        with self._lock:
            seq.finish_reason = seq.finish_reason or "abort"
            seq.logits = None
            self._decider.forget(seq)
            self.runner.settle()  # its pages may be somebody else's next
            self.batcher.drop(seq)

    def ahead(self) -> list[int]:
        """Prompt rows that each request before a new one still has to compute."""
        with self._lock:
            return self.batcher.ahead()

    def reusable(self, token_ids: Seq[int], root: bytes = b"") -> int:
        """Leading tokens of an exact prompt that are in pages already."""
        with self._lock:
            return self.batcher.reusable(token_ids, root)

    # -- sessions --------------------------------------------------------------------------------

    def open_session(self, root: bytes = b"") -> Session:
        """A conversation that keeps its pages between requests, while nobody else needs them."""
        return Session(root)

    def close_session(self, session: Session) -> None:
        """Ends a conversation and returns its pages. Safe to repeat."""
        with self._lock:
            self.batcher.close_session(session)

    # -- records ---------------------------------------------------------------------------------

    def encode_span(
        self, left: Seq[int], span: Seq[int], adapter: AdapterBinding | None = None
    ) -> tuple[Tensor, Tensor]:
        """K before RoPE and V of `span` behind the tokens `left`: `[layers, tokens, kv_heads, head_dim]`, the
        very bits that a full prefill of both computes.

        They are the base model's: raises AdapterError for an adapter that would change them. Raises
        ContextLengthError or OutOfPagesError for what can never run.
        """
        require_base(adapter, len(left) + len(span), self.spec.num_layers)
        with self._lock:
            return self._encoder.encode_alone(left, span)

    def encode_spans(
        self, left: Seq[int], spans: Seq[Seq[int]], adapter: AdapterBinding | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The same for each of several spans; `left` is computed once, which may change last bits."""
        require_base(adapter, len(left) + max(map(len, spans), default=0), self.spec.num_layers)
        with self._lock:
            return self._encoder.encode_behind(left, spans)

    # -- the pool and the weights ----------------------------------------------------------------

    def grow(self, tokens: int) -> None:
        """Makes the pool hold at least `tokens`. Requests under way keep their pages."""
        with self._lock:
            num_blocks = -(-tokens // self.pool.page) + 1
            if num_blocks > self.pool.num_blocks:
                self.runner.grow(num_blocks, self.pool.used())
                self.pool.grow(num_blocks)

    def use_weights(self, weights: Weights) -> None:
        """Exchanges the weights between two steps. Nothing made with the old ones is used again: requests
        under way and sessions go on as text, computed anew."""
        with self._lock:
            self.adapters.follow(weights)
            self.runner.model.weights = weights
            self.pool.forget()
            self.batcher.as_text()

    def forget_prefixes(self) -> None:
        """Drops all reusable pages."""
        with self._lock:
            self.pool.forget()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page is accounted for and the null block is still zero."""
        with self._lock:
            self.batcher.check_integrity()

    # -- the parts of a step ---------------------------------------------------------------------

    def _admit(self) -> list[StepOutput]:
        """Gives waiting requests their pages and records; returns those that failed on the way."""
        failed: list[StepOutput] = []
        while self.batcher.waiting:
            first = self.batcher.waiting[0]
            start = time.perf_counter()
            try:
                admitted = self.batcher.admit()
                if admitted is None:
                    break
                self.runner.copy_pages(admitted.copies)
                self.runner.splice(first, admitted.splices)
                self.batcher.spliced(admitted)
                first.stats.queue_ms = first.stats.queue_ms or (start - first.stats.created) * 1e3
                first.stats.splice_ms += (time.perf_counter() - start) * 1e3
            except Exception as error:
                failed.append(self._decider.fail(first, error))
            except BaseException:  # an interrupt: the request starts over, should anybody still want it
                self.abort(first)
                raise
        return failed

    def _forward(self, batch: list[Rows]) -> tuple[list[Sequence], Tensor | None, list[StepOutput]]:
        """One forward; returns the requests that now want a token, their logits, and those that failed."""
        if not batch:
            self.runner.settle()
            return [], None, []
        start = time.perf_counter()
        failed: list[StepOutput] = []
        try:
            logits: Tensor | None = self.runner.run(batch)
        except Exception as error:
            if len(batch) == 1:
                return [], None, [self._decider.fail(batch[0][0], error)]
            return self._one_by_one(batch)
        spent = (time.perf_counter() - start) * 1e3
        ready: list[int] = []
        for index, (seq, rows) in enumerate(batch):
            seq.pending = seq.pending[len(rows) :]
            if seq.stats.ttft_ms == 0.0:
                seq.stats.prefill_ms += spent
            if not seq.pending and not self._refine(seq):
                ready.append(index)
        if logits is not None and len(ready) < len(batch):
            logits = logits[ready]
        return [batch[i][0] for i in ready], logits, failed

    def _refine(self, seq: Sequence) -> bool:
        """After a request's first pass: whether it goes on to compute memory tokens again."""
        if seq.probe is None:
            return False
        seq.stats.probe_ms = seq.stats.prefill_ms
        deadline = seq.recompute.deadline_ms
        if deadline is not None and seq.stats.since_created() >= deadline:
            seq.selected, seq.probe = (), None
            return False
        seq.refine()
        seq.stats.computed_tokens += len(seq.pending)
        copies = self.batcher.own(seq, seq.selected or ())
        self.runner.copy_pages(copies or [])
        return copies is None or bool(seq.pending)

    def _one_by_one(self, batch: list[Rows]) -> tuple[list[Sequence], Tensor | None, list[StepOutput]]:
        """After a failed forward: whose fault was it? What a row wrote before is written again."""
        ready: list[Sequence] = []
        found: list[Tensor] = []
        failed: list[StepOutput] = []
        for rows in batch:
            done, logits, bad = self._forward([rows])
            ready += done
            failed += bad
            if logits is not None and done:
                found.append(logits)
        return ready, torch.cat(found) if found else None, failed
