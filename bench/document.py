"""A benchmark's result: one JSON document that is valid after every unit of work, and can be resumed.

    {"bench", "version", "complete", "machine", "commit", "command", "started", "seconds", "config",
     "ceilings", "units", "rows", "ratios", "notes"}

A unit is the smallest piece that is kept or repeated as a whole (one context length, one method, ...).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from memos_engine.bench.machine import cpu_ticks, machine
from memos_engine.bench.options import Options

from memos_engine.errors import MemosEngineError

VERSION = 1
Row = dict[str, Any]


class ReportFolderError(MemosEngineError):
    """The folder named by --out cannot be written to, or holds something that is no result."""


class Document:
    """Collects rows unit by unit; with `out` every unit is on disk before the next begins."""

    def __init__(self, bench: str, options: Options, ceilings: dict[str, Any] | None = None) -> None:
        self.path = None if options.out is None else result_path(writable(options.out), bench)
        self._begun = time.perf_counter()
        self._before = 0.0
        self._ticks = cpu_ticks()
        self.data: dict[str, Any] = {
            "bench": bench,
            "version": VERSION,
            "complete": False,
            "machine": machine(),
            "commit": commit(),
            "command": command(bench, options),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "config": options.public(),
            "ceilings": ceilings or {},
            "units": [],
            "rows": [],
            "ratios": [],
            "notes": [],
        }
        if options.resume and self.path is not None and self.path.is_file():
            self._resume(self.path)

    def has(self, unit: str) -> bool:
        """Whether an earlier, interrupted run has finished this unit."""
        return unit in self.data["units"]

    def add(
        self, unit: str, rows: Sequence[Row], ratios: Sequence[Row] = (), notes: Sequence[str] = ()
    ) -> None:
        """Adds a finished unit and writes the document."""
        self.data["units"].append(unit)
        self.data["rows"] += rows
        self.data["ratios"] += ratios
        self.note(*notes)
        self._write()

    def note(self, *texts: str) -> None:
        """Adds a sentence that a reader of the rows must know; each once."""
        self.data["notes"] += [text for text in texts if text not in self.data["notes"]]

    def finish(self) -> dict[str, Any]:
        """Marks the document complete, writes it and returns it."""
        self.data["complete"] = True
        self._write()
        return self.data

    def _resume(self, path: Path) -> None:
        old = read_result(path)
        same = all(old.get(key) == self.data[key] for key in ("bench", "version", "config", "commit"))
        if same and old["machine"].get("cpu") == self.data["machine"]["cpu"]:
            for key in ("units", "rows", "ratios", "notes", "ceilings", "started"):
                self.data[key] = old[key]
            self._before = float(old["seconds"])
        else:
            self.note(f"--resume found {path.name} of another configuration, commit or machine: begun anew.")

    def _write(self) -> None:
        ticks = cpu_ticks()
        if ticks is not None and self._ticks is not None:
            steal, all_ = (now - then for now, then in zip(ticks, self._ticks, strict=True))
            self.data["machine"]["steal_share"] = round(steal / max(1, all_), 4)
        self.data["seconds"] = round(self._before + time.perf_counter() - self._begun, 1)
        if self.path is not None:
            write_atomically(self.path, json.dumps(self.data, ensure_ascii=False) + "\n")


def result_path(folder: Path, bench: str) -> Path:
    """Where the result of a bench lies in a folder."""
    return folder / f"{bench}.json"


def read_result(path: Path) -> dict[str, Any]:
    """A result document from a file; ReportFolderError says what is wrong with it."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ReportFolderError(f"{path} cannot be read ({error}).") from error
    except ValueError as error:
        raise ReportFolderError(f"{path} is not JSON ({error}); is it a result of `bench`?") from error
    if not isinstance(data, dict) or not {"bench", "rows", "machine", "config"} <= data.keys():
        raise ReportFolderError(f"{path} is not a result document of `memos-engine bench`.")
    return data


def writable(folder: Path) -> Path:
    """Makes the folder and proves, before anything is measured, that results can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ReportFolderError(f"--out {folder}: results cannot be written there ({error}).") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def commit() -> str | None:
    """The commit of the checkout this runs from; see `commit_of`."""
    return commit_of(Path(__file__).resolve().parents[1])


def commit_of(top: Path) -> str | None:
    """A checkout's commit, `-dirty` if the code differs from it; None where this is no checkout of ours."""
    if not (top / ".git").exists() or not (top / "csrc").is_dir():
        return None  # installed as a package, perhaps inside some other project's checkout
    with suppress(OSError, subprocess.SubprocessError):
        head = _git(top, "rev-parse", "--short=12", "HEAD")
        changed = _git(top, "status", "--porcelain", "--", "memos_engine", "kernels", "csrc", "bench/*.py")
        return f"{head}-dirty" if changed else head
    return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def command(bench: str, options: Options) -> str:
    """The command line that repeats a run: only what differs from the defaults."""
    plain, words = Options(), ["memos-engine bench", bench]
    names = {
        "contexts": "context",
        "queries": "query",
        "batches": "batch",
        "methods": "method",
        "random_weights": "random-weights",
        "peer_timeout": "peer-timeout",
        "objective_ms": "objective-ms",
        "budgets": "budget",
    }
    for field in plain.__dataclass_fields__:
        value = getattr(options, field)
        if value == getattr(plain, field) or field in ("out", "resume", "data"):
            continue
        flag = f"--{names.get(field, field)}"
        if value is True:
            words.append(flag)
        elif field == "peers":
            words.append(f"{flag} {','.join(value) or 'none'}")
        elif isinstance(value, tuple):
            words += [f"{flag} {item}" for item in value]
        else:
            words.append(f"{flag} {value}")
    return " ".join(words)
