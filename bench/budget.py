"""A time to first token is asked for: is it kept, was it foreseen, and what answers does it leave?

Users with paragraphs of XQuAD as memories, part of them with stored KV, in host memory or on disk; questions
about them, under five budgets. The memory scheduler against fixed policies that the same cost model cuts off
where the budget ends. With --simulate: the same scheduler code in simulated time (budget_simulated.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from memos_engine.bench.budget_bed import MEMORIES, STORED, Asked, Bed, opened
from memos_engine.bench.budget_policies import OURS, POLICIES, Policy, scheduler_of
from memos_engine.bench.budget_quality import Judge, Verdict
from memos_engine.bench.document import Document, Row
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.stats import bootstrap, p95, paired_bootstrap
from memos_engine.bench.target import open_target
from memos_engine.bench.xquad import load

from memos_engine.config import ConfigError, SamplingParams
from memos_engine.memory.plan import Plan
from memos_engine.reply import Prepared

BUDGETS = (80.0, 120.0, 200.0, 500.0, 1000.0)
REQUESTS = (500, 30)  # ours, for each budget; with --quick the second
FIXED = (150, 20)  # the fixed policies
JUDGED = (120, 10)  # requests whose answers are scored
WARMUP = (24, 4)
ONE = SamplingParams(max_new_tokens=1)

NOTES = (
    f"Every request is a UserMemory.chat: the time is from the call to the first token, embedding the "
    f"question and searching included. {STORED:.0%} of the memories have stored KV, host memory holds a "
    "quarter of its bytes, the rest is read from files (which may be in the page cache). At most "
    f"{MEMORIES} memories enter a request, any with a cosine above 0.",
    "The fixed policies take memory after memory in their order and form, as long as the same cost model "
    "promises the budget; text stands in where no KV is stored. Every policy learns its own residuals, and "
    "begins with empty pages and tiers; some requests before the first measured one are not counted. Every "
    "user's index has been read before.",
    "excluded: requests whose bare query, without retrieval and memories, takes longer than the budget. "
    "met: of the others, those whose first token came in time. predicted error: median of |predicted / "
    "actual - 1| of the time to first token, predicted when the plan was made.",
    "kl: nats from full prefill of the best plan without a budget (its memories as text, in the order of "
    "relevance) over its greedy answer; gold_kl: from full prefill of the asked paragraph alone, which no "
    "policy has a say in; answer_f1: of the greedy answer, against the accepted ones; quality: 1 - kl / kl "
    "of a prompt without memories. Differences are paired by question.",
)


@dataclass(frozen=True)
class Measured:
    """One request."""

    ttft_ms: float
    plan: Plan
    prepared: Prepared
    asked: Asked
    recomputed: int


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench budget`; a unit is one budget."""
    if options.simulate:
        from memos_engine.bench.budget_simulated import run as simulated

        return simulated(options, progress)
    if options.random_weights is not None or options.device != "cpu":
        raise ConfigError("bench budget measures a pulled model on the CPU; leave those options out.")
    document = Document("budget", options)
    budgets = tuple(options.budgets) or BUDGETS
    lacking = [budget for budget in budgets if not document.has(_unit(budget))]
    if lacking:
        document.note(*NOTES)
        dataset = load(options.dataset, options.data)
        with open_target(options) as target, opened(options, target, dataset, progress) as bed:
            runner = _Runner(bed, options, progress, len(lacking))
            if not document.has("bare"):
                document.add("bare", [runner.bare_row()])
            for budget in lacking:
                document.add(_unit(budget), *runner.unit(budget))
            document.note(runner.judge.note())
    return document.finish()


def _unit(budget: float) -> str:
    return f"{budget:g} ms"


class _Runner:
    def __init__(self, bed: Bed, options: Options, progress: Progress, units: int) -> None:
        self.bed, self.options, self.progress = bed, options, progress
        q = int(options.quick)
        self.count = options.rounds(*REQUESTS)
        self.fixed = min(self.count, FIXED[q])
        self.judged = min(self.fixed, JUDGED[q])
        self.requests = bed.asked(self.count, "measured")
        self.warmup = bed.asked(WARMUP[q], "warm-up")
        self.base = bed.engine.preparer.scheduler
        self.judge = Judge(bed.engine, bed.dataset.paragraphs)
        self.done, self.total = 0, units * (self.count + len(POLICIES) * self.fixed)
        self._pass(None, max(BUDGETS), WARMUP[q], "warming up")  # the process, not a policy
        self.bare = self._bare()

    def _bare(self) -> list[float]:
        """Milliseconds of each request's bare query, without retrieval."""
        taken = []
        for asked in self.requests[: min(50, self.count)]:
            person = self.bed.people[asked.user]
            taken.append(person.chat(asked.question.text, ONE, form="none").ttft_ms)
        return taken

    def bare_row(self) -> Row:
        return {
            "policy": "bare query",
            "requests": len(self.bare),
            "ttft_ms_p50": round(statistics.median(self.bare), 2),
            "ttft_ms_p95": round(p95(self.bare), 2),
        }

    def unit(self, budget: float) -> tuple[list[Row], list[Row], list[str]]:
        """Rows and paired differences of one budget."""
        rows: list[Row] = []
        verdicts: dict[str, list[Verdict]] = {}
        for policy in (None, *POLICIES):
            name = OURS if policy is None else policy.name
            found = self._pass(policy, budget, self.count if policy is None else self.fixed, name)
            verdicts[name] = [
                self.judge.verdict(one.prepared, one.asked.question, _share(one))
                for one in found[: self.judged]
            ]
            rows.append(self._row(name, budget, found, verdicts[name]))
        ratios = []
        for name in (policy.name for policy in POLICIES):
            for what in ("kl", "gold_kl", "f1"):
                pair = [[getattr(v, what) for v in verdicts[side]] for side in (OURS, name)]
                interval = paired_bootstrap(pair, lambda a, b: np.mean(a - b, axis=-1), self.options.seed)
                title = f"{what}: ours - {name}"
                ratios.append({"name": title, "budget_ms": budget, **interval.public(5)})
        return rows, ratios, []

    def _pass(self, policy: Policy | None, budget: float, count: int, name: str) -> list[Measured]:
        bed = self.bed
        bed.engine.preparer.use(scheduler_of(policy, self.base, bed.ages))
        bed.fresh()
        for asked in self.warmup:
            self._ask(asked, budget)
        out = []
        for asked in self.requests[:count]:
            out.append(self._ask(asked, budget))
            self.done += 1
            self.progress(f"{_unit(budget)}: {name}", self.done, self.total)
        return out

    def _ask(self, asked: Asked, budget: float) -> Measured:
        person = self.bed.people[asked.user]
        reply = person.chat(asked.question.text, ONE, ttft_budget_ms=budget)
        assert self.bed.last is not None
        return Measured(reply.ttft_ms, reply.plan, self.bed.last, asked, reply.stats.recomputed_tokens)

    def _row(self, name: str, budget: float, found: Sequence[Measured], verdicts: Sequence[Verdict]) -> Row:
        excluded = sum(ms > budget for ms in self.bare) / len(self.bare)
        times = [one.ttft_ms for one in found]
        errors = [
            abs(one.plan.forecast.total_ms / one.ttft_ms - 1)
            for one in found
            if one.plan.forecast is not None
        ]
        kl = bootstrap([v.kl for v in verdicts], seed=self.options.seed)
        f1 = bootstrap([v.f1 for v in verdicts], seed=self.options.seed)
        none = statistics.fmean(v.none_kl for v in verdicts)
        forms = [form for one in found for form in _forms(one.plan)]
        entered = max(1, len(forms))
        return {
            "policy": name,
            "scope": "request",
            "budget_ms": budget,
            "requests": len(found),
            "excluded_share": round(excluded, 4),
            "met_share": round(sum(ms <= budget for ms in times) / len(times), 4),
            "ttft_ms_p50": round(statistics.median(times), 2),
            "ttft_ms_p95": round(p95(times), 2),
            "predicted_error_p50": round(statistics.median(errors), 4),
            "quality": round(1 - kl.value / none, 4),
            "kl_mean": round(kl.value, 5),
            "kl_low": round(kl.low, 5),
            "kl_high": round(kl.high, 5),
            "gold_kl_mean": round(statistics.fmean(v.gold_kl for v in verdicts), 5),
            "answer_f1": round(f1.value, 4),
            "f1_low": round(f1.low, 4),
            "f1_high": round(f1.high, 4),
            "judged": len(verdicts),
            "memories_mean": round(len(forms) / len(found), 2),
            "kv_share": round(forms.count("kv") / entered, 3),
            "recompute_mean": round(statistics.fmean(_share(one) for one in found), 3),
            "schedule_ms_p50": round(_schedule(found, statistics.median), 3),
        }


def _forms(plan: Plan) -> list[str]:
    return [segment.form for segment in plan.segments]


def _share(one: Measured) -> float:
    """What was computed again in truth: nothing where the first pass ended too late for it."""
    return one.plan.recompute if one.recomputed else 0.0


def _schedule(found: Sequence[Measured], of: Callable[[Sequence[float]], float]) -> float:
    return of([one.prepared.schedule_ms for one in found])
