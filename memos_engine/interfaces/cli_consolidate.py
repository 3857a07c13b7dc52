"""`memos-engine cube consolidate`: facts into a small adapter, through gates. Experimental."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from memos_engine.errors import MemoryInputError
from memos_engine.interfaces.cli_store import DEFAULT_STORE, user_name
from memos_engine.interfaces.options import (
    JsonOption,
    ModelOption,
    StoreOption,
    UserOption,
    console,
    emit,
    notes,
    show_table,
)

if TYPE_CHECKING:
    from memos_engine.consolidate import Report
    from memos_engine.consolidate.run import Consolidated


def register(app: typer.Typer) -> None:
    """Put the command beside the others."""
    app.command("consolidate")(consolidate)


def consolidate(
    facts: Annotated[Path, typer.Argument(help="JSON: subject, answer, value, questions, held_out, memory.")],
    name: Annotated[str, typer.Option(help="Your name for the adapter.")],
    store: StoreOption = DEFAULT_STORE,
    user: UserOption = None,
    model: ModelOption = "smollm2",
    source: Annotated[
        list[str] | None, typer.Option(help="Id of a memory that the facts are from; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 48,
    seed: Annotated[int, typer.Option(help="For another try.")] = 0,
    promote: Annotated[bool, typer.Option("--promote", help="Use it, if it passes every gate.")] = False,
    experimental: Annotated[
        bool,
        typer.Option("--experimental", envvar="MEMOS_ENGINE_EXPERIMENTAL", help="Needed: this is young."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on facts, measure it, store it with the report. Exits with 1 when a gate fails."""
    if not experimental:
        raise MemoryInputError(
            "consolidation is experimental: it takes minutes, and small models often fail its gates; add "
            "--experimental."
        )
    from memos_engine.api import MemoryEngine
    from memos_engine.config import DecoderConfig
    from memos_engine.consolidate import Recipe, read_facts
    from memos_engine.consolidate import consolidate as run

    known = read_facts(facts)
    with (
        MemoryEngine.open(model, store, decoder=DecoderConfig(dtype="float32")) as engine,
        _Bar(as_json) as bar,
    ):
        person = engine.user(user_name(user)).principal
        done = run(
            engine,
            person,
            name,
            known,
            recipe=Recipe(steps=steps, seed=seed),
            sources=[engine.opened_store.find_id(person, one) for one in source or ()],
            promote=promote,
            progress=bar.show,
        )
    if as_json:
        emit({"adapter": {**done.version.to_dict(), "report": None}, "report": done.report.to_dict()})
    else:
        _show(done)
    if not done.report.passed:
        raise typer.Exit(1)


class _Bar:
    """One bar for the stages, on standard error."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=notes, transient=True, disable=quiet)
        self._task = self._progress.add_task("preparing")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, of: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=of)


def _show(done: Consolidated) -> None:
    report: Report = done.report
    rows = []
    for gate, value in vars(report.gates).items():
        sign = ">=" if gate in ("recall", "agreement") else "<="
        result = "FAILED" if gate in report.failed else "passed"
        rows.append((gate, f"{report.measured[gate]:.3f}", f"{sign} {value:.3f}", result))
    show_table(["gate", "measured", "wanted", "result"], rows)
    console.print(f"Without the adapter, recall is {report.measured['base_recall']:.3f}.")
    for miss in report.misses[:8]:
        console.print(Text.assemble(("missed: ", "dim"), miss))
    where = f"{done.version.name} version {done.version.version} ({done.version.cube_id})"
    if done.version.current:
        console.print(f"In use: {where}.")
    elif report.passed:
        console.print(f"Stored: {where}. Use it with: memos-engine adapter promote ...")
    else:
        console.print(f"Stored, but not promoted: {where}. The text memories stay in use.")
