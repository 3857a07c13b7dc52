"""All benches after one another, into one folder, with one report; an interrupted run can go on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from memos_engine.bench import report
from memos_engine.bench.document import (
    Document,
    ReportFolderError,
    read_result,
    result_path,
    writable,
)
from memos_engine.bench.options import Options, Progress, silent

from memos_engine.errors import MemosEngineError

# In this order: the ceilings first, the long quality run last.
BENCHES: dict[str, str] = {
    "roofline": "roofline",
    "ttft": "ttft",
    "decode": "decode",
    "kernels": "kernels",
    "load": "load",
    "paper-table5": "paper_table5",
    "memory": "memory",
    "attach": "attach",
    "int8": "int8",
    "lora": "lora",
    "retrieval": "retrieval",
    "need": "need",
    "distraction": "distraction",
    "steady": "steady",
    "store": "store",
    "planner": "planner",
    "budget": "budget",
    "quality": "quality",
}
# Results under names of their own, by a command's option.
VARIANTS = ("budget-simulated",)


def runner(bench: str) -> Callable[[Options, Progress], dict[str, Any]]:
    """The `run` of a bench, imported when it is wanted."""
    module = importlib.import_module(f"memos_engine.bench.{BENCHES[bench]}")
    run: Callable[[Options, Progress], dict[str, Any]] = module.run
    return run


def run_all(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """Runs every bench; returns the document of `bench all`: one row per bench. The report lies in `out`.

    A bench that cannot run here (no evaluation data, say) is a row with its reason; the others go on.
    """
    if options.out is None:
        raise ReportFolderError("bench all writes its results and a report: name a folder with --out.")
    folder = writable(options.out)
    index = Document("all", replace(options, resume=False))
    for done, bench in enumerate(BENCHES):

        def show(text: str, part: int, of: int, b: str = bench, d: int = done) -> None:
            progress(f"{b}: {text}", 1000 * d + (1000 * part // of if of else 0), 1000 * len(BENCHES))

        old = _finished(options, bench)
        if old is not None:
            index.add(bench, [_row(old)])
            continue
        try:
            index.add(bench, [_row(runner(bench)(options, show))])
        except MemosEngineError as error:
            index.add(bench, [{"name": bench, "status": "failed", "reason": str(error)}])
    data = index.finish()
    data["report"] = [str(path) for path in report.write(folder, documents_in(folder))]
    return data


def documents_in(folder: Any) -> list[dict[str, Any]]:
    """Results of a folder in the order of `BENCHES`, then their variants; whatever else lies there is left
    alone."""
    found = []
    for bench in (*BENCHES, *VARIANTS):
        path = result_path(folder, bench)
        if path.is_file():
            found.append(read_result(path))
    return found


def _finished(options: Options, bench: str) -> dict[str, Any] | None:
    """With --resume, a complete result of just this configuration and commit."""
    assert options.out is not None
    path = result_path(options.out, bench)
    if not options.resume or not path.is_file():
        return None
    old, fresh = read_result(path), Document(bench, replace(options, out=None))
    same = all(old.get(key) == fresh.data[key] for key in ("config", "commit"))
    return old if same and old.get("complete") else None


def _row(document: dict[str, Any]) -> dict[str, Any]:
    failed = [row for row in document["rows"] if "status" in row]
    return {
        "name": document["bench"],
        "rows": len(document["rows"]),
        "not_measured": len(failed),
        "seconds": document["seconds"],
        "command": document["command"],
    }
