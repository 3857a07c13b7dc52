"""Decode: milliseconds a token behind a context, and tokens a second by batch; peers in turn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

from memos_engine.bench import roofline, stats, ttft
from memos_engine.bench.document import Document, Row
from memos_engine.bench.limits import Limits
from memos_engine.bench.options import Options, Progress, rounds_shown, silent
from memos_engine.bench.systems import OURS, Arm, Systems, check_systems, interleave, open_systems
from memos_engine.bench.target import open_target
from memos_engine.bench.workload import Workloads

WARMUP = 1
INT8 = "int8"


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench decode`."""
    check_systems(options)
    contexts = options.contexts or (1024,)
    batches = options.batches or ((1,) if options.quick else (1, 8))
    steps = 16 if options.quick else 24
    rounds = options.rounds(4, 4) + WARMUP
    with open_target(options) as target:
        document = Document("decode", options)
        ceilings = roofline.ceilings_for(document, options)
        limits = Limits(target.spec, options.resolved_dtype, ceilings)
        workloads = Workloads(target, options.seed)
        cases = [(context, batch) for context in contexts for batch in batches]
        made = {c: workloads.make(c, 32, 1) for c in contexts}
        longest = max((c + 256 + steps) for c in contexts) * max(batches)
        with open_systems(options, target, min(longest, target.spec.max_positions), document) as systems:
            for index, (context, batch) in enumerate(cases):
                unit = f"{context} tokens, batch {batch}"
                if document.has(unit):
                    continue
                ids = [t for part in made[context].parts([0]) for t in part]
                inputs = [_varied(ids, options.seed + n) for n in range(rounds)]
                rows, ratios = _measure(
                    context, batch, steps, inputs, systems, limits,
                    rounds_shown(progress, unit, index * rounds, len(cases) * rounds),
                )  # fmt: skip
                document.add(unit, rows, ratios)
        return document.finish()


def _varied(ids: list[int], seed: int) -> list[int]:
    """The same length, other tokens in the middle: no round may find the pages of the last one."""
    middle = ids[64:-64]
    random.Random(seed).shuffle(middle)
    return [*ids[:64], *middle, *ids[-64:]]


def _measure(
    context: int,
    batch: int,
    steps: int,
    inputs: list[list[int]],
    systems: Systems,
    limits: Limits,
    progress: Callable[[int], None],
) -> tuple[list[Row], list[Row]]:
    def decode(name: str, ids: list[int], **more: Any) -> dict[str, Any]:
        answer = systems.call(name, "decode", context=ids, batch=batch, steps=steps, **more)
        return {"ms": statistics.median(answer["step_ms"]), "steps": answer["step_ms"]}

    arms = [Arm(name, "decode", lambda ids, n=name: decode(n, ids)) for name in systems.names]
    if systems.device == "cpu" and limits.dtype == "bfloat16":
        arms.append(Arm(OURS, INT8, lambda ids: decode(OURS, ids, int8=True)))
    measured = interleave(arms, inputs, WARMUP, progress)
    limit = limits.decode(len(inputs[0]), batch)
    rows: list[Row] = []
    for arm in arms:
        fields = {
            "scope": "engine",
            "reuse": "none",
            "context": context,
            "batch": batch,
            "dtype": limits.dtype,
        }
        if arm.mode == INT8:  # a row of its own kind: nobody else's weights are rounded
            fields["dtype"] = f"{limits.dtype}, weights int8"
        if arm.key in measured.failed:
            rows.append(measured.status_row(arm.key, **fields))
            continue
        every = [ms for answer in measured.answers[arm.key] for ms in answer["steps"]]
        row = {
            "system": arm.system,
            "mode": arm.mode,
            **fields,
            **stats.timing(measured.samples(arm.key), "ms_per_token"),
        }
        row["ms_per_token_p50"] = round(statistics.median(every), 3)
        row["ms_per_token_p95"] = round(stats.p95(every), 3)
        row["tokens_per_s"] = round(1e3 * batch / row["ms_per_token_p50"], 2)
        if arm.mode != INT8:  # the limit is that of reading whole weights
            row["limit_ms"] = round(limit, 3)
            row["share_of_limit"] = round(limit / row["ms_per_token_p50"], 3)
        rows.append(row)
    wanted = [
        (f"decode, ours / {name}", (OURS, "decode"), (name, "decode"))
        for name in systems.names
        if name != OURS
    ]
    if any(arm.mode == INT8 for arm in arms):
        wanted += [
            (f"decode, ours with int8 weights / {name}", (OURS, INT8), (name, "decode"))
            for name in systems.names
        ]
    return rows, ttft.paired_ratios(measured, wanted, context=context, batch=batch)
