"""MemScheduler: which memories go into a request, in which order and form, and why.

A pure function of candidates, costs, budget and policy: no clock, no files, no model. Without a budget the
most relevant memories that fit the window enter, in the fastest form that keeps the asked quality. With one,
a knapsack over {skip, text, kv} and the share of tokens computed again takes what promises the best answer
before the budget is over (docs/scheduling.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memos_engine.errors import MemoryInputError
from memos_engine.memory.costs import CostTable, Load, Pricer, default_table
from memos_engine.memory.items import EQUAL, KV, SKIP, TEXT, Choice, Floats, Items, loads, values
from memos_engine.memory.knapsack import search
from memos_engine.memory.need import DEFAULT_NEED, NeedModel
from memos_engine.memory.plan import (
    Forecast,
    KnownPrefix,
    Option,
    Plan,
    PlanInput,
    PlanRequest,
    Segment,
    Skipped,
)
from memos_engine.memory.quality import DEFAULT_QUALITY, SpliceQuality, overlaps
from memos_engine.memory.residuals import Residuals

SHARES = (0.0, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6)
MOST = 64  # candidates that are weighed
FEW_SHARES = (0.0, 0.1, 0.4)
MANY = 16  # candidates beyond which only these are tried
PROMISE = 0.98  # share of requests that shall keep their budget
PREFERENCE = 0.01  # of a memory's value, that a form the policies do not prefer loses
SHORT = 64  # tokens up to which a memory that shall enter as text does so although KV is there
MEBI = float(1 << 20)
UNIT = 100.0  # tokens, by which reasons state what a memory would take


class MemScheduler:
    """The policy, over what is known of costs and of quality."""

    def __init__(
        self,
        costs: CostTable | None = None,
        quality: SpliceQuality = DEFAULT_QUALITY,
        need: NeedModel = DEFAULT_NEED,
        residuals: Residuals | None = None,
    ) -> None:
        self.costs = costs or default_table()
        self.quality = quality
        self.need = need
        self.residuals = residuals or Residuals(self.costs.spread)

    def plan(self, candidates: Sequence[PlanInput], request: PlanRequest) -> Plan:
        """Decide about every candidate. Raises `MemoryInputError` for repeated ids and impossible numbers."""
        _check(candidates)
        order = sorted(candidates, key=lambda c: (-c.rank, -c.score, c.cube_id))
        needs = self.need([one.score for one in order], [one.rank for one in order])
        order = [
            one if one.need is not None else _needed(one, p)
            for one, p in zip(order, needs.tolist(), strict=True)
        ]
        fit: list[PlanInput] = []
        skipped: list[Skipped] = []
        for one in order:
            obstacle = _obstacle(one, request, len(fit))
            if obstacle:
                skipped.append(_skip(one, obstacle))
            else:
                fit.append(one)
        price = self.pricer(request)
        if request.budget_ms is None:
            plan = self._best(fit, request, price)
        else:
            plan = self._within(fit, request, price, request.budget_ms)
        notes = plan.notes if self.costs.calibrated else (*plan.notes, _UNCALIBRATED)
        return replace(plan, skipped=_in_order((*plan.skipped, *skipped), order), notes=notes)

    def pricer(self, request: PlanRequest) -> Pricer:
        factors = self.residuals.factors()
        plan_ms = 0.0 if request.frame.spent_ms else self.costs.plan_ms * factors.get("plan", 1.0)
        return Pricer(self.costs, request.frame, factors, self.residuals.quantile(PROMISE), plan_ms)

    def no_time_to_retrieve(self, request: PlanRequest, spent_ms: float) -> str:
        """Why memories should not even be looked for within the budget; empty where they should."""
        if request.budget_ms is None:
            return ""
        factor, promise = self.residuals.factors().get, self.residuals.quantile(PROMISE)
        price = Pricer(self.costs, request.frame, self.residuals.factors(), promise)
        search = self.costs.retrieve_ms * factor("retrieve", 1.0) + self.costs.plan_ms * factor("plan", 1.0)
        needed = spent_ms + promise * search + float(price(Load()))
        if needed <= request.budget_ms:
            return ""
        return (
            f"Finding memories would take about {search:.0f} ms, and the bare query then misses "
            f"{request.budget_ms:g} ms: none were looked for."
        )

    def forecast(self, price: Pricer, load: Load) -> Forecast:
        """What a request with this load is expected to take."""
        stages = {name: float(ms) for name, ms in price.stages(load).items()}
        table = {name: ms / price.factors.get(name, 1.0) for name, ms in stages.items()}
        rest, spent = price.plan_ms + sum(stages.values()), price.frame.spent_ms
        p95 = spent + self.residuals.quantile(0.95) * rest
        return Forecast(stages, spent + rest, p95, spent + price.promise * rest, table, self.costs.calibrated)

    def expect(self, plan: Plan, request: PlanRequest, reused: int) -> Plan:
        """The plan with the forecast of what it is, `reused` tokens of its text being in pages."""
        text = sum(s.tokens for s in plan.segments if s.form == "text")
        kv = [s for s in plan.segments if s.form == "kv"]
        if plan.forecast is None or not reused or not text:
            return plan
        cached = float(min(reused, text))
        old = plan.forecast
        price, tokens = self.pricer(request), sum(s.tokens for s in kv)
        again = round(plan.recompute * tokens)
        now = self.forecast(price, Load(text - cached, cached, tokens, again, len(kv)))
        fetch = {name: side["fetch"] for name, side in (("stages", old.stages), ("table", old.table))}
        late = fetch["stages"] - now.stages["fetch"]
        return replace(
            plan,
            forecast=replace(
                now,
                stages={**now.stages, "fetch": fetch["stages"]},
                table={**now.table, "fetch": fetch["table"]},
                total_ms=now.total_ms + late,
                p95_ms=now.p95_ms + late,
                promise_ms=now.promise_ms + late,
            ),
        )

    # -- without a budget ------------------------------------------------------------------------

    def _best(self, fit: Sequence[PlanInput], request: PlanRequest, price: Pricer) -> Plan:
        """The most relevant that fit, as KV where a share keeps the quality."""
        most = min(request.max_memories, len(fit))
        share = request.recompute
        if share is None:
            good = (s for s in SHARES if self.quality.of(s, most) >= 1 - request.tolerance)
            share = next(good, None)
        text_only = "spliced KV would cost more quality than allowed" if share is None else ""
        chosen: list[tuple[PlanInput, int]] = []
        reasons: dict[str, str] = {}
        skipped: list[Skipped] = []
        used = 0
        for one in fit:
            form, reasons[one.cube_id] = _form(one, request, text_only, first=not chosen)
            tokens = one.kv.tokens if form == KV else one.text_tokens
            room = request.max_memory_tokens - used
            if len(chosen) >= request.max_memories:
                skipped.append(_skip(one, f"max_memories ({request.max_memories}) is reached"))
            elif tokens > room:
                skipped.append(_skip(one, _no_room(tokens, room, request)))
            else:
                chosen.append((one, form))
                used += tokens
        items = items_of([one for one, _ in chosen], request)
        forms = np.asarray([[form for _, form in chosen]], np.int8).reshape(1, len(chosen))
        load = loads(items, forms, share or 0.0)
        segments = self._segments(chosen, reasons, share or 0.0, most)
        kept = sum(segment.value for segment in segments)
        ideal = sum(segment.need for segment in segments)
        return Plan(
            segments,
            tuple(skipped),
            share or 0.0,
            quality=kept / ideal if ideal else 1.0,
            forecast=self.forecast(price, as_numbers(load)),
        )

    # -- within a budget -------------------------------------------------------------------------

    def _within(self, fit: Sequence[PlanInput], request: PlanRequest, price: Pricer, budget: float) -> Plan:
        most = min(request.max_memories, len(fit))
        shares: tuple[float, ...] = SHARES if len(fit) <= MANY else FEW_SHARES
        if request.recompute is not None:
            shares = (min(request.recompute, SHARES[-1]),)
        graded = [(share, self.quality.of(share, most)) for share in shares]
        # An idle machine gives a request all its time; on a busy one, time is taken from others, and waiting
        # grows faster than load.
        give = request.tolerance * request.frame.busy**2
        found: list[tuple[Choice, list[PlanInput], Items]] = []
        bound = 0.0
        plain = items_of(fit, request)
        for known in (None, *request.known):
            ordered = _ahead(fit, known)
            if ordered is None:
                continue
            items = plain if known is None else items_of(ordered, request, len(known.cube_ids))
            choices, most_possible = search(
                items, graded, price, budget, request.max_memory_tokens, request.max_memories, give
            )
            found += [(choice, ordered, items) for choice in choices]
            bound = max(bound, most_possible)
        if not found:
            empty = self.forecast(price, Load())
            note = (
                f"The bare query cannot meet {budget:g} ms: it alone is expected to take "
                f"{empty.total_ms:.0f} ms, {empty.promise_ms:.0f} ms to be sure. It goes without memories."
            )
            skipped = tuple(_skip(one, "not even the bare query meets the budget") for one in fit)
            return Plan((), skipped, 0.0, budget, 0.0, 0.0, False, empty, notes=(note,))
        enough = (1 - give) * max(one.value for one, _, _ in found)
        near = [one for one in found if one[0].value >= enough - EQUAL]
        choice, ordered, items = best = min(near, key=lambda one: (one[0].ms, -one[0].value))
        ideal = max(ideal_value(plain, request.max_memories), choice.value, 1e-9)
        load = loads(items, np.asarray([choice.forms], np.int8), choice.share)
        forecast = self.forecast(price, as_numbers(load))
        taken, reasons = _arranged(choice, ordered, items)
        segments = self._segments(taken, reasons, choice.share, most)
        left = [one for one, form in zip(ordered, choice.forms, strict=True) if form == SKIP]
        return Plan(
            segments,
            _left_out(left, request, price, forecast, choice, len(segments)),
            choice.share,
            budget,
            choice.value / ideal,
            max(0.0, bound - choice.value) / ideal,
            True,
            forecast,
            _rejected(found, best[0], shares, ideal, budget),
        )

    def _segments(
        self, taken: Sequence[tuple[PlanInput, int]], reasons: dict[str, str], share: float, most: int
    ) -> tuple[Segment, ...]:
        spliced = self.quality.of(share, most)
        out = []
        for slot, (one, form) in enumerate(taken):
            need = one.need or 0.0
            exact = form == TEXT or (slot == 0 and one.kv.exact_in_slot0)
            tokens = one.kv.tokens if form == KV else one.text_tokens
            value = need * (1.0 if exact else spliced)
            name = "kv" if form == KV else "text"
            out.append(Segment(one.cube_id, name, reasons[one.cube_id], slot, tokens, one.score, need, value))
        return tuple(out)


_UNCALIBRATED = "predictions are guesses on this machine; measure it: memos-engine doctor --calibrate"


def _check(candidates: Sequence[PlanInput]) -> None:
    if len({one.cube_id for one in candidates}) != len(candidates):
        raise MemoryInputError("a memory is among the candidates twice; give each one once.")
    for one in candidates:
        numbers = (one.score, one.rank, one.need or 0.0)
        if not all(map(math.isfinite, numbers)) or one.text_tokens < 0 or one.kv.tokens < 0:
            raise MemoryInputError(
                f"candidate {one.cube_id!r} needs a finite score and token counts of at least 0."
            )


def _needed(one: PlanInput, p: float) -> PlanInput:
    """The candidate with its probability; `replace` takes four times as long, and this runs for all of
    them."""
    return PlanInput(
        one.cube_id, one.score, one.text_tokens, one.kv, one.relevance, p, one.prefers, one.sketch
    )


def _obstacle(one: PlanInput, request: PlanRequest, before: int) -> str:
    """Why a candidate is not weighed at all; empty when it is."""
    if request.form == "none":
        return "no memories were asked for"
    if request.min_score is not None and one.score < request.min_score:
        return f"its score {one.score:.3f} is below min_score {request.min_score:.3f}"
    if before >= MOST:
        return f"only the {MOST} most relevant candidates are weighed"
    return ""


def _form(one: PlanInput, request: PlanRequest, text_only: str, first: bool) -> tuple[int, str]:
    """Form and reason of a candidate where time does not matter."""
    if request.form == "text":
        return TEXT, "text was asked for"
    if one.kv.available and not text_only:
        if one.prefers == "text" and request.form == "auto" and one.text_tokens <= SHORT:
            return TEXT, "a fact of this conversation, and short"
        exact = first and one.kv.exact_in_slot0
        return KV, f"a KV record is stored ({_kind(exact)})"
    why = text_only if one.kv.available else one.kv.reason or "no KV record is stored"
    return TEXT, f"KV was asked for, but {why}" if request.form == "kv" else why


def _kind(exact: bool) -> str:
    return "exact behind the anchor" if exact else "position-independent"


def _no_room(tokens: int, room: int, request: PlanRequest) -> str:
    return f"it needs {tokens} tokens, {room} of {request.max_memory_tokens} are left"


def _skip(one: PlanInput, reason: str) -> Skipped:
    return Skipped(one.cube_id, reason, one.score, one.need or 0.0)


def _in_order(skipped: Sequence[Skipped], order: Sequence[PlanInput]) -> tuple[Skipped, ...]:
    places = {one.cube_id: place for place, one in enumerate(order)}
    return tuple(sorted(skipped, key=lambda one: places[one.cube_id]))


def items_of(
    fit: Sequence[PlanInput], request: PlanRequest, cached: int = 0, overlap: Floats | None = None
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
        cached=cached,
    )


def _ahead(fit: Sequence[PlanInput], known: KnownPrefix | None) -> list[PlanInput] | None:
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
    top = np.argsort(-items.need, kind="stable")[:most]
    forms = np.zeros((1, len(items)), np.int8)
    forms[0, top] = np.where(items.text[top] > 0, TEXT, KV)
    return float(values(items, forms, 1.0)[0])


def _arranged(
    choice: Choice, ordered: Sequence[PlanInput], items: Items
) -> tuple[list[tuple[PlanInput, int]], dict[str, str]]:
    """The chosen memories in the order of their slots, and why each has its form."""
    taken = [(one, form) for one, form in zip(ordered, choice.forms, strict=True) if form != SKIP]
    reasons = {}
    for place, (one, form) in enumerate(taken):
        if form == KV:
            exact = place == 0 and one.kv.exact_in_slot0
            reasons[one.cube_id] = f"a KV record is stored ({_kind(exact)})"
        elif place < items.cached:
            reasons[one.cube_id] = "text that is in pages from an earlier request"
        else:
            why = "there is time for it" if one.kv.available else one.kv.reason or "no KV record is stored"
            reasons[one.cube_id] = f"text: {why}"
    return taken, reasons


def _left_out(
    left: Sequence[PlanInput],
    request: PlanRequest,
    price: Pricer,
    forecast: Forecast,
    choice: Choice,
    taken: int,
) -> tuple[Skipped, ...]:
    """Why each of the others stays out."""
    if not left:
        return ()
    if taken >= request.max_memories:
        return tuple(_skip(one, f"max_memories ({request.max_memories}) is reached") for one in left)
    kv_too = request.form != "text"
    spare = max(0.0, (request.budget_ms or 0.0) - forecast.promise_ms)
    few = np.asarray([0.0, UNIT, 0.0])
    base, text, kv = price(
        Load(text=few, kv=few[::-1], again=few[::-1] * choice.share, records=few[::-1] / UNIT)
    ).tolist()
    text, kv = (text - base) / UNIT, (kv - base) / UNIT
    out = []
    for one in left:
        way = f"{one.text_tokens * text:.0f} ms as text, "
        if one.kv.available and kv_too:
            way += f"{one.kv.tokens * kv:.0f} ms as KV"
        else:
            way += one.kv.reason or "no KV record is stored"
        out.append(_skip(one, f"it would take about {way}; {spare:.0f} ms are left"))
    return tuple(out)


def _rejected(
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
