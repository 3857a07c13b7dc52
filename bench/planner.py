"""How long planning takes, and how far from the best it may be: candidates drawn by chance, real costs.

The cost table is calibrated first, for this run alone. `gap`: the bound less what was found, as a share of
the ideal: what was found is no further than that from the best.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from memos_engine.bench.document import Document
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.stats import p95
from memos_engine.bench.target import open_target

from memos_engine.api import MemoryEngine
from memos_engine.calibration import calibrate
from memos_engine.config import DecoderConfig
from memos_engine.memory.costs import Frame
from memos_engine.memory.embed import default_embedder
from memos_engine.memory.plan import KVAvailability, PlanInput, PlanRequest
from memos_engine.memory.quality import sketch
from memos_engine.memory.scheduler import MemScheduler

COUNTS = (8, 16, 64)
BUDGETS = (80.0, 200.0, 500.0)
REPEATS = 60


def candidates(count: int, seed: int) -> list[PlanInput]:
    """Memories of 30 to 300 tokens, six in ten with KV, a third of those on disk, a few alike."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        tokens = rng.randint(30, 300)
        held = rng.random() < 0.6
        tier = "disk" if rng.random() < 0.3 else "host"
        kv = KVAvailability(
            held, tokens * held, held, "" if held else "no KV stored yet", tier, tokens * 23_000
        )
        words = [f"w{rng.randrange(5000)}" for _ in range(tokens)]
        if i % 10 == 9:
            words = words[: tokens // 3] + [f"same{n}" for n in range(tokens)]
        score = 0.9 * 0.97**i * rng.uniform(0.8, 1.0)
        out.append(PlanInput(f"m{i:03}", score, tokens, kv, score, sketch=sketch(" ".join(words))))
    return out


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench planner`."""
    document = Document("planner", options)
    decoder = DecoderConfig(dtype=options.dtype)
    with open_target(options) as target, MemoryEngine.open(target.folder, decoder=decoder) as engine:
        table = calibrate(engine.decoder, default_embedder(), progress)
        document.add("planner", planner_rows(MemScheduler(table)))
    document.note(
        "MemScheduler.plan over memories of 30 to 300 tokens, six in ten with KV, a third of those on disk, "
        f"a few alike; budgets of {', '.join(f'{ms:g}' for ms in BUDGETS)} ms in turn."
    )
    return document.finish()


def planner_rows(base: MemScheduler) -> list[dict[str, Any]]:
    """Milliseconds of `MemScheduler.plan` and the proven gap to the best, by number of candidates."""
    scheduler = MemScheduler(base.costs, base.quality, base.need, distraction=base.distraction)
    rows = []
    for count in COUNTS:
        taken: list[float] = []
        gaps: list[float] = []
        sets = [candidates(count, repeat) for repeat in range(REPEATS)]
        for repeat, some in enumerate(sets):
            budget = BUDGETS[repeat % len(BUDGETS)]
            request = PlanRequest(
                "auto", 6000, 32 if count > 16 else 8, 0.0, None, budget, frame=Frame(31, 15, 0, 20)
            )
            start = time.perf_counter()
            plan = scheduler.plan(some, request)
            taken.append((time.perf_counter() - start) * 1e3)
            gaps.append(plan.gap)
        rows.append({"candidates": count, "n": REPEATS - 3, **_times(taken[3:]), **_gaps(gaps)})
    return rows


def _times(taken: Sequence[float]) -> dict[str, float]:
    return {"plan_ms_p50": round(statistics.median(taken), 3), "plan_ms_p95": round(p95(taken), 3)}


def _gaps(gaps: Sequence[float]) -> dict[str, float]:
    return {"gap_p50": round(statistics.median(gaps), 4), "gap_p95": round(p95(gaps), 4)}
