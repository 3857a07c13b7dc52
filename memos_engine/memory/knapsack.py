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
from memos_engine.memory.items import KV, TEXT, Choice, Forms, Items, fastest, loads, values
from memos_engine.memory.relaxation import many

PATTERNS = 2200  # eight candidates of which four may enter have 1,697


def search(
    items: Items,
    shares: Sequence[tuple[float, float]],
    price: Pricer,
    budget: float,
    room: int,
    most: int,
    give: float = 0.0,
) -> tuple[list[Choice], float]:
    """The best choice for each (share, quality) that has one, and a value that no choice with any of them
    exceeds. An empty choice counts only without a share. give: share of the best value that is given for
    speed: of all choices with the rest of it, the fastest.

    price: milliseconds of a load; room: tokens that fit; most: memories that may enter.
    """
    forms = _patterns(len(items), min(most, len(items)))
    if forms is None:
        return many(items, shares, price, budget, room, most, give)
    able = np.stack([np.ones(len(items)), items.text, items.kv])  # [form, item]: 0 where it is not allowed
    good = np.all(able[forms, np.arange(len(items))] > 0, axis=1)
    good &= np.all(forms[:, : items.cached] == TEXT, axis=1)
    good &= ((forms == TEXT) @ items.text + (forms == KV) @ items.kv) <= room
    forms = forms[good]
    forms = forms[price(loads(items, forms, 0.0)) <= budget]  # a share only adds to that
    weighed = []
    for share, quality in shares:
        load = loads(items, forms, share)
        ms = price(load)
        fits = (ms <= budget) & ((np.asarray(load.again) > 0) if share else True)
        if fits.any():
            weighed.append((share, forms[fits], values(items, forms[fits], quality), ms[fits]))
    bound = max((float(worth.max()) for *_, worth, _ in weighed), default=0.0)
    out = []
    for share, some, worth, ms in weighed:
        at = fastest(worth, ms, (1 - give) * bound)
        out.append(Choice(share, tuple(some[at].tolist()), float(worth[at]), float(ms[at])))
    return out, bound


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
