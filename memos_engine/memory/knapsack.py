"""The best choice of memories and forms within a budget: a multiple-choice knapsack, once for each share of
tokens that may be computed again.

Up to PATTERNS ways of filling a request all of them are priced, with the true costs, and the best is the
best. Where there are more, `relaxation.py` finds a good one, and says how much better any other could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, product

import numpy as np

from memos_engine.memory.costs import Pricer
from memos_engine.memory.items import KV, TEXT, Choice, Floats, Forms, Items, loads, values
from memos_engine.memory.relaxation import many

PATTERNS = 2200  # eight candidates of which four may enter have 1,697
EQUAL = 1e-6  # values nearer than this are the same


def search(
    items: Items, shares: Sequence[tuple[float, float]], price: Pricer, budget: float, room: int, most: int
) -> tuple[list[Choice], float]:
    """The best choice for each (share, quality) that has one, and a value that no choice with any of them
    exceeds. An empty choice counts only without a share.

    price: milliseconds of a load; room: tokens that fit; most: memories that may enter.
    """
    forms = _patterns(len(items), min(most, len(items)))
    if forms is None:
        return many(items, shares, price, budget, room, most)
    able = np.stack([np.ones(len(items)), items.text, items.kv])  # [form, item]: 0 where it is not allowed
    good = np.all(able[forms, np.arange(len(items))] > 0, axis=1)
    good &= np.all(forms[:, : items.cached] == TEXT, axis=1)
    good &= ((forms == TEXT) @ items.text + (forms == KV) @ items.kv) <= room
    forms = forms[good]
    forms = forms[price(loads(items, forms, 0.0)) <= budget]  # a share only adds to that
    out = []
    for share, quality in shares:
        load = loads(items, forms, share)
        ms = price(load)
        fits = (ms <= budget) & ((np.asarray(load.again) > 0) if share else True)
        if fits.any():
            some, ms = forms[fits], ms[fits]
            worth = values(items, some, quality)
            best = _best(worth, ms)
            value = float(worth[best])
            out.append(Choice(share, tuple(some[best].tolist()), value, float(ms[best])))
    return out, max((one.value for one in out), default=0.0)


def _best(worth: Floats, ms: Floats) -> int:
    """The most valuable; of equals the fastest."""
    near = worth >= worth.max(initial=-np.inf) - EQUAL
    return int(np.argmin(np.where(near, ms, np.inf)))


@lru_cache(maxsize=64)
def _patterns(n: int, most: int) -> Forms | None:
    """All choices `[p, n]` of at most `most` memories; None where there are too many."""
    count, total = 1, 1
    for k in range(1, most + 1):
        count = count * (n - k + 1) // k
        total += count * 2**k
        if total > PATTERNS:
            return None
    rows = np.zeros((total, n), np.int8)
    at = 1
    for k in range(1, most + 1):
        for where in combinations(range(n), k):
            for how in product((TEXT, KV), repeat=k):
                rows[at, where] = how
                at += 1
    return rows
