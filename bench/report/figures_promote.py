"""Drawing of what records are kept by: value against LRU, LFU and peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memos_engine.bench.report import charts
from memos_engine.bench.report.charts import Bar, Group
from memos_engine.bench.report.palette import OTHERS
from memos_engine.bench.report.plots import Drawing
from memos_engine.bench.report.values import Row, clean, is_ours, number

NAMES = {
    "memos_engine": "memos_engine (value)",
    "nothing_ahead": "value, nothing built ahead",
    "lru": "LRU",
    "lfu": "LFU",
    "lfu_all_time": "LFU, counts of all time",
    "lrfu": "LRFU",
    "tinylfu": "TinyLFU admission",
    "gdsf": "GDSF",
    "s3fifo": "S3-FIFO",
}


def promotion(rows: Sequence[Row]) -> list[Drawing]:
    """Mean TTFT by policy, a group for each workload. Takes the rows of `bench.promote.promotion_rows`."""
    groups = []
    for workload in dict.fromkeys(clean(row.get("workload")) for row in rows):
        own = [row for row in rows if clean(row.get("workload")) == workload]
        own = [
            row for row in own if number(row, "ttft_ms_mean") and number(row, "built_per_1000") is not None
        ]
        own.sort(key=lambda row: number(row, "ttft_ms_mean") or 0.0)
        bars = []
        for row in own:
            mean, built = number(row, "ttft_ms_mean") or 0.0, number(row, "built_per_1000") or 0.0
            name = clean(row.get("system"))
            role = "ours" if is_ours(row) else OTHERS[0]
            bars.append(Bar(NAMES.get(name, name), mean, role, f"{mean:.0f} ms, {built:.0f} built"))
        if bars:
            groups.append(Group(workload, tuple(bars)))
    if not groups:
        return []
    title = "Value against LRU, LFU and peers, at equal bytes"
    caption = "Mean TTFT of replayed workloads, on seeds that nothing was chosen on."
    said = "; ".join(f"{g.title}: " + ", ".join(f"{b.name} {b.text}" for b in g.bars) for g in groups)

    def paint(fig: Any, narrow: bool) -> None:
        charts.bars(fig, narrow, groups, "mean TTFT, ms; records built in 1000 requests")

    return [
        Drawing(
            "promotion", title, caption, f"{title}. {said}.", paint,
            lambda narrow: charts.bars_height(groups, False, narrow),
        )
    ]  # fmt: skip
