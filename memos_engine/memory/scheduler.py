"""MemScheduler: which memories go into a request, in which order and form, and why.

A pure function of candidates, costs, budget and policy: no clock, no files, no model. Without a budget the
most relevant memories that fit the window enter, in the fastest form that keeps the asked quality. With one,
a knapsack over {skip, text, kv} and the share of tokens computed again takes what promises the best answer
before the budget is over (docs/scheduling.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memos_engine.errors import MemoryInputError
from memos_engine.memory.adapters import AdapterOption
from memos_engine.memory.arrange import (
    MEBI,
    ahead,
    arranged,
    as_numbers,
    burdens,
    distracts,
    ideal_value,
    items_of,
    kind,
    left_out,
    rejected,
    told,
)
from memos_engine.memory.costs import CostTable, Load, Pricer, default_table
from memos_engine.memory.items import EQUAL, KV, SKIP, TEXT, Choice, Floats, Items, Limits, loads, values
from memos_engine.memory.knapsack import search
from memos_engine.memory.need import DEFAULT_NEED, DISTRACTION, NeedModel
from memos_engine.memory.plan import (
    Forecast,
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
LEARNT = 0.8  # of what a memory says, that an adapter trained on it knows: the gate on recall
PROCEDURAL = 0.1  # worth of an adapter that changes how, not what, in needed memories
PATIENCE = 0.9  # share of reads from disk that a plan waits for; what is later is planned around
SHORT = 64  # tokens up to which a memory that shall enter as text does so although KV is there


class MemScheduler:
    """The policy, over what is known of costs and of quality."""

    def __init__(
        self,
        costs: CostTable | None = None,
        quality: SpliceQuality = DEFAULT_QUALITY,
        need: NeedModel = DEFAULT_NEED,
        residuals: Residuals | None = None,
        distraction: float = DISTRACTION,
    ) -> None:
        self.costs = costs or default_table()
        self.quality = quality
        self.need = need
        self.residuals = residuals or Residuals(self.costs.spread)
        self.distraction = distraction

    def plan(self, candidates: Sequence[PlanInput], request: PlanRequest) -> Plan:
        """Decide about every candidate. Raises `MemoryInputError` for repeated ids and impossible numbers."""
        score, rank, tokens = _numbers(candidates)
        ids = [one.cube_id for one in candidates]
        keys = list(zip((-rank).tolist(), (-score).tolist(), ids, strict=True))
        places = sorted(range(len(ids)), key=keys.__getitem__)
        order = [candidates[place] for place in places]
        guessed = self.need(score[places], rank[places], tokens[places]).tolist()
        needs = [p if one.need is None else one.need for one, p in zip(order, guessed, strict=True)]
        inside: list[int] = []
        skipped: list[Skipped] = []
        for place, one in enumerate(order):
            obstacle = _obstacle(one, request, len(inside))
            if obstacle:
                skipped.append(Skipped(one.cube_id, obstacle, one.score, needs[place]))
            else:
                inside.append(place)
        fit = self._weighed([order[i] for i in inside], [needs[i] for i in inside], request.max_memories)
        plan = self._chosen(fit, request)
        if request.adapter is not None and fit:
            plan = self._with_adapter(fit, request, request.adapter, plan)
        notes = plan.notes if self.costs.calibrated else (*plan.notes, _UNCALIBRATED)
        return replace(plan, skipped=_in_order((*plan.skipped, *skipped), order), notes=notes)

    def _weighed(self, fit: Sequence[PlanInput], needs: Sequence[float], most: int) -> list[PlanInput]:
        """Candidates with their need and their burden; `replace` takes four times as long, and this runs for
        all of them."""
        tokens = np.asarray([max(one.text_tokens, one.kv.tokens) for one in fit], np.float64)
        costs = burdens(np.asarray(needs, np.float64), tokens, most, self.distraction).tolist()
        return [
            PlanInput(o.cube_id, o.score, o.text_tokens, o.kv, o.relevance, need, o.prefers, o.sketch, cost)
            for o, need, cost in zip(fit, needs, costs, strict=True)
        ]

    def _chosen(self, fit: Sequence[PlanInput], request: PlanRequest) -> Plan:
        price = self.pricer(request)
        if request.budget_ms is None:
            return self._best(fit, request, price)
        return self._within(fit, request, price, request.budget_ms)

    def _with_adapter(
        self,
        fit: Sequence[PlanInput],
        request: PlanRequest,
        option: AdapterOption,
        without: Plan,
    ) -> Plan:
        """The plan with an adapter bound, where that promises more. What it knows of a memory need not enter
        again: the memory is worth only the rest."""
        known = LEARNT * option.probability if option.policy == "exclusive" else 0.0
        covered = [one for one in fit if one.cube_id in option.covers]
        rest = [replace(one, need=(one.need or 0.0) * (1 - known)) if one in covered else one for one in fit]
        swap_ms = self.costs.swap_ms * option.nbytes / MEBI if option.swap_ms is None else option.swap_ms
        frame = replace(request.frame, swap_ms=0.0 if option.warm else swap_ms)
        plan = self._chosen(rest, replace(request, frame=frame, adapter=None))
        gain = known * sum(one.need or 0.0 for one in covered)
        gain += PROCEDURAL * option.probability * (option.policy != "exclusive")
        mine, other = (sum(s.value for s in one.segments) for one in (plan, without))
        note = f"adapter {option.cube_id}: {option.reason or 'it fits the request'}"
        if not plan.feasible or mine + gain <= other + EQUAL:
            return replace(
                without, notes=(*without.notes, f"{note}; memories alone promise more in the time")
            )
        ideal = max(other / without.quality if without.quality > 0 else 0.0, mine + gain)
        quality = (mine + gain) / ideal if ideal > 0 else 1.0
        return replace(plan, quality=quality, adapter=option, notes=(*plan.notes, f"{note}; it is bound"))

    def pricer(self, request: PlanRequest) -> Pricer:
        factors = self.residuals.factors()
        plan_ms = 0.0 if request.frame.spent_ms else self.costs.plan_ms * factors.get("plan", 1.0)
        promise, fetch = self.residuals.quantile(PROMISE), self.residuals.tail("fetch", PATIENCE)
        return Pricer(self.costs, request.frame, factors, promise, plan_ms, fetch)

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
        slow = spent + price.fetch_promise * stages["fetch"]
        p95, promised = (
            slow + factor * (rest - stages["fetch"])
            for factor in (self.residuals.quantile(0.95), price.promise)
        )
        return Forecast(
            stages, spent + rest, p95, promised, table, self.costs.calibrated, price.fetch_promise
        )

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
        alike = overlaps([one.sketch for one in fit])
        inside: list[int] = []
        for place, one in enumerate(fit):
            form, reasons[one.cube_id] = _form(one, request, text_only, first=not chosen)
            tokens = one.kv.tokens if form == KV else one.text_tokens
            room = request.max_memory_tokens - used
            again = sum(alike[place, i] * min(one.need or 0.0, fit[i].need or 0.0) for i in inside)
            if len(chosen) >= request.max_memories:
                skipped.append(told(one, f"max_memories ({request.max_memories}) is reached"))
            elif tokens > room:
                skipped.append(told(one, _no_room(tokens, room, request)))
            elif (one.need or 0.0) - again < one.burden:
                skipped.append(told(one, distracts(one)))
            else:
                chosen.append((one, form))
                inside.append(place)
                used += tokens
        within = alike[np.ix_(inside, inside)]
        items = items_of([one for one, _ in chosen], request, overlap=within)
        forms = np.asarray([[form for _, form in chosen]], np.int8).reshape(1, len(chosen))
        load = loads(items, forms, share or 0.0)
        segments = self._segments(chosen, reasons, share or 0.0, most)
        kept = float(values(items, forms, self.quality.of(share or 0.0, most))[0])
        ideal = ideal_value(items, len(items))
        return Plan(
            segments,
            tuple(skipped),
            share or 0.0,
            quality=min(1.0, kept / ideal) if ideal > 0 else 1.0,
            forecast=self.forecast(price, as_numbers(load)),
        )

    # -- within a budget -------------------------------------------------------------------------

    def _within(
        self,
        fit: Sequence[PlanInput],
        request: PlanRequest,
        price: Pricer,
        budget: float,
    ) -> Plan:
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
        limits = Limits(price, budget, request.max_memory_tokens, request.max_memories, give)
        plain = items_of(fit, request)
        for known in (None, *request.known):
            ordered = ahead(fit, known)
            if ordered is None:
                continue
            items = plain
            if known is not None:
                items = items_of(ordered, request, len(known.cube_ids))
            choices, most_possible = search(items, graded, limits)
            found += [(choice, ordered, items) for choice in choices]
            bound = max(bound, most_possible)
        if not found:
            empty = self.forecast(price, Load())
            note = (
                f"The bare query cannot meet {budget:g} ms: it alone is expected to take "
                f"{empty.total_ms:.0f} ms, {empty.promise_ms:.0f} ms to be sure. It goes without memories."
            )
            skipped = tuple(told(one, "not even the bare query meets the budget") for one in fit)
            return Plan((), skipped, 0.0, budget, 0.0, 0.0, False, empty, notes=(note,))
        most_valued = max(one.value for one, _, _ in found)
        enough = most_valued - give * abs(most_valued)  # a prefix in pages may be worth less than nothing
        near = [one for one in found if one[0].value >= enough - EQUAL]
        choice, ordered, items = best = min(near, key=lambda one: (one[0].ms, -one[0].value))
        ideal = max(ideal_value(plain, request.max_memories), choice.value, 1e-9)
        load = loads(items, np.asarray([choice.forms], np.int8), choice.share)
        forecast = self.forecast(price, as_numbers(load))
        taken, reasons = arranged(choice, ordered, items)
        segments = self._segments(taken, reasons, choice.share, most)
        left = [one for one, form in zip(ordered, choice.forms, strict=True) if form == SKIP]
        return Plan(
            segments,
            left_out(left, request, price, choice.share, forecast, len(segments)),
            choice.share,
            budget,
            choice.value / ideal,
            max(0.0, bound - choice.value) / ideal,
            True,
            forecast,
            rejected(found, best[0], shares, ideal, budget),
        )

    def _segments(
        self,
        taken: Sequence[tuple[PlanInput, int]],
        reasons: dict[str, str],
        share: float,
        most: int,
    ) -> tuple[Segment, ...]:
        spliced = self.quality.of(share, most)
        out = []
        for slot, (one, form) in enumerate(taken):
            need = one.need or 0.0
            exact = form == TEXT or (slot == 0 and one.kv.exact_in_slot0)
            tokens = one.kv.tokens if form == KV else one.text_tokens
            value = need * (1.0 if exact else spliced) - one.burden
            name = "kv" if form == KV else "text"
            out.append(Segment(one.cube_id, name, reasons[one.cube_id], slot, tokens, one.score, need, value))
        return tuple(out)


_UNCALIBRATED = "predictions are guesses on this machine; measure it: memos-engine doctor --calibrate"


def _numbers(candidates: Sequence[PlanInput]) -> Floats:
    """`[3, n]`: scores, ranks and tokens, all of which make sense."""
    if len({one.cube_id for one in candidates}) != len(candidates):
        raise MemoryInputError("a memory is among the candidates twice; give each one once.")
    rows = [(one.score, one.rank, one.need or 0.0, one.text_tokens, one.kv.tokens) for one in candidates]
    numbers = np.asarray(rows, np.float64).reshape(len(rows), 5)
    bad = ~np.isfinite(numbers[:, :3]).all(1) | (numbers[:, 3:] < 0).any(1)
    if bad.any():
        raise MemoryInputError(
            f"candidate {candidates[int(bad.argmax())].cube_id!r} needs a finite score and token counts of "
            "at least 0."
        )
    return np.asarray(numbers[:, [0, 1, 3]].T, np.float64)


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
        return KV, f"a KV record is stored ({kind(exact)})"
    why = text_only if one.kv.available else one.kv.reason or "no KV record is stored"
    return TEXT, f"KV was asked for, but {why}" if request.form == "kv" else why


def _no_room(tokens: int, room: int, request: PlanRequest) -> str:
    return f"it needs {tokens} tokens, {room} of {request.max_memory_tokens} are left"


def _in_order(skipped: Sequence[Skipped], order: Sequence[PlanInput]) -> tuple[Skipped, ...]:
    places = {one.cube_id: place for place, one in enumerate(order)}
    return tuple(sorted(skipped, key=lambda one: places[one.cube_id]))
