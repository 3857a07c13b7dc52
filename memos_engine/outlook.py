"""What stands around a request's memories when it is planned: rows to compute, work before it, pages to
reuse."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from memos_engine.decoder.engine import DecoderEngine
from memos_engine.memory.costs import CostTable, Frame
from memos_engine.memory.plan import KnownPrefix

MOST_OWNERS = 256
SMOOTH = 1 / 32  # what a request counts in the share of those that found the engine busy
ORDERS = 8  # newest orders of text that are remembered of each owner


@dataclass(frozen=True)
class Surroundings:
    """head, tail: ids before and behind the memories; behind: tokens of the conversation before all this.
    anchor: how many ids of the head come from the anchor's record where KV follows. root: salts the pages."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    behind: int = 0
    anchor: int = 0
    root: bytes = b""


class Outlook:
    """Remembers which memories stood as exact text right behind which head, by owner. Safe for threads."""

    def __init__(self, decoder: DecoderEngine) -> None:
        self.decoder = decoder
        self._orders: OrderedDict[bytes, deque[tuple[tuple[int, ...], tuple[str, ...]]]] = OrderedDict()
        self._lock = threading.Lock()
        self._busy = 0.0  # share of late requests that found others at work

    def frame(self, around: Surroundings, costs: CostTable) -> Frame:
        """The request's surroundings as the cost model sees them, now."""
        head = len(around.head)
        reused = 0 if around.behind else self.decoder.reusable(around.head, around.root)
        ahead = self.decoder.ahead()
        queue = sum(float(costs.rows_ms(float(rows))) for rows in ahead)
        self._busy += SMOOTH * (bool(ahead) - self._busy)
        return Frame(
            head=head,
            head_rows=head - reused,
            head_rows_kv=head - max(reused, around.anchor),
            tail=len(around.tail),
            behind=around.behind,
            queue_ms=queue,
            busy=self._busy,
        )

    def known(self, around: Surroundings, texts: dict[str, tuple[int, ...]]) -> list[KnownPrefix]:
        """The longest run of candidates (given with their tokens) that begins an earlier request as text and
        is in pages still; none, or one."""
        with self._lock:
            orders = list(self._orders.get(around.root, ()))
        runs: dict[tuple[str, ...], int] = {}
        for head, cube_ids in orders if not around.behind else ():
            run = tuple(takewhile(texts.__contains__, cube_ids))
            if run and head == around.head:
                runs[run] = sum(len(texts[one]) for one in run)
        page = self.decoder.pool.page
        for run, tokens in sorted(runs.items(), key=lambda item: -item[1]):
            ids = [*around.head, *(token for one in run for token in texts[one])]
            if self.decoder.reusable(ids, around.root) > len(ids) - page:
                return [KnownPrefix(run, tokens)]
        return []

    def reused(self, around: Surroundings, leading: Sequence[tuple[int, ...]]) -> int:
        """Tokens of a plan's leading texts that are in pages already."""
        if around.behind or not leading:
            return 0
        ids = [*around.head, *(token for text in leading for token in text)]
        return max(0, self.decoder.reusable(ids, around.root) - len(around.head))

    def forget(self) -> None:
        """Keeps nothing of any prompt."""
        with self._lock:
            self._orders.clear()

    def went(self, around: Surroundings, texts: Sequence[str]) -> None:
        """Takes note of memories that a request computed as text right behind its head, in this order."""
        if not texts or around.behind:
            return
        with self._lock:
            orders = self._orders.setdefault(around.root, deque(maxlen=ORDERS))
            entry = (around.head, tuple(texts))
            if entry in orders:
                orders.remove(entry)
            orders.append(entry)
            self._orders.move_to_end(around.root)
            while len(self._orders) > MOST_OWNERS:
                self._orders.popitem(last=False)
