"""Everything a GPU has to show, in one call: `bench/gpu_check.sh` lays out the package and starts this.

Build, tests, the writers' bits and speed against the reference, then the benches with random weights. Each
part is a process with a time limit, so that one that hangs costs its own share of the time and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.document import commit_of, write_atomically
from memos_engine.bench.machine import machine


@dataclass(frozen=True)
class Part:
    """One process. seconds: its limit; bench: it writes a result document under this name."""

    name: str
    argv: tuple[str, ...]
    seconds: float
    bench: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tree", type=Path, required=True)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; use --device cpu to try the script itself.")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes - 15
    rows = []
    for part in parts(options.device, options.source, options.tree, options.out):
        begun = time.monotonic()
        limit = min(part.seconds, deadline - begun)
        status, said = ("skipped", "no time left") if limit < 5 else run(part, limit)
        row = {
            "part": part.name,
            "status": status,
            "seconds": round(time.monotonic() - begun, 1),
            "said": said,
        }
        print(f"{part.name}: {status}, {row['seconds']} s. {said}", flush=True)
        rows.append(row)
    document = {
        "bench": "gpu_check",
        "version": 1,
        "complete": True,
        "machine": machine(),
        "commit": commit_of(options.source),
        "command": f"bench/gpu_check.sh --device {options.device}",
        "config": {"device": options.device},
        "rows": rows,
    }
    write_atomically(options.out / f"{prefix(options.device)}check.json", json.dumps(document) + "\n")
    table(rows, options.out, options.device)
    raise SystemExit(any(row["status"] not in ("ok", "skipped") for row in rows))


def prefix(device: str) -> str:
    """What the results' names begin with, so that a GPU's never replace this machine's."""
    return "gpu-" if device == "cuda" else "gpu-dry-run-"


def parts(device: str, source: Path, tree: Path, out: Path) -> list[Part]:
    """What is run, in order of worth: what comes first is done even when time runs out."""
    build, python = tree / "build", sys.executable
    configure = (
        f"cmake -S {source} -B {build} -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE={python} "
        f"-Dpybind11_DIR=$({python} -m pybind11 --cmakedir) -DMEMOS_ENGINE_OUTPUT={tree}/memos_engine"
    )
    small, big = ("tiny", "smollm2-135m") if device == "cpu" else ("smollm2-135m", "qwen3-8b")
    tests = f"{python} -m pytest -q -x --import-mode=importlib -p no:cacheprovider {tree}/tests/kernels"
    found = [
        Part("build", ("bash", "-c", f"{configure} && cmake --build {build} -j {os.cpu_count()}"), 150),
        Part("writers", (python, "-m", "memos_engine.bench.gpu_writers", device, small, big), 60),
        Part("kernel tests", ("bash", "-c", tests), 120),
    ]
    benches: list[tuple[str, str, list[str], float]] = [
        ("roofline", big, [], 60),
        ("kernels", big, ["--context", "1024"], 60),
        ("ttft", big, ["--context", "1024", "--context", "4096", "--n", "5"], 90),
        ("paper-table5", big, ["--n", "3"], 120),
        ("decode", big, ["--n", "3"], 60),
    ]
    if device == "cuda":
        benches.append(("paper-table5", "qwen3-32b", ["--n", "2"], 120))
    else:
        benches = [(name, small, [*more, "--quick"], limit) for name, _, more, limit in benches]
    for name, shapes, more, limit in benches:
        folder = tree / "results" / f"{name}-{shapes}"
        target = out / f"{prefix(device)}{name}-{shapes}.json"
        words = [python, "-m memos_engine.bench.gpu_bench", name, device, shapes, str(folder), str(target)]
        command = " ".join([*words, *more])
        found.append(Part(f"{name} {shapes}", ("bash", "-c", command), limit, bench=True))
    return found


def run(part: Part, limit: float) -> tuple[str, str]:
    """Status (ok, failed, timeout) and the last line it printed."""
    try:
        done = subprocess.run(
            part.argv, capture_output=True, text=True, timeout=limit, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return "timeout", f"ended after {limit:.0f} s"
    lines = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()]
    if done.returncode != 0:
        sys.stderr.write("\n".join(lines[-25:]) + "\n")
    return ("ok" if done.returncode == 0 else "failed"), (lines or ["(silent)"])[-1].strip()[:200]


def table(rows: list[dict[str, Any]], out: Path, device: str) -> None:
    """What a person wants to see first: parts, then the headline rows of each result."""
    print()
    for row in rows:
        print(f"{row['part']:32} {row['status']:8} {row['seconds']:6.1f} s")
    for path in sorted(out.glob(f"{prefix(device)}*.json")):
        for row in json.loads(path.read_text())["rows"]:
            value = next(
                (row[k] for k in ("ttft_ms_p50", "ours_ms", "ms_per_token_p50", "us_p50") if k in row), None
            )
            wanted = row.get("system") != "torch" and row.get("op") in (None, "paged_attention", "splice_kv")
            if value is not None and wanted:
                what = [row.get(k) for k in ("op", "shape", "mode", "context", "query", "batch")]
                name = " ".join(str(w) for w in what if w not in (None, ""))
                print(f"{path.stem:34} {name:56} {value:10.2f}  share {row.get('share_of_limit', '-')}")


if __name__ == "__main__":
    main()
