"""Drawings of roofline, kernels, load and the paper's Table 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memos_engine.bench.report import charts
from memos_engine.bench.report.charts import Bar, Group, Level, Line
from memos_engine.bench.report.palette import OTHERS, row_name, series_role
from memos_engine.bench.report.plots import Drawing
from memos_engine.bench.report.values import (
    Row,
    clean,
    distinct,
    figure,
    is_ours,
    label,
    number,
    percent,
    system_name,
    where,
)


def roofline(rows: Sequence[Row]) -> list[Drawing]:
    """GEMM throughput against the number of rows, a line for each dtype."""
    gemm = [r for r in rows if r.get("ceiling") == "gemm" and number(r, "rows") and number(r, "value")]
    dtypes = sorted({clean(r.get("dtype")) for r in gemm})
    lines = []
    for i, dtype in enumerate(dtypes):
        own = sorted(
            (r for r in gemm if clean(r.get("dtype")) == dtype), key=lambda r: number(r, "rows") or 0
        )
        style, marker = (("-", "o"), ("--", "s"), ("-.", "^"))[i % 3]
        line = Line(dtype or "GEMM", OTHERS[i % len(OTHERS)], style, marker)
        line.x, line.y = [number(r, "rows") or 0 for r in own], [number(r, "value") or 0 for r in own]
        lines.append(line)
    if not lines or max(len(line.x) for line in lines) < 2:
        return []
    unit = clean(gemm[0].get("unit"), 20) or "value"
    sizes = sorted({x for line in lines for x in line.x})

    def paint(fig: Any, narrow: bool) -> None:
        charts.lines(
            fig, narrow, lines, "rows multiplied at once", f"{unit} (log scale), higher is better",
            log_x=True, log_y=True, ticks=sizes,
        )  # fmt: skip

    title = "Roofline: what a matrix product reaches on this machine"
    said = "; ".join(
        f"{line.name}: {figure(line.y[0])} {unit} at {figure(line.x[0])} rows, "
        f"{figure(line.y[-1])} at {figure(line.x[-1])}"
        for line in lines
    )
    caption = "Few rows are limited by reading the weights, many by arithmetic; both axes are logarithmic."
    return [
        Drawing(
            "roofline-gemm", title, caption, f"{title}. {said}.", paint,
            lambda narrow: charts.lines_height(narrow, len(lines)),
        )
    ]  # fmt: skip


def kernels(rows: Sequence[Row]) -> list[Drawing]:
    """Each kernel's share of the machine's limit."""
    found = []
    names = [row_name(row) for row in rows]
    for (dtype,) in distinct(rows, "dtype"):
        own = [r for r in where(rows, dtype=dtype) if number(r, "share_of_limit") is not None]
        groups = []
        for op, shape in distinct(own, "op", "shape"):
            bars = [
                Bar(
                    system_name(r.get("backend") or "ours"),
                    100 * (number(r, "share_of_limit") or 0),
                    series_role(r, names),
                    percent(number(r, "share_of_limit") or 0) + _time(r),
                )
                for r in where(own, op=op, shape=shape)
            ]
            heading = f"{clean(op, 60)}  {clean(shape, 60)}".strip()
            groups.append(Group(heading, tuple(sorted(bars, key=_down)), floor=100.0))
        if groups:
            found += _kernel_drawings(clean(dtype, 24), groups)
    return found


def _down(bar: Bar) -> float:
    return -float(bar.value)


def _time(row: Row) -> str:
    value = number(row, "us_p50")
    return f" ({figure(value)} µs)" if value is not None else ""


def _kernel_drawings(dtype: str, groups: list[Group]) -> list[Drawing]:
    pages = [groups[i : i + 14] for i in range(0, len(groups), 14)]
    found = []
    for i, page in enumerate(pages):
        more = f", {i + 1} of {len(pages)}" if len(pages) > 1 else ""
        title = f"Kernels: share of the machine's limit ({dtype or 'all'}{more})"
        said = "; ".join(
            f"{group.title}: " + ", ".join(f"{bar.name} {bar.text}" for bar in group.bars) for group in page
        )
        name = "-".join(["kernels", *(c for c in (_plain(dtype), str(i + 1) if more else "") if c)])
        found.append(_shares(name, title, f"{title}. {said}.", page))
    return found


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isascii() and c.isalnum())


def _shares(name: str, title: str, alt: str, groups: list[Group]) -> Drawing:
    def paint(fig: Any, narrow: bool) -> None:
        charts.bars(
            fig, narrow, groups, "% of the limit, longer is better", "as fast as this machine allows", 100
        )

    caption = "100 % would be as fast as the measured ceilings of this machine allow."
    return Drawing(name, title, caption, alt, paint, lambda narrow: charts.bars_height(groups, True, narrow))


def load(rows: Sequence[Row]) -> list[Drawing]:
    """Goodput, and percentiles of TTFT, against the traffic offered."""
    found = []
    for traffic in dict.fromkeys(clean(r.get("traffic"), 20) for r in rows):
        x = "clients" if traffic == "closed" else "offered_per_s"
        own = [r for r in rows if clean(r.get("traffic"), 20) == traffic and number(r, x) is not None]
        if not own:
            continue
        unit = "clients, each waiting for its answer" if x == "clients" else "requests offered per second"
        words = {"open": "open loop", "closed": "closed loop"}.get(traffic, traffic or "load")
        name = _plain(traffic) or "load"
        objectives = sorted({v for r in own if (v := number(r, "objective_ms"))})
        if any(number(r, "goodput_per_s") is not None for r in own):
            found.append(_goodput(f"load-goodput-{name}", words, own, x, unit, objectives))
        if any(number(r, "ttft_ms_p50") is not None for r in own):
            found.append(_percentiles(f"load-ttft-{name}", words, own, x, unit, objectives))
    return found


def _few(lines: Sequence[Line]) -> list[float]:
    """The sizes themselves as ticks, unless they are many."""
    sizes = sorted({x for line in lines for x in line.x})
    return sizes if len(sizes) <= 8 else []


def _by_system(rows: Sequence[Row], x: str, y: str, name: str, style: str, marker: str) -> list[Line]:
    names = [row_name(row) for row in rows]
    lines = []
    for text in dict.fromkeys(label(row) for row in rows):
        own = [r for r in rows if label(r) == text and number(r, y) is not None]
        own.sort(key=lambda r: number(r, x) or 0)
        if own:
            line = Line(text + name, series_role(own[0], names), style, marker)
            line.heavy = is_ours(own[0]) and own[0].get("mode") in ("splice", None)
            line.x, line.y = [number(r, x) or 0 for r in own], [number(r, y) or 0 for r in own]
            lines.append(line)
    return lines


def _goodput(
    name: str, words: str, rows: list[Row], x: str, unit: str, objectives: list[float]
) -> Drawing:  # fmt: skip
    lines = _by_system(rows, x, "goodput_per_s", "", "-", "o")
    within = f" within {figure(objectives[0])} ms" if len(objectives) == 1 else ""
    title = f"Load: goodput{within} ({words})"
    guide = "every request in time" if x == "offered_per_s" else ""

    def paint(fig: Any, narrow: bool) -> None:
        charts.lines(
            fig, narrow, lines, unit, "requests per second that met the objective", diagonal=guide,
            ticks=_few(lines),
        )  # fmt: skip

    said = "; ".join(
        f"{line.name}: {figure(line.y[0])} per second at {figure(line.x[0])}, "
        f"{figure(line.y[-1])} at {figure(line.x[-1])}, at most {figure(max(line.y))}"
        for line in lines
    )
    caption = "Goodput counts only requests whose first token came within the objective. Higher is better."
    entries = len(lines) + bool(guide)
    return Drawing(
        name, title, caption, f"{title}. {said}.", paint, lambda narrow: charts.lines_height(narrow, entries)
    )


def _percentiles(
    name: str, words: str, rows: list[Row], x: str, unit: str, objectives: list[float]
) -> Drawing:  # fmt: skip
    lines = [
        line
        for key, style, marker in (("p50", "-", "o"), ("p95", "--", "s"), ("p99", ":", "^"))
        for line in _by_system(rows, x, f"ttft_ms_{key}", f", {key.upper()}", style, marker)
        if min(line.y) > 0
    ]
    levels = [Level(value, f"objective {figure(value)} ms", "ink", "-.") for value in objectives[:2]]
    title = f"Load: time to first token ({words})"

    def paint(fig: Any, narrow: bool) -> None:
        charts.lines(fig, narrow, lines, unit, "milliseconds (log scale), lower is better", levels=levels,
                     log_y=True, ticks=_few(lines))  # fmt: skip

    said = "; ".join(
        f"{line.name}: {figure(line.y[0])} ms at {figure(line.x[0])}, "
        f"{figure(line.y[-1])} at {figure(line.x[-1])}"
        for line in lines
    )
    caption = "Waiting in the queue counts. Where a line turns up steeply the system is saturated."
    entries = len(lines) + len(levels)
    return Drawing(
        name, title, caption, f"{title}. {said}.", paint, lambda narrow: charts.lines_height(narrow, entries)
    )


def table5(rows: Sequence[Row]) -> list[Drawing]:
    """Reduction of the time to first token, here and in the paper, cell by cell."""
    found = []
    for model, printed in distinct(rows, "model", "paper_model"):
        groups = []
        theirs = f"paper, {clean(printed, 24)}" if printed else "paper"
        for row in where(rows, model=model, paper_model=printed):
            bars = [
                Bar(name, 100 * value, role, percent(value))
                for name, key, role in (("here", "reduction", "ours"), (theirs, "paper_reduction", "paper"))
                if (value := number(row, key)) is not None
            ]
            if bars:
                at = f"{clean(row.get('context'))} tokens of memory, {clean(row.get('query'))} of query"
                groups.append(Group(at, tuple(bars)))
        if groups:
            found.append(_reductions(clean(model, 40), groups))
    return found


def _reductions(model: str, groups: list[Group]) -> Drawing:
    title = f"Table 5 of the paper: time to first token saved{f' ({model})' if model else ''}"

    def paint(fig: Any, narrow: bool) -> None:
        charts.bars(fig, narrow, groups, "% of the time saved, longer is better")

    said = "; ".join(f"{g.title}: " + ", ".join(f"{b.name} {b.text}" for b in g.bars) for g in groups)
    caption = (
        "The paper's cells come from other models on other hardware, with a baseline of its own: "
        "compare the pattern, not the heights."
    )
    name = "-".join(w for w in ("table5", _plain(model)) if w)
    return Drawing(
        name,
        title,
        caption,
        f"{title}. {said}.",
        paint,
        lambda narrow: charts.bars_height(groups, False, narrow),
    )
