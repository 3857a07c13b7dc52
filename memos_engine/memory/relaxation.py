"""The knapsack of many candidates: Lagrangian relaxation (Fisher 1981; Kellerer, Pferschy and Pisinger,
Knapsack Problems, 2004, ch. 11).

With a price on a millisecond, on a token of room and on a place among the memories, every candidate takes the
form with the largest gain by itself. Each set of prices gives a choice to try, and, costs being nowhere above
the true ones, a bound that no choice exceeds. All sets of prices are tried at once, and parts of the greedy
order (Sinha and Zoltners 1979) beside them; the best choice that keeps all limits, at its true cost, takes in
one memory more where that fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memos_engine.memory.costs import Load
from memos_engine.memory.items import (
    EQUAL,
    KV,
    SKIP,
    TEXT,
    Choice,
    Floats,
    Forms,
    Items,
    Limits,
    fastest,
    loads,
    values,
)

# Prices of a millisecond that are tried, in its gain where the budget ends when memories enter by what they
# gain in one: upwards, for true costs are above the lines; downwards, for other limits may bind first.
PRICES = np.concatenate([[1e-4, 0.2], np.geomspace(0.6, 5.0, 6)])
ROOMS = np.asarray([0.0, 0.4])  # of a token, in the best gain for one
PARTS = np.linspace(0.0, 1.0, 6)  # of the memories that fill the budget so, which are tried as they are
NEAR = 16  # likeliest memories that are tried to fill a choice up


def many(items: Items, shares: Sequence[tuple[float, float]], limits: Limits) -> tuple[list[Choice], float]:
    """As `knapsack.search`, but the choices are good rather than best, and the bound is above them."""
    budget, give = limits.budget, limits.give
    share = np.asarray([one for one, _ in shares])
    quality = np.asarray([one for _, one in shares])
    start, text_ms, kv_ms = _lines(items, share, limits)
    open_ = start <= budget
    if not open_.any():
        return [], 0.0
    share, quality, start = share[open_], quality[open_], start[open_]
    text_ms, kv_ms = text_ms[open_], kv_ms[open_]
    # What does not even fit alone, at its lower cost, is in no choice.
    text_ms[text_ms > (budget - start)[:, None]] = np.inf
    kv_ms[kv_ms > (budget - start)[:, None]] = np.inf
    gains = _Gains(items, quality, (text_ms, kv_ms), limits, budget - start)
    bound = float(gains.bounds(budget - start).max())
    forms, which = gains.choices()
    ok, ms = _fitting(items, forms, share[which], limits)
    worth = values(items, forms, quality[which])
    if not ok.any():
        return [], bound
    enough = (1 - give) * float(worth[ok].max())
    out: list[Found] = []
    ok = ok.reshape(len(share), -1)
    for at, own in enumerate(ok):
        here = np.flatnonzero(own) + at * len(own)
        if len(here):
            best = here[fastest(worth[here], ms[here], enough)]
            chosen = forms[best]
            out.append((chosen, float(share[at]), float(quality[at]), float(worth[best]), float(ms[best])))
    top = max(range(len(out)), key=lambda i: out[i][3])
    if not give:
        at = int(np.argmax(share == out[top][1]))
        out[top] = _filled(items, out[top], (text_ms[at], kv_ms[at]), limits)
    choices = [Choice(s, tuple(chosen.tolist()), value, took) for chosen, s, _, value, took in out]
    return choices, max(bound, *(one.value for one in choices))


Found = tuple[Forms, float, float, float, float]


def _lines(items: Items, share: Floats, limits: Limits) -> tuple[Floats, Floats, Floats]:
    """Affine lower costs: of a request with its cached text `[s]`, and what each memory adds as text and as
    KV `[s, n]`."""
    exact = items.kv * items.exact
    slack = max(0.5, float(exact.max(initial=0))) if items.cached == 0 else 0.5
    rows = limits.price.rows_within(limits.budget)
    cached = float(items.text[: items.cached].sum())
    unit = np.eye(6)
    load = Load(unit[1], cached, unit[2], 0.0, unit[3], unit[4], unit[5])  # one row for each thing that costs
    lines = limits.price.floor(load, share[:, None], slack, rows)  # [s, 6]
    base, (text, kv, record, read, mib) = lines[:, 0], (lines[:, 1:] - lines[:, :1]).T
    kv_ms = kv[:, None] * items.kv + record[:, None] + read[:, None] * items.disk + mib[:, None] * items.mib
    return base, text[:, None] * items.text, kv_ms


class _Gains:
    """What each memory gains at each set of prices: `[shares, prices, rooms, n]`."""

    def __init__(
        self, items: Items, quality: Floats, lines: tuple[Floats, Floats], limits: Limits, left: Floats
    ) -> None:
        self.items = items
        text_ms, kv_ms = lines
        n, cached = len(items), items.cached
        self.places = max(0, limits.most - cached)
        self.room = limits.room - float(items.text[:cached].sum())
        none = -np.inf
        text = np.where(items.text > 0, items.need * items.text_worth - items.burden, none)
        kv = np.where(items.kv > 0, items.need * items.kv_worth * quality[:, None] - items.burden, none)
        text = np.where(np.isfinite(text_ms), text, none)
        kv = np.where(np.isfinite(kv_ms), kv, none)
        text[:, :cached] = kv[:, :cached] = none
        text_ms = np.where(np.isfinite(text_ms), text_ms, 0.0)
        kv_ms = np.where(np.isfinite(kv_ms), kv_ms, 0.0)
        self.greedy = _Greedy(np.maximum(text, 0.0), np.maximum(kv, 0.0), text_ms, kv_ms, left)
        dearest = np.maximum(text, kv).max(1, initial=1e-9) / max(1.0, float(items.text.mean()) if n else 1.0)
        longest = np.sort(np.maximum(items.text, items.kv))[::-1][: limits.most]
        tight = float(longest.sum()) > limits.room
        rooms = ROOMS if tight else ROOMS[:1]
        self.ms = (self.greedy.price[:, None] * PRICES)[:, :, None]  # the price of a millisecond
        self.tokens = dearest[:, None, None] * rooms[None, None, :]
        ms, tokens = self.ms[..., None], self.tokens[..., None]
        self.text = text[:, None, None] - ms * text_ms[:, None, None] - tokens * items.text
        self.kv = kv[:, None, None] - ms * kv_ms[:, None, None] - tokens * items.kv
        self.gain = np.maximum(np.maximum(self.text, self.kv), 0.0)
        if self.places >= n:
            self.place: Floats = np.zeros(self.gain.shape[:-1])
        elif self.places == 0:
            self.place = np.full(self.gain.shape[:-1], np.inf)
        else:  # the price of a place: the gain of the first memory that gets none
            at = n - self.places
            self.place = np.partition(self.gain, at - 1, axis=-1)[..., at - 1]
        self.bonus = (1 - quality) * float(
            (items.need * items.kv_worth * items.exact * (items.kv > 0)).max(initial=0)
        )
        self.fixed = float((items.need * items.text_worth - items.burden)[:cached].sum())

    def bounds(self, left: Floats) -> Floats:
        """`[s]`: the least value that a set of prices leaves possible with so many milliseconds."""
        if self.places == 0:
            return np.full(len(left), self.fixed)
        net = np.maximum(self.gain - self.place[..., None], 0.0)
        total = net.sum(-1) + self.place * self.places
        first, second, twice = self.items.pairs
        used: set[int] = set()
        apart = []  # pairs that share no memory: of both one alone, or both for less
        for at, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            if used.isdisjoint(pair):
                used.update(pair)
                apart.append(at)
        if apart:
            one, other = net[..., first[apart]], net[..., second[apart]]
            total = total - np.minimum(twice[apart], np.minimum(one, other)).sum(-1)
        total = total + self.ms * left[:, None, None] + self.tokens * self.room
        return np.asarray(total.min((1, 2)) + self.bonus + self.fixed, np.float64)

    def choices(self) -> tuple[Forms, npt.NDArray[np.intp]]:
        """Choices `[p, n]` to try, and the share that each belongs to. Of memories that say the same, the
        less likely one is tried only where it gains what it has of its own."""
        items = self.items
        gain = self.gain
        first, second, _ = items.pairs
        if len(first):
            said = np.zeros(len(items))
            np.maximum.at(said, second, items.overlap[first, second])
            gain = np.maximum(gain - said * items.need, 0.0)
        taken = gain > np.minimum(self.place, 1e30)[..., None]
        forms = np.where(taken, np.where(self.text >= self.kv, TEXT, KV), SKIP).astype(np.int8)
        shares, n = len(forms), len(items)
        forms = np.concatenate([forms.reshape(shares, -1, n), self.greedy.choices(self.places)], axis=1)
        forms[..., : items.cached] = TEXT
        return forms.reshape(-1, n), np.repeat(np.arange(shares), forms.shape[1])


class _Greedy:
    """Memories by what they gain in a millisecond, each in the form that gains most in one.

    price `[s]`: that gain where the budget ends; fits `[s]`: how many fit, by the lower costs. forms, place
    `[s, n]`: a memory's form, and its place in this order.
    """

    def __init__(self, text: Floats, kv: Floats, text_ms: Floats, kv_ms: Floats, left: Floats) -> None:
        by_text, by_kv = text / np.maximum(text_ms, 1e-6), kv / np.maximum(kv_ms, 1e-6)
        gain, n = np.maximum(by_text, by_kv), text.shape[1]
        order = np.argsort(-gain, axis=1, kind="stable")
        spent = np.take_along_axis(np.where(by_text > by_kv, text_ms, kv_ms), order, axis=1).cumsum(1)
        rows = np.arange(len(gain))
        self.fits = (spent <= left[:, None]).sum(1)
        self.price = np.maximum(gain[rows, order[rows, np.minimum(self.fits, n - 1)]], 1e-9)
        self.place = np.empty_like(order)
        np.put_along_axis(self.place, order, np.arange(n)[None], axis=1)
        self.forms = np.where(gain > 0, np.where(by_text > by_kv, TEXT, KV), SKIP).astype(np.int8)

    def choices(self, most: int) -> Forms:
        """`[s, len(PARTS), n]`: the first of this order, more and more of them. Memories that are alike would
        by any price enter all at once."""
        sizes = np.minimum(np.ceil(self.fits[:, None] * PARTS), most)
        return np.where(self.place[:, None] < sizes[:, :, None], self.forms[:, None], SKIP).astype(np.int8)


def _fitting(
    items: Items, forms: Forms, share: Floats | float, limits: Limits
) -> tuple[npt.NDArray[np.bool_], Floats]:
    load = loads(items, forms, share)
    ms = limits.price(load)
    tokens = np.asarray(load.text) + load.kv + load.cached
    ok = (ms <= limits.budget) & (tokens <= limits.room) & ((forms != SKIP).sum(1) <= limits.most)
    return ok & ((np.asarray(load.again) > 0) | (np.asarray(share) == 0)), ms


def _filled(items: Items, found: Found, lines: tuple[Floats, Floats], limits: Limits) -> Found:
    """The choice with what still fits: of all single further steps the most valuable. lines `[n]`, twice:
    what each memory takes at least, as text and as KV."""
    forms, share, quality, value, ms = found
    text_ms, kv_ms = lines
    spare = limits.budget - ms
    behind = np.arange(len(items)) >= items.cached
    saved = np.where(forms == KV, kv_ms, 0.0)
    as_text = behind & (items.text > 0) & (forms != TEXT) & (text_ms - saved <= spare)
    as_kv = behind & (items.kv > 0) & (forms == SKIP) & (kv_ms <= spare)
    where = np.concatenate([np.flatnonzero(as_text), np.flatnonzero(as_kv)])
    if not len(where):
        return found
    how = np.repeat(np.asarray([TEXT, KV], np.int8), [as_text.sum(), as_kv.sum()])
    likely = np.argsort(-items.need[where], kind="stable")[: 2 * NEAR]
    where, how = where[likely], how[likely]
    tried = np.repeat(forms[None], len(where), axis=0)
    tried[np.arange(len(where)), where] = how
    ok, took = _fitting(items, tried, share, limits)
    worth = np.where(ok, values(items, tried, quality), -np.inf)
    best = int(np.argmax(worth))
    if worth[best] <= value + EQUAL:
        return found
    return tried[best], share, quality, float(worth[best]), float(took[best])
