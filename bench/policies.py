"""What a cache of KV records keeps, by policy: ours, the usual ones, peers, and one that knows the future.

Each is told of every want and says what it keeps; `now` counts requests. Sizes in bytes. The peers are
written from their papers: GDSF (Cherkasova, HPL-98-69R1, 1998), W-TinyLFU's admission (Einziger et al., ACM
TOS 13(4), 2017) over LRU, S3-FIFO (Yang et al., SOSP 2023), LRFU (Lee et al., IEEE ToC 50(12), 2001).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from heapq import nlargest
from typing import Protocol

from memos_engine.memory.value import Keeper, Pace


class Policy(Protocol):
    """`want` is called for each memory of each request: whether it is kept, and then what stays."""

    def want(self, key: int, nbytes: int, saved_ms: float, now: float, group: Hashable = None) -> bool: ...

    def holds(self, key: int) -> bool: ...


class Value:
    """memos_engine: `memory.value.Keeper`; and, as `memory/transform.py` does between requests, what its user
    asks for most by now comes in even where it was not asked for just then. ahead: so many at a time."""

    def __init__(self, most: int, pace: Pace | None = None, ahead: int = 3) -> None:
        self.keeper: Keeper[int] = Keeper(most, pace or Pace())
        self.ahead, self.looked = ahead, -1.0
        self.seen: dict[Hashable, dict[int, tuple[int, float]]] = {}  # bytes and milliseconds, by user
        self.built: list[int] = []  # ahead of use, since the last look

    def holds(self, key: int) -> bool:
        return key in self.keeper.held

    def want(self, key: int, nbytes: int, saved_ms: float, now: float, group: Hashable = None) -> bool:
        keeper, seen = self.keeper, self.seen.setdefault(group, {})
        seen[key] = nbytes, saved_ms
        keeper.used(key, now, group)
        held = self.holds(key)
        if not held:
            keeper.offer(key, nbytes, saved_ms, now)
        if now == self.looked:  # once a request
            return held
        self.looked = now

        def density(other: int) -> float:
            return keeper.rate(other, now) * seen[other][1] / seen[other][0]

        for other in nlargest(self.ahead, (k for k in seen if k not in keeper.held), key=density):
            if keeper.offer(other, *seen[other], now) is not None:
                self.built.append(other)
        return held


class Ranked:
    """Everything is taken in; what has the least rank leaves, the longest unused one first among equals."""

    def __init__(self, most: int) -> None:
        self.most, self.nbytes = most, 0
        self.held: OrderedDict[int, int] = OrderedDict()

    def holds(self, key: int) -> bool:
        return key in self.held

    def noted(self, key: int, nbytes: int, saved_ms: float, now: float) -> None:
        """A want, before it is known whether the record is here."""

    def rank(self, key: int, now: float) -> float:
        return 0.0

    def left(self, key: int, now: float) -> None:
        """A record has left."""

    def admits(self, key: int, leaving: list[int], now: float) -> bool:
        return True

    def want(self, key: int, nbytes: int, saved_ms: float, now: float, group: Hashable = None) -> bool:
        self.noted(key, nbytes, saved_ms, now)
        if key in self.held:
            self.held.move_to_end(key)
            return True
        if nbytes > self.most:
            return False
        leaving = self._victims(nbytes - (self.most - self.nbytes), now)
        if leaving and not self.admits(key, leaving, now):
            return False
        for old in leaving:
            self.nbytes -= self.held.pop(old)
            self.left(old, now)
        self.held[key] = nbytes
        self.nbytes += nbytes
        return False

    def _victims(self, needed: int, now: float) -> list[int]:
        freed, leaving = 0, []
        for key in sorted(self.held, key=lambda k: self.rank(k, now)) if needed > 0 else ():
            if freed >= needed:
                break
            leaving.append(key)
            freed += self.held[key]
        return leaving


class LRU(Ranked):
    def _victims(self, needed: int, now: float) -> list[int]:
        freed, leaving = 0, []
        for key, size in self.held.items():
            if freed >= needed:
                break
            leaving.append(key)
            freed += size
        return leaving


class LFU(Ranked):
    """Counts while a record is kept, as caches usually do."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.count: dict[int, float] = {}

    def noted(self, key: int, nbytes: int, saved_ms: float, now: float) -> None:
        self.count[key] = self.count.get(key, 0.0) + 1.0

    def rank(self, key: int, now: float) -> float:
        return self.count[key]

    def left(self, key: int, now: float) -> None:
        del self.count[key]


class PerfectLFU(LFU):
    """Counts of everything, forever."""

    def left(self, key: int, now: float) -> None:
        pass


class TinyLFU(LFU):
    """LRU, with a newcomer admitted only where it was wanted more often than what leaves; counts are halved
    every 10 wants for each record kept."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.seen = 0

    def noted(self, key: int, nbytes: int, saved_ms: float, now: float) -> None:
        super().noted(key, nbytes, saved_ms, now)
        self.seen += 1
        if self.seen > 10 * max(len(self.held), 16):
            self.seen //= 2
            self.count = {k: c / 2 for k, c in self.count.items() if c > 0.25 or k in self.held}

    _victims = LRU._victims

    def left(self, key: int, now: float) -> None:
        pass

    def admits(self, key: int, leaving: list[int], now: float) -> bool:
        return self.count[key] > max(self.count.get(k, 0.0) for k in leaving)


class LRFU(LFU):
    """One decayed count; half-life in requests."""

    def __init__(self, most: int, half_life: float = 250.0) -> None:
        super().__init__(most)
        self.half_life = half_life
        self.at: dict[int, float] = {}

    def noted(self, key: int, nbytes: int, saved_ms: float, now: float) -> None:
        self.count[key] = self.rank(key, now) + 1.0
        self.at[key] = now

    def rank(self, key: int, now: float) -> float:
        return self.count.get(key, 0.0) * 2.0 ** ((self.at.get(key, now) - now) / self.half_life)

    def left(self, key: int, now: float) -> None:
        pass


class GDSF(LFU):
    """Ageing + count x milliseconds / bytes."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.age = 0.0
        self.value: dict[int, float] = {}

    def noted(self, key: int, nbytes: int, saved_ms: float, now: float) -> None:
        super().noted(key, nbytes, saved_ms, now)
        self.value[key] = self.age + self.count[key] * saved_ms / nbytes

    def rank(self, key: int, now: float) -> float:
        return self.value[key]

    def left(self, key: int, now: float) -> None:
        self.age = self.value.pop(key)
        super().left(key, now)


class S3FIFO:
    """A small queue (a tenth of the bytes), a main one with second chances, and ghosts of the small one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size: dict[int, int] = {}
        self.again: dict[int, int] = {}
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.bytes = {"small": 0, "main": 0}

    def holds(self, key: int) -> bool:
        return key in self.size

    def want(self, key: int, nbytes: int, saved_ms: float, now: float, group: Hashable = None) -> bool:
        if key in self.size:
            self.again[key] = min(self.again[key] + 1, 3)
            return True
        if nbytes > self.most:
            return False
        while sum(self.bytes.values()) + nbytes > self.most:
            self._make_room()
        where = "main" if key in self.ghosts else "small"
        self.ghosts.pop(key, None)
        self._into(where, key, nbytes)
        self.again[key] = 0
        return False

    def _into(self, where: str, key: int, nbytes: int) -> None:
        (self.main if where == "main" else self.small).append(key)
        self.size[key] = nbytes
        self.bytes[where] += nbytes

    def _make_room(self) -> None:
        if self.small and (self.bytes["small"] > self.most // 10 or not self.main):
            key = self.small.popleft()
            size = self.size.pop(key)
            self.bytes["small"] -= size
            if self.again[key] > 0:
                self.again[key] = 0
                self._into("main", key, size)
                return
            self.ghosts[key] = None
            while len(self.ghosts) > max(len(self.main), 16):
                self.ghosts.popitem(last=False)
            return
        key = self.main.popleft()
        if self.again[key] > 0:
            self.again[key] -= 1
            self.main.append(key)
            return
        self.bytes["main"] -= self.size.pop(key)


class Clairvoyant(Ranked):
    """Knows when everything is wanted next: what is wanted last leaves (Belady, with bytes ignored in the
    order). No policy can be had for it; a bound to look at, not a peer."""

    def __init__(self, most: int, wants: list[list[int]]) -> None:
        super().__init__(most)
        self.next: dict[int, deque[int]] = {}
        for at, keys in enumerate(wants):
            for key in keys:
                self.next.setdefault(key, deque()).append(at)

    def noted(self, key: int, nbytes: int, saved_ms: float, now: float) -> None:
        coming = self.next[key]
        while coming and coming[0] <= now:
            coming.popleft()

    def rank(self, key: int, now: float) -> float:
        coming = self.next[key]
        return -coming[0] if coming else -float("inf")

    def admits(self, key: int, leaving: list[int], now: float) -> bool:
        return self.rank(key, now) > max(self.rank(k, now) for k in leaving)


POLICIES: dict[str, Callable[[int], Policy]] = {
    "memos_engine": Value,
    "nothing_ahead": lambda most: Value(most, ahead=0),
    "lru": LRU,
    "lfu": LFU,
    "lfu_all_time": PerfectLFU,
    "lrfu": LRFU,
    "tinylfu": TinyLFU,
    "gdsf": GDSF,
    "s3fifo": S3FIFO,
}
