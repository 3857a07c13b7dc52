"""What one caller may search, in memory: a cache of the store's rows that follows every write."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memos_engine.memory.cube import time_from_text
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store_retrieval import PassageRow

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEVER = np.iinfo(np.int64).max
_STATES = tuple(state.value for state in LifecycleState)


def microseconds(iso: str) -> int:
    """A stored time as microseconds since 1970."""
    moment = time_from_text(iso)
    return int(moment.timestamp()) * 1_000_000 + moment.microsecond


@dataclass(frozen=True)
class _Active:
    """The last answer of `active`, good from `since` until before `ends` (microseconds)."""

    states: tuple[int, ...]
    since: int
    ends: int
    mask: Bools
    context_words: Ints

    def holds(self, states: tuple[int, ...], now: int) -> bool:
        return self.states == states and self.since <= now < self.ends


def _times(rows: Iterable[PassageRow]) -> Ints:
    """`[m, 3]`: key, first and last moment (microseconds) of each time that these rows name."""
    found = [(r.key, microseconds(first), microseconds(last)) for r in rows for first, last in r.named]
    return np.array(found, np.int64).reshape(-1, 3)


class Passages:
    """Rows as columns, ordered by key.

    `keys [n] int64`, ascending; `ids [n]` the memories' ids as bytes; `words`, `valid_from` and `until`
    (microseconds, `NEVER` without one) `[n] int64`; `state [n]`; `source [n]`: equal for rows of a session,
    -1 without one; `before` and `after` `[n]`: the row of the neighbour in the session, or -1; `linked`:
    whether there is any. A row keeps its place in its session whatever its state.
    """

    def __init__(self) -> None:
        self._sources: dict[tuple[int, str], int] = {}
        self._active: _Active | None = None
        self.clear()

    def __len__(self) -> int:
        return len(self.keys)

    def clear(self) -> None:
        self._sources.clear()
        self._times = _times([])
        self._set(self._columns([]))

    def replace(self, ids: Collection[str] | None, rows: Iterable[PassageRow]) -> tuple[Ints, list[int]]:
        """Put `rows` where those of `ids` (None: all) were.

        Returns the keys that are gone for good and the keys that are new or may have changed.
        """
        new = sorted(rows, key=lambda row: row.key)
        if ids is None:
            out = np.ones(len(self), bool)
        else:
            out = np.isin(self.ids, np.array(sorted(ids), dtype="S36"))
        added = self._columns(new)
        gone = np.setdiff1d(self.keys[out], added["keys"])
        kept = {name: np.concatenate([getattr(self, name)[~out], added[name]]) for name in added}
        keys = kept["keys"]
        if not (keys[1:] > keys[:-1]).all():
            order = np.argsort(keys, kind="stable")
            kept = {name: column[order] for name, column in kept.items()}
        stay = ~np.isin(self._times[:, 0], self.keys[out])
        self._times = np.concatenate([self._times[stay], _times(new)])
        self._set(kept)
        return gone, [row.key for row in new]

    def rows_of(self, keys: Ints) -> Ints:
        """Row numbers of those keys that are here, in the order given."""
        if not len(self) or not len(keys):
            return np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return np.asarray(at[self.keys[at] == keys], dtype=np.int64)

    def active(self, states: Iterable[LifecycleState], now: int) -> Bools:
        """`[n]`: in one of the states, and not past its time at `now` (microseconds). Read-only."""
        wanted = tuple(sorted(_STATES.index(state.value) for state in states))
        if self._active is None or not self._active.holds(wanted, now):
            there = self.until > now
            mask = np.asarray(np.isin(self.state, wanted) & there)
            mask.flags.writeable = False
            ends = int(self.until[there].min(initial=NEVER))
            self._active = _Active(wanted, now, ends, mask, self._context_words(mask))
        return self._active.mask

    def context_words(self, active: Bools) -> Ints:
        """`[n]`: words of each memory and of the two before it in its session, as far as they are active."""
        if self._active is not None and self._active.mask is active:
            return self._active.context_words
        return self._context_words(active)

    def _context_words(self, active: Bools) -> Ints:
        count = np.where(active, self.words, 0)
        total = count.copy()
        for row in self.steps(2, forward=False) if self.linked else ():
            there = row >= 0
            total[there] += count[row[there]]
        return np.asarray(np.where(active, total, 0), np.int64)

    def _columns(self, rows: list[PassageRow]) -> dict[str, npt.NDArray[np.generic]]:
        source = [
            -1
            if row.session is None
            else self._sources.setdefault((row.owner, row.session), len(self._sources))
            for row in rows
        ]
        return {
            "keys": np.array([row.key for row in rows], np.int64),
            "ids": np.array([row.cube_id for row in rows], "S36"),
            "place": np.array([row.place for row in rows], np.int64),
            "source": np.array(source, np.int64),
            "words": np.array([row.words for row in rows], np.int64),
            "valid_from": np.array([microseconds(row.valid_from) for row in rows], np.int64),
            "until": np.array([NEVER if r.until is None else microseconds(r.until) for r in rows], np.int64),
            "state": np.array([_STATES.index(row.state) for row in rows], np.int8),
            "embedded": np.array([row.embedded for row in rows], np.bool_),
        }

    def _set(self, columns: dict[str, npt.NDArray[np.generic]]) -> None:
        self.keys: Ints = columns["keys"]  # type: ignore[assignment]
        self.ids = columns["ids"]
        self.place: Ints = columns["place"]  # type: ignore[assignment]
        self.source: Ints = columns["source"]  # type: ignore[assignment]
        self.words: Ints = columns["words"]  # type: ignore[assignment]
        self.valid_from: Ints = columns["valid_from"]  # type: ignore[assignment]
        self.until: Ints = columns["until"]  # type: ignore[assignment]
        self.state = columns["state"]
        self.embedded: Bools = columns["embedded"]  # type: ignore[assignment]
        rows = np.searchsorted(self.keys, self._times[:, 0])
        self.naming = np.column_stack([rows, self._times[:, 1:]])
        self.before, self.after = self._neighbours()
        self.linked = bool((self.before >= 0).any())
        self._active = None

    def _neighbours(self) -> tuple[Ints, Ints]:
        before, after = np.full(len(self), -1), np.full(len(self), -1)
        order = np.lexsort((self.place, self.source))
        first, second = order[:-1], order[1:]
        linked = (self.source[first] == self.source[second]) & (self.source[first] >= 0)
        before[second[linked]] = first[linked]
        after[first[linked]] = second[linked]
        return before, after

    def steps(self, count: int, forward: bool) -> list[Ints]:
        """Neighbours 1, 2, ... `count` places before (`forward`: after) each row, -1 where there is none."""
        link = self.after if forward else self.before
        found: list[Ints] = []
        here = link
        for _ in range(count):
            found.append(here)
            here = np.where(here >= 0, link[here], -1)
        return found
