"""The two kinds of chart of the report: labelled bars in groups, and lines over a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memos_engine.bench.report.palette import light
from memos_engine.bench.report.plots import legend_height, plain_axis, tidy_legend
from memos_engine.bench.report.values import figure as written

LABEL = 38  # letters of a name in a legend of two columns
ROW = 0.215  # inches a bar takes


@dataclass(frozen=True)
class Bar:
    """upto: where the thin line of the bar ends (P95)."""

    name: str
    value: float
    role: str
    text: str
    upto: float | None = None


@dataclass(frozen=True)
class Group:
    """Bars under one heading; floor: a value that none of them can get below."""

    title: str
    bars: tuple[Bar, ...]
    floor: float | None = None


@dataclass
class Line:
    """upto: ends of the error bars; low and high: a band around the line."""

    name: str
    role: str
    style: Any  # as matplotlib names or measures it
    marker: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    upto: list[float | None] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    heavy: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    y: float
    name: str
    role: str = "limit"
    style: str = ":"


def short(text: str, most: int) -> str:
    """Text that fits a plot; never one that matplotlib takes for a hidden label."""
    text = text.lstrip("_") or "unnamed"
    return text if len(text) <= most else text[: most - 1] + "…"


def bars_height(groups: Sequence[Group], floor: bool, narrow: bool) -> float:
    step = _step(groups, narrow)
    rows = sum(len(group.bars) * step + (1.5 if group.title else 0.6) for group in groups)
    return rows * ROW + 0.6 + (0.3 if floor else 0)


def _step(groups: Sequence[Group], narrow: bool) -> float:
    """Rows a bar takes: two where its name stands above it, because a phone has no room beside it."""
    longest = max((len(bar.name) for group in groups for bar in group.bars), default=0)
    return 1.95 if narrow and longest > 18 else 1.0


def bars(
    figure: Any,
    narrow: bool,
    groups: Sequence[Group],
    xlabel: str,
    floor: str = "",
    most: float = 0.0,
) -> None:
    """Horizontal bars, each with its name and value; headings stand above their group, where a phone has
    room for them. floor: what the groups' floors are called; most: the axis reaches at least that far."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import blended_transform_factory

    axis = figure.add_subplot()
    every = [bar for group in groups for bar in group.bars]
    right = max([most, 1e-12, *(max(bar.value, bar.upto or 0) for bar in every)])
    edge = blended_transform_factory(figure.transFigure, axis.transData)
    step, y, places, names = _step(groups, narrow), 0.0, [], []
    for group in groups:
        y += 1.5 if group.title else 0.6
        if group.title:
            words = short(group.title, 44 if narrow else 90)
            axis.text(
                0.008, y - 0.82, words, transform=edge, va="center", fontweight="bold", fontsize=10.5
            ).set_in_layout(False)
        first = y
        for bar in group.bars:
            if step > 1:
                words = short(bar.name, 44)
                axis.text(0.008, y, words, transform=edge, va="center", fontsize=10).set_in_layout(False)
            else:
                places.append(y)
                names.append(short(bar.name, 18 if narrow else 34))
            _bar(axis, bar, y + step - 1, right)
            y += step
        if group.floor is not None:
            axis.plot([group.floor] * 2, [first - 0.5, y - 0.5], color=light("ink"), lw=1.4, ls=(0, (3, 2)))
    longest = max([len(bar.text) for bar in every] or [1])
    left = min([0.0, *(bar.value for bar in every)])
    axis.set_xlim(left, right * (1.04 + longest * (0.028 if narrow else 0.0135)))
    axis.set_ylim(y - 0.3, -0.1)
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", length=0, labelcolor=light("ink"))
    axis.tick_params(axis="x", length=3)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", lw=0.8)
    axis.set_xlabel(xlabel)
    if narrow:
        axis.locator_params(axis="x", nbins=5)
    if floor:
        tidy_legend(figure, [Line2D([], [], color=light("ink"), lw=1.4, ls=(0, (3, 2)), label=floor)], 1)


def _bar(axis: Any, bar: Bar, y: float, right: float) -> None:
    axis.barh(y, bar.value, height=0.78, color=light(bar.role), linewidth=0)
    end = max(bar.value, 0.0)
    if bar.upto is not None and bar.upto > bar.value:
        axis.plot([bar.value, bar.upto], [y, y], color=light("muted"), lw=1.2, solid_capstyle="butt")
        axis.plot([bar.upto], [y], marker="|", color=light("muted"), ms=6, mew=1.2)
        end = bar.upto
    axis.text(end + right * 0.012, y, bar.text, va="center", ha="left", fontsize=10.5)


def lines_height(narrow: bool, entries: int) -> float:
    return (3.1 if narrow else 3.7) + float(legend_height(entries, legend_columns(narrow)))


def legend_columns(narrow: bool) -> int:
    return 1 if narrow else 2


def lines(
    figure: Any,
    narrow: bool,
    series: Sequence[Line],
    xlabel: str,
    ylabel: str,
    *,
    levels: Sequence[Level] = (),
    log_x: bool = False,
    log_y: bool = False,
    ticks: Sequence[float] = (),
    diagonal: str = "",
    bottom: float | None = None,
) -> None:
    """Lines with error bars or bands; the legend runs from the highest last point to the lowest. What lies
    under `bottom` leaves a logarithmic picture downwards."""
    axis = figure.add_subplot()
    handles: list[tuple[float, Any]] = []
    if diagonal:
        end = max([x for line in series for x in line.x] or [1.0])
        (guide,) = axis.plot([0, end], [0, end], color=light("limit"), ls=":", lw=1.2, label=diagonal)
        handles.append((end, guide))
    for line in series:
        handles.append((line.y[-1], _line(axis, line)))
    for level in levels:
        handle = axis.axhline(
            level.y,
            color=light(level.role),
            ls=level.style,
            lw=1.5,
            label=short(level.name, LABEL),
            zorder=1.5,
        )
        handles.append((level.y, handle))
    values = [v for line in series for v in (*line.y, *line.low, *line.high, *(u for u in line.upto if u))]
    values = [v for v in (*values, *(level.y for level in levels)) if v > 0 or not log_y]
    if log_x:
        axis.set_xscale("log", base=2)
    if ticks:
        shown = ticks[:: max(1, -(-len(ticks) // (5 if narrow else 9)))]
        axis.set_xticks(shown, [written(tick) for tick in shown])
        axis.minorticks_off()
    if log_y and values:
        axis.set_yscale("log")
        least = min(values) if bottom is None else max(min(values), bottom)
        axis.set_ylim(least / 1.35, max(values) * 1.35)
        plain_axis(axis.yaxis, least, max(values))
    elif values:
        axis.set_ylim(0, max(values) * 1.08 or 1)
    axis.grid(lw=0.8)
    axis.set_xlabel(xlabel)
    axis.set_title(ylabel, loc="left", color=light("muted"), fontsize=10.5)
    handles.sort(key=lambda pair: -pair[0])
    tidy_legend(figure, [handle for _, handle in handles], legend_columns(narrow))


def _line(axis: Any, line: Line) -> Any:
    colour = light(line.role)
    if line.low and line.high:
        axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
    late = [(x, y, u) for x, y, u in zip(line.x, line.y, line.upto, strict=False) if u is not None and u > y]
    for x, y, upto in late:
        axis.plot([x, x], [y, upto], color=colour, lw=1.1, alpha=0.75)
        axis.plot([x], [upto], marker="_", ms=6, color=colour, alpha=0.75)
    (handle,) = axis.plot(
        line.x, line.y, color=colour, ls=line.style, marker=line.marker, label=short(line.name, LABEL),
        lw=2.6 if line.heavy else 1.7, zorder=3 if line.heavy else 2.5,
        markeredgecolor=light("card") if line.marker not in "x|_+" else colour, markeredgewidth=0.8,
    )  # fmt: skip
    return handle
