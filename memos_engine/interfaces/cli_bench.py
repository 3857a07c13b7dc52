"""`memos-engine bench`: the harness's programs behind one command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from memos_engine.interfaces.options import JsonOption, ModelOption, emit, notes, show_table

bench_app = typer.Typer(
    help="Measure on this machine; --json prints the result as one line.", no_args_is_help=True
)


@bench_app.command("ttft")
def bench_ttft(
    model: ModelOption = "smollm2",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    context: Annotated[
        list[int] | None, typer.Option(help="Memory tokens; may be repeated (default 1024).")
    ] = None,
    query: Annotated[int, typer.Option(min=1)] = 32,
    memories: Annotated[int, typer.Option(min=1)] = 4,
    n: Annotated[int, typer.Option(help="Measured rounds.", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    peers: Annotated[str, typer.Option(help="Comma-separated; empty for none.")] = "transformers",
    seed: Annotated[int, typer.Option()] = 0,
    as_json: JsonOption = False,
) -> None:
    """Time to first token: full prefill, prefix, splice, query alone, transformers."""
    from memos_engine.bench import ttft

    config = ttft.TtftConfig(
        model, dtype, tuple(context or (1024,)), query, memories, n, seed=seed, threads=threads,
        peers=tuple(p for p in peers.split(",") if p),
    )  # fmt: skip
    _bench(
        lambda progress: ttft.run(config, progress),
        as_json,
        ["system", "mode", "context", "ttft_ms_p50", "ttft_ms_p95", "same_first_token"],
    )


@bench_app.command("memory")
def bench_memory(
    model: ModelOption = "smollm2",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Peak memory of a process that remembers, prefills, splices and answers."""
    from memos_engine.bench import memory

    _bench(
        lambda _: memory.run(model, dtype),
        as_json,
        ["dtype", "peak_mb", "model_mb", "pool_mb", "overhead_mb", "overhead_full_pool_mb"],
    )


def _bench(run: Callable[[Callable[[str], None]], dict[str, Any]], as_json: bool, columns: list[str]) -> None:
    with notes.status("warming up") as status:
        document = run(status.update)
    if as_json:
        emit(document)
        return
    show_table(columns, [[row[column] for column in columns] for row in document["rows"]])
