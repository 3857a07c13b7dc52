"""What the scheduler's plans are made of and told in: candidates as arrays, the order of slots, reasons.

Pure functions, without a policy of their own; `scheduler.py` decides with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memos_engine.memory.costs import Load, Pricer
from memos_engine.memory.items import EQUAL, KV, SKIP, TEXT, Choice, Floats, Items, values
from memos_engine.memory.plan import Forecast, KnownPrefix, Option, PlanInput, PlanRequest, Skipped
from memos_engine.memory.quality import overlaps

PREFERENCE = 0.01  # of a memory's value, that a form the policies do not prefer loses
MEBI = float(1 << 20)
UNIT = 100.0  # tokens, by which reasons state what a memory would take


def told(one: PlanInput, reason: str) -> Skipped:
    return Skipped(one.cube_id, reason, one.score, one.need or 0.0)


def kind(exact: bool) -> str:
    return "exact behind the anchor" if exact else "position-independent"


def items_of(
    fit: Sequence[PlanInput],
    request: PlanRequest,
    cached: int = 0,
    overlap: Floats | None = None,
) -> Items:
    """Candidates as arrays, with the forms that the request allows."""
    kv_too = request.form != "text"

    def array(values: Sequence[float]) -> Floats:
        return np.asarray(values, np.float64)

    held = [one.kv.available and kv_too for one in fit]
    text = [request.form != "kv" or not one.kv.available for one in fit]
    disk = [here and one.kv.tier == "disk" for one, here in zip(fit, held, strict=True)]
    return Items(
        need=array([one.need or 0.0 for one in fit]),
        text=array([one.text_tokens * ok for one, ok in zip(fit, text, strict=True)]),
        kv=array([one.kv.tokens * ok for one, ok in zip(fit, held, strict=True)]),
        exact=np.asarray([one.kv.exact_in_slot0 for one in fit], np.bool_),
        disk=np.asarray(disk, np.bool_),
        mib=array([one.kv.nbytes / MEBI * slow for one, slow in zip(fit, disk, strict=True)]),
        text_worth=array([1 - PREFERENCE * (one.prefers == "kv") for one in fit]),
        kv_worth=array([1 - PREFERENCE * (one.prefers == "text") for one in fit]),
        overlap=overlaps([one.sketch for one in fit]) if overlap is None else overlap,
        burden=array([one.burden for one in fit]),
        cached=cached,
    )


def burdens(needs: Floats, tokens: Floats, most: int, distraction: float) -> Floats:
    """What each memory's tokens take from the worth of the others, of which the `most` most needed count;
    distraction: a thousand tokens' share of it (`need.DISTRACTION`)."""
    top = np.argsort(-needs, kind="stable")[:most]
    others = np.full(len(needs), needs[top].sum())
    others[top] -= needs[top]
    return np.asarray(distraction / 1e3 * tokens * np.minimum(1.0, others), np.float64)


def distracts(one: PlanInput) -> str:
    """Why a memory stays out whatever time there is."""
    return f"its {one.text_tokens} tokens would distract more than they help"


def ahead(fit: Sequence[PlanInput], known: KnownPrefix | None) -> list[PlanInput] | None:
    """The candidates with those of a known prefix in front, in its order; None where one is missing."""
    if known is None:
        return list(fit)
    by_id = {one.cube_id: one for one in fit}
    if not all(cube_id in by_id for cube_id in known.cube_ids):
        return None
    return [by_id[i] for i in known.cube_ids] + [one for one in fit if one.cube_id not in known.cube_ids]


def as_numbers(load: Load) -> Load:
    """The load of the only plan, as numbers."""
    names = Load.__dataclass_fields__
    return Load(**{name: float(np.ravel(getattr(load, name))[0]) for name in names})


def ideal_value(items: Items, most: int) -> float:
    """Value of the best memories in their best form, were there time."""
    net = items.need - items.burden
    top = np.argsort(-net, kind="stable")[:most]
    top = top[net[top] > 0]
    forms = np.zeros((1, len(items)), np.int8)
    forms[0, top] = np.where(items.text[top] > 0, TEXT, KV)
    return float(values(items, forms, 1.0)[0])


def arranged(
    choice: Choice, ordered: Sequence[PlanInput], items: Items
) -> tuple[list[tuple[PlanInput, int]], dict[str, str]]:
    """The chosen memories in the order of their slots, and why each has its form."""
    taken = [(one, form) for one, form in zip(ordered, choice.forms, strict=True) if form != SKIP]
    reasons = {}
    for place, (one, form) in enumerate(taken):
        if form == KV:
            exact = place == 0 and one.kv.exact_in_slot0
            reasons[one.cube_id] = f"a KV record is stored ({kind(exact)})"
        elif place < items.cached:
            reasons[one.cube_id] = "text that is in pages from an earlier request"
        else:
            why = "there is time for it" if one.kv.available else one.kv.reason or "no KV record is stored"
            reasons[one.cube_id] = f"text: {why}"
    return taken, reasons


def per_token(price: Pricer, share: float) -> tuple[float, float]:
    """Milliseconds that a token of text and one of KV take, the share computed again included: of a second
    memory, for the first of its form may begin, or spare, what all share."""
    by_text, by_kv = np.asarray([[1, 2, 0, 0], [0, 0, 1, 2]]) * UNIT
    load = Load(text=by_text, kv=by_kv, again=by_kv * share, records=by_kv / UNIT)
    first, text, other, kv = price(load).tolist()
    return (text - first) / UNIT, (kv - other) / UNIT


def left_out(
    left: Sequence[PlanInput],
    request: PlanRequest,
    price: Pricer,
    share: float,
    forecast: Forecast,
    taken: int,
) -> tuple[Skipped, ...]:
    """Why each of the others stays out."""
    if not left:
        return ()
    if taken >= request.max_memories:
        return tuple(told(one, f"max_memories ({request.max_memories}) is reached") for one in left)
    kv_too = request.form != "text"
    spare = max(0.0, (request.budget_ms or 0.0) - forecast.promise_ms)
    useful = [(one.need or 0.0) >= one.burden for one in left]
    text, kv = per_token(price, share) if any(useful) else (0.0, 0.0)
    out = []
    for one, helps in zip(left, useful, strict=True):
        if not helps:
            out.append(told(one, distracts(one)))
            continue
        way = f"{one.text_tokens * text:.0f} ms as text, "
        if one.kv.available and kv_too:
            way += f"{one.kv.tokens * kv:.0f} ms as KV"
        else:
            way += one.kv.reason or "no KV record is stored"
        out.append(told(one, f"it would take about {way}; {spare:.0f} ms are left"))
    return tuple(out)


def rejected(
    found: Sequence[tuple[Choice, list[PlanInput], Items]],
    best: Choice,
    shares: Sequence[float],
    ideal: float,
    budget: float,
) -> tuple[Option, ...]:
    """The other shares' best, and those that have none."""
    names = ("skip", "text", "kv")
    out = []
    for share in shares:
        here = [one for one, _, _ in found if one.share == share]
        if not here:
            why = f"nothing with this share fits into {budget:g} ms"
            out.append(Option(share, (), 0.0, 0.0, why))
            continue
        top = max(here, key=lambda one: (one.value, -one.ms))
        if top is not best:
            slower = (
                "slower, and no better"
                if top.value <= best.value + EQUAL
                else "better, but slow for a busy engine"
            )
            why = slower if top.value >= best.value - EQUAL else "promises less"
            forms = tuple(names[form] for form in top.forms)
            out.append(Option(share, forms, top.value / ideal, top.ms, why))
    return tuple(out)
