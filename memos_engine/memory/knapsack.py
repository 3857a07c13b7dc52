"""The best choice of memories and forms within a budget: a multiple-choice knapsack, once for each share of
tokens that may be computed again.

Up to WAYS ways of filling a request all of them are priced, with the true costs, and the best is the
best. Where there are more, `relaxation.py` finds a good one, and says how much better any other could be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memos_engine.memory.items import (
    KV,
    SKIP,
    TEXT,
    Choice,
    Forms,
    Items,
    Limits,
    again,
    fastest,
    loads,
    values,
)
from memos_engine.memory.relaxation import many

WAYS = 800  # of six candidates with KV each there are 729


def search(items: Items, shares: Sequence[tuple[float, float]], limits: Limits) -> tuple[list[Choice], float]:
    """The best choice for each (share, quality) that has one, and a value that no choice with any of them
    exceeds. An empty choice counts only without a share."""
    forms = _ways(items)
    if forms is None:
        return many(items, shares, limits)
    price, budget = limits.price, limits.budget
    forms = forms[(forms != SKIP).sum(1) <= limits.most]
    forms = forms[((forms == TEXT) @ items.text + (forms == KV) @ items.kv) <= limits.room]
    forms = forms[price(loads(items, forms, 0.0)) <= budget]  # a share only adds to that
    plain = loads(items, forms, 0.0)
    weighed = []
    for share, quality in shares:
        load = replace(plain, again=again(items, forms, np.asarray(plain.kv), share))
        ms = price(load)
        fits = (ms <= budget) & ((np.asarray(load.again) > 0) if share else True)
        if fits.any():
            weighed.append((share, forms[fits], values(items, forms[fits], quality), ms[fits]))
    bound = max((float(worth.max()) for *_, worth, _ in weighed), default=0.0)
    out = []
    for share, some, worth, ms in weighed:
        at = fastest(worth, ms, (1 - limits.give) * bound)
        out.append(Choice(share, tuple(some[at].tolist()), float(worth[at]), float(ms[at])))
    return out, bound


def _ways(items: Items) -> Forms | None:
    """All ways to fill a request `[p, n]`, counted like the digits of a number; None: there are too many."""
    if 2 ** (len(items) - items.cached) > WAYS:  # each can at least stay out
        return None
    able: list[tuple[int, ...]] = []
    for i, (text, kv) in enumerate(zip((items.text > 0).tolist(), (items.kv > 0).tolist(), strict=True)):
        able.append((TEXT,) if i < items.cached else (SKIP, *(TEXT,) * text, *(KV,) * kv))
    total = math.prod(map(len, able))
    if total > WAYS:
        return None
    rows, stride = np.arange(total), 1
    forms = np.zeros((total, len(able)), np.int8)
    for i, choices in enumerate(able):
        forms[:, i] = np.asarray(choices, np.int8)[rows // stride % len(choices)]
        stride *= len(choices)
    return forms
