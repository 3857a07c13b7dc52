"""`bench budget --simulate`: the memory scheduler under load that this machine could never make.

A discrete-event simulation in which only the time is made up: candidates come from the replayed workload
(`replay.py`: a million memories, a thousand requests a second), what lies in which tier is kept by value
(`memory/value.py`), plans are made by the very MemScheduler of the engine, and each request then takes what a
cost table says, times errors that the scheduler does not know and must learn. Promotion by value against LRU,
LFU and peers is replayed beside it (`promote.py`).
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memos_engine.bench.budget_policies import OURS, POLICIES, Policy, scheduler_of
from memos_engine.bench.document import Document, Row
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.promote import promotion_rows
from memos_engine.bench.replay import KINDS, Event, Memory, Workload, events, memories
from memos_engine.bench.stats import p95

from memos_engine.memory.costs import CostTable, Frame
from memos_engine.memory.plan import KVAvailability, Plan, PlanInput, PlanRequest
from memos_engine.memory.scheduler import MemScheduler
from memos_engine.memory.value import Keeper, Pace
from memos_engine.outlook import SMOOTH
from memos_engine.preparing import NEEDED

BUDGETS = (80.0, 120.0, 200.0, 500.0, 1000.0)
CUBES = (1_000_000, 20_000)  # with --quick the second
REQUESTS = (6000, 400)
RATE = 1000.0  # requests a second
LOADS = (0.6, 0.9, 1.2)  # work that comes, over what the engines can do without budgets
KV_BYTES, HOST_BYTES = 256 << 30, 32 << 30
PACE = Pace(half_life=60.0, phase=20.0)  # seconds
GHOSTS = 200_000
WARM_UP = 10  # times as many requests fill the tiers; a fifth more is planned, not counted
SAVED_MS = 0.33  # a token's prefill less its splice
TAIL, HEAD, RELATED = 24, 31, 4
SERVICE_MS = 60.0  # what a request takes about: sets the number of engines for a load
# What the simulated machine is slower or faster at than the scheduler's table, and how it wavers.
TRUTH = {"forward": 1.15, "splice": 0.8, "fetch": 1.4, "probe": 1.1}
NOISE, STALLS, STALL_MS = 0.06, 0.002, 300.0
# SmolLM2-135M in bfloat16 on two cores (doctor --calibrate, rounded).
TABLE = CostTable(
    "simulated",
    forward=((1, 8.0), (16, 11.0), (64, 22.0), (128, 42.0), (256, 78.0), (512, 165.0), (1024, 335.0)),
    pairs_ms=60.0, splice=(0.2, 0.05, 1.6), fetch=(0.1, 2.0), probe_ms=150.0, select_ms=1.0, retrieve_ms=8.0,
    plan_ms=3.0, spread=0.08,
)  # fmt: skip

NOTES = (
    "Simulated time. A thousand requests a second about a million memories; as many engines as give the load "
    "that the row names. Each engine does one request after the other; the one with the least slack goes "
    "first (or the oldest: admission fifo). Budgets are drawn from 80, 120, 200, 500 and 1000 ms.",
    "The simulated machine differs from the scheduler's table "
    f"({', '.join(f'{name} x {factor}' for name, factor in TRUTH.items())}), wavers by {NOISE:.0%} and "
    f"stalls for {STALL_MS:g} ms once in {1 / STALLS:g} requests; none of it is told.",
    "quality: what the scheduler's own model expects of the plan against the best one without a budget, mean "
    "over requests; a request that misses its budget counts as it is.",
)


@dataclass
class World:
    """Memories, and which of their records lie in files and in host memory."""

    memories: Sequence[Memory]
    stored: Keeper[int]
    host: Keeper[int]
    topics: int
    rng: random.Random

    def candidates(self, event: Event) -> list[PlanInput]:
        """What retrieval finds: the wanted memories, and others of the user's that are like them."""
        first = event.user * self.topics
        others = [first + self.rng.randrange(self.topics) for _ in range(RELATED)]
        found = dict.fromkeys([*event.wanted, *others])
        out = []
        for rank, key in enumerate(found):
            memory = self.memories[key]
            held = key in self.stored.held
            kv = KVAvailability(
                held, memory.tokens * held, held, "" if held else "no KV stored yet",
                "host" if key in self.host.held else "disk", memory.nbytes,
            )  # fmt: skip
            score = 0.75 * 0.9**rank if key in event.wanted else 0.3 * 0.9**rank
            out.append(PlanInput(str(key), score, memory.tokens, kv, score))
        return out

    def used(self, keys: Sequence[int], now: float) -> None:
        """After a reply: records that lacked are built where they are worth it, those used stay near."""
        for key in keys:
            memory = self.memories[key]
            for keeper in (self.stored, self.host):
                keeper.used(key, now, memory.user)
                if key not in keeper.held:
                    keeper.offer(key, memory.nbytes, memory.tokens * SAVED_MS, now)


@dataclass(order=True)
class Waiting:
    """A planned request in an engine's queue."""

    key: float
    at: float = field(compare=False)
    budget: float = field(compare=False)
    plan: Plan = field(compare=False)
    takes: float = field(compare=False)
    expected: float = field(compare=False)
    table: dict[str, float] = field(compare=False)
    actual: dict[str, float] = field(compare=False)


@dataclass
class Engine:
    """One decoder: busy until some time, with a queue."""

    free_at: float = 0.0
    queue: list[Waiting] = field(default_factory=list)

    def backlog(self, now: float, key: float) -> float:
        """Milliseconds that a request with this key waits, as expected."""
        return max(0.0, self.free_at - now) + sum(one.expected for one in self.queue if one.key <= key)


class Simulation:
    """One policy at one load."""

    def __init__(self, options: Options, policy: Policy | None, load: float, slack: bool) -> None:
        q = int(options.quick)
        cubes = (options.cubes or (CUBES[q],))[0]
        self.slack, self.load, self.policy = slack, load, policy
        self.rng = random.Random(f"simulation/{options.seed}")
        each = 100
        users = max(2, cubes // each)
        self.workload = Workload(users=users, memories=each, topics=10, rate=RATE / 2, kinds=KINDS[:1])
        base = MemScheduler(TABLE)
        self.scheduler = scheduler_of(policy, base, {})
        self.world = World(
            memories(self.workload, options.seed),
            Keeper(KV_BYTES, PACE, GHOSTS), Keeper(HOST_BYTES, PACE, GHOSTS), each,
            random.Random(f"world/{options.seed}"),
        )  # fmt: skip
        self.requests = options.rounds(*REQUESTS)
        self.seed = options.seed
        self.busy = 0.0
        self.done: list[Waiting] = []
        self.finished: list[float] = []

    def run(self) -> Row:
        """Plays all requests; the first fifth warms up."""
        warm = self.requests // 5
        engines = [Engine() for _ in range(max(1, round(RATE * SERVICE_MS / 1e3 / self.load)))]
        fill = WARM_UP * self.requests
        for number, event in enumerate(events(self.workload, self.seed, fill + warm + self.requests)):
            if number < fill:
                self.world.used(event.wanted, event.time)
                continue
            now = event.time * 1e3
            for engine in engines:
                self._serve(engine, now)
            engine = min(engines, key=lambda one: one.backlog(now, math.inf))
            heapq.heappush(engine.queue, self._planned(event, engine, now, self.rng.choice(BUDGETS)))
            if number == fill + warm:
                self.done.clear()
                self.finished.clear()
        for engine in engines:
            self._serve(engine, math.inf)
        return self._row(len(engines))

    def _planned(self, event: Event, engine: Engine, now: float, budget: float) -> Waiting:
        factors = self.scheduler.residuals.factors()
        spent = TABLE.retrieve_ms * self.rng.lognormvariate(0.0, NOISE) + TABLE.plan_ms
        latest = now + budget - 30.0
        queue = engine.backlog(now, latest if self.slack else math.inf)
        queue /= factors.get("queue", 1.0)
        self.busy += SMOOTH * ((queue > 0) - self.busy)
        frame = Frame(HEAD, 15, 0, TAIL, 0, queue, spent, self.busy)
        request = PlanRequest("auto", 6000, 8, 0.0, None, budget, frame=frame)
        plan = self.scheduler.plan(self.world.candidates(event), request)
        forecast = plan.forecast
        assert forecast is not None
        service = {k: v for k, v in forecast.table.items() if k != "queue"}
        noise = self.rng.lognormvariate(0.0, NOISE)
        actual = {k: v * TRUTH.get(k, 1.0) * noise for k, v in service.items()}
        takes = sum(actual.values()) + (STALL_MS if self.rng.random() < STALLS else 0.0)
        expected = sum(v for k, v in forecast.stages.items() if k != "queue")
        key = now + budget - expected if self.slack else now
        return Waiting(key, now, budget, plan, takes + 0.0, expected, service, actual | {"spent": spent})

    def _serve(self, engine: Engine, now: float) -> None:
        """Finishes what the engine has begun by now."""
        while engine.queue and engine.free_at <= now:
            ready = [
                one for one in engine.queue if one.at + one.actual["spent"] <= max(engine.free_at, one.at)
            ]
            one = min(ready or engine.queue)
            engine.queue.remove(one)
            heapq.heapify(engine.queue)
            start = max(engine.free_at, one.at + one.actual["spent"])
            engine.free_at = start + one.takes
            ttft = engine.free_at - one.at
            self.scheduler.residuals.observe(one.table, one.actual)
            forecast = one.plan.forecast
            assert forecast is not None
            fetch = one.actual["fetch"], forecast.stages["fetch"]
            spent = one.actual["spent"]
            self.scheduler.residuals.promised(forecast.total_ms - spent - fetch[1], ttft - spent - fetch[0])
            inside = [int(s.cube_id) for s in one.plan.segments]
            outside = [int(s.cube_id) for s in one.plan.skipped if s.need >= NEEDED]
            self.world.used(inside + outside, one.at / 1e3)
            self.done.append(one)
            self.finished.append(ttft)

    def _row(self, engines: int) -> Row:
        errors = []
        met = 0
        for one, ttft in zip(self.done, self.finished, strict=True):
            met += ttft <= one.budget
            assert one.plan.forecast is not None
            errors.append(abs(one.plan.forecast.total_ms / ttft - 1))
        segments = [s.form for one in self.done for s in one.plan.segments]
        return {
            "policy": OURS if self.policy is None else self.policy.name,
            "admission": "slack" if self.slack else "fifo",
            "load": self.load,
            "engines": engines,
            "cubes": len(self.world.memories),
            "requests": len(self.done),
            "met_share": round(met / len(self.done), 4),
            "ttft_ms_p50": round(statistics.median(self.finished), 2),
            "ttft_ms_p95": round(p95(self.finished), 2),
            "predicted_error_p50": round(statistics.median(errors), 4),
            "quality": round(statistics.fmean(one.plan.quality for one in self.done), 4),
            "memories_mean": round(len(segments) / len(self.done), 2),
            "kv_share": round(segments.count("kv") / max(1, len(segments)), 3),
        }


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench budget --simulate`; a unit is a load, or the promotion replay."""
    document = Document("budget-simulated", options)
    text, kv = POLICIES[:2]
    variants: list[tuple[Policy | None, bool]] = [(None, True), (None, False), (text, True), (kv, True)]
    total = len(LOADS) * len(variants) + 1
    for number, load in enumerate(LOADS):
        unit = f"load {load:g}"
        if document.has(unit):
            continue
        document.note(*NOTES)
        rows = []
        for i, (policy, slack) in enumerate(variants):
            progress(f"{unit}: {OURS if policy is None else policy.name}", number * len(variants) + i, total)
            rows.append(Simulation(options, policy, load, slack).run())
        document.add(unit, rows)
    if not document.has("promotion"):
        progress("promotion by value", total - 1, total)
        document.add("promotion", promotion_rows(seeds=(100, 101)) if options.quick else promotion_rows())
    return document.finish()
