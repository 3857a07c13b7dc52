"""The report: one HTML file that needs nothing else, and its plots as PNG files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
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
    return [path, *(_write_bytes(folder / f"{plot.name}.png", plot.png) for plot in plots)]


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


def _write_bytes(path: Path, content: bytes) -> Path:
    """The file holds the old bytes or the new ones, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return path
