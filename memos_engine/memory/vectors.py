"""Embeddings of one caller's passages in memory: exact, in step with the rows, without a second copy for the
context view."""

from __future__ import annotations

import numpy as np

from memos_engine.memory.index import Floats, Indices, VectorIndex, cosines
from memos_engine.memory.passages import Bools, Ints, Passages
from memos_engine.memory.retrieval import CONTEXT, Scores

_CHUNK = 4096


class ExactVectors:
    """A matrix with a row for each key. Rows of forgotten keys are zeroed and used again."""

    def __init__(self) -> None:
        self._keys: Indices = np.zeros(0, np.int64)  # ascending
        self._slots: Indices = np.zeros(0, np.int64)  # the matrix row of each
        self._matrix: Floats = np.zeros((0, 0), np.float32)
        self._free: list[int] = []
        self._used = 0
        # Per matrix row: the rows before it in its session when its context was last measured, and the
        # length of what the three add up to.
        self._one = self._two = np.zeros(0, np.int64)
        self._length = np.zeros(0)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def matrix(self) -> tuple[Indices, Floats]:
        """All keys, ascending, and a copy of their vectors `[n, dim]`."""
        return self._keys.copy(), self._matrix[self._slots]

    def put(self, keys: Indices, matrix: Floats) -> None:
        if not len(keys):
            return
        self.drop(keys)
        slots = np.array([self._slot(matrix.shape[1]) for _ in keys], np.int64)
        self._matrix[slots] = matrix
        self._forget_context(slots)
        both, rows = np.concatenate([self._keys, keys]), np.concatenate([self._slots, slots])
        order = np.argsort(both, kind="stable")
        self._keys, self._slots = both[order], rows[order]

    def drop(self, keys: Indices) -> None:
        out = np.isin(self._keys, keys)
        slots = self._slots[out]
        self._matrix[slots] = 0
        self._forget_context(slots)
        self._free += slots.tolist()
        self._keys, self._slots = self._keys[~out], self._slots[~out]

    def nearest(self, query: Floats, k: int) -> Indices:
        return self._keys

    def vectors(self, keys: Indices) -> Floats:
        slots = self.slots(keys)
        return np.where(slots[:, None] >= 0, self._matrix[slots], np.float32(0))

    def slots(self, keys: Indices) -> Indices:
        """The matrix row of each key, -1 for those not held."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._slots[at], -1)

    def views(self, query: Floats, slot: Indices, one: Indices, two: Indices) -> tuple[Scores, Scores]:
        """Cosines `[n]` to the vectors in `slot [n]`, and to each with the two before it mixed in.

        `one`, `two` `[n]` are those before, -1 where there is none; so is a slot without a vector.
        """
        known = np.append(cosines(query, self._matrix[: self._used]), np.float32(0)).astype(np.float64)
        self._measure(slot, one, two)
        length = np.where(slot >= 0, self._length[slot], 0) if len(self._length) else np.zeros(len(slot))
        mixed = CONTEXT[0] * known[slot] + CONTEXT[1] * known[one] + CONTEXT[2] * known[two]
        return known[slot], np.divide(mixed, length, out=np.zeros(len(slot)), where=length > 1e-6)

    def _measure(self, slot: Indices, one: Indices, two: Indices) -> None:
        """Lengths of the mixtures, where they are not known from an earlier search."""
        held = np.flatnonzero(slot >= 0)
        stale = held[(self._one[slot[held]] != one[held]) | (self._two[slot[held]] != two[held])]
        for start in range(0, len(stale), _CHUNK):
            rows = stale[start : start + _CHUNK]
            mixed = sum(
                weight * np.where(at[rows, None] >= 0, self._matrix[at[rows]], np.float32(0))
                for weight, at in zip(CONTEXT, (slot, one, two), strict=True)
            )
            self._length[slot[rows]] = np.linalg.norm(mixed, axis=1)
            self._one[slot[rows]], self._two[slot[rows]] = one[rows], two[rows]

    def _slot(self, dim: int) -> int:
        if self._free:
            return self._free.pop()
        if self._used == len(self._matrix):
            more = max(64, self._used // 2)
            self._matrix = _grown(self._matrix.reshape(self._used, -1 if self._used else dim), more)
            self._one, self._two, self._length = (
                _grown(array, more) for array in (self._one, self._two, self._length)
            )
        self._used += 1
        return self._used - 1

    def _forget_context(self, slots: Indices) -> None:
        """Lengths that these rows have a part in."""
        if not len(slots):
            return
        self._one[slots] = -2
        self._one[np.isin(self._one, slots) | np.isin(self._two, slots)] = -2


def _grown(array: np.ndarray, more: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])


def dense_views(
    index: VectorIndex, query: Floats, passages: Passages, active: Bools, rows: Ints | None
) -> tuple[Scores, Scores]:
    """The views `dense` and `dense_context` `[n]`: zero where a passage has no vector, or is not active.

    `rows`: those to look at (None: all, which needs an `ExactVectors`). What is not active lends no context.
    """
    one, two = passages.steps(2, forward=False)
    if isinstance(index, ExactVectors):
        slot = np.where(active, index.slots(passages.keys), -1)
        linked = [np.where(at >= 0, slot[at], -1) if len(slot) else at for at in (one, two)]
        return index.views(query, slot, linked[0], linked[1])
    looked = np.flatnonzero(active) if rows is None else rows[active[rows]]
    own, mixed = np.zeros(len(passages)), np.zeros(len(passages))
    sets = [np.where((at >= 0) & active[at], at, -1) for at in (looked, one[looked], two[looked])]
    needed = np.unique(np.concatenate(sets))
    vectors = index.vectors(np.where(needed >= 0, passages.keys[needed], -1))
    total = np.zeros((len(looked), len(query)), np.float32)
    for weight, at in zip(CONTEXT, sets, strict=True):
        total += np.float32(weight) * vectors[np.searchsorted(needed, at)]
    mine = vectors[np.searchsorted(needed, sets[0])]
    length = np.linalg.norm(total, axis=1, keepdims=True)
    good = mine.any(axis=1) & (length[:, 0] > 1e-6)  # without a vector of its own there is no view
    own[looked] = cosines(query, mine)
    mixed[looked] = cosines(query, np.divide(total, length, out=np.zeros_like(total), where=good[:, None]))
    return own, mixed
