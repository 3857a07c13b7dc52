"""MemoryEngine: a model, a store, and the way of a request between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from memos_engine.activation import ActivationMemory
from memos_engine.background import Background
from memos_engine.canary import Canary
from memos_engine.chats import Chat, Chats
from memos_engine.config import SYSTEM_PROMPT, DecoderConfig, MemoryConfig, Recompute, SamplingParams
from memos_engine.decoder.engine import DecoderEngine, StepOutput
from memos_engine.decoder.live import LiveWeights
from memos_engine.decoder.sequence import Stats, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import (
    MemosEngineError,
    StoreError,
)
from memos_engine.memory.costs import CostTable
from memos_engine.memory.embed import Embedder, default_embedder
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import Candidate, MemOperator
from memos_engine.memory.store import MemoryStore
from memos_engine.models import resolve
from memos_engine.parameter import AdapterUse, ParameterMemory
from memos_engine.preparing import Ask, Preparer
from memos_engine.prompt import PromptLayout, eos_ids, load_tokenizer
from memos_engine.reply import Prepared
from memos_engine.user import UserMemory

log = logging.getLogger("memos_engine")


class MemoryEngine:
    """A decoder with memory. `open` loads a model; `from_model` shares a live transformers model."""

    def __init__(
        self,
        decoder: DecoderEngine,
        tokenizer: Any,
        store: MemoryStore | None,
        *,
        embedder: Embedder | None = None,
        memory: MemoryConfig | None = None,
        system_prompt: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.layout = PromptLayout(tokenizer, system_prompt)
        self.store = store
        self.config = memory or MemoryConfig()
        self.eos_token_ids = tuple(eos_token_ids)
        self.activation: ActivationMemory | None = None
        self.parameter: ParameterMemory | None = None
        self.live: LiveWeights | None = None
        self.chats = Chats(decoder)
        self._embedder = embedder
        self._operator: MemOperator | None = None
        if store is not None:
            self.activation = ActivationMemory(decoder, self.layout, store, self.config)
            self.parameter = ParameterMemory(decoder, store)
        self.preparer = Preparer(decoder, self.layout, self.activation, self.config, self.parameter)
        self.canary = Canary(decoder, self.config.canary, self.config.canary_kl)
        self.background: Background | None = None
        if self.activation is not None:
            self.background = Background(self.activation, self._costs)

    @classmethod
    def open(
        cls,
        model: str | Path = "smollm2",
        store: str | Path | None = None,
        *,
        decoder: DecoderConfig | None = None,
        memory: MemoryConfig | None = None,
        embedder: Embedder | None = None,
        system_prompt: str | None = SYSTEM_PROMPT,
    ) -> MemoryEngine:
        """Opens a pulled model (alias, hub id or folder) and a store directory (made if missing).

        system_prompt: part of the anchor, so of every record's identity; None takes the template's own.

        Raises ModelFilesError when the model was not pulled, UnsupportedModelError when the decoder cannot
        run it, StoreError when the directory cannot be used.
        """
        folder = resolve(str(model))
        spec = ModelSpec.from_folder(folder)
        settings = decoder or DecoderConfig()
        opened = None if store is None else MemoryStore.open(store)
        try:
            weights = Weights.from_folder(folder, spec, getattr(torch, settings.resolved_dtype))
            tokenizer = load_tokenizer(folder)
            return cls(
                DecoderEngine(spec, weights, settings),
                tokenizer,
                opened,
                embedder=embedder,
                memory=memory,
                system_prompt=system_prompt,
                eos_token_ids=eos_ids(folder) or _as_tuple(tokenizer.eos_token_id),
            )
        except BaseException:
            if opened is not None:
                opened.close()
            raise

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        store: str | Path | None = None,
        *,
        decoder: DecoderConfig | None = None,
        memory: MemoryConfig | None = None,
        embedder: Embedder | None = None,
    ) -> MemoryEngine:
        """An engine over a live transformers model; parameters are shared, not copied."""
        spec = ModelSpec.from_config(model.config, type(model).__name__)
        engine = DecoderEngine(spec, Weights.from_model(model, spec), decoder)
        eos = model.generation_config.eos_token_id if model.generation_config else None
        opened = None if store is None else MemoryStore.open(store)
        try:
            made = cls(
                engine,
                tokenizer,
                opened,
                embedder=embedder,
                memory=memory,
                eos_token_ids=_as_tuple(eos) or _as_tuple(tokenizer.eos_token_id),
            )
            made.live = LiveWeights(model)
            return made
        except BaseException:
            if opened is not None:
                opened.close()
            raise

    def user(self, name: str, tenant: str = "default") -> UserMemory:
        """The memories of one user; nobody else's can be seen through it."""
        return UserMemory(self, Principal(tenant, name))

    def close(self) -> None:
        """Ends what works in the background at its next step, and closes the store."""
        if self.background is not None:
            self.background.stop()
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> MemoryEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def refresh(self) -> None:
        """Follows a live model whose weights have changed. Every request and every build begins with it."""
        if self.live is not None:
            self.live.refresh(self.decoder)

    def ready(self) -> MemoryEngine:
        """Does now what the first request would otherwise wait for; returns the engine.

        Loads the embedder, hashes the weights (about a second a gigabyte), computes the anchor, runs one
        forward. Worth it in a server or a benchmark.
        """
        if self.activation is not None:
            self.embedder.embed(["warm up"])
            _ = self.layout.digest, self.decoder.runner.model.weights.digest
            self.activation.anchor()
        list(self.decoder.generate([TextSpan(self.layout.query("Hello"))], SamplingParams(max_new_tokens=2)))
        return self

    # -- the way of a request --------------------------------------------------------------------

    @property
    def embedder(self) -> Embedder:
        """The sentence embedder, loaded at first use."""
        if self._embedder is None:
            self._embedder = default_embedder()
        return self._embedder

    @property
    def operator(self) -> MemOperator:
        """Retrieval over the store."""
        if self._operator is None:
            self._operator = MemOperator(self.opened_store, self.embedder)
        return self._operator

    @property
    def opened_store(self) -> MemoryStore:
        if self.store is None:
            raise StoreError("This engine has no store. Open it with store=<directory> to use memories.")
        return self.store

    def prepare(
        self,
        principal: Principal,
        query: str,
        head: tuple[int, ...],
        tail: tuple[int, ...],
        ask: Ask = Ask(),  # noqa: B008 - frozen
        chat: Chat | None = None,
        start: float | None = None,
    ) -> Prepared:
        """Retrieves, plans and lays out: head | memories | tail.

        head: ids in front of the memories (the anchor, perhaps history); tail: ids behind them. chat: the
        conversation that all this goes behind; memories that it holds already are not put in again. start:
        when the call began, by `time.perf_counter` (default: now).
        """
        start = time.perf_counter() if start is None else start
        self.refresh()

        def recall(k: int) -> list[Candidate]:
            return self.operator.recall(principal, query, k=k)

        found = None if self.store is None else recall
        return self.preparer.prepare(principal, found, head, tail, replace(ask, query=query), chat, start)

    def salt(self, principal: Principal) -> bytes:
        """What keeps this principal's pages apart from all others'."""
        return b"" if self.activation is None else self.activation.salt(principal)

    def run(
        self,
        prepared: Prepared,
        params: SamplingParams,
        on_token: Callable[[StepOutput], None] | None = None,
        chat: Chat | None = None,
        adapter: AdapterUse | None = None,
    ) -> tuple[list[int], Stats, str]:
        """Decodes a prepared request, the adapter (default: the plan's) active from its last span on. Returns
        the answer's ids without a stop token, what it cost, and the finish reason (stop or length)."""
        session = None if chat is None else chat.pages
        again, by = self.preparer.recompute(prepared), self.preparer.start_by(prepared)
        salt = self.salt(prepared.principal)
        use = adapter or prepared.adapter
        bound = None if use is None else use.bound(sum(len(span.token_ids) for span in prepared.spans[:-1]))
        for out in self.decoder.generate(
            prepared.spans, params, salt, session, recompute=again, start_by=by, adapter=bound
        ):
            seq = out.sequence
            if on_token is not None:
                on_token(out)
        reason = seq.finish_reason or "length"
        if chat is not None:
            chat.went_on(seq.output, [segment.cube_id for segment in prepared.plan.segments])
        return seq.output[:-1] if reason == "stop" else seq.output, seq.stats, reason

    def after_reply(self, prepared: Prepared) -> None:
        """Off the request's path: records use, builds the KV that memories lack, lets the canary look."""
        used = [segment.cube_id for segment in prepared.plan.segments]
        if self.store is None or not (used or prepared.lacking):
            return
        try:
            if used:
                self.store.record_use(prepared.principal, used)
        except MemosEngineError as error:
            log.warning("memos_engine: the use of memories was not recorded: %s", error)
        if self.config.build and self.activation is not None and prepared.lacking:
            try:
                self.refresh()
                self.activation.build(prepared.principal, prepared.lacking)
            except MemosEngineError as error:  # the answer is out: nobody waits for this
                log.warning("memos_engine: the KV of memories was not stored: %s", error)
        if prepared.whole and self.activation is not None and self.canary.wants(prepared.spans):
            self._check(prepared, self.activation)
        if self.background is not None:  # last: a look counts the uses that were recorded above
            self.background.used(prepared.principal, prepared.plan)
            if self.config.background and self.live is None:
                self.background.start()

    def _costs(self) -> tuple[CostTable, dict[str, float]]:
        """What requests cost here: the table, and what measured requests make of it, by stage."""
        scheduler = self.preparer.scheduler
        return scheduler.costs, dict(scheduler.residuals.factors())

    def _check(self, prepared: Prepared, activation: ActivationMemory) -> None:
        """The canary's look at a request; turns splicing off for the model where it drifts."""
        try:
            again = Recompute(prepared.plan.recompute)
            self.canary.check(prepared.spans, again, self.salt(prepared.principal))
            drift = self.canary.drift
            if drift is not None:
                log.warning("memos_engine: splicing is turned off for this model: %s", drift)
                activation.turn(drift)
                self.canary.latest.clear()
        except MemosEngineError as error:
            log.warning("memos_engine: the canary could not look: %s", error)


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
