"""`memos-engine bench`: the harness's programs behind one command, with one set of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from memos_engine.errors import MemosEngineError
from memos_engine.interfaces.options import JsonOption, ModelOption, console, emit, notes, show_table

bench_app = typer.Typer(
    help="Measure on this machine; --json prints the result as one line, --out DIR keeps it with a report.",
    no_args_is_help=True,
)
_DEFAULT_OUT = Path("memos-engine-bench")

Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine is fast at.")]
Many = list[int] | None
Peers = Annotated[
    str | None,
    typer.Option(help="Comma-separated, or none; default: all that are installed (see `bench peers`)."),
]


def _register(bench: str, summary: str) -> None:
    """One command per bench: they differ in what they do, not in how they are called."""

    def command(
        model: ModelOption = "smollm2",
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        dtype: Dtype = "auto",
        threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
        context: Annotated[Many, typer.Option(help="Memory tokens; may be repeated.")] = None,
        query: Annotated[Many, typer.Option(help="Question tokens; may be repeated.")] = None,
        batch: Annotated[Many, typer.Option(help="Requests decoded together; may be repeated.")] = None,
        memories: Annotated[Many, typer.Option(help="Memories of a prompt; may be repeated.")] = None,
        recompute: Annotated[
            list[float] | None, typer.Option(help="Share of memory tokens computed anew; may be repeated.")
        ] = None,
        cubes: Annotated[Many, typer.Option(help="Memories of a store; may be repeated.")] = None,
        method: Annotated[
            list[str] | None, typer.Option(help="A method of `quality` (default: all); may be repeated.")
        ] = None,
        peers: Peers = None,
        dataset: Annotated[str, typer.Option(help="Evaluation set of `quality`.")] = "xquad_en",
        data: Annotated[
            Path | None, typer.Option(envvar="MEMOS_ENGINE_DATA", help="Folder of evaluation sets.")
        ] = None,
        random_weights: Annotated[
            str | None, typer.Option(help="Shapes with random weights, such as qwen3-8b.")
        ] = None,
        n: Annotated[int | None, typer.Option(help="Measured rounds, or prompts of `quality`.")] = None,
        seed: Annotated[int, typer.Option()] = 0,
        objective_ms: Annotated[
            float | None, typer.Option(help="First token's deadline of `load` (default: 3 x unloaded).")
        ] = None,
        budget: Annotated[
            list[float] | None,
            typer.Option(help="Milliseconds to the first token, of `budget`; may be repeated."),
        ] = None,
        simulate: Annotated[
            bool, typer.Option("--simulate", help="Run `budget` in simulated time, without a model.")
        ] = False,
        profile: Annotated[
            bool, typer.Option("--profile", help="Keep the curve of `quality` beside the models.")
        ] = False,
        quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and rounds.")] = False,
        out: Annotated[
            Path | None, typer.Option(help="Folder for the JSON and the HTML report with its PNGs.")
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run did.")] = False,
        peer_timeout: Annotated[
            float, typer.Option(help="Seconds one call to a system may take before it is ended.")
        ] = 120.0,
        as_json: JsonOption = False,
    ) -> None:
        from memos_engine.bench.options import Options
        from memos_engine.bench.suite import run_all, runner

        options = Options(
            model=model,
            device=device,
            dtype=dtype,
            threads=threads,
            contexts=tuple(context or ()),
            queries=tuple(query or ()),
            batches=tuple(batch or ()),
            memories=tuple(memories or ()),
            recompute=tuple(recompute or ()),
            cubes=tuple(cubes or ()),
            methods=tuple(method or ()),
            peers=_names(peers),
            dataset=dataset,
            data=data,
            random_weights=random_weights,
            n=n,
            seed=seed,
            objective_ms=objective_ms,
            budgets=tuple(budget or ()),
            simulate=simulate,
            profile=profile,
            quick=quick,
            out=out or (_DEFAULT_OUT if bench == "all" else None),
            resume=resume,
            peer_timeout=peer_timeout,
        )
        run = run_all if bench == "all" else runner(bench)
        try:
            with _bar(bench) as progress:
                document = run(options, progress)
        except KeyboardInterrupt:
            if options.out is not None:
                kept = f"interrupted; what is finished is in {options.out}: go on with --resume"
                notes.print(kept, style="yellow")
            raise
        _finish(document, options.out, as_json)

    command.__doc__ = summary
    bench_app.command(bench)(command)


def _names(peers: str | None) -> tuple[str, ...] | None:
    if peers is None:
        return None
    return tuple(name for name in peers.split(",") if name and name != "none")


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal; elsewhere nothing, so that logs stay short."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def _finish(document: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Prints a result and, with a folder, (re)writes the report over all results in it."""
    from memos_engine.bench import report
    from memos_engine.bench.suite import documents_in

    written = document.pop("report", None)
    if out is not None and written is None:
        written = [str(path) for path in report.write(out, documents_in(out))]
    if as_json:
        emit(document)
        return
    _print(document)
    if written:
        notes.print(f"report: {written[0]}")


def _print(document: dict[str, Any]) -> None:
    """The rows that were measured, those that were not with their reasons, the ratios, the notes."""
    from memos_engine.bench.report import tables

    if document["bench"] == "compare":
        found = tables.overview(document)
    else:
        found = [tables.listing(_narrow(document)), tables.missing(document), tables.ratios(document)]
    for table in [t for t in found if t is not None and t.rows]:
        rows = [[f"{c.text} ({c.small})" if c.small else c.text for c in row] for row in table.rows]
        show_table([c.text for c in table.head], rows, title=table.caption)
    for note in document.get("notes", ()):
        notes.print(f"note: {note}", style="dim")


# What a terminal has room for; the JSON and the report hold every column.
_COLUMNS = {
    "ttft": "system mode scope context tier ttft_ms_p50 ttft_ms_p95 share_of_limit same_first_token",
    "decode": "system context batch ms_per_token_p50 ms_per_token_p95 tokens_per_s share_of_limit",
    "quality": "method memories recompute kl_mean kl_token1 top1 answer_f1 answer_contains n",
    "kernels": "op shape backend us_p50 share_of_limit",
    "load": "mode traffic offered_per_s clients met_share goodput_per_s ttft_ms_p50 ttft_ms_p95 itl_ms_p50",
    "paper-table5": "context query build_ms direct_ms ours_ms reduction break_even paper_reduction",
    "retrieval": "retriever r_at_5 r_at_10 r_at_10_low r_at_10_high mrr search_ms_p50 n",
    "distraction": "part tokens memories found other_tokens log_likelihood answer_f1",
    "need": "model part tokens questions n log_loss base_log_loss base_rate calibration_error",
    "budget-simulated": "policy system admission load engines requests met_share ttft_ms_p50 ttft_ms_p95 "
    "ttft_ms_mean quality kv_share",
    "store": "cubes add_ms_p50 add_ms_p95 fsync_ms_p95 search_ms_p50 get_ms_p50 open_s bytes_per_cube",
    "budget": "policy budget_ms requests met_share ttft_ms_p50 predicted_error_p50 kl_mean answer_f1",
    "lora": "system variant batch context ms_per_token_p50 overhead byte_bound swap_ms_p50",
    "steady": "part recompute ttft_ms_p50 ttft_ms_p95 host_share vault_mb records_changed records_added",
}


def _narrow(document: dict[str, Any]) -> dict[str, Any]:
    if document["bench"] not in _COLUMNS:
        return document
    wanted = {*_COLUMNS[document["bench"]].split(), "status", "reason"}
    rows = [{k: v for k, v in row.items() if k in wanted} for row in document["rows"]]
    return {**document, "rows": rows}


for _bench, _summary in {
    "ttft": "Time to first token: full prefill, prefix, splice, question alone; peers in turn; two scopes.",
    "decode": "Milliseconds a token behind a context, tokens a second by batch; peers in turn.",
    "quality": "What splicing costs in quality: KL, agreement and answers against recompute, with baselines.",
    "kernels": "Each op at the model's shapes, ours against torch and against the machine.",
    "roofline": "The machine's ceilings: GEMM by rows and dtype, read, copy, fsync, disk, PCIe.",
    "load": "Closed and open (Poisson) traffic: TTFT and inter-token percentiles, goodput.",
    "paper-table5": "Table 5 of the MemOS paper on this machine, its own cells beside ours.",
    "memory": "Peak memory of a process that remembers, prefills, splices and answers.",
    "attach": "What attach() costs a generate() call: an empty store, no store, the engine, transformers.",
    "int8": "What decoding with weights of eight bits costs in quality.",
    "lora": "What adapters cost: decoding with one for each request, swaps; PEFT in turn.",
    "retrieval": "Evidence recall on LoCoMo: BM25, dense, RRF, ours with and without an embedder.",
    "need": "How likely an answer needs a memory, given what retrieval says: fitted and scored on LoCoMo.",
    "distraction": "What memories that are not needed cost an answer: fitted and checked on LoCoMo.",
    "planner": "How long planning takes, and how far from the best a plan may be, by number of candidates.",
    "budget": "A time to first token is asked for: is it kept, foreseen, and what answers does it leave?",
    "steady": "Hundreds of requests in novel orders: last against first TTFT; do records stay as they were?",
    "store": "The store by its size: adding beside a bare fsync, searching, reading, opening, bytes on disk.",
    "all": "Everything above, into one folder with one report.",
}.items():
    _register(_bench, _summary)


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Result to compare with.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Newer result.")],
    tolerance: Annotated[float, typer.Option(help="Change that does not matter.", min=0.0)] = 0.05,
    relative: Annotated[
        str | None, typer.Option(help="Divide by this system's full prefill of the same round.")
    ] = None,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with status 3 on a regression.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell regressions from noise: ratios B / A with 95 % intervals."""
    from memos_engine.bench.compare import compare_files

    document = compare_files(before, after, tolerance, relative)
    if as_json:
        emit(document)
    else:
        _print(document)
    if fail and document["regressions"]:
        raise typer.Exit(3)


@bench_app.command("peers")
def bench_peers(
    install: Annotated[bool, typer.Option("--install", help="Set up those that are missing.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only this peer; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Show the systems that benches compare with, and set them up."""
    from memos_engine.bench.peers import install as setup
    from memos_engine.bench.peers import registry

    failed: dict[str, str] = {}
    for name in (only or setup.RECIPES) if install else ():
        try:
            setup.install(name, notes.print)
        except MemosEngineError as error:
            failed[name] = str(error)
            notes.print(f"{name}: {error}")
    table = registry.table(device)
    if as_json:
        emit([{**row, **({"error": failed[row["name"]]} if row["name"] in failed else {})} for row in table])
    else:
        show_table(
            ["name", "what", "kind", "ready", "why not"],
            [
                (
                    r["name"],
                    r["title"],
                    r["kind"],
                    "yes" if r["installed"] else "no",
                    failed.get(r["name"], r["why"]),
                )
                for r in table
            ],
        )
    if failed:
        raise typer.Exit(1)


@bench_app.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds results of `bench --out`.")],
    as_json: JsonOption = False,
) -> None:
    """Write the HTML report and its PNGs once more from the results in a folder."""
    from memos_engine.bench import report
    from memos_engine.bench.document import ReportFolderError, writable
    from memos_engine.bench.suite import documents_in

    documents = documents_in(folder) if folder.is_dir() else []
    if not documents:
        raise ReportFolderError(
            f"{folder} holds no result; make one with `memos-engine bench all --out DIR`."
        )
    written = [str(path) for path in report.write(writable(folder), documents)]
    if as_json:
        emit({"written": written})
        return
    for path in written:
        console.print(path)
