"""Candidates as arrays, what a choice of forms brings in, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from memos_engine.memory.costs import Load, Pricer

Floats = npt.NDArray[np.float64]
Forms = npt.NDArray[np.int8]
Indices = npt.NDArray[np.intp]
SKIP, TEXT, KV = 0, 1, 2
EQUAL = 1e-6  # values nearer than this are the same


@dataclass(frozen=True)
class Items:
    """Candidates, most relevant first; each array has one entry a candidate.

    need: probability of being needed. text, kv: tokens as text and from a record (0 where that form is not
    allowed). exact: its record is exact in slot 0. disk, mib: whether the record must be read, and its size.
    text_worth, kv_worth: factor on a form's quality (the policies' preferences). overlap `[n, n]`: what two
    memories say both. burden: what each costs wherever it stands, for it draws attention from the others.
    cached: a prefix of all items that stands as text in pages: these go in, as text.
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
    burden: Floats
    cached: int = 0

    def __len__(self) -> int:
        return len(self.need)

    @cached_property
    def text_columns(self) -> Floats:
        """`[n, 2]`: tokens to compute, and tokens in pages."""
        there = np.arange(len(self)) < self.cached
        return np.stack([np.where(there, 0.0, self.text), np.where(there, self.text, 0.0)], axis=1)

    @cached_property
    def kv_columns(self) -> Floats:
        """`[n, 4]`: tokens, records, reads from disk, and their mebibytes."""
        return np.stack([self.kv, np.ones(len(self)), self.disk.astype(np.float64), self.mib], axis=1)

    @cached_property
    def pairs(self) -> tuple[Indices, Indices, Floats]:
        """Memories that say the same: (i, j, what both are worth less together)."""
        first, second = np.nonzero(self.overlap)
        once = first < second
        first, second = first[once], second[once]
        return first, second, self.overlap[first, second] * np.minimum(self.need[first], self.need[second])


@dataclass(frozen=True)
class Choice:
    """A form for each item, what that is worth, and the milliseconds until the first token."""

    share: float
    forms: tuple[int, ...]
    value: float
    ms: float


@dataclass(frozen=True)
class Limits:
    """What a choice must keep. price: milliseconds of a load, against the budget; room: tokens that fit;
    most: memories that may enter. give: share of the best value that is given for speed: of all choices with
    the rest of it, the fastest."""

    price: Pricer
    budget: float
    room: int
    most: int
    give: float = 0.0


def loads(items: Items, forms: Forms, share: Floats | float) -> Load:
    """What choices `[p, n]` bring in. share: one number, or `[p]`."""
    text, kv = (forms == TEXT).astype(np.float64), (forms == KV).astype(np.float64)
    rows, cached = (text @ items.text_columns).T
    spliced, records, disk, mib = (kv @ items.kv_columns).T
    return Load(rows, cached, spliced, again(items, forms, spliced, share), records, disk, mib)


def again(items: Items, forms: Forms, spliced: Floats, share: Floats | float) -> Floats:
    """`[p]`: tokens that are computed again: a share of the spliced ones, none of them in an exact slot 0."""
    if not len(items) or (np.ndim(share) == 0 and share == 0):
        return np.zeros(len(forms))
    first, exact = _exact(items, forms)
    loose = spliced - exact * items.kv[first]
    return np.asarray(np.minimum(loose, np.round(np.asarray(share) * spliced)), np.float64)


def _exact(items: Items, forms: Forms) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """`[p]`: the memory in slot 0, and whether its record is there and exact."""
    if not len(items):
        return np.zeros(len(forms), np.intp), np.zeros(len(forms), np.bool_)
    first = (forms != SKIP).argmax(1)
    exact = (forms[np.arange(len(forms)), first] == KV) & items.exact[first]
    return first, exact


def values(items: Items, forms: Forms, quality: Floats | float) -> Floats:
    """`[p]`: what choices are worth. quality: of a spliced memory; one number, or `[p]`."""
    text, kv = (forms == TEXT).astype(np.float64), (forms == KV).astype(np.float64)
    as_text, as_kv = items.need * items.text_worth, items.need * items.kv_worth
    worth = text @ (as_text - items.burden) + (kv @ as_kv) * quality - kv @ items.burden
    if len(items):
        first, exact = _exact(items, forms)
        worth = worth + exact * as_kv[first] * (1 - np.asarray(quality))
    first, second, twice = items.pairs
    if len(first):
        there = forms != SKIP
        worth = worth - (there[:, first] & there[:, second]) @ twice
    return np.asarray(worth, np.float64)


def fastest(worth: Floats, ms: Floats, enough: float) -> int:
    """The fastest choice that is worth enough; where none is, the fastest of the most valuable ones."""
    near = worth >= min(enough, float(worth.max())) - EQUAL
    return int(np.argmin(np.where(near, ms, np.inf)))
