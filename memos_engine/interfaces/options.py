"""What the commands share: options, consoles, JSON output."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# What users and stores say is never read as markup; lines stay whole for those who copy or parse them.
console = Console(markup=False, highlight=False, soft_wrap=True)
notes = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="MEMOS_ENGINE_STORE", help="Store directory (made if missing).")
]
UserOption = Annotated[
    str | None,
    typer.Option("--user", "-u", envvar="MEMOS_ENGINE_USER", help="Whose memories (default: you)."),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", envvar="MEMOS_ENGINE_MODEL", help="Alias, hub id or folder of a pulled model."),
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine is fast at.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
    whole: Collection[str] = (),
) -> None:
    """Prints a table; cells are plain text, whatever brackets they hold. Columns named in `whole` are never
    broken: their cells are there to be copied."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, no_wrap=column in whole)
    for cells in rows:
        table.add_row(*(Text(str(cell)) for cell in cells))
    console.print(table, soft_wrap=False)


def emit(data: Any) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(data, ensure_ascii=False, default=str))
