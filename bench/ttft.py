"""Time to first token: full prefill, exact-prefix reuse, spliced memory, the question alone; peers in turn.

Engine scope (token ids in, first token out, records in host memory) is measured here, request scope in
`request.py`. Every system has a process of its own; a fresh order of memories in every round.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from memos_engine.bench import request, roofline, stats
from memos_engine.bench.document import Document, Row
from memos_engine.bench.limits import REFINE, REFINED, Limits
from memos_engine.bench.options import Options, Progress, rounds_shown, silent
from memos_engine.bench.peers import registry
from memos_engine.bench.systems import OURS, Arm, Measured, Systems, check_systems, interleave, open_systems
from memos_engine.bench.target import open_target
from memos_engine.bench.workload import Workload, Workloads

OWN_MODES = ("full", "prefix", "splice", REFINE, "query_only")
# "pages": records go into pages anew for each request; the workers share no spliced pages.
REUSE = {"full": "none", "prefix": "prefix", "splice": "pages", REFINE: "pages", "query_only": "none"}
SHARE = {"full": 1.0, "splice": 0.0, REFINE: REFINED}
WARMUP = 2
REPEATS = 3  # of a short request in one turn; its median is the turn's sample


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench ttft`."""
    check_systems(options)
    contexts = options.contexts or ((1024,) if options.quick else (512, 1024, 2048, 4096))
    queries, memories = options.queries or (32,), options.memories or (4,)
    cases = [(c, q, m) for m in memories for q in queries for c in contexts]
    with open_target(options) as target:
        workloads = Workloads(target, options.seed)
        made = {case: workloads.make(*case) for case in cases}
        longest = max(sum(map(len, work.parts(list(range(case[2]))))) for case, work in made.items()) + 8
        document = Document("ttft", options)
        ceilings = roofline.ceilings_for(document, options)
        limits = Limits(target.spec, options.resolved_dtype, ceilings)
        rounds = {case: _rounds(options, case[0]) for case in cases}
        asked = options.rounds(9, 7) + WARMUP
        wanted = target.random is None  # request scope needs a tokenizer, and a window for its prompts
        if wanted and target.spec.max_positions < request.TOKENS:
            wanted = False
            document.note(f"request scope is left out: it needs a window of {request.TOKENS} tokens")
        total, begun = sum(rounds.values()) + wanted * asked, 0
        longest = max(longest, request.TOKENS if wanted else 0)
        with open_systems(options, target, longest, document) as systems:
            for case in cases:
                unit = _unit(case)
                if not document.has(unit):
                    rows, ratios = _measure(
                        case, made[case], systems, limits, rounds[case], options.seed,
                        rounds_shown(progress, unit, begun, total),
                    )  # fmt: skip
                    document.add(unit, rows, ratios)
                begun += rounds[case]
            if wanted and not document.has("request"):
                rows, ratios = request.measure(
                    options, target, limits, systems, asked, document,
                    rounds_shown(progress, "request scope", begun, total),
                )  # fmt: skip
                document.add("request", rows, ratios)
        return document.finish()


def _rounds(options: Options, context: int) -> int:
    """Warm-up included. Long prompts, of which a round takes a minute, get fewer unless the options say how
    many."""
    return options.rounds(9 if context <= 1024 else 4, 7) + WARMUP


def _unit(case: tuple[int, int, int]) -> str:
    context, query, memories = case
    return f"{context} tokens in {memories}, query {query}"


def _measure(
    case: tuple[int, int, int],
    work: Workload,
    systems: Systems,
    limits: Limits,
    rounds: int,
    seed: int,
    progress: Any,
) -> tuple[list[Row], list[Row]]:
    context, query, memories = case
    rng = random.Random(seed)
    inputs = [
        {
            "fresh": [work.parts(rng.sample(range(memories), memories), asked) for asked in round_],
            "fixed": [work.parts(range(memories), asked) for asked in round_],
        }
        for round_ in (range(i * REPEATS, (i + 1) * REPEATS) for i in range(rounds))
    ]
    arms = [
        Arm(name, mode, partial(_first_token, systems, name, mode))
        for name in systems.names
        for mode in modes(name)
    ]
    measured = interleave(arms, inputs, WARMUP, progress)
    tier, rows = "host" if systems.device == "cpu" else "device", []
    for arm in arms:
        bare = arm.mode == "query_only"
        fields = {
            "scope": "engine",
            "reuse": REUSE[arm.mode],
            "context": 0 if bare else context,
            "query": query,
            "memories": 0 if bare else memories,
            "recompute": SHARE.get(arm.mode),
            "dtype": limits.dtype,
            "tier": tier if REUSE[arm.mode] != "none" else None,
        }
        if arm.mode == REFINE:
            fields["mode"] = "splice"  # with another share
        limit = limits.first_token(arm.mode, len(work.anchor), context, query)
        rows.append(timed_row(arm, measured, fields, limit))
    return rows, ratios_of(measured, context, query, memories)


def _first_token(systems: Systems, name: str, mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """A system's turn: one full prefill, or the median of REPEATS short requests, each with another order
    and question. What reuses a prefix gets the order it knows, with a question it does not know; our own then
    also computes that prompt in full, untimed, to tell whether the token is right."""
    prompts = given["fixed" if mode == "prefix" else "fresh"][: 1 if mode == "full" else REPEATS]
    answers = [systems.call(name, "first_token", mode=mode, parts=parts) for parts in prompts]
    answer: dict[str, Any] = {**answers[0], "ms": statistics.median(a["ms"] for a in answers)}
    if (name, mode) == (OURS, "prefix"):
        answer["truth"] = systems.call(name, "first_token", mode="full", parts=prompts[0])["token"]
    return answer


def modes(name: str) -> tuple[str, ...]:
    """What a system is asked for."""
    return OWN_MODES if name == OURS else registry.PEERS[name].modes


def timed_row(arm: Arm, measured: Measured, fields: dict[str, Any], limit: float) -> Row:
    """A row of numbers, or of the reason why there are none."""
    if arm.key in measured.failed:
        return measured.status_row(arm.key, **fields)
    samples = measured.samples(arm.key)
    row = {"system": arm.system, "mode": arm.mode, **fields, **stats.timing(samples, "ttft_ms")}
    row["limit_ms"] = round(limit, 3)
    row["share_of_limit"] = round(limit / row["ttft_ms_p50"], 4)
    row["same_first_token"] = _agreement(arm, measured)
    return row


def _agreement(arm: Arm, measured: Measured) -> float | None:
    """Share of rounds in which the first token is that of our own full prefill of the same prompt."""
    if arm.mode == "query_only" or arm.key == (OURS, "full"):
        return None
    if arm.mode == "prefix":
        truth = [answer["truth"] for answer in measured.answers.get((OURS, "prefix"), ())]
    else:
        truth = [answer["token"] for answer in measured.answers.get((OURS, "full"), ())]
    mine = [answer["token"] for answer in measured.answers[arm.key]]
    if not truth:
        return None
    return round(sum(a == b for a, b in zip(mine, truth, strict=True)) / len(truth), 3)


def ratios_of(measured: Measured, context: int, query: int, memories: int) -> list[Row]:
    """Ours against each system that reuses nothing, and against each that reuses a prefix, round by round."""
    wanted: list[tuple[str, tuple[str, str], tuple[str, str]]] = [
        ("spliced / own full prefill", (OURS, "splice"), (OURS, "full")),
        (f"spliced, {REFINED:.0%} recomputed / own full prefill", (OURS, REFINE), (OURS, "full")),
    ]
    for system, mode in measured.answers:
        if system != OURS and mode == "full":
            wanted.append((f"own full prefill / {system} full prefill", (OURS, "full"), (system, mode)))
            wanted.append((f"spliced / {system} full prefill", (OURS, "splice"), (system, mode)))
        elif system != OURS and mode == "prefix":
            wanted.append((f"spliced / {system} exact prefix", (OURS, "splice"), (system, mode)))
            wanted.append((f"own exact prefix / {system} exact prefix", (OURS, "prefix"), (system, mode)))
    return paired_ratios(measured, wanted, context=context, query=query, memories=memories)


def paired_ratios(
    measured: Measured,
    wanted: Sequence[tuple[str, tuple[str, str], tuple[str, str]]],
    name: str = "ms",
    **fields: Any,
) -> list[Row]:
    """Median ratio of two arms, paired by round, with its interval; left out where an arm has no samples."""
    out = []
    for text, over, under in wanted:
        a, b = measured.samples(over, name), measured.samples(under, name)
        if a and b:
            out.append({"name": text, **fields, **stats.ratio(a, b).public()})
    return out
