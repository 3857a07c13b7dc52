"""Which records are worth keeping: value against LRU, LFU and peers, on replayed workloads at equal bytes.

A request's time is that of its query, and for each memory that it wants: a splice where the record lies in
host memory, a fetch and a splice where it is on disk, a prefill of the text where there is no record. Every
policy gets the same bytes in both tiers and decides what lies there; a record that it takes is built after
the reply, as the engine does it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from memos_engine.bench.policies import POLICIES, Policy
from memos_engine.bench.replay import KINDS, Event, Memory, Workload, events, memories

# `Pace` was chosen on seeds 0 to 9; 100 to 119 were looked at while the workload was shaped.
HELD_OUT = tuple(range(300, 320))
KV_BYTES, HOST_BYTES = 384 << 20, 128 << 20
REQUESTS, WARM_UP, SHIFT = 2400, 800, 1600
WINDOW = 50  # requests that what is saved is summed over, after the shift
NEAR = 1.1  # times the TTFT of a policy with nothing to unlearn: then the shift has been followed


@dataclass(frozen=True)
class Costs:
    """Milliseconds, as measured for SmolLM2-135M on two cores: a query alone took 29, with 784 tokens of
    memories spliced 42, as text 576. fetch: a byte at about 1 GB/s."""

    query_ms: float = 29.0
    splice_ms_per_byte: float = (42.0 - 29.0) / 784 / 23040
    text_ms_per_token: float = (576.0 - 29.0) / 784
    fetch_ms_per_byte: float = 1e-6

    def text_ms(self, memory: Memory) -> float:
        return memory.tokens * self.text_ms_per_token * memory.kind.work

    def splice_ms(self, memory: Memory) -> float:
        return memory.nbytes * self.splice_ms_per_byte

    def fetch_ms(self, memory: Memory) -> float:
        return memory.nbytes * self.fetch_ms_per_byte


@dataclass
class Replayed:
    """One policy over one workload. ttft: milliseconds of each request; saved: what its memories would
    have cost more as text. hits, misses: of wants after warm-up."""

    ttft: list[float] = field(default_factory=list)
    saved: list[float] = field(default_factory=list)
    host_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    builds: int = 0
    again: int = 0  # records built that were dropped before


def replay(
    known: Sequence[Memory],
    requests: Sequence[Event],
    disk: Policy,
    host: Policy,
    costs: Costs,
    warm_up: int = WARM_UP,
) -> Replayed:
    """Runs the requests. disk: which memories have a record at all; host: which of them lie in memory."""
    done = Replayed()
    ever: set[int] = set()
    for now, event in enumerate(requests):
        counts, spent = now >= warm_up, 0.0
        for key in event.wanted:
            memory = known[key]
            text, splice, fetch = costs.text_ms(memory), costs.splice_ms(memory), costs.fetch_ms(memory)
            there = disk.want(key, memory.nbytes, text - splice - fetch, now, event.user)
            warm = host.want(key, memory.nbytes, fetch, now, event.user) and there
            spent += text if not there else splice if warm else splice + fetch
            done.host_hits += counts and warm
            done.disk_hits += counts and there and not warm
            done.misses += counts and not there
            ahead: list[int] = getattr(disk, "built", [])
            for built in [*([key] if not there and disk.holds(key) and key not in ahead else []), *ahead]:
                done.builds += 1
                done.again += built in ever
                ever.add(built)
            ahead.clear()
        work = known[event.wanted[0]].kind.work if event.wanted else 1.0
        done.ttft.append(costs.query_ms * work + spent)
        done.saved.append(sum(costs.text_ms(known[key]) for key in event.wanted) - spent)
    return done


def followed_in(runs: Sequence[Replayed], fresh: Sequence[Replayed], shift: int = SHIFT) -> int | None:
    """Requests after the shift until the time is nearly, and stays, that of a policy that began empty at
    the shift, and so has nothing to unlearn; all seeds together. None: never. What nobody asked for before
    is read as text once, whatever the policy: against the time before the shift nothing could be said."""
    end, late = min(len(run.ttft) for run in fresh), 0
    for first in range(end - WINDOW):
        ours = sum(sum(run.ttft[shift + first : shift + first + WINDOW]) for run in runs)
        if ours > NEAR * sum(sum(run.ttft[first : first + WINDOW]) for run in fresh):
            late = first + 1
    return late if late < end - WINDOW else None


def promotion_rows(
    seeds: Sequence[int] = HELD_OUT,
    *,
    costs: Costs | None = None,
    workload: Workload | None = None,
    policies: Sequence[str] = tuple(POLICIES),
    requests: int = REQUESTS,
    kv_bytes: int = KV_BYTES,
    host_bytes: int = HOST_BYTES,
    name: str = "mixed",
) -> list[dict[str, Any]]:
    """One row a policy: mean and P95 TTFT after warm-up over all seeds, hits, records built and built again,
    and how fast it follows the planted shift. `less_than`: by which share our mean is below that of the
    policy. Row key `system` as everywhere."""
    costs, workload = costs or Costs(), workload or Workload(shift_at=requests * SHIFT // REQUESTS)
    warm_up = requests * WARM_UP // REQUESTS
    runs: dict[str, list[Replayed]] = {policy: [] for policy in policies}
    fresh: list[Replayed] = []
    for seed in seeds:
        known, asked = memories(workload, seed), list(events(workload, seed, requests))
        for policy in policies:
            make = POLICIES[policy]
            runs[policy].append(replay(known, asked, make(kv_bytes), make(host_bytes), costs, warm_up))
        if workload.shift_at is not None:
            rest, make = asked[workload.shift_at :], POLICIES["memos_engine"]
            fresh.append(replay(known, rest, make(kv_bytes), make(host_bytes), costs, 0))
    means = {p: fmean(fmean(run.ttft[warm_up:]) for run in done) for p, done in runs.items()}
    rows = []
    for policy, done in runs.items():
        times = sorted(time for run in done for time in run.ttft[warm_up:])
        wants = sum(run.host_hits + run.disk_hits + run.misses for run in done) or 1
        ours = means.get("memos_engine", means[policy])
        built = len(done) * requests / 1000
        rows.append(
            {
                "system": policy,
                "workload": name,
                "kv_bytes": kv_bytes,
                "host_bytes": host_bytes,
                "requests": requests,
                "seeds": len(done),
                "ttft_ms_mean": round(means[policy], 2),
                "ttft_ms_p95": round(times[int(0.95 * (len(times) - 1))], 2),
                "less_than": round(1.0 - ours / means[policy], 4),
                "host_hit_share": round(sum(run.host_hits for run in done) / wants, 4),
                "disk_hit_share": round(sum(run.disk_hits for run in done) / wants, 4),
                "built_per_1000": round(sum(run.builds for run in done) / built, 1),
                "built_again_per_1000": round(sum(run.again for run in done) / built, 1),
                "followed_shift_in": None
                if workload.shift_at is None
                else followed_in(done, fresh, workload.shift_at),
                "ttft_ms_after_shift": None
                if workload.shift_at is None
                else round(fmean(fmean(run.ttft[workload.shift_at :][50:150]) for run in done), 2),
            }
        )
    return rows


def variants(shift_at: int | None = SHIFT) -> dict[str, Workload]:
    """Where a policy wins shows in what is left out."""
    base = Workload(shift_at=shift_at)
    return {
        "mixed": base,
        "one model": replace(base, kinds=KINDS[:1]),
        "no scans": replace(base, scan=0.0),
        "no shift": replace(base, shift_at=None),
        "flat reuse": replace(base, zipf=0.9),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m memos_engine.bench.promote [--quick] [--out DIR]`: rows, and promotion.json and .png."""
    from argparse import ArgumentParser
    from pathlib import Path

    from memos_engine.bench.report.figures_promote import promotion
    from memos_engine.bench.report.plots import draw

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Two seeds, the mixed workload.")
    parser.add_argument("--out", type=Path, help="Where promotion.json and promotion.png go.")
    asked = parser.parse_args(argv)
    seeds = HELD_OUT[:2] if asked.quick else HELD_OUT
    rows = promotion_rows(seeds)
    some = ("memos_engine", "nothing_ahead", "lru", "lfu", "gdsf")
    for name, workload in variants().items():
        if name != "mixed" and not asked.quick:
            rows += promotion_rows(seeds[:10], workload=workload, policies=some, name=name)
    for row in rows:
        print(json.dumps(row))
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "promotion.json").write_text(json.dumps({"bench": "promotion", "rows": rows}, indent=1))
        for plot in draw(promotion(rows)):
            (asked.out / f"{plot.name}.png").write_bytes(plot.png)


if __name__ == "__main__":
    main()
