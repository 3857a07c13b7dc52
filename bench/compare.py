"""Two result documents of one bench, row by row: what became slower, with confidence.

A row is known by everything in it that is no measurement. The verdict rests on the 95 % interval of the ratio
later over earlier: `slower` only if the whole interval is above 1 + tolerance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memos_engine.bench.compare_rows import ROUGH, Key, Metric, matched, metrics, raw, samples_of, wilson
from memos_engine.bench.compare_settings import differences
from memos_engine.bench.document import read_result
from memos_engine.bench.report.tables import is_difference
from memos_engine.bench.report.values import OURS, Row, clean, is_ours, label, number, records, samples
from memos_engine.bench.stats import Interval, paired_bootstrap, ratio_of_medians

from memos_engine.config import ConfigError

TOLERANCE = 0.05
# Fewer samples on a side say too little about a median: no verdict.
FEWEST = 5
TOO_FEW = f"fewer than {FEWEST} samples on a side"
BAD = ("slower", "worse", "lost")


def compare_files(
    a: Path, b: Path, tolerance: float = TOLERANCE, relative: str | None = None
) -> dict[str, Any]:
    """`compare` of two files, named by their file names in the result."""
    found = compare(read_result(a), read_result(b), tolerance, relative)
    for side, path in (("a", a), ("b", b)):
        found["config"][side]["file"] = path.name
    found["command"] = f"memos-engine bench compare {a.name} {b.name}" + _options(tolerance, relative)
    return found


def _options(tolerance: float, relative: str | None) -> str:
    words = f" --tolerance {tolerance:g}" if tolerance != TOLERANCE else ""
    return words + (f" --relative {relative}" if relative else "")


def compare(
    a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float = TOLERANCE, relative: str | None = None
) -> dict[str, Any]:
    """The result document of the comparison: a is the earlier, b the later.

    relative: divides every timed row by the `full` row of this system in the same group, round by round, so
    that what slows the whole machine cancels.
    """
    if a.get("bench") != b.get("bench"):
        raise ConfigError(
            f"compare: {clean(a.get('bench'))} and {clean(b.get('bench'))} are different benches; "
            "give two results of the same."
        )
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance={tolerance}: a share, at least 0 and less than 1.")
    pairs, alone = matched(records(a), records(b))
    sides = (_References(records(a), relative), _References(records(b), relative))
    if relative and not all(side.known for side in sides):
        raise ConfigError(
            f"relative {relative!r}: both results need rows of that system with samples "
            "(its full prefill, where the bench has modes)."
        )
    rows: list[Row] = []
    for key, x, y in pairs:
        rows += _compared(key, x, y, tolerance, sides if relative else None)
    for key, row, side in alone:
        rows.append(_line(key, row, {"verdict": f"only in {side}"}))
    _name(rows)
    ratios = _ratios(a, b)
    notes = [*differences(a, b, tolerance), *_drift(rows, relative, tolerance)]
    if any(x.get(key) != y.get(key) for _, x, y in pairs for key in ROUGH):
        notes.append(
            "Open-loop rows pair by their place: each run offers shares of what it can serve itself."
        )
    changes = [row["difference"] for row in ratios if row["difference"] is not None]
    return {
        "bench": "compare",
        "version": 1,
        "complete": True,
        "machine": b.get("machine") if isinstance(b.get("machine"), dict) else {},
        "commit": b.get("commit"),
        "config": {
            "bench": b.get("bench"),
            "tolerance": tolerance,
            "relative": relative,
            "a": _about(a),
            "b": _about(b),
        },
        "rows": rows,
        "ratios": ratios,
        "largest_ratio_difference": max(changes, default=None),
        "notes": notes,
        "regressions": sum(row["regression"] for row in rows),
    }


def _about(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: document.get(key) for key in ("commit", "started", "command", "complete")}


# Told by the label, or of no use to a reader.
_UNNAMED = ("system", "mode", "method", "recompute", "reuse", "tier")


def _name(rows: Sequence[Row]) -> None:
    """Names every row by its label and by what tells it from the others."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row["identity"].items():
            values.setdefault(key, set()).add(clean(value))
    for row in rows:
        telling = [(k, v) for k, v in row["identity"].items() if k not in _UNNAMED and len(values[k]) > 1]
        row["row"] = ", ".join([row["row"], *(f"{key} {clean(value)}" for key, value in telling)])


def _line(key: Key, row: Row, more: dict[str, Any]) -> Row:
    line: Row = {"row": label(row), "identity": dict(key), "ours": is_ours(row)}
    line |= dict.fromkeys(("metric", "better", "a", "b", "ratio", "low", "high", "verdict", "why"))
    line |= more
    # A slower peer says something about the machine, not about this package.
    line["regression"] = line["verdict"] in BAD and _counts(row)
    return line


def _counts(row: Row) -> bool:
    return is_ours(row) or not any(row.get(k) for k in ("system", "method", "backend", "ceiling"))


def _compared(
    key: Key, x: Row, y: Row, tolerance: float, sides: tuple[_References, _References] | None
) -> list[Row]:
    if x.get("status") or y.get("status"):
        named = x if y.get("status") else y
        why = clean(y.get("reason")) or clean(y.get("status")) or None
        return [_line(key, named, {"verdict": _status_verdict(x, y), "why": why})]
    if sides is None:
        return [_line(key, y, _absolute(metric, x, y, tolerance)) for metric in metrics(x, y)]
    sampled = [metric for metric in metrics(x, y) if metric.sampled]
    return [_line(key, y, _relative(metric, x, y, sides, tolerance)) for metric in sampled]


def _status_verdict(x: Row, y: Row) -> str:
    """A row that had numbers and now crashes is a loss; a peer that is not installed is not."""
    if x.get("status") and y.get("status"):
        return "not measured"
    if x.get("status"):
        return "new"
    return "not measured" if y.get("status") in ("absent", "unsupported") else "lost"


def _absolute(metric: Metric, x: Row, y: Row, tolerance: float) -> dict[str, Any]:
    old, new = number(x, metric.name) or 0.0, number(y, metric.name) or 0.0
    if metric.sampled:
        before, after = samples_of(x, metric.name), samples_of(y, metric.name)
        if min(len(before), len(after)) < FEWEST:
            return _verdict(metric, old, new, None, tolerance) | {"why": TOO_FEW}
        return _verdict(metric, old, new, ratio_of_medians(after, before), tolerance)
    found = _paired_means(metric, x, y) or _stated(metric, x, y)
    if found is not None:
        return _verdict(metric, old, new, found, tolerance)
    return _verdict(metric, old, new, None, tolerance) | {"why": "no samples, no interval"}


def _paired_means(metric: Metric, x: Row, y: Row) -> Interval | None:
    """Ratio of mean KL over the same prompts, drawn together."""
    before, after = raw(x), raw(y)
    if metric.name != "kl_mean" or len(before) != len(after) or len(before) < FEWEST:
        return None
    if min(before) < 0 or sum(value > 0 for value in before) < FEWEST:
        return None
    tiny = 1e-12  # a draw may hold zeros alone
    return paired_bootstrap([after, before], lambda p, q: (p.mean(-1) + tiny) / (q.mean(-1) + tiny))


def _stated(metric: Metric, x: Row, y: Row) -> Interval | None:
    """From the intervals that two means brought along, or of two shares of n cases: wide, for it takes both
    at their far ends."""
    names = {"kl_mean": ("kl_low", "kl_high"), "answer_f1": ("f1_low", "f1_high")}.get(metric.name)
    bounds = [number(row, key) for row in (x, y) for key in names or ()]
    known = [bound for bound in bounds if bound is not None and bound > 0]
    old, new = number(x, metric.name) or 0.0, number(y, metric.name) or 0.0
    if len(known) == 4 and old:
        low, high, new_low, new_high = known
    elif metric.share and old and number(x, "n") and number(y, "n"):
        low, high = wilson(old, number(x, "n") or 1.0)
        new_low, new_high = wilson(new, number(y, "n") or 1.0)
    else:
        return None
    return Interval(new / old, new_low / high, new_high / low)


def _relative(
    metric: Metric, x: Row, y: Row, sides: tuple[_References, _References], tolerance: float
) -> dict[str, Any]:
    series = [side.divided(row) for side, row in zip(sides, (x, y), strict=True)]
    if any(values is None for values in series):
        own = any(side.is_reference(row) for side, row in zip(sides, (x, y), strict=True))
        return {"metric": metric.name, "verdict": "reference" if own else "no reference"}
    before, after = (values or [] for values in series)
    old, new = statistics.median(before), statistics.median(after)
    firm = min(len(before), len(after)) >= FEWEST
    found = ratio_of_medians(after, before) if firm else None
    line = _verdict(metric, old, new, found, tolerance)
    line["metric"] = f"{metric.name} over {sides[0].system}"
    return line if firm else line | {"why": TOO_FEW}


def _verdict(
    metric: Metric, old: float, new: float, found: Interval | None, tolerance: float
) -> dict[str, Any]:
    worse, better = ("slower", "faster") if metric.speed else ("worse", "better")
    above, below = (worse, better) if metric.less else (better, worse)
    verdict = "unclear"
    if found is not None:
        if found.low > 1 + tolerance:
            verdict = above
        elif found.high < 1 - tolerance:
            verdict = below
        elif found.low >= 1 - tolerance and found.high <= 1 + tolerance:
            verdict = "same"
    if verdict == "unclear" and old == new and not metric.sampled:
        verdict = "same"
    point = found.value if found is not None else new / old if old else 1.0 if new == old else math.inf
    ends = {"low": round(found.low, 4), "high": round(found.high, 4)} if found is not None else {}
    return {
        "metric": metric.name,
        "better": "lower" if metric.less else "higher",
        "a": round(old, 6),
        "b": round(new, 6),
        "ratio": round(point, 4) if math.isfinite(point) else None,
        **ends,
        "verdict": verdict,
    }


class _References:
    """The rows of one system that others are divided by."""

    SAME = ("context", "query", "batch", "dtype", "memories", "model", "op", "shape")

    def __init__(self, rows: Sequence[Row], system: str | None) -> None:
        self.system = system
        self._rows = [
            r
            for r in rows
            if r.get("system") == system and r.get("mode") in ("full", "decode", None) and samples(r)
        ]
        self.known = bool(self._rows)

    def is_reference(self, row: Row) -> bool:
        return any(row is own for own in self._rows)

    def divided(self, row: Row) -> list[float] | None:
        """The row's samples over those of its reference, round by round; None where there is none."""
        if self.is_reference(row) or not samples(row):
            return None
        fits = [r for r in self._rows if self._fits(r, row) and len(samples(r)) == len(samples(row))]
        if not fits:
            return None
        best = max(fits, key=lambda r: r.get("scope") == row.get("scope"))
        return [x / y for x, y in zip(samples(row), samples(best), strict=True)]

    def _fits(self, reference: Row, row: Row) -> bool:
        both = [key for key in self.SAME if reference.get(key) is not None and row.get(key) is not None]
        return all(reference[key] == row[key] for key in both)


def _ratios(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    """The documents' own ratios, later against earlier: `difference` is relative to the earlier."""
    pairs, _ = matched(records(a, "ratios"), records(b, "ratios"))
    rows = []
    for key, x, y in pairs:
        old, new = number(x, "value"), number(y, "value")
        known = old is not None and new is not None and old != 0 and not is_difference(x)
        difference = round(abs((new or 0.0) / (old or 1.0) - 1), 4) if known else None
        rows.append({**dict(key), "a": old, "b": new, "difference": difference})
    return rows


def _drift(rows: Sequence[Row], relative: str | None, tolerance: float) -> list[str]:
    """Whether others moved as well, which no change of this package can do."""
    notes = []
    others = [
        row["ratio"]
        for row in rows
        if row["identity"].get("system") not in (None, OURS) and row["ratio"] and row["better"] == "lower"
    ]
    moved = statistics.median(others) if others else 1.0
    if not relative and abs(moved - 1) > tolerance:
        notes.append(
            f"Other systems moved too, by a factor of {moved:.2f} in the median: that is the machine. "
            "--relative SYSTEM takes it out."
        )
    few = sum(row["why"] == TOO_FEW for row in rows)
    if few:
        notes.append(f"{few} rows have too few samples for a verdict (at least {FEWEST} on both sides).")
    skipped = sum(r["verdict"] == "no reference" for r in rows)
    if skipped:
        notes.append(f"{skipped} rows have no row of {relative} with as many rounds to be divided by.")
    return notes
