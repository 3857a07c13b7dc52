"""Traffic over the engine: clients that wait (closed loop) and Poisson arrivals that do not (open loop).

A request's clock starts when it was due, not when the engine found time for it: a stalled engine cannot slow
down the traffic that measures it. The same requests arrive at the same moments with their memories spliced
and with the same memories as text.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from typing import Any

from memos_engine.bench import stats
from memos_engine.bench.document import Document, Row
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.peers.process import PeerError
from memos_engine.bench.systems import OURS, Systems, check_systems, open_systems
from memos_engine.bench.target import open_target
from memos_engine.bench.workload import Workload, Workloads

MODES = ("splice", "full")
POOL, SPAN, TAKEN, QUERY, ANSWER = 24, 256, 4, 32, 16
OFFERED = (0.4, 0.7, 1.0, 1.4)  # shares of what one client of the spliced engine gets through
CLIENTS = (1, 4)
SECONDS = (15.0, 4.0)  # of traffic for each row; with --quick the second


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench load`."""
    check_systems(options)
    seconds = SECONDS[options.quick]
    offered = OFFERED[1:3] if options.quick else OFFERED
    with open_target(options) as target:
        work = Workloads(target, options.seed).make(POOL * SPAN, QUERY, POOL)
        document = Document("load", options)
        total, done = len(MODES) * (len(CLIENTS) + len(offered)), 0
        longest = len(work.anchor) + TAKEN * SPAN + QUERY + ANSWER
        with open_systems(replace(options, peers=()), target, 2 * longest, document) as systems:
            _warm(systems, work)
            for clients in CLIENTS:
                for mode in MODES:
                    unit = f"{clients} waiting clients, {mode}"
                    progress(unit, done, total)
                    if not document.has(unit):
                        document.add(unit, [_closed(systems, work, options, mode, clients, seconds)])
                    done += 1
            rate, objective = _scale(document, options)
            for share in offered:
                for mode in MODES:
                    unit = f"Poisson arrivals at {share:g} of capacity, {mode}"
                    progress(unit, done, total)
                    if not document.has(unit):
                        row = _open(systems, work, options, mode, share * rate, seconds, objective)
                        document.add(unit, [row])
                    done += 1
        for row in document.data["rows"]:
            _judge(row, objective)
        return document.finish()


def _warm(systems: Systems, work: Workload) -> None:
    """Encodes every memory once and runs each path once: records exist before traffic does."""
    for first in range(0, POOL, TAKEN):
        order = list(range(first, min(first + TAKEN, POOL)))
        for mode in MODES:
            systems.call(OURS, "first_token", mode=mode, parts=work.parts(order))


def _closed(
    systems: Systems, work: Workload, options: Options, mode: str, clients: int, seconds: float
) -> Row:
    return _row(
        systems,
        {"traffic": "closed", "clients": clients},
        mode=mode,
        clients=clients,
        seconds=seconds,
        requests=_requests(work, random.Random(options.seed), 400),
        due=[],
    )


def _open(
    systems: Systems,
    work: Workload,
    options: Options,
    mode: str,
    rate: float,
    seconds: float,
    objective: float,
) -> Row:
    rng = random.Random(options.seed + 1)
    due, at = [], rng.expovariate(rate)
    while at < seconds:
        due.append(at)
        at += rng.expovariate(rate)
    due = due or [0.0]
    return _row(
        systems,
        {"traffic": "open", "offered_per_s": round(rate, 3), "objective_ms": objective},
        mode=mode,
        clients=0,
        seconds=2 * seconds,
        requests=_requests(work, rng, len(due)),
        due=due,
    )


def _requests(work: Workload, rng: random.Random, count: int) -> list[list[list[int]]]:
    """Memories by popularity (Zipf, exponent 1), in an order of their own for each request."""
    weights = [1 / (rank + 1) for rank in range(POOL)]
    out = []
    for _ in range(count):
        chosen: list[int] = []
        while len(chosen) < TAKEN:
            (pick,) = rng.choices(range(POOL), weights)
            if pick not in chosen:
                chosen.append(pick)
        out.append(work.parts(chosen))
    return out


def _row(systems: Systems, fields: dict[str, Any], **arguments: Any) -> Row:
    named = {
        "system": OURS,
        "mode": arguments["mode"],
        "scope": "engine",
        "reuse": "pages" if arguments["mode"] == "splice" else "none",
        **fields,
        "answer_tokens": ANSWER,
        "memory_tokens": TAKEN * SPAN,
    }
    try:
        got = systems.call(OURS, "traffic", answer=ANSWER, **arguments)
    except PeerError as error:
        return {**named, "status": error.status, "reason": str(error)}
    ttft = got["ttft_ms"]
    if not ttft:
        return {**named, "status": "failed", "reason": "no request got its first token in the time given"}
    itl = got["itl_ms"] or [0.0]
    return {
        **named,
        "requests": got["requests"],
        "unfinished": got["unfinished"],
        **stats.timing(ttft, "ttft_ms"),
        "ttft_ms_p99": round(_percentile(ttft, 99), 3),
        "itl_ms_p50": round(statistics.median(itl), 3),
        "itl_ms_p95": round(stats.p95(itl), 3),
        "seconds": round(got["seconds"], 3),
        "requests_per_s": round(got["finished"] / got["seconds"], 3),
        "throughput_tokens_per_s": round(got["tokens"] / got["seconds"], 2),
    }


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def _scale(document: Document, options: Options) -> tuple[float, float]:
    """Requests a second of one waiting client with splices, and the TTFT objective: three times what an
    unloaded spliced request takes, unless the options name one."""
    for row in document.data["rows"]:
        if row["traffic"] == "closed" and row["clients"] == 1 and row["mode"] == "splice":
            if "status" in row:
                raise PeerError(row["status"], f"our own engine gave no rate to scale by: {row['reason']}")
            objective = options.objective_ms or round(3 * row["ttft_ms_p50"], 1)
            return float(row["requests_per_s"]), float(objective)
    raise AssertionError("closed-loop rows come first")


def _judge(row: Row, objective: float) -> None:
    """Share of all due requests whose first token came within the objective, and their rate (goodput)."""
    if "status" in row:
        return
    met = sum(ms <= objective for ms in row["samples"])
    row["objective_ms"] = objective
    row["met_share"] = round(met / max(1, row["requests"]), 4)
    row["goodput_per_s"] = round(met / row["seconds"], 3)
