"""What a request takes until its first token: a small model of each stage, per machine and model.

`TTFT = queue + retrieve + plan + fetch + splice + adapter swap + probe + forward`. A table holds what a probe
of a few seconds measured (`memos-engine doctor --calibrate`); predictions are numpy expressions of how much
of everything a plan has, so that thousands of plans are priced at once. Pure: no clock, no files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from memos_engine.errors import MemoryInputError

VERSION = 1
Number = float | npt.NDArray[np.float64]


@dataclass(frozen=True)
class CostTable:
    """Milliseconds, as measured on one machine with one model.

    key: names machine, model, dtypes, threads and build; a table counts for no other. forward: (rows, ms) of
    one forward without context, ascending; between them by straight lines. pairs_ms: a million (row, key)
    pairs of attention. splice: a request, a record, a thousand tokens. fetch: a record, and a mebibyte, from
    disk. probe_ms: a million (query row, memory token) pairs. select_ms: choosing what to compute again.
    retrieve_ms, plan_ms: finding candidates and preparing the plan. swap_ms: a mebibyte of an adapter.
    spread: standard deviation of log(actual / predicted) as far as the calibration saw it.
    """

    key: str
    forward: tuple[tuple[int, float], ...]
    pairs_ms: float
    splice: tuple[float, float, float]
    fetch: tuple[float, float]
    probe_ms: float
    select_ms: float
    retrieve_ms: float
    plan_ms: float
    swap_ms: float = 1.0
    spread: float = 0.1
    calibrated: bool = True
    machine: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        rows = [rows for rows, _ in self.forward]
        if len(rows) < 2 or rows != sorted(set(rows)) or rows[0] < 1:
            raise MemoryInputError("A cost table needs forwards of at least two sizes, ascending.")
        numbers = [ms for _, ms in self.forward] + [*self.splice, *self.fetch]
        numbers += [self.pairs_ms, self.probe_ms, self.select_ms, self.retrieve_ms, self.plan_ms]
        numbers += [self.swap_ms, self.spread]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise MemoryInputError("A cost table holds a number that is negative or not finite.")

    @cached_property
    def _curve(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
        """The forwards as arrays, and the slope behind the last one."""
        known, ms = (np.asarray(side, np.float64) for side in zip(*self.forward, strict=True))
        return known, ms, float((ms[-1] - ms[-2]) / (known[-1] - known[-2]))

    def rows_ms(self, rows: Number) -> npt.NDArray[np.float64]:
        """One forward of so many rows, without context; beyond the largest measured, in proportion."""
        known, ms, slope = self._curve
        rows = np.asarray(rows, np.float64)
        beyond = np.maximum(rows - known[-1], 0.0) * slope
        return np.asarray((np.interp(rows, known, ms) + beyond) * (rows > 0))

    @cached_property
    def hull(self) -> tuple[tuple[float, float], ...]:
        """The lower convex hull of the forwards, far beyond the last one too: a curve nowhere above them."""
        far = 1000 * self.forward[-1][0]
        hull: list[tuple[float, float]] = []
        for x, y in (*self.forward, (far, float(self.rows_ms(float(far))))):
            while len(hull) > 1 and _turn(hull[-2], hull[-1], (x, y)) <= 0:
                hull.pop()
            hull.append((float(x), y))
        return tuple(hull)

    def line(self, rows: float) -> tuple[float, float]:
        """(slope, intercept) of the hull's edge at `rows`: what makes a knapsack's bound valid although a
        forward is no straight line."""
        edges = list(pairwise(self.hull))
        (x0, y0), (x1, y1) = next((edge for edge in edges if rows <= edge[1][0]), edges[-1])
        slope = (y1 - y0) / (x1 - x0)
        return slope, y0 - slope * x0

    def attention_ms(self, pairs: Number) -> npt.NDArray[np.float64]:
        return np.asarray(pairs, np.float64) * (self.pairs_ms / 1e6)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"machine": dict(self.machine)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostTable:
        """Raises MemoryInputError for a file that is no cost table of this version."""
        try:
            raw = json.loads(text)
            if raw.get("version") != VERSION:
                raise MemoryInputError(
                    f"The cost table has version {raw.get('version')!r}, this build reads {VERSION}; "
                    "run: memos-engine doctor --calibrate"
                )
            raw["forward"] = tuple((int(rows), float(ms)) for rows, ms in raw["forward"])
            raw["splice"], raw["fetch"] = tuple(raw["splice"]), tuple(raw["fetch"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, MemoryInputError):
                raise
            raise MemoryInputError(
                f"This is not a cost table ({error!r}); run: memos-engine doctor --calibrate"
            ) from error


def default_table(parameters: int = 135_000_000, layers: int = 30, threads: int = 2) -> CostTable:
    """A guess for a machine that nobody has measured: slow, so that promises err on the safe side.

    Two operations a parameter and row at 100 GFLOP/s a thread, and one reading of bf16 weights at 8 GB/s;
    doubled.
    """
    read = 2 * parameters * 2 / 8e9 * 1e3
    row = 2 * 2 * parameters / (1e11 * max(1, threads)) * 1e3
    forward = tuple((rows, read + rows * row) for rows in (1, 64, 1024))
    return CostTable(
        "none", forward, pairs_ms=layers * 2.0, splice=(2.0, 0.5, 5.0), fetch=(1.0, 4.0),
        probe_ms=layers * 4.0, select_ms=3.0, retrieve_ms=15.0, plan_ms=4.0, swap_ms=4.0, spread=0.3,
        calibrated=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """What stands around the memories of a request, in tokens, and what has been spent already, in ms.

    head: in front of the memories; head_rows: how many of these are computed (the others are in pages),
    head_rows_kv: the same where KV follows, and the anchor comes from its record.
    tail: behind them, always computed. behind: of a conversation before all this. queue_ms: until the
    request's first forward begins, of others' work. spent_ms: since the call, before planning. busy: share
    of late requests that found others at work, 0 to 1. swap_ms: of an adapter that is bound.
    """

    head: int = 0
    head_rows: int = 0
    head_rows_kv: int = 0
    tail: int = 1
    behind: int = 0
    queue_ms: float = 0.0
    spent_ms: float = 0.0
    busy: float = 0.0
    swap_ms: float = 0.0


@dataclass(frozen=True)
class Load:
    """What plans bring in; each a number, or an array with one entry a plan. text: rows of memories that go
    in as text; cached: tokens of text that are in pages already. kv: tokens from records; again: how many of
    these are computed again. records, disk_records, disk_mib: counts."""

    text: Number = 0.0
    cached: Number = 0.0
    kv: Number = 0.0
    again: Number = 0.0
    records: Number = 0.0
    disk_records: Number = 0.0
    disk_mib: Number = 0.0


def stages(table: CostTable, frame: Frame, load: Load) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each stage but retrieve and plan, which no choice of memories changes.

    A plan that computes memory tokens again runs the query twice: first over the stored KV (`probe`), then
    with the chosen tokens (`forward`).
    """
    text, kv, again = (np.asarray(side, np.float64) for side in (load.text, load.kv, load.again))
    memory = text + kv + load.cached
    before = float(frame.behind + frame.head)
    context = before + memory
    head_rows = np.where(kv > 0, frame.head_rows_kv, frame.head_rows)
    rows = head_rows + text + frame.tail
    pairs = head_rows * (frame.behind + head_rows / 2) + text * (before + memory / 2)
    pairs = pairs + frame.tail * (context + frame.tail / 2)
    forward = once = table.rows_ms(rows) + table.attention_ms(pairs)
    probe, two = np.zeros(once.shape), again > 0
    if two.any():
        # Text in front of the first chosen token is not computed twice; nobody knows yet which that is: half.
        second = again + text / 2
        pairs = second * (before + memory / 2) + frame.tail * (context + frame.tail / 2)
        forward = np.where(two, table.rows_ms(second + frame.tail) + table.attention_ms(pairs), once)
        probing = once + table.select_ms + frame.tail * kv * (table.probe_ms / 1e6)
        probe = np.where(two, probing, 0.0)
    base, each, thousand = table.splice
    spliced = np.where(kv > 0, kv + (frame.head_rows - frame.head_rows_kv), 0.0)
    return {
        "queue": np.full(context.shape, frame.queue_ms),
        "fetch": load.disk_records * table.fetch[0]
        + load.disk_mib * np.float64(table.fetch[1])
        + frame.swap_ms,
        "splice": np.where(kv > 0, base + each * load.records + spliced * (thousand / 1e3), 0.0),
        "probe": probe,
        "forward": forward,
    }


@dataclass(frozen=True)
class Pricer:
    """Prices loads for one request: the table's stages times `factors` from measured residuals, times the
    factors that most requests stay below (`fetch_promise` for reading files, which depends on what the system
    holds of them, `promise` for all else), after what was spent already."""

    table: CostTable
    frame: Frame
    factors: Mapping[str, float] = field(default_factory=dict)
    promise: float = 1.0
    plan_ms: float = 0.0  # what is left of planning itself
    fetch_promise: float = 1.0

    def stages(self, load: Load) -> dict[str, npt.NDArray[np.float64]]:
        """Medians of what is still to come."""
        parts = stages(self.table, self.frame, load)
        return {name: self.factors.get(name, 1.0) * ms for name, ms in parts.items()}

    def __call__(self, load: Load) -> npt.NDArray[np.float64]:
        """Milliseconds from the call to the first token that the promise allows for."""
        parts = self.stages(load)
        fetch = self.fetch_promise * parts.pop("fetch")
        rest = sum(parts.values(), np.zeros(()))
        return np.asarray(self.frame.spent_ms + fetch + self.promise * (self.plan_ms + rest), np.float64)

    def rows_within(self, budget: float) -> float:
        """About how many rows a budget pays for; where `floor` should be tight."""
        left = (budget - self.frame.spent_ms) / self.promise - self.plan_ms
        ms = left / self.factors.get("forward", 1.0)
        return next((float(rows) for rows, taken in self.table.forward if taken >= ms), float("inf"))

    def floor(self, load: Load, share: Number, slack: float, rows: float) -> npt.NDArray[np.float64]:
        """An affine function of the load that is nowhere above the price, tightest where about `rows` rows
        are computed. share, slack: at least `share * kv - slack` tokens are computed again; share may be an
        array that goes with the load's."""
        table, frame = self.table, self.frame
        slope, fixed = table.line(rows)
        text, kv = np.asarray(load.text, np.float64), np.asarray(load.kv, np.float64)
        before = float(frame.behind + frame.head)
        whole = before + text + kv + load.cached
        head_rows = min(frame.head_rows, frame.head_rows_kv)
        pairs = head_rows * (frame.behind + head_rows / 2) + text * before
        pairs = pairs + frame.tail * (whole + frame.tail / 2)
        once = fixed + slope * (head_rows + text + frame.tail) + pairs * (table.pairs_ms / 1e6)
        again = np.asarray(share, np.float64) * kv - slack + text / 2
        more = fixed + slope * (again + frame.tail)
        more = more + (again * before + frame.tail * whole) * (table.pairs_ms / 1e6)
        probing = once + table.select_ms + frame.tail * kv * (table.probe_ms / 1e6)
        forward, probe = self.factors.get("forward", 1.0), self.factors.get("probe", 1.0)
        out = np.where(np.asarray(share) > 0, probe * probing + forward * more, forward * once)
        spliced = table.splice[1] * load.records + kv * (table.splice[2] / 1e3)
        fetched = load.disk_records * table.fetch[0] + load.disk_mib * np.float64(table.fetch[1])
        fetched = fetched + frame.swap_ms
        out = out + self.factors.get("splice", 1.0) * spliced
        fetched = self.fetch_promise * self.factors.get("fetch", 1.0) * fetched
        out = out + self.factors.get("queue", 1.0) * frame.queue_ms
        return np.asarray(frame.spent_ms + fetched + self.promise * (self.plan_ms + out), np.float64)


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
