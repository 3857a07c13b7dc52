"""What `memos-engine doctor` looks at."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from memos_engine import __version__
from memos_engine.interfaces.options import show_table


def examine(store: Path | None) -> dict[str, Any]:
    """Versions, machine, kernel paths, models and, given one, a store; JSON-safe."""
    import torch

    from memos_engine import ops
    from memos_engine.config import default_dtype
    from memos_engine.models import list_models

    report: dict[str, Any] = {
        "memos_engine": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "packages": {name: _version(name) for name in ("torch", "transformers", "safetensors", "triton")},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "default_dtype": default_dtype(),
        "ops": ops.describe(),
        "models": [{"name": m.name, "complete": m.complete, "path": str(m.path)} for m in list_models()],
    }
    if store is not None:
        report["store"] = _store(store)
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report for people."""
    packages = ", ".join(f"{n} {v}" for n, v in report["packages"].items() if v)
    console.print(
        f"memos-engine {report['memos_engine']}, Python {report['python']}, SQLite {report['sqlite']}"
    )
    console.print(
        f"{packages}; {report['cores']} cores, {report['threads']} threads, GPU: {report['gpu'] or 'none'}"
    )
    console.print(f"default dtype here: {report['default_dtype']}")
    show_table(
        ["op", "path"],
        [(op, ", ".join(f"{k}: {v}" for k, v in path.items())) for op, path in report["ops"].items()],
    )
    if not report["models"]:
        console.print("No model yet: memos-engine models pull smollm2")
    for model in report["models"]:
        console.print(
            f"model {model['name']}: {'complete' if model['complete'] else 'INCOMPLETE, pull it again'}"
        )
    if "store" in report:
        s = report["store"]
        console.print(
            f"store {s['path']}: {s['cubes']} memories, {s['kv_records']} KV records "
            f"({s['sound']} files sound), audit chain of {s['audited']} events verifies"
        )


def calibrated(model: str, dtype: str, notes: Console) -> dict[str, Any]:
    """Measures this machine's costs with a model and keeps them; the table, JSON-safe."""
    from rich.progress import Progress

    from memos_engine.api import MemoryEngine
    from memos_engine.calibration import calibrate, save_costs
    from memos_engine.config import DecoderConfig
    from memos_engine.memory.embed import default_embedder

    with (
        MemoryEngine.open(model, decoder=DecoderConfig(dtype=dtype)) as engine,
        Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar,
    ):
        task = bar.add_task("calibrating", total=None)
        table = calibrate(
            engine.ready().decoder,
            default_embedder(),
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
        found: dict[str, Any] = json.loads(table.to_json())
        return found | {"path": str(save_costs(table))}


def show_costs(costs: dict[str, Any], console: Console) -> None:
    """Prints a cost table for people."""
    show_table(["rows of a forward", "ms"], [(str(rows), f"{ms:.1f}") for rows, ms in costs["forward"]])
    base, record, thousand = costs["splice"]
    each, mib = costs["fetch"]
    console.print(
        f"attention {costs['pairs_ms']:.0f} ms a million pairs; splice {base:.2f} ms, {record:.2f} ms a "
        f"record, {thousand:.2f} ms a thousand tokens; fetch {each:.2f} ms a record, {mib:.2f} ms a MiB; "
        f"first pass {costs['probe_ms']:.0f} ms a million pairs more; retrieval {costs['retrieve_ms']:.1f} ms"
    )
    console.print(f"kept in {costs['path']}")


def show_plan(report: dict[str, Any], console: Console) -> None:
    """Prints what a plan foresaw, what it took, and why each memory is in or out."""
    if report["budget_ms"] is not None:
        kept = {True: "met", False: "MISSED", None: "open"}[report["met"]]
        console.print(f"budget {report['budget_ms']:g} ms: {kept}; expected quality {report['quality']:.2f}")
    times = [
        (name, *("-" if ms is None else f"{ms:.1f}" for ms in (row["predicted_ms"], row["actual_ms"])))
        for name, row in report["stages"].items()
    ]
    show_table(["stage", "predicted ms", "actual ms"], times)
    show_table(
        ["memory", "form", "need", "why"],
        [(row["cube_id"], row["form"], f"{row['need']:.2f}", row["reason"]) for row in report["memories"]],
    )
    for note in report["notes"]:
        console.print(note, style="dim")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _store(path: Path) -> dict[str, Any]:
    from memos_engine.errors import NotAStoreError
    from memos_engine.memory.store import MemoryStore

    if not (path / "memory.db").exists():
        raise NotAStoreError(f"{path} is not a memos_engine store; name the directory that holds memory.db.")
    with MemoryStore.open(path) as store:
        return {"path": str(path), "audited": store.audit_verify(), "sound": store.scrub(), **store.stats()}
