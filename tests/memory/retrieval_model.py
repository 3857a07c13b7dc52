"""Retrieval by loops over dictionaries: what the tests hold the real one against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from memos_engine.memory.dates import named_times
from memos_engine.memory.embed import COMMON_WORDS
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.retrieval import CONTEXT, RetrievalWeights
from memos_engine.memory.store_fts import Stemmer
from memos_engine.memory.when import intervals

STEMS = Stemmer()
COMMON = {stem for word in COMMON_WORDS for stem in STEMS(word)}


@dataclass
class Known:
    """What the model knows of a memory; `id` sorts by age."""

    id: str
    owner: Principal
    text: str
    created_at: datetime
    valid_from: datetime
    session: str | None = None
    tags: tuple[str, ...] = ()
    semantic_type: str = "fact"
    ttl_at: datetime | None = None
    state: LifecycleState = LifecycleState.GENERATED
    erased: bool = False


def passes(one: Known, filters: Filters) -> bool:
    tags = set(one.tags)
    inside = all(
        (low is None or low <= moment) and (high is None or moment < high)
        for moment, low, high in (
            (one.created_at, filters.created_from, filters.created_to),
            (one.valid_from, filters.valid_from, filters.valid_to),
        )
    )
    return (
        inside
        and (not filters.tags_any or bool(tags & set(filters.tags_any)))
        and set(filters.tags_all) <= tags
        and not tags & set(filters.tags_none)
        and (not filters.semantic_types or one.semantic_type in filters.semantic_types)
        and (filters.ids is None or one.id in filters.ids)
    )


def relevance(
    memories: list[Known],
    query: str,
    filters: Filters,
    now: datetime,
    vectors: dict[str, np.ndarray] | None,
    weights: RetrievalWeights,
) -> dict[str, tuple[float, float]]:
    """Relevance and score of each memory of one owner that is active at `now`, by id."""
    kept = sorted((m for m in memories if not m.erased and m.state is not LifecycleState.EXPIRED), key=_id)
    active = [m for m in kept if m.state in filters.states and (m.ttl_at is None or m.ttl_at > now)]
    here = {m.id for m in active}
    chain: dict[str | None, list[Known]] = {}
    for one in kept:
        chain.setdefault(one.session, []).append(one)

    def neighbour(one: Known, step: int) -> Known | None:
        if one.session is None:
            return None
        row = chain[one.session]
        at = row.index(one) + step
        return row[at] if 0 <= at < len(row) and row[at].id in here else None

    words = {m.id: set(STEMS(m.text)) for m in active}
    length = {m.id: _count(m.text) for m in active}
    context, context_length = {}, {}
    for one in active:
        before = [m for m in (neighbour(one, -1), neighbour(one, -2)) if m is not None]
        context[one.id] = words[one.id].union(*(words[m.id] for m in before))
        context_length[one.id] = length[one.id] + sum(length[m.id] for m in before)
    stems = list(dict.fromkeys(STEMS(query)))
    stems = [s for s in stems if s not in COMMON] or stems
    held = {s: sum(s in found for found in words.values()) for s in stems}
    used = sorted((s for s in stems if held[s]), key=lambda s: (held[s], s))[: weights.max_terms]

    def coverage(sets: dict[str, set[str]], sizes: dict[str, int]) -> dict[str, float]:
        n, out = len(sets), {}
        mean = max(1.0, sum(sizes.values()) / n) if n else 1.0
        counts = {s: sum(s in found for found in sets.values()) for s in used}
        for name, found in sets.items():
            total = sum(math.log1p((n - counts[s] + 0.5) / (counts[s] + 0.5)) for s in used if s in found)
            out[name] = total / (1 - weights.length + weights.length * sizes[name] / mean)
        return out

    views = {"words": coverage(words, length), "words_context": coverage(context, context_length)}
    if vectors is not None:
        at = vectors[query]
        views["dense"] = {m.id: float(vectors[m.text] @ at) for m in active}
        views["dense_context"] = {}
        for one in active:
            mixed = CONTEXT[0] * vectors[one.text]
            for weight, step in ((CONTEXT[1], -1), (CONTEXT[2], -2)):
                other = neighbour(one, step)
                if other is not None:
                    mixed = mixed + weight * vectors[other.text]
            size = float(np.linalg.norm(mixed))
            views["dense_context"][one.id] = float(mixed @ at) / size if size > 1e-6 else 0.0
    base = {m.id: 0.0 for m in active}
    for view, values in views.items():
        top = max((v for v in values.values() if v > 0), default=1.0)
        for name, value in values.items():
            base[name] += weights.of(view) * max(value, 0.0) / top
    total = dict(base)
    for one in active:
        for sign, share in ((-1, weights.from_before), (1, weights.from_after)):
            for step in range(1, weights.reach + 1):
                other = neighbour(one, sign * step)
                if other is not None:
                    total[one.id] += share * weights.fading ** (step - 1) * base[other.id]
    years = sorted({m.valid_from.year for m in active})
    best, slack = max(total.values(), default=0.0), timedelta(days=weights.dated_days)
    for one in active:
        if any(a <= one.valid_from <= b + slack for a, b in intervals(query, now, years)):
            total[one.id] += weights.dated * best
        asked = intervals(query, now, years)
        if any(a <= c and d <= b for a, b in asked for c, d in named_times(one.text, one.valid_from)):
            total[one.id] += weights.named * best
    fading = sum(weights.fading**step for step in range(weights.reach))
    most = (1 + (weights.from_before + weights.from_after) * fading) * (1 + weights.dated + weights.named)
    most *= sum(weights.of(view) for view in views)
    rarity = {s: math.log1p((len(words) - held[s] + 0.5) / (held[s] + 0.5)) for s in used}
    close = {
        m.id: views["dense"][m.id]
        if vectors is not None
        else sum(rarity[s] for s in used if s in words[m.id]) / (sum(rarity.values()) or 1.0)
        for m in active
    }
    return {m.id: (total[m.id] / most, close[m.id]) for m in active}


def _id(one: Known) -> str:
    return one.id


def _count(text: str) -> int:
    import re

    return len(re.findall(r"\w+", text))
