"""Which rows of two results are the same row, and which of their values are measurements."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memos_engine.bench.report.values import Row, number, samples

Key = tuple[tuple[str, Any], ...]

# Numbers that say what was measured, whatever their names look like.
IDENTITY = {
    *(
        "context",
        "query",
        "memories",
        "recompute",
        "batch",
        "rows",
        "clients",
        "offered_per_s",
        "objective_ms",
    ),
    *("budget_ms", "cubes", "rank", "adapters", "seed", "spliced_tokens"),
    *("paper_build_s", "paper_kv_s", "paper_direct_s", "paper_reduction"),
}
# Neither identity nor anything to compare by itself.
ASIDE = {
    *("samples", "direct_samples", "stages_ms", "n", "status", "reason", "notes", "requests", "unfinished"),
    *("seconds", "share_of_limit", "limit_ms", "limit_us", "forms", "low", "high"),
}
# What a run sets by its own speed: rows that differ only here are still the same row.
ROUGH = {"offered_per_s", "objective_ms"}
LESS = re.compile(
    r"(^|_)(ms|us|ns|s|mb|gib|bytes)(_p\d+)?$|^ms_per_|^kl_|break_even|bytes_per|overhead|predicted_error|^records_"
)
MORE = re.compile(
    r"_per_s$|(^|_)share$|^top1$|^answer_|^same_first_token$|reduction$|^r_at_|^mrr$|^quality$|speedup"
)
SPEED = re.compile(r"(^|_)(ms|us|ns|s)(_p\d+)?$|^ms_per_|_per_s$|^value$|reduction$")
SHARES = {"top1", "answer_f1", "answer_contains", "same_first_token", "met_share", "r_at_5", "r_at_10", "mrr"}
# Ends, tails and inverses of a metric that is compared itself.
DERIVED = re.compile(r"_p9\d(_|$)|_(low|high)$")
UNITS_LESS = ("ms", "us", "µs", "s", "ns")


@dataclass(frozen=True)
class Metric:
    """less: less is better. sampled: the row's samples are this metric's. share: between 0 and 1.
    speed: its verdicts are slower and faster, otherwise worse and better."""

    name: str
    less: bool
    sampled: bool
    share: bool
    speed: bool


def identify(row: Row, keys: Sequence[str]) -> Key:
    """What tells this row from others, out of `keys`."""
    return tuple((key, row[key]) for key in keys if row.get(key) is not None and _identifies(key, row[key]))


def _identifies(key: str, value: Any) -> bool:
    if key in ASIDE or (isinstance(value, float) and not math.isfinite(value)):
        return False
    if key in IDENTITY or isinstance(value, (str, bool)):
        return True
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (str, int)) for item in value)
    if isinstance(value, float) or key == "value" or LESS.search(key) or MORE.search(key):
        return False
    return isinstance(value, int)


_Known = tuple[Key, Row]


def matched(
    a: Sequence[Row], b: Sequence[Row]
) -> tuple[list[tuple[Key, Row, Row]], list[tuple[Key, Row, str]]]:
    """Pairs of rows, and rows that only one side has.

    Columns that one side lacks altogether (a later version added them) do not tell rows apart; rows that
    nothing tells apart pair in their order, and so do those that differ only in counts or in what a run sets
    by its own speed. A row without numbers may say less about itself: it pairs with every row that it could
    have been.
    """
    shared = [key for key in _keys(a) if key in set(_keys(b))] if a and b else [*_keys(a), *_keys(b)]
    pairs, rest_a, rest_b = _joined(
        [(identify(r, shared), r) for r in a], [(identify(r, shared), r) for r in b]
    )
    more, rest_a, rest_b = _joined(rest_a, rest_b, firm_only=True)
    lost, rest_a, rest_b = _covered(rest_a, rest_b)
    new, rest_b, rest_a = _covered(rest_b, rest_a)
    pairs += more + lost + [(key, x, y) for key, y, x in new]
    return pairs, [*((*pair, "a") for pair in rest_a), *((*pair, "b") for pair in rest_b)]


def _joined(
    a: Sequence[_Known], b: Sequence[_Known], firm_only: bool = False
) -> tuple[list[tuple[Key, Row, Row]], list[_Known], list[_Known]]:
    """Rows of equal identity, and what is left. firm_only: by names and known sizes alone."""
    left, right = _numbered(a, firm_only), _numbered(b, firm_only)
    pairs = [(key, x, right[name][1]) for name, (key, x) in left.items() if name in right]
    rest_a = [pair for name, pair in left.items() if name not in right]
    return pairs, rest_a, [pair for name, pair in right.items() if name not in left]


def _numbered(rows: Sequence[_Known], firm_only: bool) -> dict[tuple[str, int], _Known]:
    """Rows by identity and by how many came before with the same."""
    found: dict[tuple[str, int], _Known] = {}
    for key, row in rows:
        known = {k: v for k, v in _plain(key).items() if not firm_only or _firm(k, v)}
        name, count = json.dumps(known, sort_keys=True, default=str), 0
        while (name, count) in found:
            count += 1
        found[name, count] = (key, row)
    return found


def _firm(key: str, value: Any) -> bool:
    return key not in ROUGH and (key in IDENTITY or not isinstance(value, (int, float)))


def _plain(key: Key) -> dict[str, Any]:
    """1 and 1.0 are one value: JSON writers differ."""
    return {k: float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for k, v in key}


def _covered(
    full: Sequence[_Known], other: Sequence[_Known]
) -> tuple[list[tuple[Key, Row, Row]], list[_Known], list[_Known]]:
    """Rows of `full` that a row without numbers of the other side speaks for, and what is left of both."""
    bare = [(set(map(repr, _plain(key).items())), row) for key, row in other if row.get("status") and key]
    pairs, used, rest = [], set(), []
    for key, row in full:
        names = set(map(repr, _plain(key).items()))
        found = next((row for wanted, row in bare if wanted <= names), None)
        if found is None:
            rest.append((key, row))
        else:
            pairs.append((key, row, found))
            used.add(id(found))
    return pairs, rest, [(key, row) for key, row in other if id(row) not in used]


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def metrics(x: Row, y: Row) -> list[Metric]:
    """What can be compared of two rows, in the order of the row."""
    names = [key for key in y if number(x, key) is not None and number(y, key) is not None]
    names = [
        name for name in names if name not in IDENTITY and name not in ASIDE and not DERIVED.search(name)
    ]
    timed = any(name.startswith(("ms_per_token", "us_p50")) for name in names)
    found = []
    for name in names:
        less = _less(name, y)
        if less is None or (timed and name == "tokens_per_s"):
            continue
        sampled = all(samples_of(row, name) for row in (x, y))
        found.append(Metric(name, less, sampled, name in SHARES, bool(SPEED.search(name))))
    return found


def _less(name: str, row: Row) -> bool | None:
    """Whether less is better; None for a number that is neither."""
    if name == "value":
        return row.get("unit") in UNITS_LESS
    if MORE.search(name):
        return False
    return True if LESS.search(name) else None


def samples_of(row: Row, name: str) -> list[float]:
    """The samples of a metric: those named after it, or the row's own if their median is this metric's."""
    own = row.get(f"{name.removesuffix('_ms')}_samples")
    if isinstance(own, list):
        return list(samples({"samples": own}))
    values, median = samples(row), number(row, name)
    if not values or median is None or not name.endswith(("_p50", "value", "_ms")):
        return []
    return list(values) if abs(statistics.median(values) - median) <= 0.02 * abs(median) + 1e-9 else []


def raw(row: Row) -> list[float]:
    """The row's samples, zeros among them."""
    values = row.get("samples")
    read = [number({"v": value}, "v") for value in values] if isinstance(values, list) else []
    return [value for value in read if value is not None] if None not in read else []


def wilson(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share of n cases (Wilson 1927), also right at 0 and 1. The mean of values
    between 0 and 1 spreads at most as much as a share, so it serves for those as well."""
    share = min(1.0, max(0.0, share))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(1e-9, middle - half), min(1.0, middle + half)
