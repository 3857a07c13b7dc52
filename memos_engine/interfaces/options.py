"""What the commands share: options, consoles, JSON output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()
notes = Console(stderr=True)

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


def emit(data: Any) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(data, ensure_ascii=False, default=str))
