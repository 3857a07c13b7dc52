"""Fixed policies under a budget: what a system without this scheduler would do, cut off where the same cost
model says that the budget ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memos_engine.memory.arrange import as_numbers, ideal_value, items_of
from memos_engine.memory.costs import Pricer
from memos_engine.memory.items import KV, SKIP, TEXT, loads, values
from memos_engine.memory.plan import Plan, PlanInput, PlanRequest, Segment, Skipped
from memos_engine.memory.scheduler import MemScheduler

OURS = "memos_engine"


@dataclass(frozen=True)
class Policy:
    """form: of every memory that has it (text elsewhere). share: of tokens computed again. newest: memories
    by age, not by relevance."""

    name: str
    form: int
    share: float = 0.0
    newest: bool = False


POLICIES = (
    Policy("text until full", TEXT),
    Policy("kv r=0 until full", KV),
    Policy("kv r=.15 until full", KV, 0.15),
    Policy("newest first", KV, newest=True),
)


class Fixed(MemScheduler):
    """One memory after the other, in an order and form of its own, as long as the promise keeps the
    budget."""

    policy: Policy
    ages: dict[str, int]  # larger: newer

    def _within(
        self,
        fit: Sequence[PlanInput],
        request: PlanRequest,
        price: Pricer,
        budget: float,
    ) -> Plan:
        order = sorted(fit, key=lambda one: -self.ages[one.cube_id]) if self.policy.newest else list(fit)
        items = items_of(order, request)
        forms = np.zeros((1, len(order)), np.int8)
        used = 0.0
        for i in range(len(order)):
            form = KV if self.policy.form == KV and items.kv[i] > 0 else TEXT
            tokens = float(items.kv[i] if form == KV else items.text[i])
            trial = forms.copy()
            trial[0, i] = form
            full = (forms != SKIP).sum() >= request.max_memories
            if full or used + tokens > request.max_memory_tokens:
                continue
            if float(price(loads(items, trial, self.policy.share))[0]) > budget:
                continue  # a shorter one may still fit
            forms, used = trial, used + tokens
        load = as_numbers(loads(items, forms, self.policy.share))
        taken = [(one, int(form)) for one, form in zip(order, forms[0], strict=True) if form != SKIP]
        segments = tuple(
            Segment(
                one.cube_id, "kv" if form == KV else "text", self.policy.name, slot,
                one.kv.tokens if form == KV else one.text_tokens, one.score, one.need or 0.0,
            )
            for slot, (one, form) in enumerate(taken)
        )  # fmt: skip
        inside = {segment.cube_id for segment in segments}
        skipped = tuple(Skipped(one.cube_id, "full", one.score) for one in order if one.cube_id not in inside)
        share = self.policy.share if float(np.asarray(load.again)) > 0 else 0.0
        graded = self.quality.of(self.policy.share, min(request.max_memories, len(fit)))
        value = float(values(items, forms, graded)[0]) if len(order) else 0.0
        best = max(ideal_value(items, request.max_memories), 1e-9)
        quality = value / best if len(order) else 1.0
        return Plan(segments, skipped, share, budget, quality, forecast=self.forecast(price, load))


def scheduler_of(policy: Policy | None, base: MemScheduler, ages: dict[str, int]) -> MemScheduler:
    """A scheduler that has learnt nothing yet, with the costs and the quality model of another."""
    if policy is None:
        return MemScheduler(base.costs, base.quality, base.need, distraction=base.distraction)
    fixed = Fixed(base.costs, base.quality, base.need, distraction=base.distraction)
    fixed.policy, fixed.ages = policy, ages
    return fixed
