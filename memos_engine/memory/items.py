"""Candidates as arrays, what a choice of forms brings in, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from memos_engine.memory.costs import Load

Floats = npt.NDArray[np.float64]
Forms = npt.NDArray[np.int8]
Indices = npt.NDArray[np.intp]
SKIP, TEXT, KV = 0, 1, 2


@dataclass(frozen=True)
class Items:
    """Candidates, most relevant first; each array has one entry a candidate.

    need: probability of being needed. text, kv: tokens as text and from a record (0 where that form is not
    allowed). exact: its record is exact in slot 0. disk, mib: whether the record must be read, and its size.
    text_worth, kv_worth: factor on a form's quality (the policies' preferences). overlap `[n, n]`: what two
    memories say both. cached: a prefix of all items that stands as text in pages: these go in, as text.
    """

    need: Floats
    text: Floats
    kv: Floats
    exact: npt.NDArray[np.bool_]
    disk: npt.NDArray[np.bool_]
    mib: Floats
    text_worth: Floats
    kv_worth: Floats
    overlap: Floats
    cached: int = 0

    def __len__(self) -> int:
        return len(self.need)

    @cached_property
    def pairs(self) -> tuple[Indices, Indices, Floats]:
        """Memories that say the same: (i, j, what both are worth less together)."""
        first, second = np.nonzero(np.triu(self.overlap))
        return first, second, self.overlap[first, second] * np.minimum(self.need[first], self.need[second])


@dataclass(frozen=True)
class Choice:
    """A form for each item, what that is worth, and the milliseconds until the first token."""

    share: float
    forms: tuple[int, ...]
    value: float
    ms: float


def loads(items: Items, forms: Forms, share: Floats | float) -> Load:
    """What choices `[p, n]` bring in. share: one number, or `[p]`."""
    text, kv = forms == TEXT, forms == KV
    rows = text[:, items.cached :] @ items.text[items.cached :]
    cached = text[:, : items.cached] @ items.text[: items.cached]
    spliced = kv @ items.kv
    exact = _exact(items, forms)
    loose = spliced - np.where(exact.any(1), (exact @ items.kv), 0.0)
    again = np.minimum(loose, np.round(np.asarray(share) * spliced))
    records = kv.sum(1)
    return Load(rows, cached, spliced, again, records, kv @ items.disk, kv @ items.mib)


def _exact(items: Items, forms: Forms) -> npt.NDArray[np.bool_]:
    """`[p, n]`: the record that stands in slot 0 and is exact there."""
    taken = forms != SKIP
    first = taken & (np.cumsum(taken, axis=1) == 1)
    exact: npt.NDArray[np.bool_] = first & (forms == KV) & items.exact
    return exact


def values(items: Items, forms: Forms, quality: float) -> Floats:
    """`[p]`: what choices are worth. quality: of a spliced memory."""
    text, kv = forms == TEXT, forms == KV
    worth = text @ (items.need * items.text_worth) + kv @ (items.need * items.kv_worth * quality)
    worth = worth + _exact(items, forms) @ (items.need * items.kv_worth * (1 - quality))
    first, second, twice = items.pairs
    if len(first):
        there = forms != SKIP
        worth = worth - (there[:, first] & there[:, second]) @ twice
    return np.asarray(worth, np.float64)
