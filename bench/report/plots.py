"""Plots as inline SVG (wide and narrow) and PNG: the same bytes for the same documents.

matplotlib is an extra; without it `draw` gives nothing and the page says how to install it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from memos_engine.bench.report.palette import ROLES, light, variable

# Inches at 72 units each: about what a card of the page measures on a laptop and on a phone.
WIDE, NARROW = 7.2, 4.25
RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "memos_engine",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "axes.titlesize": 11,
    "axes.edgecolor": light("muted"),
    "axes.labelcolor": light("muted"),
    "text.color": light("ink"),
    "xtick.color": light("muted"),
    "ytick.color": light("muted"),
    "grid.color": light("grid"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn. `paint(figure, narrow)` fills a matplotlib figure; `height(narrow)` in inches."""

    name: str
    title: str
    caption: str
    alt: str
    paint: Callable[[Any, bool], None]
    height: Callable[[bool], float]


@dataclass(frozen=True)
class Plot:
    """A finished plot; the SVGs carry no id that another plot of the page has."""

    name: str
    title: str
    caption: str
    alt: str
    wide: str
    narrow: str
    png: bytes


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw(drawings: Sequence[Drawing]) -> list[Plot]:
    """Every drawing as a plot; none without matplotlib."""
    return [_plot(drawing) for drawing in drawings] if available() else []


def _plot(drawing: Drawing) -> Plot:
    return Plot(
        drawing.name,
        drawing.title,
        drawing.caption,
        drawing.alt,
        _svg(drawing, narrow=False),
        _svg(drawing, narrow=True),
        _png(drawing),
    )


def _figure(drawing: Drawing, narrow: bool, title: bool, save: Callable[[Any], None]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        # A label may hold letters that the font lacks: the browser has them.
        warnings.simplefilter("ignore")
        size = (NARROW if narrow else WIDE, drawing.height(narrow) + (0.35 if title else 0))
        figure: Any = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
        drawing.paint(figure, narrow)
        if title:
            figure.suptitle(drawing.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        save(figure)


def _png(drawing: Drawing) -> bytes:
    stream = io.BytesIO()
    _figure(
        drawing,
        narrow=False,
        title=True,
        save=lambda figure: figure.savefig(
            stream, format="png", dpi=160, facecolor=light("card"), metadata={"Software": None}
        ),
    )
    return stream.getvalue()


def _svg(drawing: Drawing, narrow: bool) -> str:
    stream = io.StringIO()
    _figure(
        drawing,
        narrow=narrow,
        title=False,
        save=lambda figure: figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None}),
    )
    return inline(stream.getvalue(), f"{drawing.name}-{'s' if narrow else 'l'}", drawing.alt)


def inline(text: str, prefix: str, alt: str) -> str:
    """matplotlib's SVG file as an element of a page: no metadata, no style for the whole page, ids of its
    own, the light colours as CSS variables."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in [c for c in parent if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            name = key.rpartition("}")[2]
            if name == "id":
                if value in used:
                    element.set("id", f"{prefix}-{value}")
                continue
            element.set(name, _attribute(name, value, prefix))
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": alt})
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "href":
        return re.sub(r"^#", f"#{prefix}-", value)
    if name in ("style", "clip-path", "fill", "stroke"):
        value = re.sub(r"url\(#", f"url(#{prefix}-", value)
        return re.sub(r"#[0-9a-f]{6}\b", _coloured, value)
    return value


_VARIABLES = {colours[0]: f"var({variable(role)})" for role, colours in ROLES.items()}


def _coloured(match: re.Match[str]) -> str:
    return _VARIABLES.get(match.group(), match.group())


# -- pieces that the figures share -----------------------------------------------------------------


def tidy_legend(figure: Any, handles: Sequence[Any], columns: int) -> None:
    """The legend under the axes, where it hides nothing."""
    if handles:
        figure.legend(
            handles=list(handles),
            loc="outside lower left",
            ncols=max(1, min(columns, len(handles))),
            frameon=False,
            handlelength=2.6,
            columnspacing=1.4,
            borderaxespad=0.2,
        )


def legend_height(entries: int, columns: int) -> float:
    return 0.21 * -(-entries // max(1, columns)) + 0.1


def plain_axis(axis: Any, low: float, high: float) -> None:
    """A log axis whose ticks are plain numbers, dense enough to read by."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    from memos_engine.bench.report.values import figure as written

    wide = low > 0 and high / low > 60
    axis.set_major_locator(LogLocator(base=10, subs=(1.0,) if high > 3e3 * low else (1.0, 3.0) if wide else
                                      (1.0, 2.0, 5.0)))  # fmt: skip
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())
