"""The `memos-engine` command."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from memos_engine import __version__
from memos_engine.errors import ContextLengthError, MemoryInputError, MemosEngineError
from memos_engine.interfaces import cli_consolidate, cli_govern, cli_top, cli_upkeep
from memos_engine.interfaces.cli_adapter import adapter_app
from memos_engine.interfaces.cli_bench import bench_app
from memos_engine.interfaces.cli_cube import cube_app
from memos_engine.interfaces.cli_store import DEFAULT_STORE, existing, standard_input, user_name
from memos_engine.interfaces.options import (
    DtypeOption,
    JsonOption,
    ModelOption,
    StoreOption,
    UserOption,
    console,
    emit,
    notes,
    show_table,
)

app = typer.Typer(
    help="Memory inside the decoder: remember, recall, and answer from spliced KV memories.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="Fetch and check models.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(cube_app, name="cube")
app.add_typer(adapter_app, name="adapter")
cli_upkeep.register(cube_app)
cli_consolidate.register(cube_app)
cli_govern.register(app)
cli_top.register(app)


def _engine(model: str, store: Path | None, decoder: dict[str, Any] | None = None, **memory: Any) -> Any:
    from memos_engine.api import MemoryEngine
    from memos_engine.config import DecoderConfig, MemoryConfig

    settings = DecoderConfig(**(decoder or {}))
    return MemoryEngine.open(model, store, decoder=settings, memory=MemoryConfig(**memory))


# -- memories ------------------------------------------------------------------------------------


@app.command()
def remember(
    text: Annotated[str, typer.Argument(help="What to remember; - reads standard input.")],
    store: StoreOption = DEFAULT_STORE,
    user: UserOption = None,
    model: ModelOption = "smollm2",
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Store a memory."""
    text = standard_input() if text == "-" else text
    with _engine(model, store) as engine:
        cube = engine.user(user_name(user)).remember(text, tags=tag or ())
    if as_json:
        emit(cube.to_dict())
    else:
        console.print(f"Remembered as {cube.id}.")


@app.command()
def recall(
    query: Annotated[str | None, typer.Argument(help="What to look for; without it, all memories.")] = None,
    store: StoreOption = DEFAULT_STORE,
    user: UserOption = None,
    model: ModelOption = "smollm2",
    k: Annotated[int, typer.Option("-k", help="How many.", min=1)] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show the memories nearest to a query, or all of them."""
    with _engine(model, existing(store)) as engine:
        person = engine.user(user_name(user))
        if query is None:
            rows = [(cube, None) for cube in person.memories()]
        else:
            rows = [(c.cube, round(c.score, 4)) for c in person.recall(query, k=k)]
    if as_json:
        emit([{"score": score, **cube.to_dict()} for cube, score in rows])
    else:
        _memories_table(rows)


@app.command()
def restore(
    cube_id: Annotated[str, typer.Argument(metavar="ID")],
    store: StoreOption = DEFAULT_STORE,
    user: UserOption = None,
    model: ModelOption = "smollm2",
    as_json: JsonOption = False,
) -> None:
    """Bring an archived memory back."""
    with _engine(model, existing(store)) as engine:
        cube = engine.user(user_name(user)).restore(cube_id)
    if as_json:
        emit(cube.to_dict())
    else:
        console.print(f"Restored: {cube.id}")


@app.command()
def forget(
    text: Annotated[str | None, typer.Argument(help="Show the memories this matches.")] = None,
    id_: Annotated[
        list[str] | None, typer.Option("--id", help="Act on this memory; may be repeated.")
    ] = None,
    how: Annotated[
        str, typer.Option(help="archive (kept, not retrieved), delete, or erase (text destroyed).")
    ] = "delete",
    store: StoreOption = DEFAULT_STORE,
    user: UserOption = None,
    model: ModelOption = "smollm2",
    as_json: JsonOption = False,
) -> None:
    """Show matches of TEXT, or archive, delete or erase memories by id."""
    if how not in ("archive", "delete", "erase"):
        raise typer.BadParameter("use archive, delete or erase", param_hint="--how")
    if (text is None) == (not id_):
        raise typer.BadParameter("give either TEXT, to see what matches, or --id, to act")
    with _engine(model, existing(store)) as engine:
        person = engine.user(user_name(user))
        if text is not None:
            found = person.recall(text)
            if as_json:
                emit([{"score": round(c.score, 4), **c.cube.to_dict()} for c in found])
            else:
                _memories_table([(c.cube, c.score) for c in found])
                console.print(
                    "Nothing was changed. Act with: memos-engine forget --id ID --how archive|delete|erase"
                )
            return
        for cube_id in id_ or ():
            person.history(cube_id)  # all of them exist, or nothing is done
        for cube_id in id_ or ():
            getattr(person, how)(cube_id)
    past = {"archive": "archived", "delete": "deleted", "erase": "erased"}[how]
    if as_json:
        emit({past: id_})
    else:
        console.print(f"{past.capitalize()}: {', '.join(id_ or ())}")


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    store: StoreOption = DEFAULT_STORE,
    user: UserOption = None,
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "auto",
    form: Annotated[str, typer.Option(help="How memories enter: auto, kv, text or none.")] = "auto",
    recompute: Annotated[
        float | None,
        typer.Option(
            help="Share of stored memories computed again: 0 fastest, 1 full (default: the plan's).",
            min=0,
            max=1,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Milliseconds until the first token (default: the best answer).", min=0.001),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show what was planned, and why.")] = False,
    memories: Annotated[int, typer.Option(help="Most memories of one request.", min=0)] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option()] = None,
    adapter: Annotated[str | None, typer.Option(help="With this adapter of yours; questions only.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Decode faster on a CPU, weights rounded to 8 bits.")
    ] = False,
    page_dtype: Annotated[
        str, typer.Option(help="KV pages: auto (the model's dtype), or int8 for half of bfloat16's memory.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Talk to the model; it answers from your memories. With --json, one line of JSON per answer."""
    from memos_engine.config import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    chosen = {"form": form, "recompute": recompute, "max_memories": memories, "ttft_budget_ms": budget}
    decoder = {"dtype": dtype, "page_dtype": page_dtype, "int8_decode": int8}
    with _engine(model, store, decoder, **chosen) as engine:
        with notes.status("getting ready"):
            person = engine.ready().user(user_name(user))
        if question is not None:
            _answer(person, question, params, None, as_json, explain, adapter)
            return
        if adapter is not None:
            raise typer.BadParameter(
                "give a question: a conversation takes no adapter", param_hint="--adapter"
            )
        notes.print("Type a message; /remember TEXT stores a memory, an empty line ends.", style="dim")
        while line := _ask():
            try:
                if line.startswith("/remember"):
                    cube = person.remember(line.removeprefix("/remember").strip())
                    notes.print(f"Remembered as {cube.id}.", style="dim")
                else:
                    _answer(person, line, params, "chat", as_json, explain)
            except (MemoryInputError, ContextLengthError) as error:
                if not sys.stdin.isatty():
                    raise
                notes.print(Text.assemble(("error: ", "bold red"), str(error)))


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(
    person: Any,
    question: str,
    params: Any,
    session: str | None,
    as_json: bool,
    explain: bool,
    adapter: str | None = None,
) -> None:
    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    stream = None if as_json else show
    try:
        reply = person.chat(question, params, session=session, stream=stream, adapter=adapter)
    except ContextLengthError:
        if session is None or not person.end_session(session):
            raise
        notes.print("The conversation fills the window: it begins anew, with the memories.", style="dim")
        reply = person.chat(question, params, session=session, stream=stream)
    if as_json:
        emit(
            {
                "text": reply.text,
                "finish_reason": reply.finish_reason,
                "ttft_ms": round(reply.ttft_ms, 2),
                "total_ms": round(reply.total_ms, 2),
                "timings_ms": {name: round(ms, 2) for name, ms in reply.timings.items()},
                "plan": reply.plan.explain(),
                "adapter": reply.adapter,
            }
            | ({"report": reply.plan.report()} if explain or reply.plan.budget_ms is not None else {})
        )
    else:
        print()
        used = [f"{form} {cube_id}" for cube_id, form in reply.forms.items()]
        with_ = f"; adapter: {reply.adapter}" if reply.adapter else ""
        notes.print(
            f"first token {reply.ttft_ms:.0f} ms; memories: {', '.join(used) or 'none'}{with_}", style="dim"
        )
        if explain:
            from memos_engine.interfaces.doctor import show_plan

            show_plan(reply.plan.report(), notes)


def _memories_table(rows: Sequence[tuple[Any, float | None]]) -> None:
    if not rows:
        console.print("No memory matches.")
        return
    short = [(cube, score, textwrap.shorten(cube.body, 160, placeholder="...")) for cube, score in rows]
    show_table(
        ["id", "score", "state", "text"],
        [(cube.id, "" if score is None else f"{score:.2f}", cube.state, text) for cube, score, text in short],
    )


# -- models, doctor, demo, bench -----------------------------------------------------------------


@models_app.command("pull")
def models_pull(
    source: Annotated[str, typer.Argument(help="smollm2, minilm, a hub id, a folder, or a GGUF file.")],
    force: Annotated[bool, typer.Option(help="Fetch again even if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model, converting it if need be. Safe to repeat."""
    from memos_engine.models import pull

    path = pull(source, progress=not as_json, force=force)
    emit({"source": source, "path": str(path)}) if as_json else console.print(f"{source}: {path}")


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List pulled models."""
    from memos_engine.models import list_models

    found = list_models()
    if as_json:
        emit([{"name": m.name, "path": str(m.path), "bytes": m.bytes, "complete": m.complete} for m in found])
        return
    show_table(
        ["name", "MB", "complete", "path"],
        [(m.name, f"{m.bytes / 1e6:.0f}", "yes" if m.complete else "no", m.path) for m in found],
    )


@models_app.command("verify")
def models_verify(source: str, as_json: JsonOption = False) -> None:
    """Hash every file of a pulled model again."""
    from memos_engine.models import resolve, verify

    path = resolve(source)
    verify(path, progress=not as_json)
    if as_json:
        emit({"source": source, "path": str(path), "sound": True})
    else:
        console.print(f"{source}: every file in {path} matches its checksum.")


@app.command()
def doctor(
    store: Annotated[
        Path | None, typer.Option(envvar="MEMOS_ENGINE_STORE", help="Also check this store.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure what requests cost here, for plans under a budget.")
    ] = False,
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, which kernels run, and whether a store is sound; or measure this machine."""
    from memos_engine.interfaces.doctor import calibrated, examine, show, show_costs

    if calibrate:
        costs = calibrated(model, dtype, notes)
        emit(costs) if as_json else show_costs(costs, console)
        return
    report = examine(store)
    emit(report) if as_json else show(report, console)


@app.command()
def demo(
    store: Annotated[
        Path | None, typer.Option(help="Keep the store here (default: a temporary folder).")
    ] = None,
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Two users, their memories, ten questions: without memory, with text, with spliced KV."""
    from memos_engine.interfaces.demo import run

    run(store, model, dtype, as_json, console)


def _version(value: bool) -> None:
    if value:
        print(f"memos-engine {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Entry point: expected errors are one line, not a traceback."""
    try:
        app()
    except (MemosEngineError, OSError) as error:
        if "--json" in sys.argv:
            emit({"error": type(error).__name__, "message": str(error)})
        notes.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
