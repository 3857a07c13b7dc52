"""The few numbers at the top of the report: each with its meaning, n and command."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from memos_engine.bench.report.standings import NEAR, Standing, standings
from memos_engine.bench.report.values import (
    Document,
    Row,
    clean,
    figure,
    is_ours,
    label,
    measured,
    number,
    part,
    percent,
    records,
    samples,
    system_name,
    times,
)
from memos_engine.bench.stats import ratio

MOST = 6


@dataclass(frozen=True)
class Headline:
    """tone: ahead, behind, level or empty."""

    title: str
    number: str
    meaning: str
    n: str
    command: str
    tone: str = ""


def headlines(documents: Sequence[Document]) -> list[Headline]:
    """Three to six cards, fewer if the documents hold less."""
    makers = {
        "ttft": [_splice, _against_peers],
        "quality": [_quality],
        "decode": [_decode],
        "load": [_load],
        "paper-table5": [_table5],
        "kernels": [_kernels],
        "roofline": [_roofline],
        "memory": [_memory],
        "compare": [_compare],
    }
    cards = []
    for bench, steps in makers.items():
        for document in (d for d in documents if clean(d.get("bench")) == bench):
            cards += [card for step in steps if (card := step(document)) is not None]
            break  # the first document of a bench speaks for it; the sections show all
    return cards[:MOST]


def _ours(document: Document, key: str, **wanted: object) -> list[Row]:
    rows = [r for r in measured(records(document)) if is_ours(r) and number(r, key)]
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def _n(rows: Sequence[Row], what: str = "rounds") -> str:
    counts = sorted({int(n) for row in rows if (n := number(row, "n"))})
    if not counts:
        return "n not recorded"
    return f"n = {counts[0]} {what}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]} {what}"


def _command(document: Document) -> str:
    return str(clean(document.get("command")) or f"memos-engine bench {clean(document.get('bench'))}")


def _pairs(document: Document) -> list[tuple[Row, Row]]:
    """Spliced rows without recomputing, each with full prefill of the same prompt."""
    pairs = []
    for row in _ours(document, "ttft_ms_p50", mode="splice"):
        if row.get("tier") in NEAR and not number(row, "recompute"):
            keys = ("context", "query", "memories", "scope", "dtype")
            same = [
                full
                for mode in ("full", "text")
                for full in _ours(document, "ttft_ms_p50", mode=mode)
                if all(full.get(key) == row.get(key) for key in keys)
            ]
            if same:
                pairs.append((row, same[0]))
    return pairs


def _middle(rows: Sequence[Row]) -> float:
    """The size a headline speaks of: 1024 tokens where measured, else the largest."""
    sizes = {number(row, "context") or 0 for row in rows}
    return 1024.0 if 1024.0 in sizes else max(sizes)


def _splice(document: Document) -> Headline | None:
    pairs = _pairs(document)
    if not pairs:
        return None
    size = _middle([row for row, _ in pairs])
    row, full = next((r, f) for r, f in pairs if (number(r, "context") or 0) == size)
    a, b = samples(full), samples(row)
    found = ratio(a, b) if len(a) == len(b) >= 5 else None
    value = found.value if found else (number(full, "ttft_ms_p50") or 0) / (number(row, "ttft_ms_p50") or 1)
    interval = f" (95 % interval {figure(found.low)} to {figure(found.high)})" if found else ""
    alike = [
        p for p in pairs if all(p[0].get(k) == row.get(k) for k in ("query", "memories", "scope", "dtype"))
    ]
    ends = sorted(alike, key=lambda p: number(p[0], "context") or 0)
    spread = ""
    if len(ends) > 1:
        said = [f"{times(_over(*p))} at {figure(number(p[0], 'context') or 0)}" for p in (ends[0], ends[-1])]
        spread = f" From {said[0]} to {said[1]} tokens."
    where = f"{figure(size)} tokens of memory, {clean(row.get('dtype'))}, {clean(row.get('scope'))} scope"
    now, before = (figure(number(r, "ttft_ms_p50") or 0) for r in (row, full))
    meaning = (
        f"sooner first token, spliced against our own full prefill: {now} ms instead of {before} ms at "
        f"{where}{interval}.{spread}"
    )
    tone = "ahead" if value > 1.05 else "behind" if value < 0.95 else "level"
    return Headline("Spliced memory", times(value), meaning, _n([row, full]), _command(document), tone)


def _over(row: Row, full: Row) -> float:
    return (number(full, "ttft_ms_p50") or 0) / (number(row, "ttft_ms_p50") or 1)


def _against_peers(document: Document) -> Headline | None:
    found = [s for s in standings(document) if s.route == "everything computed"]
    at = [s for s in found if s.group.startswith("1024 ")] or found[-1:]
    if not at:
        return None
    item: Standing = at[0]
    said = {
        "ahead": "Ours is ahead.",
        "behind": "The other is ahead.",
        "level": "This run cannot tell them apart.",
    }
    lead = item.lead
    interval = f" (95 % interval {figure(lead.low)} to {figure(lead.high)})" if item.firm else ""
    meaning = (
        f"the speed of {item.rival}, the fastest other system that computes the whole prompt: "
        f"{figure(item.ours_value)} ms against {figure(item.rival_value)} ms at {item.group}{interval}. "
        f"{said[item.verdict]}"
    )
    rows = [r for r in measured(records(document)) if label(r) in (item.ours, item.rival)]
    return Headline(
        "Full prefill against others",
        times(item.lead.value),
        meaning,
        _n(rows),
        _command(document),
        item.verdict,
    )


def _quality(document: Document) -> Headline | None:
    rows = [r for r in measured(records(document)) if number(r, "kl_mean") is not None]
    ours = [r for r in rows if is_ours(r) and (number(r, "recompute") or 0) < 1]
    if not ours:
        return None
    row = min(ours, key=lambda r: (number(r, "recompute") or 0, -(number(r, "memories") or 0)))
    kl = number(row, "kl_mean") or 0
    peers = [r for r in rows if r.get("memories") == row.get("memories")]
    said = [
        f"{words} {figure(number(r, 'kl_mean') or 0)}"
        for method, words in (("full_bf16", "rounding to bf16 alone"), ("none", "no memory at all"))
        for r in peers
        if r.get("method") == method
    ]
    low, high = number(row, "kl_low"), number(row, "kl_high")
    interval = (
        f" (95 % interval {figure(low)} to {figure(high)})" if low is not None and high is not None else ""
    )
    many = f"{clean(row.get('memories'))} memories, " if row.get("memories") else ""
    beside = f" Beside it: {', '.join(said)}." if said else ""
    meaning = (
        f"nats of KL divergence from full prefill with {many}{percent(number(row, 'recompute') or 0)} of "
        f"their tokens recomputed{interval}.{beside}"
    )
    return Headline("What splicing costs", figure(kl), meaning, _n([row], "prompts"), _command(document))


def _decode(document: Document) -> Headline | None:
    rows = _ours(document, "tokens_per_s") or _ours(document, "ms_per_token_p50")
    if not rows:
        return None
    row = min(rows, key=lambda r: (number(r, "batch") or 1, abs((number(r, "context") or 0) - 1024)))
    speed = number(row, "tokens_per_s") or 1000 / (number(row, "ms_per_token_p50") or 1)
    share = number(row, "share_of_limit")
    limit = f", {percent(share)} of what this machine's ceilings allow" if share is not None else ""
    context, batch = clean(row.get("context")), clean(row.get("batch")) or "1"
    at = f"{context} tokens of context, batch {batch}"
    group = (f"{context} tokens, batch {batch}", f"{context} tokens, {clean(row.get('dtype'))}")
    item = next((s for s in standings(document) if s.group.startswith(group)), None)
    beside = ""
    if item is not None:
        factor = times(item.lead.value if item.verdict != "behind" else 1 / item.lead.value)
        beside = {
            "ahead": f" Ours is ahead of {item.rival} by {factor}.",
            "behind": f" {item.rival} is ahead by {factor}.",
            "level": f" Level with {item.rival}.",
        }[item.verdict]
    meaning = f"tokens a second at {at}{limit}.{beside}"
    return Headline(
        "Decode", figure(speed), meaning, _n([row]), _command(document), item.verdict if item else ""
    )


def _load(document: Document) -> Headline | None:
    rows = _ours(document, "goodput_per_s")
    if not rows:
        return None
    row = max(rows, key=lambda r: number(r, "goodput_per_s") or 0)
    objective, met = number(row, "objective_ms"), number(row, "met_share")
    within = f" within {figure(objective)} ms" if objective else ""
    share = f"; {percent(met)} of all requests met it" if met is not None else ""
    offered = number(row, "offered_per_s")
    at = f"{figure(offered)} offered" if offered else f"{clean(row.get('clients'))} clients"
    others = [r for r in measured(records(document)) if not is_ours(r) and number(r, "goodput_per_s")]
    best = max(others, key=lambda r: number(r, "goodput_per_s") or 0, default=None)
    beside = ""
    if best is not None:
        shown = figure(number(best, "goodput_per_s") or 0)
        beside = f" The best other system, {system_name(best.get('system'))}, reached {shown}."
    full = [r for r in rows if r.get("mode") == "full" and r.get("traffic") == row.get("traffic")]
    if full and row.get("mode") != "full":
        most = max(number(r, "goodput_per_s") or 0 for r in full)
        beside += f" With every prompt computed in full ours reached {figure(most)}."
    meaning = f"requests a second got their first token{within}, at {at}{share}.{beside}"
    ahead = best is None or (number(row, "goodput_per_s") or 0) >= (number(best, "goodput_per_s") or 0)
    count = number(row, "requests")
    return Headline(
        "Goodput under load", figure(number(row, "goodput_per_s") or 0), meaning,
        f"n = {figure(count)} requests" if count else _n([row]), _command(document),
        "" if best is None else "ahead" if ahead else "behind",
    )  # fmt: skip


def _table5(document: Document) -> Headline | None:
    rows = [r for r in measured(records(document)) if number(r, "reduction") is not None]
    if not rows:
        return None
    shares = [number(r, "reduction") or 0 for r in rows]
    model = clean(rows[0].get("model") or part(document, "config").get("model"))
    paper = [v for r in rows if (v := number(r, "paper_reduction")) is not None]
    beside = f" The paper's own cells: {percent(min(paper))} to {percent(max(paper))}." if paper else ""
    meaning = (
        f"less time to first token in the median of {len(rows)} cells of the paper's Table 5; here "
        f"{percent(min(shares))} to {percent(max(shares))}, on "
        f"{model or 'one model'}.{beside}"
    )
    value = percent(statistics.median(shares))
    return Headline("The paper's Table 5", value, meaning, _n(rows), _command(document))


def _kernels(document: Document) -> Headline | None:
    rows = _ours(document, "share_of_limit")
    if not rows:
        return None
    shares = [number(r, "share_of_limit") or 0 for r in rows]
    meaning = (
        f"of the machine's limit in the median of {len(rows)} kernel shapes, from {percent(min(shares))} "
        f"to {percent(max(shares))}."
    )
    return Headline("Our kernels", percent(statistics.median(shares)), meaning, _n(rows), _command(document))


def _roofline(document: Document) -> Headline | None:
    rows = [r for r in measured(records(document)) if r.get("ceiling") == "read" and number(r, "value")]
    if not rows:
        return None
    row = max(rows, key=lambda r: number(r, "value") or 0)
    meaning = (
        f"{clean(row.get('unit'), 20)} is the fastest this machine reads its memory: the floor under decode."
    )
    return Headline(
        "Memory bandwidth", figure(number(row, "value") or 0), meaning, _n([row]), _command(document)
    )


def _memory(document: Document) -> Headline | None:
    rows = _ours(document, "peak_mb")
    if not rows:
        return None
    row = min(rows, key=lambda r: number(r, "peak_mb") or 0)
    meaning = (
        f"MB at the peak of a process that does everything once ({clean(row.get('dtype')) or 'one dtype'})."
    )
    return Headline(
        "Peak memory", figure(number(row, "peak_mb") or 0), meaning, _n([row]), _command(document)
    )


def _compare(document: Document) -> Headline | None:
    rows = [r for r in records(document) if number(r, "ratio") is not None]
    found = number(document, "regressions")
    if not rows or found is None:
        return None
    unclear = sum(row.get("verdict") == "unclear" for row in rows)
    meaning = (
        f"values of ours became worse with confidence, of {len(rows)} that were compared; "
        f"{unclear} are unclear."
    )
    return Headline(
        "Regressions", figure(found), meaning, f"n = {len(rows)} values", _command(document),
    )  # fmt: skip
