"""The Hugging Face drop-in: the same model, whose `generate()` runs here and may use memories.

What the decoder does not run goes to the model's own `generate()` with one logged reason.
"""

from __future__ import annotations

import inspect
import logging
import time
from pathlib import Path
from typing import Any

from memos_engine.api import MemoryEngine
from memos_engine.config import DTYPES, DecoderConfig, MemoryConfig
from memos_engine.decoder.adapter import Adapter
from memos_engine.decoder.live import rotary_mismatch
from memos_engine.errors import ModelError
from memos_engine.interfaces.attach_call import Call
from memos_engine.interfaces.attach_memory import Memories, Wish
from memos_engine.memory.embed import Embedder
from memos_engine.memory.store import MemoryStore
from memos_engine.parameter import AdapterUse

log = logging.getLogger("memos_engine")


def attach(
    model: Any,
    tokenizer: Any,
    store: str | Path | None = None,
    user: str | None = None,
    *,
    decoder: DecoderConfig | None = None,
    memory: MemoryConfig | None = None,
    embedder: Embedder | None = None,
    adapter: str | Path | Adapter | AdapterUse | None = None,
) -> Any:
    """Lets `model.generate()` run in this decoder, with the memories of `user` from `store`.

    Parameters are shared, nothing is copied. The new `generate()` takes all arguments of the model's own and
    gives the same results; where it cannot run a call, the model's own runs it. Further arguments: user and
    memory_query (a string, or one for each prompt of the batch; by default the prompt's text is the query),
    memory_form (auto, kv, text, none), recompute (share of spliced memory tokens to compute again),
    ttft_budget_ms (time from the call to the first token; docs/scheduling.md), adapter (by default the one
    given here: the name of one of the user's, a PEFT folder, or an `Adapter`; None: without). What it
    returns, and what processors, criteria and streamers see, holds no memory ids. Returns the same model;
    `detach` undoes it.

    Raises StoreError where the directory cannot be used. A call with an adapter that cannot run here raises
    AdapterError: it is never left out silently.
    """
    detach(model)
    engine, reason = None, _unfit(model)
    if reason is None:
        settings = decoder or DecoderConfig(dtype=_dtype(model))
        try:
            engine = MemoryEngine.from_model(
                model, tokenizer, store, decoder=settings, memory=memory, embedder=embedder
            )
            reason = rotary_mismatch(model, engine.decoder.spec)
        except ModelError as error:
            reason = str(error)
    memories = None
    if store is not None:
        memories = _memories(engine, tokenizer, store, memory, embedder)
    Attached(model, engine, memories, user, reason, adapter).install()
    return model


def detach(model: Any) -> Any:
    """Gives the model its own `generate()` back and closes the store."""
    attached = model.__dict__.get("_memos_engine")
    if attached is not None:
        attached.remove()
    return model


class Attached:
    """What stands behind an attached model, and its `generate`: an object, so that copies get their own.

    reason: why the decoder cannot run the model at all; None: it can, by `engine`. original: the model's
    own generate().
    """

    def __init__(
        self,
        model: Any,
        engine: MemoryEngine | None,
        memories: Memories | None,
        user: str | None,
        reason: str | None,
        adapter: str | Path | Adapter | AdapterUse | None = None,
    ) -> None:
        self.model, self.engine, self.memories = model, engine, memories
        self.user, self.reason, self.adapter = user, reason, adapter
        self.original = model.generate
        self._own = "generate" in model.__dict__
        self._said: set[str] = set()

    def install(self) -> None:
        self.model._memos_engine = self
        self.model.generate = self

    def remove(self) -> None:
        for name in ("_memos_engine", "generate"):
            self.model.__dict__.pop(name, None)
        if self._own:
            self.model.generate = self.original
        if self.engine is not None:
            self.engine.close()
        elif self.memories is not None:
            self.memories.store.close()

    def __call__(
        self, inputs: Any = None, generation_config: Any = None, *positional: Any, **arguments: Any
    ) -> Any:
        """The model's own generate(), run by this engine where it can; see `attach`."""
        wish = Wish(
            arguments.pop("user", self.user),
            arguments.pop("memory_query", None),
            arguments.pop("memory_form", None),
            arguments.pop("recompute", None),
            arguments.pop("ttft_budget_ms", None),
            time.perf_counter(),
            arguments.pop("adapter", self.adapter),
        )
        if positional:
            names = list(inspect.signature(self.original).parameters)[2:]
            arguments |= dict(zip(names, positional, strict=False))
        arguments |= {"inputs": inputs, "generation_config": generation_config}
        return Call(self, arguments, wish).run()

    def unfit(self) -> str | None:
        """Why nothing can run here now, or None. Follows changed weights."""
        if self.reason is not None or self.engine is None:
            return self.reason
        if self.model.training:
            return "the model is in training mode; call model.eval()"
        try:
            live = self.engine.live
            reason = None if live is None else live.altered()
            if reason is None:
                self.engine.refresh()
        except ModelError as error:
            return str(error)
        return reason

    def say(self, reason: str) -> None:
        """Logs why a call runs in the model's own generate(): each reason once."""
        level = logging.DEBUG if reason in self._said else logging.WARNING
        self._said.add(reason)
        log.log(level, "memos_engine: this call runs in the model's own generate(): %s.", reason.rstrip("."))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled models are not attached: their generate() is their own."""
        return _Unattached, (self.model,)


class _Unattached:
    """Stands in a copy of an attached model where the original has its `Attached`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *positional: Any, **arguments: Any) -> Any:
        return type(self.model).generate(self.model, *positional, **arguments)

    def remove(self) -> None:
        for name in ("_memos_engine", "generate"):
            self.model.__dict__.pop(name, None)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _unfit(model: Any) -> str | None:
    if _dtype(model) not in DTYPES:
        return f"the model's dtype is {model.dtype}; {', '.join(d for d in DTYPES if d != 'auto')} run here"
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return "parameters of the model are on the meta device"
    return None


def _memories(
    engine: MemoryEngine | None,
    tokenizer: Any,
    store: str | Path,
    config: MemoryConfig | None,
    embedder: Embedder | None,
) -> Memories | None:
    opened = MemoryStore.open(store) if engine is None else engine.opened_store
    try:
        return Memories(opened, tokenizer, config or MemoryConfig(), engine, embedder)
    except ModelError as error:  # its template cannot be cut into spans
        log.warning("memos_engine: no memories enter this model's prompts: %s", error)
        opened.close()
        return None
