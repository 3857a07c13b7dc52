"""Drawings of the budget bench: what a time buys, and whether it was kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memos_engine.bench.report import charts
from memos_engine.bench.report.charts import Line
from memos_engine.bench.report.palette import OTHERS
from memos_engine.bench.report.plots import Drawing
from memos_engine.bench.report.values import OURS, Row, clean, figure, number

FLOOR = 1e-4  # nats; a logarithmic axis has no zero


def budget(rows: Sequence[Row]) -> list[Drawing]:
    """KL against the budget, and the share of requests that kept it, a line for each policy."""
    timed = [row for row in rows if number(row, "budget_ms") and number(row, "met_share") is not None]
    if len({number(row, "budget_ms") for row in timed}) < 2:
        return []
    kl = _lines(timed, "kl_mean", "kl_low", "kl_high", floor=FLOOR)
    met = _lines(timed, "met_share", scale=100.0)
    return [
        _drawing(
            "budget-quality", "What a time to first token buys", kl, "budget, ms (log scale)",
            "KL from the best plan, nats (log scale), lower is better",
            "KL divergence from full prefill of all memories, mean over questions with its 95 % interval; "
            "every policy is cut off where the same cost model says that the budget ends.", log_y=True,
        ),
        _drawing(
            "budget-kept", "Is the time kept?", met, "budget, ms (log scale)",
            "requests in time, %, higher is better",
            "Share of requests whose first token came within the budget.", log_y=False,
        ),
    ]  # fmt: skip


def _lines(
    rows: Sequence[Row], key: str, low: str = "", high: str = "", *, floor: float = 0.0, scale: float = 1.0
) -> list[Line]:
    out: list[Line] = []
    names = list(dict.fromkeys(clean(row.get("policy"), 40) for row in rows))
    others = 0
    for name in names:
        own = sorted((r for r in rows if r.get("policy") == name), key=lambda r: number(r, "budget_ms") or 0)
        ours = name == OURS
        style, marker = (
            ("-", "D") if ours else ((":", "--", "-.", (0, (4, 2)))[others % 4], "osv^"[others % 4])
        )
        line = Line(name, "ours" if ours else OTHERS[others % len(OTHERS)], style, marker, heavy=ours)
        others += not ours
        line.x = [number(row, "budget_ms") or 0.0 for row in own]
        line.y = [max(floor, scale * (number(row, key) or 0.0)) for row in own]
        if low:
            line.low = [max(floor, number(row, low) or 0.0) for row in own]
            line.high = [max(floor, number(row, high) or 0.0) for row in own]
        out.append(line)
    return out


def _drawing(
    name: str, title: str, lines: list[Line], x: str, y: str, caption: str, *, log_y: bool
) -> Drawing:
    ticks = sorted({value for line in lines for value in line.x})

    def paint(fig: Any, narrow: bool) -> None:
        charts.lines(fig, narrow, lines, x, y, log_x=True, log_y=log_y, ticks=ticks)

    said = "; ".join(
        f"{line.name}: {figure(line.y[0])} at {figure(line.x[0])} ms, "
        f"{figure(line.y[-1])} at {figure(line.x[-1])}"
        for line in lines
    )
    return Drawing(
        name,
        title,
        caption,
        f"{title}. {said}.",
        paint,
        lambda narrow: charts.lines_height(narrow, len(lines)),
    )
