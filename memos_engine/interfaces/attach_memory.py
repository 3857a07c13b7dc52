"""Whose memories enter which prompt of an attached `generate()`, and where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memos_engine.api import MemoryEngine
from memos_engine.config import MemoryConfig, Recompute
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.sequence import NOTHING, Span, TextSpan
from memos_engine.decoder.sequence import Sequence as Request
from memos_engine.errors import ContextLengthError, MemoryInputError, MemosEngineError
from memos_engine.memory.embed import Embedder, default_embedder
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.plan import check_budget
from memos_engine.memory.store import MemoryStore
from memos_engine.parameter import AdapterUse
from memos_engine.preparing import Ask
from memos_engine.prompt import PromptLayout
from memos_engine.reply import Prepared

log = logging.getLogger("memos_engine")

Ids = tuple[int, ...]


@dataclass
class Prompt:
    """One row: the caller's ids, and the spans that run in their place, memories included.

    root: salts the prefix index. prepared: the plan, where the engine made it; recompute, start_by: what it
    asks of the decoder. used: memories entered as text without it.
    """

    ids: Ids
    spans: list[Span]
    root: bytes = b""
    prepared: Prepared | None = None
    principal: Principal | None = None
    used: list[str] = field(default_factory=list)
    recompute: Recompute = NOTHING
    start_by: float | None = None
    bound: AdapterBinding | None = None

    @classmethod
    def plain(cls, ids: Ids, root: bytes = b"") -> Prompt:
        return cls(ids, [TextSpan(ids)], root)

    @property
    def is_plain(self) -> bool:
        """Whether it is the caller's own, to the token."""
        return self.size == len(self.ids)

    def bind(self, use: AdapterUse) -> None:
        """From the caller's own tokens behind the memories on; all of them where there are no memories."""
        behind = 0 if self.is_plain else self.size - len(self.spans[-1].token_ids)
        self.bound = use.bound(behind)

    @property
    def size(self) -> int:
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def token_ids(self) -> Ids:
        return tuple(token for span in self.spans for token in span.token_ids)


@dataclass(frozen=True)
class Wish:
    """What one call asks for: users and queries (one, or one a row), the form of its memories, the share of
    their tokens to compute again, the time until its first token, counted from `start`, and an adapter."""

    user: Any = None
    query: Any = None
    form: str | None = None
    recompute: float | None = None
    ttft_budget_ms: float | None = None
    start: float | None = None
    adapter: Any = None


class Memories:
    """The memories of a store for the prompts of one model.

    With an engine they enter by its plan, as stored KV or text; without one as text.
    """

    def __init__(
        self,
        store: MemoryStore,
        tokenizer: Any,
        config: MemoryConfig,
        engine: MemoryEngine | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.store, self.tokenizer, self.config, self.engine = store, tokenizer, config, engine
        self.layout = PromptLayout(tokenizer) if engine is None else engine.layout
        self._embedder = embedder
        self._operator: MemOperator | None = None

    def principals(self, wish: Wish, rows: int) -> list[Principal]:
        """The user of each row. Raises MemoryInputError where the call leaves that open."""
        users = _by_row(wish.user, rows, "user")
        if all(user is not None for user in users):
            return [Principal("default", user) for user in users]
        known = self.store.known_users()
        if len(known) > 1:
            raise MemoryInputError(
                f"The model is attached to a store of {len(known)} users: say whose memories may be used, "
                "generate(..., user=...), or user=[...] with one name for each row."
            )
        only = known[0] if known else Principal("default", "nobody")
        return [only if user is None else Principal("default", user) for user in users]

    def prompts(self, wish: Wish, rows: Sequence[Ids], make: Callable[..., Prompt]) -> list[Prompt]:
        """make: `by_engine` or `as_text`, called with ids, user and query of each row."""
        users = self.principals(wish, len(rows))
        queries = _by_row(wish.query, len(rows), "memory_query")
        return [make(*row, wish) for row in zip(rows, users, queries, strict=True)]

    def by_engine(
        self, ids: Ids, who: Principal, query: str | None, wish: Wish, *, engine: MemoryEngine, new: int
    ) -> Prompt:
        """The row with its memories by the engine's plan; the caller's own ids where none enters."""
        head, tail = self._cut(ids)
        salt = engine.salt(who)
        try:
            prepared = engine.prepare(
                who,
                self._query(query, tail),
                head,
                tail,
                Ask(wish.form, None, wish.recompute, wish.ttft_budget_ms, new),
                start=wish.start,
            )
        except (MemoryInputError, ContextLengthError) as error:
            if query is not None:
                raise
            log.warning("memos_engine: no memory enters this prompt: %s", error)
            return Prompt.plain(ids, salt)
        if not prepared.plan.segments:
            return Prompt.plain(ids, salt)
        again, by = engine.preparer.recompute(prepared), engine.preparer.start_by(prepared)
        prompt = Prompt(ids, prepared.spans, salt, prepared, who, recompute=again, start_by=by)
        longest = engine.decoder.spec.max_positions
        if prompt.size + new > longest:
            log.warning(
                "memos_engine: no memory enters this prompt: it would pass the window of %d tokens.", longest
            )
            return Prompt.plain(ids, salt)
        return prompt

    def as_text(self, ids: Ids, who: Principal, query: str | None, wish: Wish, *, room: int) -> Prompt:
        """The row with its memories as text, whatever form was asked for, in at most `room` more tokens."""
        head, tail = self._cut(ids)
        check_budget(wish.ttft_budget_ms)
        if wish.ttft_budget_ms is not None:
            log.warning("memos_engine: ttft_budget_ms is kept only where this decoder runs the call.")
        try:
            found = self.operator.recall(who, self._query(query, tail), k=self.config.max_memories)
        except MemoryInputError as error:
            if query is not None:
                raise
            log.warning("memos_engine: no memory enters this prompt: %s", error)
            return Prompt.plain(ids)
        spans, used = [TextSpan(head)] if head else [], []
        room -= len(head) + len(tail) - len(ids)
        for candidate in found:
            span = self.layout.memory(candidate.cube.body or "")
            if candidate.score >= self.config.min_score and len(span) <= room:
                spans.append(TextSpan(span))
                used.append(candidate.cube.id)
                room -= len(span)
        if not used:
            return Prompt.plain(ids)
        return Prompt(ids, [*spans, TextSpan(tail)], principal=who, used=used)

    def after(self, prompts: Sequence[Prompt], requests: Sequence[Request] = ()) -> None:
        """Off the answer's path: learns from the times of the `requests` that they became, records use,
        builds missing KV."""
        for prompt, request in zip(prompts, requests, strict=False):
            if prompt.prepared is not None and self.engine is not None and len(prompts) == 1:
                stats, start = request.stats, prompt.prepared.start
                plan = self.engine.preparer.account(
                    prompt.prepared, stats, (stats.created - start) * 1e3 + stats.ttft_ms
                )
                log.debug("memos_engine: %s", plan.report())
        for prompt in prompts:
            if prompt.prepared is not None and self.engine is not None:
                self.engine.after_reply(prompt.prepared)
            elif prompt.used and prompt.principal is not None:
                try:
                    self.store.record_use(prompt.principal, prompt.used)
                except MemosEngineError as error:
                    log.warning("memos_engine: the use of memories was not recorded: %s", error)

    @property
    def operator(self) -> MemOperator:
        if self.engine is not None:
            return self.engine.operator
        if self._operator is None:
            self._operator = MemOperator(self.store, self._embedder or default_embedder())
        return self._operator

    def _query(self, query: str | None, tail: Ids) -> str:
        return query or str(self.tokenizer.decode(list(tail), skip_special_tokens=True))

    def _cut(self, ids: Ids) -> tuple[Ids, Ids]:
        """Head and tail, between which memories go: behind the anchor or, with another system prompt, behind
        the first turn; else in front of the prompt, with an anchor of their own."""
        anchor = self.layout.anchor
        if anchor and ids[: len(anchor)] == anchor and len(ids) > len(anchor):
            return anchor, ids[len(anchor) :]
        opening, closing = self.layout.turn_open, self.layout.turn_close
        size = len(opening)
        starts_with_user = opening in (ids[:size], ids[1 : 1 + size])  # without or with BOS
        if opening and closing and not starts_with_user:
            for start in range(1, len(ids) - len(closing)):
                end = start + len(closing)
                if ids[start:end] == closing:
                    if ids[end : end + size] == opening:
                        return ids[:end], ids[end:]
                    break
        return anchor, ids


def _by_row(value: Any, rows: int, name: str) -> list[Any]:
    if value is None or isinstance(value, str):
        return [value] * rows
    values = list(value)
    if len(values) != rows:
        raise MemoryInputError(
            f"{name} has {len(values)} entries for a batch of {rows}; give one, or one for each row."
        )
    return values
