"""`memos-engine cube verify | gc`: is the store sound, and what is due in it. For its operator; no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from memos_engine.errors import StoreError
from memos_engine.interfaces.cli_store import DEFAULT_STORE, StoreHere, opened
from memos_engine.interfaces.options import JsonOption, console, emit, notes, show_table

if TYPE_CHECKING:
    from memos_engine.memory.checkup import Checkup, Part

_DAY = 86400.0


def register(app: typer.Typer) -> None:
    """Put these commands beside the others."""
    for command in (verify, gc):
        app.command()(command)


def verify(
    store: StoreHere = DEFAULT_STORE,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop or build anew what the store has elsewhere.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the whole store: every page, row and file. Exits with 1 when something is (still) wrong."""
    found = _checked(store, repair)
    if as_json:
        emit(found.to_dict())
    else:
        _show(found, repair)
    if not found.sound:
        raise typer.Exit(1)


def _checked(directory: Path, repair: bool) -> Checkup:
    from memos_engine.memory.checkup import Checkup, Part, Problem

    try:
        with opened(directory) as here, notes.status("checking") as status:
            return here.store.check(repair=repair, progress=lambda part: status.update(f"checking: {part}"))
    except StoreError as error:
        if type(error) is not StoreError:
            raise  # no store, one in use or of a newer version: nothing is known about its soundness
        return Checkup((Part("database", 0, "pages", (Problem(str(error)),)),))


def _show(found: Checkup, repair: bool) -> None:
    rows = [(part.name, f"{part.looked_at} {part.unit}", _result(part)) for part in found.parts]
    show_table(["part", "looked at", "result"], rows)
    for part in found.parts:
        for problem in part.problems:
            said = ("mended: ", "bold yellow") if problem.mended else ("wrong: ", "bold red")
            console.print(Text.assemble(said, problem.what))
        for note in part.notes:
            console.print(Text.assemble(("note: ", "dim"), note))
    if found.mendable and not repair:
        console.print("Some of this is mended by: memos-engine cube verify --repair")


def _result(part: Part) -> str:
    if not part.problems:
        return "sound"
    return "mended" if part.sound else "WRONG"


def gc(
    store: StoreHere = DEFAULT_STORE,
    idle: Annotated[
        float | None, typer.Option("--idle-days", help="Archive what lay unused so long.", min=0)
    ] = None,
    forget: Annotated[
        float | None, typer.Option("--forget-days", help="Delete what was archived so long ago.", min=0)
    ] = None,
    old_kv: Annotated[
        float, typer.Option("--old-kv-days", help="Drop KV of versions before after so long.", min=0)
    ] = 7.0,
    grace: Annotated[
        float, typer.Option("--grace", help="Seconds that files which nothing names stay.", min=0)
    ] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Do what is due, for all users: expire, archive what faded, drop old KV and files that nothing names."""
    from memos_engine.memory.janitor import Janitor, SweepPolicy

    policy = SweepPolicy(
        idle_s=None if idle is None else idle * _DAY,
        forget_s=None if forget is None else forget * _DAY,
        old_kv_s=old_kv * _DAY,
    )
    with opened(store) as here:
        done = Janitor(here.store, policy).clean(grace_s=grace, dry_run=dry_run)
    if as_json:
        emit(done.to_dict())
        return
    swept = done.swept
    rows = (
        ("memories expired", swept.expired),
        ("memories faded, archived", swept.faded),
        ("memories idle, archived", swept.idle),
        ("archived memories deleted", swept.forgotten),
        ("old KV records dropped", swept.kv_records),
        ("files removed", done.files),
        ("bytes freed", f"{done.bytes:,}"),
    )
    show_table(["due" if dry_run else "done", "count"], rows)
