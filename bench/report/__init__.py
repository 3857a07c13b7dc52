"""The report: one HTML file that needs nothing else, and its plots as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from memos_engine.bench.document import writable, write_atomically
from memos_engine.bench.report.figures import drawings
from memos_engine.bench.report.page import render
from memos_engine.bench.report.plots import Plot, available, draw
from memos_engine.bench.report.values import Document

__all__ = ["build", "write"]


def write(folder: Path, documents: Sequence[Document]) -> list[Path]:
    """Writes `report.html` and a PNG for each plot; returns their paths, the page first."""
    page, plots = build(documents)
    writable(folder)
    path = folder / "report.html"
    write_atomically(path, page)
    pictures = [folder / f"{plot.name}.png" for plot in plots]
    for picture, plot in zip(pictures, plots, strict=True):
        write_atomically(picture, plot.png)
    return [path, *pictures]


def build(documents: Sequence[Document]) -> tuple[str, list[Plot]]:
    """The page and its plots; each plot's name is its own among all of them."""
    taken: set[str] = set()
    plots: dict[int, list[Plot]] = {}
    for i, document in enumerate(documents):
        named = []
        for drawing in drawings(document):
            name, count = drawing.name, 1
            while name in taken:
                count += 1
                name = f"{drawing.name}-{count}"
            taken.add(name)
            named.append(replace(drawing, name=name))
        plots[i] = draw(named)
    page: str = render(documents, plots, available())
    return page, [plot for own in plots.values() for plot in own]
