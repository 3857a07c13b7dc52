"""Who is fastest: rows that answer the same question are ranked, and a peer ahead of us is named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memos_engine.bench.report.values import (
    Document,
    Row,
    clean,
    figure,
    is_ours,
    label,
    measured,
    number,
    percent,
    records,
    samples,
)
from memos_engine.bench.stats import Interval, ratio, ratio_of_medians

# Without samples there is no interval; a smaller difference than this then counts as none.
LEVEL = 0.05
# Tiers in which a record waits where the decoder computes.
NEAR = (None, "host", "device")


@dataclass(frozen=True)
class Standing:
    """One comparable group. lead: best other over ours (ours over it where more is better), so above 1
    means that ours is ahead; `firm` if an interval stands behind the verdict."""

    group: str
    route: str
    best: str
    ours: str
    rival: str
    lead: Interval
    firm: bool
    verdict: str  # ahead, level, behind
    ours_value: float
    rival_value: float


@dataclass(frozen=True)
class _Rule:
    """How the rows of a bench form groups: metric, whether less is better, and each row's groups."""

    metrics: tuple[str, ...]
    less: bool
    groups: Callable[[Row], list[tuple[str, str]]]


def standings(document: Document) -> list[Standing]:
    """Every group of the document in which ours meets another system."""
    rule = _RULES.get(clean(document.get("bench")))
    if rule is None:
        return []
    found: dict[tuple[str, str], list[Row]] = {}
    for row in measured(records(document)):
        if _metric(rule, row) is not None:
            for group in rule.groups(row):
                found.setdefault(group, []).append(row)
    shown = [_standing(group, rows, rule) for group, rows in found.items()]
    return [standing for standing in shown if standing is not None]


def _metric(rule: _Rule, row: Row) -> float | None:
    values = (number(row, key) for key in rule.metrics)
    value = next((v for v in values if v is not None), None)
    return value if value is not None and value >= 0 else None


def _standing(group: tuple[str, str], rows: Sequence[Row], rule: _Rule) -> Standing | None:
    def value(row: Row) -> float:
        return _metric(rule, row) or 0.0

    best = min if rule.less else max
    mine, others = [r for r in rows if is_ours(r)], [r for r in rows if not is_ours(r)]
    if not mine or not others:
        return None
    ours, rival = best(mine, key=value), best(others, key=value)
    lead, firm = _lead(ours, rival, value, rule.less)
    if firm:
        verdict = "ahead" if lead.low > 1 else "behind" if lead.high < 1 else "level"
    else:
        verdict = "level" if abs(lead.value - 1) <= LEVEL else "ahead" if lead.value > 1 else "behind"
    first = best([ours, rival], key=value)
    return Standing(
        *group, label(first), label(ours), label(rival), lead, firm, verdict, value(ours), value(rival)
    )


def _lead(ours: Row, rival: Row, value: Callable[[Row], float], less: bool) -> tuple[Interval, bool]:
    a, b = samples(ours), samples(rival)
    if less and min(len(a), len(b)) >= 5 and _fits(a, value(ours)) and _fits(b, value(rival)):
        return (ratio(b, a) if len(a) == len(b) else ratio_of_medians(b, a)), True
    over, under = (value(rival), value(ours)) if less else (value(ours), value(rival))
    point = over / under if under else 1.0 if over == under else math.inf
    ends = [number(row, key) for row in (ours, rival) for key in ("kl_low", "kl_high")]
    if all(end is not None and end > 0 for end in ends):
        low, high, rival_low, rival_high = (float(end or 0) for end in ends)
        return Interval(point, rival_low / high, rival_high / low), True
    return Interval(point, point, point), False


def _fits(values: Sequence[float], median: float) -> bool:
    """Whether the samples are those of this metric."""
    return abs(statistics.median(values) - median) <= 0.02 * median


def _at(row: Row, *parts: tuple[str, str]) -> str:
    """`1024 tokens of memory, batch 4`: the named values that the row has."""
    words = []
    for key, words_for in parts:
        value = number(row, key)
        shown = figure(value) if value is not None else clean(row.get(key), 60)
        if shown:
            one, _, many = words_for.rpartition("|")
            words.append((one if one and shown == "1" else many).replace("{}", shown))
    return ", ".join(words)


def _ttft_groups(row: Row) -> list[tuple[str, str]]:
    mode = row.get("mode")
    at = _at(
        row,
        ("context", "{} + "),
        ("query", "{} tokens"),
        ("memories", "{} memory|{} memories"),
        ("dtype", "{}"),
        ("scope", "{} scope"),
    ).replace("+ , ", "+ ")
    if mode in ("full", "text"):
        return [(at, "everything computed"), (at, "memories in a new order, quickest way")]
    if mode == "splice":
        tier = row.get("tier")
        return [(at, "memories in a new order, quickest way")] if tier in NEAR else []
    if mode == "prefix":
        return [(at, "memories in the same order as before")]
    return []


def _decode_groups(row: Row) -> list[tuple[str, str]]:
    at = _at(row, ("context", "{} tokens"), ("batch", "batch {}"), ("dtype", "{}"), ("scope", "{} scope"))
    return [(at, "time per token")]


def _kernel_groups(row: Row) -> list[tuple[str, str]]:
    return [(_at(row, ("op", "{}"), ("shape", "{}"), ("dtype", "{}")), "time per call")]


def _load_groups(row: Row) -> list[tuple[str, str]]:
    at = _at(
        row,
        ("traffic", "{} loop"),
        ("offered_per_s", "{} request/s|{} requests/s"),
        ("clients", "{} client|{} clients"),
        ("objective_ms", "objective {} ms"),
    )
    return [(at, "goodput")]


def _quality_groups(row: Row) -> list[tuple[str, str]]:
    share = number(row, "recompute")
    if row.get("method") in ("full", "full_bf16", "none") or share is None:
        return []
    return [
        (
            _at(row, ("memories", "{} memory|{} memories")) + f", {percent(share)} recomputed",
            "KL to full prefill",
        )
    ]


_RULES = {
    "ttft": _Rule(("ttft_ms_p50",), True, _ttft_groups),
    "decode": _Rule(("ms_per_token_p50",), True, _decode_groups),
    "kernels": _Rule(("us_p50",), True, _kernel_groups),
    "load": _Rule(("goodput_per_s",), False, _load_groups),
    "quality": _Rule(("kl_mean",), True, _quality_groups),
}
