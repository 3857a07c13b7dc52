"""What a pull is doing: a bar on a terminal, one plain line per stage elsewhere, nothing when asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


class Reporter:
    """Announces stages on standard error; transient bars (rich) where that is a terminal."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.bars = enabled and sys.stderr.isatty()

    def line(self, text: str) -> None:
        """One line of plain text."""
        if self.enabled:
            print(f"memos_engine: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """A stage of `total` units (None: unknown, a spinner); yields the function that counts them."""
        if not self.bars:
            self.line(title)
            yield lambda _: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            Elapsed(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda count: progress.advance(task, count)
