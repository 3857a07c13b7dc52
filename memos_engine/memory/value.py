"""What it is worth to keep a form of a memory in a tier: use rate x milliseconds saved, against its bytes.

`worth = rate x saved_ms - nbytes x price`: what a place saves in a unit of time, less what the bytes could
save there instead. A tier that is full has the price of the worst record in it, so that the same sum decides
promotion, demotion and drop (`best_place`) and, where only bytes are scarce, what leaves (`Keeper`).

Rates are exponentially decayed counts, which weigh recency and frequency together (LRFU: Lee et al., IEEE
Transactions on Computers 50(12), 2001). Most memories were used once or twice, which says little: what their
group (an owner's memories, say) is used in the mean counts as further uses, an empirical Bayes estimate
(Robbins, 1956). Worth by milliseconds and bytes is GreedyDual-Size-Frequency's (Cherkasova, HPL-98-69R1,
1998); that a newcomer must be worth more than what it pushes out is TinyLFU's (Einziger et al., ACM
Transactions on Storage 13(4), 2017), with a margin, so that two records of like worth do not take turns.

Nothing here knows a clock: `now` is any number that does not go back by itself, seconds or uses; half-lives
are in the same unit. A `now` before the last one counts as that one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from memos_engine.errors import MemoryInputError

LN2 = math.log(2.0)
LOOKED_AT = 256  # records that are looked at for a victim: those longest unused
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Pace:
    """half_life: after which a use counts half. margin: how much more a newcomer, or another place, must be
    worth than what is there (hysteresis). prior: uses that the mean of a record's group counts as."""

    half_life: float = 300.0
    margin: float = 0.2
    prior: float = 1.0
    phase: float = 80.0

    def __post_init__(self) -> None:
        good = all(math.isfinite(x) for x in (self.half_life, self.margin, self.prior, self.phase))
        if not (good and self.half_life > 0 and self.phase > 0 and self.margin >= 0 and self.prior >= 0):
            raise MemoryInputError(
                f"{self}: the half-life must be positive, margin and prior at least 0, all of them finite."
            )


@dataclass(frozen=True, slots=True)
class Usage:
    """A decayed count of uses as it stood at the moment `at`, the last use."""

    count: float = 0.0
    at: float = 0.0

    def counted(self, now: float, half_life: float) -> float:
        """What the uses count at `now`."""
        return self.count * math.exp(-max(now - self.at, 0.0) * LN2 / half_life)

    def used(self, now: float, half_life: float, uses: float = 1.0) -> Usage:
        """With `uses` more at `now`."""
        return Usage(self.counted(now, half_life) + uses, max(now, self.at))

    def rate(self, now: float, half_life: float) -> float:
        """Uses in a unit of time: of a steady rate, the count is rate x half_life / ln 2."""
        return self.counted(now, half_life) * LN2 / half_life


@dataclass(frozen=True, slots=True)
class Held:
    """A record in a tier: its bytes, and what one use of it saves against the next tier below."""

    nbytes: int
    saved_ms: float


@dataclass(slots=True)
class _Group:
    """usage: of all its records, forgotten like theirs; lately: the same, forgotten as `Pace.phase` says."""

    usage: Usage = field(default_factory=Usage)
    lately: Usage = field(default_factory=Usage)
    members: int = 0


class Keeper(Generic[K]):
    """What a tier of `most` bytes keeps: the records of most worth for their bytes. Pure bookkeeping; not
    thread-safe by itself. ghosts: records whose use is remembered after they have left."""

    def __init__(self, most: int, pace: Pace | None = None, ghosts: int = 4096) -> None:
        self.most, self.pace, self.ghosts = most, pace or Pace(), ghosts
        self.nbytes = 0
        self.held: OrderedDict[K, Held] = OrderedDict()  # least recently used first
        self._usage: OrderedDict[K, tuple[Usage, Hashable]] = OrderedDict()  # with its group
        self._groups: dict[Hashable, _Group] = {}

    def used(self, key: K, now: float, group: Hashable = None) -> None:
        """Notes a use, whether the record is here or not. group: memories whose uses are alike."""
        usage, before = self._usage.pop(key, (Usage(), group))
        if usage.count == 0.0 or before != group:
            self._leave(before, usage)
            self._groups.setdefault(group, _Group()).members += 1
        self._usage[key] = usage.used(now, self.pace.half_life), group
        all_ = self._groups[group]
        all_.usage = all_.usage.used(now, self.pace.half_life)
        all_.lately = all_.lately.used(now, self.pace.phase)
        if key in self.held:
            self.held.move_to_end(key)
        while len(self._usage) > self.ghosts + len(self.held):
            oldest = next(iter(self._usage))
            usage, group = self._usage.pop(oldest)
            if oldest in self.held:
                self._usage[oldest] = usage, group  # looked at again last
            else:
                self._leave(group, usage)

    def _leave(self, group: Hashable, usage: Usage) -> None:
        """A record is no longer of this group; one that was never used was not."""
        if usage.count > 0.0:
            self._groups[group].members -= 1
            if self._groups[group].members == 0:
                del self._groups[group]

    def rate(self, key: K, now: float) -> float:
        """Uses of a record in a unit of time; 0 for one that is not known."""
        usage, group = self._usage.get(key, (None, None))
        if usage is None:
            return 0.0
        pace, all_ = self.pace, self._groups[group]
        whole = all_.usage.counted(now, pace.half_life)
        if whole <= 0.0:  # so long ago that nothing is left of it
            return 0.0
        share = usage.counted(now, pace.half_life) / whole + pace.prior / all_.members
        return all_.lately.rate(now, pace.phase) * share

    def worth(self, key: K, now: float, held: Held | None = None) -> float:
        """Milliseconds that the record saves in a unit of time."""
        return self.rate(key, now) * (held or self.held[key]).saved_ms

    def offer(self, key: K, nbytes: int, saved_ms: float, now: float) -> list[K] | None:
        """Takes a record in; returns what has to leave for it. None: it is not taken, since it is larger than
        the tier or what would leave is worth as much."""
        new = Held(nbytes, saved_ms)
        self.forget(key)
        if nbytes > self.most:
            return None
        leaving = self.victims(nbytes - (self.most - self.nbytes), now)
        if leaving:
            lost = sum(self.worth(k, now) for k in leaving)
            if self.worth(key, now, new) < lost * (1.0 + self.pace.margin):
                return None
        for old in leaving:
            self.forget(old)
        self.held[key] = new
        self.nbytes += nbytes
        return leaving

    def victims(self, needed: int, now: float) -> list[K]:
        """The records of least worth for their bytes that free so many; the worst first."""
        if needed <= 0:
            return []
        looked = LOOKED_AT
        while True:
            some = list(islice(self.held, looked))
            some.sort(key=lambda k: self.worth(k, now) / max(self.held[k].nbytes, 1))
            freed, leaving = 0, []
            for key in some:
                if freed >= needed:
                    break
                leaving.append(key)
                freed += self.held[key].nbytes
            if freed >= needed or looked >= len(self.held):
                return leaving
            looked *= 4

    def forget(self, key: K) -> None:
        """The record is no longer here; its use is remembered."""
        gone = self.held.pop(key, None)
        self.nbytes -= 0 if gone is None else gone.nbytes

    def clear(self) -> None:
        """Forgets everything."""
        self.held.clear()
        self._usage.clear()
        self._groups.clear()
        self.nbytes = 0


def best_place(
    rate: float,
    nbytes: int,
    saved_ms: Mapping[str, float],
    prices: Mapping[str, float],
    here: str,
    margin: float = 0.2,
) -> str:
    """Where a record is worth most: one of the places in `saved_ms`, or `here`.

    saved_ms: milliseconds that a use saves from each place, against the text (which saves 0). prices: of a
    byte there, milliseconds in a unit of time. A move must gain more than `margin` of what it is about, the
    difference in what uses save or in what the bytes cost, whichever is larger; so that rates that waver
    about the break-even do not move anything. Ties stay.
    """

    def use(place: str) -> float:
        return rate * saved_ms.get(place, 0.0)

    def cost(place: str) -> float:
        return nbytes * prices.get(place, 0.0)

    best = max(saved_ms, key=lambda place: (use(place) - cost(place), place == here), default=here)
    more, dearer = use(best) - use(here), cost(best) - cost(here)
    return best if more - dearer > margin * max(abs(more), abs(dearer)) else here


def price(densities: Iterable[float]) -> float:
    """What a byte of a full tier costs: as much as its worst record earns with one; 0 where it has room."""
    return min(densities, default=0.0)
