"""`memos-engine top`: memories by value, what the tiers hold, hit rates and jobs, live. No model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from memos_engine.interfaces.cli_store import DEFAULT_STORE, Opened, StoreHere, opened
from memos_engine.interfaces.options import JsonOption, UserOption, console, emit

if TYPE_CHECKING:
    from memos_engine.memory.store_jobs import Job
    from memos_engine.memory.store_top import Worth

_STATUS = "status.json"  # what the engine that serves the store says of its tiers now and then
_WORDS = 48  # letters of a memory


def register(app: typer.Typer) -> None:
    """Put the command beside the others."""
    app.command()(top)


def top(
    store: StoreHere = DEFAULT_STORE,
    user: UserOption = None,
    n: Annotated[int, typer.Option("-n", help="Memories and jobs shown.", min=1)] = 15,
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Watch a store: memories by value, tiers, hit rates and jobs. Ctrl-C ends it."""
    with opened(store, user) as here:
        if as_json:
            emit(_document(store, here, n))
            return
        if once:
            console.print(_screen(store, here, n))
            return
        try:
            with Live(_screen(store, here, n), console=console, screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(every)
                    live.update(_screen(store, here, n), refresh=True)
        except KeyboardInterrupt:
            return


def _status(store: Path) -> dict[str, Any]:
    """What the engine said last; empty where there is none, or what it said cannot be read."""
    try:
        said = json.loads((store / _STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _document(store: Path, here: Opened, n: int) -> dict[str, Any]:
    return {
        "memories": [worth.to_dict() for worth in here.store.worths(here.principal, n)],
        "jobs": [job.to_dict() for job in here.store.jobs(here.principal, limit=n)],
        "engine": _status(store),
    }


def _screen(store: Path, here: Opened, n: int) -> Group:
    said = _status(store)
    return Group(
        _memories(here.store.worths(here.principal, n)),
        _tiers(said),
        _jobs(here.store.jobs(here.principal, limit=n)),
    )


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        made.add_column(
            name, justify="left" if name in ("memory", "tier", "kind", "state", "why") else "right"
        )
    return made


def _memories(worths: list[Worth]) -> Table:
    made = _table("Memories by value", "value", "uses/day", "uses", "tokens", "KV bytes", "memory")
    for worth in worths:
        words = " ".join((worth.cube.body or "").split())[:_WORDS]
        made.add_row(
            f"{worth.value:.1f}",
            f"{worth.per_day:.2f}",
            str(worth.cube.uses),
            str(worth.tokens),
            f"{worth.nbytes:,}" if worth.records else "text",
            Text(words),
        )
    return made


def _tiers(said: dict[str, Any]) -> Table | Text:
    tiers = said.get("tiers")
    if not isinstance(tiers, dict):
        return Text("\nTiers: no engine that transforms this store has said anything yet.\n")
    made = _table(f"Tiers, as of {said.get('at', '?')}", "tier", "records", "bytes", "of", "hits")
    for name, tier in tiers.items():
        made.add_row(
            name,
            str(tier["records"]),
            f"{tier['nbytes']:,}",
            f"{tier['most']:,}",
            f"{tier['hit_share']:.0%}",
        )
    return made


def _jobs(jobs: list[Job]) -> Table:
    made = _table("Jobs", "kind", "state", "done", "value", "tries", "memories", "why")
    for job in jobs:
        made.add_row(
            job.kind,
            job.state,
            f"{job.progress:.0%}",
            f"{job.value:.3g}",
            f"{job.attempts}/{job.most_attempts}",
            str(len(job.cube_ids)),
            Text(job.reason),
        )
    return made
