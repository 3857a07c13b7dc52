"""How well passages fit a query: four views, fused by score, spread to neighbours, drawn to dates.

Pure functions of arrays. Which weights are the defaults and what was tried is in docs/retrieval.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from memos_engine.errors import MemoryInputError
from memos_engine.memory.passages import Bools, Ints, Passages

Scores = npt.NDArray[np.float64]
VIEWS = ("words", "words_context", "dense", "dense_context")
CONTEXT = (1.0, 0.5, 0.3)
"""What a memory, the one before it and the one before that weigh in the dense context view."""
DIGITS = 6
"""Decimals of a score: float32 products differ beyond that between machines, and ties must not."""


@dataclass(frozen=True, slots=True)
class RetrievalWeights:
    """How the views are weighed; every view is scaled to a maximum of 1 first.

    `words`: rarity of the query's words that a memory holds; `words_context`: the same with the two memories
    before it in its session; `dense`, `dense_context`: likewise by embedding. `length`: how much long texts
    count less for the same words, 0 to 1. A memory lends `from_before` of its score to the one after it and
    `from_after` to the one before it, `fading` of that one place further, up to `reach` places. `dated`: what
    a memory gains by lying in the time that the query names, as a share of the best score, or up to
    `dated_days` after it (people tell of things afterwards); `named`: by naming itself a time within that
    one (`yesterday`, counted from when it was said). `max_terms`: words of a query that count.
    Raises `MemoryInputError`.
    """

    words: float = 1.0
    words_context: float = 2.0
    dense: float = 0.25
    dense_context: float = 1.5
    length: float = 0.1
    from_before: float = 0.0
    from_after: float = 0.1
    fading: float = 0.75
    reach: int = 6
    dated: float = 0.4
    dated_days: int = 3
    named: float = 0.4
    max_terms: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise MemoryInputError(f"{field.name}={value!r}: must be a number of at least 0.")
        if self.length > 1 or self.fading > 1:
            raise MemoryInputError("length and fading must be at most 1.")

    def of(self, view: str) -> float:
        weight: float = getattr(self, view)
        return weight


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of all passages for one query, each array `[n] float64`.

    `raw` and `scaled` by view; `base` is their weighted sum, `relevance` (0 to 1) adds what neighbours and
    dates give. `terms`: the query's words that counted, with their rarity; `present [terms, n]`.
    """

    raw: Mapping[str, Scores]
    scaled: Mapping[str, Scores]
    terms: tuple[tuple[str, float], ...]
    present: Bools
    base: Scores
    spread: Scores
    dated: Bools
    named: Bools
    relevance: Scores


def word_views(
    passages: Passages, active: Bools, postings: Mapping[str, Ints], weights: RetrievalWeights
) -> tuple[dict[str, Scores], tuple[tuple[str, float], ...], Bools]:
    """The views `words` and `words_context`, the terms that counted, and where they are `[terms, n]`.

    All counts are of active passages, so that no score depends on what the caller may not see.
    """
    n = len(passages)
    found: list[tuple[int, str, Ints]] = []
    for stem, keys in postings.items():
        rows = passages.rows_of(keys)
        rows = rows[active[rows]]
        if len(rows):
            found.append((len(rows), stem, rows))
    found.sort(key=lambda item: item[:2])
    found = found[: weights.max_terms]
    present = np.zeros((len(found), n), np.bool_)
    for here, (_, _, rows) in zip(present, found, strict=True):
        here[rows] = True
    context = _with_followers(present, [item[2] for item in found], passages, active)
    held = [item[2] for item in found]
    around = [np.flatnonzero(row) for row in context] if passages.linked else held
    total = int(np.count_nonzero(active))
    rarity = _rarity(held, total)
    words, near = np.where(active, passages.words, 0), passages.context_words(active)
    views = {
        "words": _coverage(held, rarity, words, active, weights.length),
        "words_context": _coverage(around, _rarity(around, total), near, active, weights.length),
    }
    terms = tuple((item[1], float(value)) for item, value in zip(found, rarity, strict=True))
    return views, terms, present


def _with_followers(present: Bools, rows: Sequence[Ints], passages: Passages, active: Bools) -> Bools:
    """`present`, and true for the two rows behind each in its session, too, where they are active."""
    if not passages.linked:
        return present
    context: Bools = present.copy()
    for here, held in zip(context, rows, strict=True):
        behind = held
        for _ in range(2):
            behind = passages.after[behind]
            behind = behind[behind >= 0]
            here[behind] = True
        here &= active
    return context


def _rarity(rows: Sequence[Ints], total: int) -> Scores:
    """BM25's inverse document frequency, in the form that is never negative. `rows`: where each term is."""
    held = np.array([len(one) for one in rows], np.float64)
    return np.asarray(np.log1p((total - held + 0.5) / (held + 0.5)), dtype=np.float64)


def _coverage(rows: Sequence[Ints], rarity: Scores, words: Ints, active: Bools, length: float) -> Scores:
    """BM25 in which a word counts once however often it comes (k1 = 0 there), with a say for length."""
    score = np.zeros(len(active))
    for one, value in zip(rows, rarity, strict=True):
        score[one] += value
    mean = max(1.0, float(words.sum()) / max(1, int(np.count_nonzero(active))))
    some = np.flatnonzero(score)
    score[some] /= 1 - length + length * words[some] / mean
    return score


def spread(base: Scores, passages: Passages, weights: RetrievalWeights, active: Bools) -> Scores:
    """What neighbours in the session lend: who asks and who answers share what a query is about."""
    gained = np.zeros_like(base)
    lenders = np.flatnonzero(base) if passages.linked else np.zeros(0, np.int64)
    for link, share in ((passages.after, weights.from_before), (passages.before, weights.from_after)):
        borrowers, sources = lenders, lenders
        for _ in range(weights.reach if share and len(lenders) else 0):
            borrowers = link[borrowers]
            there = borrowers >= 0
            borrowers, sources = borrowers[there], sources[there]
            gained[borrowers] += share * base[sources]
            share *= weights.fading
    return np.where(active, gained, 0)


def fuse(
    raw: Mapping[str, Scores],
    passages: Passages,
    active: Bools,
    weights: RetrievalWeights,
    *,
    intervals: Sequence[tuple[int, int]] = (),
    terms: tuple[tuple[str, float], ...] = (),
    present: Bools | None = None,
) -> Ranking:
    """Scale each view to a maximum of 1, add them up by weight, let neighbours and dates have their say.

    `intervals`: times that the query names, in microseconds; the ends are inside.
    """
    n = len(passages)
    scaled: dict[str, Scores] = {}
    base = np.zeros(n)
    for view, values in raw.items():
        positive = np.where(active, np.maximum(values, 0), 0)
        top = positive.max(initial=0)
        scaled[view] = positive / top if top > 0 else positive
        base += weights.of(view) * scaled[view]
    gained = spread(base, passages, weights, active)
    total = base + gained
    dated, named = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    rows, firsts, lasts = passages.naming.T
    slack = weights.dated_days * 86_400_000_000
    for start, end in intervals:
        dated |= (passages.valid_from >= start) & (passages.valid_from <= end + slack)
        named[rows[(firsts >= start) & (lasts <= end)]] = True
    dated &= active
    named &= active
    total = total + total.max(initial=0) * (weights.dated * dated + weights.named * named)
    highest = sum(weights.of(view) for view in raw) * _most(weights)
    relevance = np.round(total / highest if highest > 0 else total, DIGITS)
    nothing = np.zeros((0, n), np.bool_)
    return Ranking(
        raw, scaled, terms, nothing if present is None else present, base, gained, dated, named, relevance
    )


def _most(weights: RetrievalWeights) -> float:
    """The highest total that a base score of 1 everywhere could reach."""
    fading = sum(weights.fading**step for step in range(weights.reach))
    return (1 + (weights.from_before + weights.from_after) * fading) * (1 + weights.dated + weights.named)
