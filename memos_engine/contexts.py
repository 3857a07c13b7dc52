"""Left contexts: what memories are encoded behind, for records that are averages.

They are made of the owner's own memories where there are enough of them, because their like is what will
stand in front; otherwise of statements that belong to nobody (`neutral.py`). A memory is never encoded
behind itself, nor behind another owner's.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from memos_engine.decoder.identity import ids_digest
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState
from memos_engine.memory.store import MemoryStore
from memos_engine.neutral import left_contexts
from memos_engine.prompt import PromptLayout

# Tokens of each context, at least: as few and as many as stand in front of a memory in real prompts.
TOKENS = (270, 135, 360, 45, 180, 450, 90, 270)
FEWEST = 32  # own memories; with fewer the contexts would be too much alike
MOST = FEWEST * 4**3  # the oldest ones that are chosen from
USED = 64
LONGEST = 600  # tokens of a memory that goes into a context: each is computed once for every build
NEEDED = 4  # contexts without a memory itself; where its own are fewer, it takes the neutral ones
KEPT = (*LIVE, LifecycleState.ARCHIVED)


@dataclass(frozen=True)
class LeftContext:
    """token_ids behind the anchor; digest of the anchor with them; sources: ids of the memories in it."""

    token_ids: tuple[int, ...]
    digest: str
    sources: frozenset[str] = frozenset()


def fill(spans: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[tuple[int, ...], frozenset[str]]]:
    """Contexts of `TOKENS` tokens or a little more from memories `(id, token_ids)`, one after another and
    from the beginning again: token ids and the ids of the memories in each. None takes more than a quarter
    of the memories, so that each is in two contexts at most, and has others without it."""
    out = []
    turn, most = cycle(spans), -(-len(spans) // 4)
    for wanted in TOKENS:
        ids: list[int] = []
        sources: list[str] = []
        while len(ids) < wanted and len(sources) < most:
            name, span = next(turn)
            ids += span
            sources.append(name)
        out.append((tuple(ids), frozenset(sources)))
    return out


def chosen(names: Sequence[str]) -> list[str]:
    """Which memories, given oldest first, make up the contexts, in an order that only their ids decide.

    Of the oldest 32, 128, 512 ...: so that contexts, and all records made behind them, change seldom.
    """
    if len(names) < FEWEST:
        return []
    size = FEWEST
    while size * 4 <= min(len(names), MOST):
        size *= 4
    return sorted(names[:size], key=lambda name: hashlib.sha256(name.encode()).digest())[:USED]


def fitting(
    own: Sequence[LeftContext], neutral: Sequence[LeftContext], name: str, room: int
) -> list[LeftContext]:
    """The contexts for the memory of this name: those without it, of at most `room` tokens."""
    found = [context for context in own if name not in context.sources and len(context.token_ids) <= room]
    return found if len(found) >= NEEDED else [c for c in neutral if len(c.token_ids) <= room]


class LeftContexts:
    """The left contexts of each owner. kind: own, neutral, or auto: own where there are enough memories."""

    def __init__(self, layout: PromptLayout, store: MemoryStore, kind: str) -> None:
        self._layout, self._store, self._kind = layout, store, kind
        self._lock = threading.Lock()
        self._own: dict[Principal, list[LeftContext]] = {}
        self._former: dict[Principal, list[LeftContext]] = {}
        self._neutral = [self._context(ids) for ids in left_contexts(layout)]

    def refresh(self, principal: Principal) -> None:
        """Chooses anew from what the owner keeps now. Until then a choice stays: stored records fit it."""
        made = [] if self._kind == "neutral" else self._choose(principal)
        with self._lock:
            before = self._own.get(principal)
            if before is not None and before != made:
                self._former[principal] = before
            self._own[principal] = made

    def of(self, principal: Principal, cube_id: str, room: int) -> list[LeftContext]:
        """Those for one memory: without itself, and of at most `room` tokens."""
        with self._lock:
            known = self._own.get(principal)
        if known is None:
            self.refresh(principal)
            return self.of(principal, cube_id, room)
        return fitting(known, self._neutral, cube_id, room)

    def former(self, principal: Principal, cube_id: str, room: int) -> list[LeftContext]:
        """Those of the choice before the last one, if there was one; records made behind them are stale."""
        with self._lock:
            known = self._former.get(principal)
        return [] if known is None else fitting(known, self._neutral, cube_id, room)

    def _choose(self, principal: Principal) -> list[LeftContext]:
        kept = self._store.list(principal, states=KEPT, limit=MOST, own=True)
        bodies = {cube.id: cube.body for cube in kept if cube.body}
        spans = [(name, self._layout.memory(bodies[name])) for name in chosen(list(bodies))]
        short = [(name, span) for name, span in spans if len(span) <= LONGEST]
        if len(short) < FEWEST // 2:
            return []
        return [self._context(ids, sources) for ids, sources in fill(short)]

    def _context(self, ids: tuple[int, ...], sources: frozenset[str] = frozenset()) -> LeftContext:
        return LeftContext(ids, ids_digest((*self._layout.anchor, *ids)), sources)
