"""UserMemory: one user's memories and chat."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from memos_engine.config import SamplingParams
from memos_engine.errors import AdapterError, MemoryInputError, StoreError
from memos_engine.memory.cube import MemCube, validate_text
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import Candidate
from memos_engine.memory.store import HistoryEntry
from memos_engine.memory.store_jobs import Job
from memos_engine.parameter import AdapterUse
from memos_engine.preparing import Ask
from memos_engine.reply import Reply, TextStream
from memos_engine.user_adapters import UserAdapters

if TYPE_CHECKING:
    from memos_engine.api import MemoryEngine


log = logging.getLogger("memos_engine")

WARM_TOGETHER = 16  # memories whose records are built at once: they share the left contexts


class UserMemory:
    """One user's memories and chat."""

    def __init__(self, engine: MemoryEngine, principal: Principal) -> None:
        self.engine = engine
        self.principal = principal

    def remember(
        self,
        text: str,
        tags: Sequence[str] = (),
        idempotency_key: str | None = None,
        *,
        session: str | None = None,
        valid_from: datetime | None = None,
    ) -> MemCube:
        """Stores a memory as text; its KV record is built later, when it is first used or by `warm`.

        session: the conversation it is from; what was remembered just before it there helps to find it.
        valid_from: since when it holds (default: now), for questions that name a time.
        """
        engine = self.engine
        text = validate_text(text)
        tokens = len(engine.layout.memory(text))
        room = min(engine.decoder.spec.max_positions, engine.decoder.pool_tokens) // 2
        if tokens > room:
            raise MemoryInputError(
                f"This memory has {tokens} tokens; at most {room} (half the context) fit beside a question. "
                "Split it into parts."
            )
        return engine.operator.remember(
            self.principal,
            text,
            tags=tags,
            idempotency_key=idempotency_key,
            session=session,
            valid_from=valid_from,
        )

    def recall(
        self, query: str, k: int = 8, *, filters: Filters | None = None, explain: bool = False
    ) -> list[Candidate]:
        """The k memories that fit the query best, best first; explain: each says why."""
        operator = self.engine.operator
        return operator.recall(self.principal, validate_text(query), k=k, filters=filters, explain=explain)

    def memories(self) -> list[MemCube]:
        """All live memories, oldest first."""
        return self.engine.opened_store.list(self.principal)

    def archive(self, cube_id: str) -> MemCube:
        """Puts a memory away: kept, not retrieved."""
        return self.engine.opened_store.archive(self.principal, cube_id)

    def restore(self, cube_id: str) -> MemCube:
        """Brings an archived memory back."""
        return self.engine.opened_store.restore(self.principal, cube_id)

    def delete(self, cube_id: str) -> None:
        """Ends a memory: hidden from everything but its history; its KV is removed."""
        self.engine.opened_store.delete(self.principal, cube_id)
        self._let_go()

    def erase(self, cube_id: str) -> None:
        """Destroys a memory's text, vectors and KV for good; only the fact that it existed remains."""
        self.engine.opened_store.erase(self.principal, cube_id)
        self._let_go()

    def history(self, cube_id: str) -> list[HistoryEntry]:
        """What happened to a memory, oldest first."""
        return self.engine.opened_store.history(self.principal, cube_id)

    def warm(
        self, cube_ids: Sequence[str] | None = None, progress: Callable[[str], None] | None = None
    ) -> int:
        """Builds the missing KV records of these (default: all live) memories; returns how many."""
        activation = self.engine.activation
        if activation is None:
            raise StoreError("This engine has no store; there is nothing to build.")
        self.engine.refresh()
        store = self.engine.opened_store
        ids = [c.id for c in self.memories()] if cube_ids is None else list(cube_ids)
        built = 0
        for start in range(0, len(ids), WARM_TOGETHER):
            some = ids[start : start + WARM_TOGETHER]
            built += activation.build(self.principal, [store.get(self.principal, one) for one in some])
            if progress is not None:
                for cube_id in some:
                    progress(cube_id)
        return built

    @property
    def adapters(self) -> UserAdapters:
        """The user's adapters: parameter memory."""
        memory = self.engine.parameter
        if memory is None:
            raise StoreError("This engine has no store. Open it with store=<directory> to keep adapters.")
        return UserAdapters(memory, self.principal, self._let_go)

    def transform(self) -> list[Job]:
        """Looks at all own memories now, and does what is worth it: builds, moves, joins and drops KV
        (docs/transformations.md), until nothing is due or a request comes. Returns what the look queued, as
        it stands then. With `MemoryConfig(background=True)` it happens by itself."""
        background = self.engine.background
        if background is None:
            raise StoreError("This engine has no store; there is nothing to transform.")
        self.engine.refresh()
        return background.work(self.principal)

    def chat(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        form: str | None = None,
        max_memories: int | None = None,
        recompute: float | None = None,
        ttft_budget_ms: float | None = None,
        history: Sequence[tuple[str, str]] = (),
        session: str | None = None,
        stream: Callable[[str], None] | None = None,
        adapter: str | AdapterUse | None = None,
    ) -> Reply:
        """Answers from the user's memories.

        form: auto, text, kv or none (default: the engine's). recompute: share of the memories' tokens that
        are computed again although their KV is stored, 0 to 1 (default: the engine's). ttft_budget_ms: time
        from this call to the first token, for which the plan gives up what it must (default: the engine's;
        None: the best answer); `reply.plan` says what it foresaw and what it took. history: earlier
        (question, answer) turns. session: the name of a conversation to go on with (or to begin): its turns,
        and the memories that they brought in, stay where they are, and their pages are reused while there is
        room. One call at a time per session. stream: called with each new piece of the answer. adapter: name
        or id of an adapter of the user's, active from behind the memories on (default: the plan's choice, or
        none); one that cannot be used is left out, and the reply says why.
        """
        engine = self.engine
        start = time.perf_counter()
        text = validate_text(text)
        params = params or SamplingParams()
        if not params.stop_token_ids:
            params = replace(params, stop_token_ids=engine.eos_token_ids)
        chat = (
            None
            if session is None
            else engine.chats.get(self.principal, session, engine.salt(self.principal))
        )
        if chat is not None and chat.begun:
            if history:
                raise MemoryInputError("The session has begun: its own turns are its history. Leave one out.")
            head = chat.closing(engine.layout.answer_close)
        else:
            head = engine.layout.anchor + engine.layout.history(history)
        chosen, why = self._adapter(adapter, session)
        if chosen is not None and chosen.whole:
            form = "text" if form in (None, "auto", "kv") else form  # no stored KV was made under it
        prepared = engine.prepare(
            self.principal,
            text,
            head,
            engine.layout.query(text),
            Ask(
                *(form, max_memories, recompute, ttft_budget_ms, params.max_new_tokens, session),
                adapters=adapter is None and engine.config.adapters == "auto",
            ),
            chat,
            start,
        )
        preparation_ms = (time.perf_counter() - start) * 1e3
        writer = None if stream is None else TextStream(engine.tokenizer, params.stop_token_ids, stream)
        ids, stats, reason = engine.run(prepared, params, writer, chat, chosen)
        if writer is not None:
            writer.close()
        ttft_ms = preparation_ms + stats.ttft_ms
        reply = Reply(
            text=engine.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            token_ids=tuple(ids),
            finish_reason=reason,
            ttft_ms=ttft_ms,
            total_ms=(time.perf_counter() - start) * 1e3,
            plan=engine.preparer.account(prepared, stats, ttft_ms),
            stats=stats,
            adapter=why or (prepared.adapter.label if prepared.adapter else ""),
            timings={**prepared.timings, "splice": stats.splice_ms, "prefill": stats.prefill_ms},
        )
        engine.after_reply(prepared)
        return reply

    def _adapter(self, wanted: str | AdapterUse | None, session: str | None) -> tuple[AdapterUse | None, str]:
        """What a request's adapter is, and how the reply names it, or why there is none."""
        if wanted is None:
            return None, ""
        if session is not None:
            raise MemoryInputError("A session's earlier turns were made without the adapter; use history=.")
        try:
            chosen = self.adapters.memory.use(self.principal, wanted)
        except AdapterError as error:
            log.warning("memos_engine: the answer is given without adapter: %s", error)
            return None, f"without adapter: {error}"
        return chosen, chosen.label

    def end_session(self, name: str) -> bool:
        """Ends a conversation and gives its pages back; False if there was none of that name."""
        return bool(self.engine.chats.end(self.principal, name))

    def _let_go(self) -> None:
        """Nothing of an ended memory stays in this process: neither its record, nor pages it went into, nor
        conversations that may hold it."""
        self.engine.chats.end(self.principal)
        if self.engine.activation is not None:
            self.engine.activation.evict()
        self.engine.preparer.forget()
        if self.engine.parameter is not None:
            self.engine.parameter.evict()
            self.engine.decoder.adapters.forget()
        if self.engine.background is not None:
            self.engine.background.forget(self.principal)
        self.engine.decoder.forget_prefixes()
