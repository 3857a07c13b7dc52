"""What each bench's rows look like drawn: one function a bench, rows in, drawings out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from memos_engine.bench.report import charts
from memos_engine.bench.report.charts import Bar, Group, Level, Line
from memos_engine.bench.report.figures_budget import budget
from memos_engine.bench.report.figures_more import kernels, load, roofline, table5
from memos_engine.bench.report.figures_promote import promotion
from memos_engine.bench.report.palette import SPLICED, STYLES, row_name, series_role
from memos_engine.bench.report.plots import Drawing
from memos_engine.bench.report.values import (
    Document,
    Row,
    clean,
    distinct,
    figure,
    is_ours,
    label,
    measured,
    number,
    percent,
    records,
    system_name,
    where,
)

MOST = 8  # plots of one bench; the tables hold the rest


def drawings(document: Document) -> list[Drawing]:
    """The plots of a document, none for a bench that this file does not know."""
    rows = measured(records(document))
    makers = {
        "ttft": ttft,
        "decode": decode,
        "quality": quality,
        "kernels": kernels,
        "roofline": roofline,
        "load": load,
        "budget": budget,
        "budget-simulated": promotion,
        "paper-table5": table5,
    }
    maker = makers.get(clean(document.get("bench")))
    return maker(rows)[:MOST] if maker else []


def slug(*words: Any) -> str:
    """A name for files and ids."""
    text = "-".join(clean(word, 24) for word in words if word not in (None, ""))
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "plot"


def ttft(rows: Sequence[Row]) -> list[Drawing]:
    """Time to first token against context, a line for each system and mode, P95 as error bars."""
    found = []
    keys = ("scope", "dtype", "query", "memories")
    for scope, dtype, query, memories in distinct([r for r in rows if number(r, "context")], *keys):
        group = where(rows, scope=scope, dtype=dtype, query=query)
        group = [r for r in group if number(r, "ttft_ms_p50") and r.get("memories") in (memories, 0, None)]
        sized = [r for r in group if number(r, "context")]
        bare = [r for r in group if not number(r, "context")]
        sizes = sorted({number(r, "context") or 0 for r in sized})
        if not sizes:
            continue
        words = ", ".join(
            w
            for w in (
                f"{clean(scope)} scope" if scope else "",
                clean(dtype),
                f"{clean(query)}-token query" if query else "",
                f"{clean(memories)} memories" if memories else "",
            )
            if w
        )
        name, title = slug("ttft", scope, dtype, query, memories), f"Time to first token ({words})"
        alt = f"{title}. " + _said(sized, "context", "tokens", "ttft_ms_p50", "ms")
        if len(sizes) == 1:
            bars = _bars([*sized, *bare], "ttft_ms_p50", "ttft_ms_p95", label)
            groups = [Group(f"{figure(sizes[0])} tokens of memory", tuple(sorted(bars, key=_value)))]
            found.append(_bar_drawing(name, title, alt, groups, "milliseconds, shorter is better", _P95))
            continue
        lines = _lines(sized, "context", "ttft_ms_p50", "ttft_ms_p95")
        levels = [
            Level(_middle([number(r, "ttft_ms_p50") or 0 for r in bare if label(r) == text]), text)
            for text in dict.fromkeys(label(r) for r in bare)
        ]
        found.append(_line_drawing(name, title, alt, lines, levels, sizes))
    return found


_P95 = "Bars show the median, the thin line reaches P95."


def _value(bar: Bar) -> float:
    return float(bar.value)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def _line_drawing(
    name: str, title: str, alt: str, lines: list[Line], levels: list[Level], sizes: list[float]
) -> Drawing:
    def paint(fig: Any, narrow: bool) -> None:
        charts.lines(
            fig, narrow, lines, "tokens of memory", "milliseconds (log scale), lower is better",
            levels=levels, log_x=True, log_y=True, ticks=sizes,
        )  # fmt: skip

    caption = "Points show the median, error bars reach P95; both axes are logarithmic."
    entries = len(lines) + len(levels)
    return Drawing(name, title, caption, alt, paint, lambda narrow: charts.lines_height(narrow, entries))


def _bar_drawing(
    name: str, title: str, alt: str, groups: list[Group], xlabel: str, caption: str, floor: str = ""
) -> Drawing:
    def paint(fig: Any, narrow: bool) -> None:
        charts.bars(fig, narrow, groups, xlabel, floor)

    return Drawing(
        name, title, caption, alt, paint, lambda narrow: charts.bars_height(groups, bool(floor), narrow)
    )


def _lines(rows: Sequence[Row], x: str, y: str, upto: str = "") -> list[Line]:
    names = [row_name(row) for row in rows]
    lines = []
    for text in dict.fromkeys(label(row) for row in rows):
        own = sorted((r for r in rows if label(r) == text), key=lambda r: number(r, x) or 0)
        mode = clean(own[0].get("mode"))
        style, marker = STYLES.get(mode, ("-", "o"))
        tier, again = clean(own[0].get("tier")), bool(number(own[0], "recompute"))
        if mode == "splice" and (again or tier in SPLICED):
            style, marker = SPLICED.get(tier, ("--", "d"))
        heavy = mode == "splice" and style == "-" and is_ours(own[0])
        line = Line(text, series_role(own[0], names), style, marker, heavy=heavy)
        for row in own:
            if (value := number(row, y)) is not None:
                line.x.append(number(row, x) or 0)
                line.y.append(value)
                line.upto.append(number(row, upto))
        if line.y:
            lines.append(line)
    return lines


def _bars(rows: Sequence[Row], value: str, upto: str, name: Any) -> list[Bar]:
    names = [row_name(row) for row in rows]
    return [
        Bar(name(row), v, series_role(row, names), figure(v), number(row, upto))
        for row in rows
        if (v := number(row, value)) is not None
    ]


def _said(rows: Sequence[Row], x: str, unit: str, y: str, measure: str) -> str:
    """The plot in words, for those who cannot see it."""
    parts = []
    for text in dict.fromkeys(label(row) for row in rows):
        own = sorted((r for r in rows if label(r) == text), key=lambda r: number(r, x) or 0)
        points = [(number(r, x), number(r, y)) for r in own]
        said = [f"{figure(b)} {measure} at {figure(a or 0)} {unit}" for a, b in points if b is not None]
        ends = said if len(said) < 3 else [said[0], said[-1]]
        if ends:
            parts.append(f"{text}: {', '.join(ends)}")
    return "; ".join(parts[:12]) + "."


def decode(rows: Sequence[Row]) -> list[Drawing]:
    """Milliseconds a token as bars, with the time that reading the bytes takes at least as floor."""
    found = []
    for batch, dtype in distinct(rows, "batch", "dtype"):
        own = [r for r in where(rows, batch=batch, dtype=dtype) if number(r, "ms_per_token_p50")]
        groups = []
        for (context,) in distinct(sorted(own, key=lambda r: number(r, "context") or 0), "context"):
            at = where(own, context=context)
            bars = _bars(at, "ms_per_token_p50", "ms_per_token_p95", lambda r: system_name(r.get("system")))
            title = f"{clean(context)} tokens of context" if context is not None else ""
            groups.append(Group(title, tuple(sorted(bars, key=_value)), _floor(at)))
        if not groups:
            continue
        words = ", ".join(w for w in (f"batch {clean(batch)}" if batch else "", clean(dtype)) if w)
        title = f"Decode: milliseconds per token{f' ({words})' if words else ''}"
        floor = "the machine's limit for our bytes" if any(g.floor for g in groups) else ""
        alt = f"{title}. " + _said(own, "context", "tokens", "ms_per_token_p50", "ms")
        caption = _P95 + (" No kernel can be left of the dashed line." if floor else "")
        name = slug("decode", f"b{clean(batch)}" if batch else "", dtype)
        found.append(
            _bar_drawing(
                name, title, alt, groups, "milliseconds per token, shorter is better", caption, floor
            )
        )
    return found


def _floor(rows: Sequence[Row]) -> float | None:
    """The least time the machine allows: the share of the limit times the time; ours if it says so."""
    for row in sorted(rows, key=lambda r: not is_ours(r)):
        share, value = number(row, "share_of_limit"), number(row, "ms_per_token_p50")
        if share and value:
            return float(share * value)
    return None


def quality(rows: Sequence[Row]) -> list[Drawing]:
    """KL to full prefill against the share recomputed, with confidence bands and the noise floor."""
    found = []
    for (memories,) in distinct(rows, "memories"):
        own = [r for r in where(rows, memories=memories) if number(r, "kl_mean") is not None]
        flat = [r for r in own if r.get("method") in ("full_bf16", "none") and number(r, "kl_mean")]
        curves = [
            r for r in own if r.get("method") not in ("full", "full_bf16", "none") and _share(r) is not None
        ]
        if not curves:
            continue
        positive = [k for r in own if (k := number(r, "kl_mean")) and k > 0]
        bottom = min(positive, default=1e-6) / 2
        lines = _lines(curves, "recompute", "kl_mean")
        for line in lines:
            ends = sorted((r for r in curves if label(r) == line.name), key=lambda r: _share(r) or 0)
            line.x = [100 * x for x in line.x]
            line.y = [max(y, bottom) for y in line.y]
            line.style, line.heavy = "-", is_ours(ends[0])
            line.marker = "D" if line.heavy else "o"
            if all(number(r, key) is not None for r in ends for key in ("kl_low", "kl_high")):
                line.low = [max(number(r, "kl_low") or 0, bottom) for r in ends]
                line.high = [max(number(r, "kl_high") or 0, bottom) for r in ends]
        names = {"full_bf16": "noise floor: bf16 full prefill", "none": "no memory at all"}
        levels = [
            Level(number(r, "kl_mean") or 0, names[r["method"]], style="--" if r["method"] == "none" else ":")
            for r in flat
        ]
        found.append(_quality_drawing(memories, lines, levels, curves))
    return found


def _share(row: Row) -> float | None:
    share: float | None = number(row, "recompute")
    return share


def _quality_drawing(memories: Any, lines: list[Line], levels: list[Level], rows: list[Row]) -> Drawing:
    words = f" ({clean(memories)} memories)" if memories is not None else ""
    title = f"Quality: distance from full prefill{words}"
    floor = min((level.y / 5 for level in levels), default=None)
    shares = sorted({100 * (_share(r) or 0) for r in rows})

    def paint(fig: Any, narrow: bool) -> None:
        charts.lines(
            fig, narrow, lines, "tokens recomputed, %", "KL divergence, nats (log scale), lower is better",
            levels=levels, log_y=True, ticks=shares if len(shares) < 6 else (), bottom=floor,
        )  # fmt: skip

    said = [
        f"{label(r)} {figure(number(r, 'kl_mean') or 0)} at {percent(_share(r) or 0)} recomputed"
        for r in rows[:12]
    ]
    caption = "Bands are 95 % bootstrap intervals. What lies far below the noise floor leaves the picture."
    return Drawing(
        slug("quality", memories), title, caption, f"{title}. {'; '.join(said)}.", paint,
        lambda narrow: charts.lines_height(narrow, len(lines) + len(levels)),
    )  # fmt: skip
