"""Table 5 of the MemOS paper (arXiv 2507.03724): what a stored KV saves, at its nine context and query sizes.

Its cells come from HF transformers on one H800 with the KV already on the GPU, one memory at the head of the
prompt. Here the same shape runs on this machine. `build`: the one encoding of the memory. `direct`: our own
full prefill. `ours`: the same prompt with the memory spliced from its record in memory (exact, as it stands
right behind the anchor). `break_even`: uses after which building has paid for itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from memos_engine.bench import roofline, stats
from memos_engine.bench.document import Document, Row
from memos_engine.bench.limits import Limits
from memos_engine.bench.options import Options, Progress, rounds_shown, silent
from memos_engine.bench.systems import OURS, Arm, Measured, Systems, check_systems, interleave, open_systems
from memos_engine.bench.target import open_target
from memos_engine.bench.workload import Workload, Workloads

# model: {(context, query): (build s, KV TTFT s, direct TTFT s, reduction %)}, as printed in the paper
PAPER: dict[str, dict[tuple[int, int], tuple[float, float, float, float]]] = {
    "Qwen3-8B": {
        (6064, 953): (0.92, 0.50, 2.37, 79.1),
        (6064, 303): (0.93, 0.19, 2.16, 91.1),
        (6064, 167): (0.93, 0.12, 2.04, 94.2),
        (2773, 953): (0.41, 0.43, 1.22, 64.6),
        (2773, 303): (0.41, 0.16, 1.08, 85.1),
        (2773, 167): (0.43, 0.10, 0.95, 89.7),
        (583, 953): (0.12, 0.39, 0.51, 23.0),
        (583, 303): (0.12, 0.14, 0.32, 55.6),
        (583, 167): (0.12, 0.08, 0.29, 71.3),
    },
    "Qwen3-32B": {
        (6064, 953): (0.71, 0.31, 1.09, 71.4),
        (6064, 303): (0.71, 0.15, 0.98, 84.3),
        (6064, 167): (0.71, 0.11, 0.96, 88.8),
        (2773, 953): (0.31, 0.24, 0.56, 56.9),
        (2773, 303): (0.31, 0.12, 0.47, 75.1),
        (2773, 167): (0.31, 0.08, 0.44, 81.2),
        (583, 953): (0.09, 0.20, 0.24, 18.6),
        (583, 303): (0.09, 0.09, 0.15, 39.6),
        (583, 167): (0.09, 0.07, 0.14, 53.5),
    },
    "Qwen2.5-72B": {
        (6064, 953): (1.26, 0.48, 2.04, 76.4),
        (6064, 303): (1.26, 0.23, 1.82, 87.2),
        (6064, 167): (1.27, 0.15, 1.79, 91.4),
        (2773, 953): (0.58, 0.39, 1.05, 62.7),
        (2773, 303): (0.58, 0.18, 0.89, 79.2),
        (2773, 167): (0.71, 0.23, 0.82, 71.6),
        (583, 953): (0.16, 0.33, 0.43, 23.8),
        (583, 303): (0.16, 0.15, 0.27, 43.2),
        (583, 167): (0.16, 0.10, 0.25, 60.5),
    },
}
_PAPER_MODEL = {"qwen3-8b": "Qwen3-8B", "qwen3-32b": "Qwen3-32B"}
CONTEXTS, QUERIES = (583, 2773, 6064), (167, 303, 953)
WARMUP = 1


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench paper-table5`. Peers run only when named: a full prefill of 7,000 tokens
    in every one of them is long."""
    check_systems(options)
    contexts = options.contexts or (CONTEXTS[:2] if options.quick else CONTEXTS)
    queries = options.queries or (QUERIES[1:2] if options.quick else QUERIES)
    cells = [(context, query) for context in contexts for query in queries]
    rounds = options.rounds(3, 3) + WARMUP
    with open_target(options) as target:
        document = Document("paper-table5", options)
        ceilings = roofline.ceilings_for(document, options)
        limits = Limits(target.spec, options.resolved_dtype, ceilings)
        workloads = Workloads(target, options.seed)
        works = {cell: workloads.make(*cell, 1) for cell in cells}
        longest = max(sum(map(len, work.parts([0]))) for work in works.values()) + 8
        model = _PAPER_MODEL.get(options.random_weights or "", "Qwen3-8B")
        with open_systems(_peers_named(options), target, longest, document) as systems:
            for index, cell in enumerate(cells):
                unit = f"{cell[0]} + {cell[1]}"
                if document.has(unit):
                    continue
                rows, ratios = _cell(
                    cell, works[cell], systems, limits, rounds, model,
                    rounds_shown(progress, unit, index * rounds, len(cells) * rounds),
                )  # fmt: skip
                document.add(unit, [{**row, "model": target.name} for row in rows], ratios)
        document.note(
            f"The paper's cells are {model} on an H800 with the KV already on the GPU; ours are "
            f"{target.name} on this {options.device} machine with the record in its memory. Compare "
            "reductions, not seconds."
        )
        return document.finish()


def _peers_named(options: Options) -> Options:
    return replace(options, peers=()) if options.peers is None else options


def _cell(
    cell: tuple[int, int],
    work: Workload,
    systems: Systems,
    limits: Limits,
    rounds: int,
    model: str,
    progress: Callable[[int], None],
) -> tuple[list[Row], list[Row]]:
    context, query = cell
    arms = [
        Arm(OURS, "build", lambda parts: systems.call(OURS, "build", parts=parts)),
        Arm(OURS, "full", lambda parts: systems.call(OURS, "first_token", mode="full", parts=parts)),
        Arm(OURS, "splice", lambda parts: systems.call(OURS, "first_token", mode="splice", parts=parts)),
    ]
    arms += [
        Arm(name, "full", lambda parts, n=name: systems.call(n, "first_token", mode="full", parts=parts))
        for name in systems.names
        if name != OURS
    ]
    measured = interleave(arms, [work.parts([0])] * rounds, WARMUP, progress)
    row: Row = {
        "system": OURS,
        "scope": "engine",
        "reuse": "pages",
        "tier": "host" if systems.device == "cpu" else "device",
        "context": context,
        "query": query,
        "dtype": limits.dtype,
    }
    others = [measured.status_row(key, context=context, query=query) for key in measured.failed]
    if any(other["system"] == OURS for other in others):
        return others, []
    row |= _numbers(measured)
    row["share_of_limit"] = round(
        limits.first_token("splice", len(work.anchor), context, query) / row["ours_ms"], 3
    )
    for name in systems.names:
        if name != OURS and (name, "full") in measured.answers:
            row[f"{name}_direct_ms"] = round(statistics.median(measured.samples((name, "full"))), 2)
    printed = PAPER[model].get(cell)
    if printed is not None:
        row |= {
            "paper_model": model,
            "paper_build_s": printed[0],
            "paper_kv_s": printed[1],
            "paper_direct_s": printed[2],
            "paper_reduction": round(printed[3] / 100, 3),
        }
    name = f"spliced / own full prefill, {context} + {query}"
    pair = stats.ratio(measured.samples((OURS, "splice")), measured.samples((OURS, "full")))
    return [row, *others], [{"name": name, "context": context, "query": query, **pair.public()}]


def _numbers(measured: Measured) -> Row:
    build, direct, ours = (
        statistics.median(measured.samples((OURS, mode))) for mode in ("build", "full", "splice")
    )
    tokens = zip(measured.answers[OURS, "full"], measured.answers[OURS, "splice"], strict=True)
    same = [a["token"] == b["token"] for a, b in tokens]
    return {
        "build_ms": round(build, 2),
        "direct_ms": round(direct, 2),
        "ours_ms": round(ours, 2),
        "reduction": round(1 - ours / direct, 4),
        "break_even": math.ceil(build / (direct - ours)) if direct > ours else None,
        "same_first_token": round(sum(same) / len(same), 3),
        "n": len(same),
        "samples": [round(ms, 3) for ms in measured.samples((OURS, "splice"))],
        "direct_samples": [round(ms, 3) for ms in measured.samples((OURS, "full"))],
    }
