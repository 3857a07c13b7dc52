"""Everything a GPU has to show, in one call: `bench/gpu_check.sh` lays out the package and starts this.

Build, the kernels and a whole model against references and floors, tests, then the benches with random
weights. Each part is a process with a time limit, so that one that hangs costs its own share of the time and
nothing else. All that was measured ends in one JSON file, rewritten after every part.
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
    """One process. seconds: its limit; result: the document that it writes."""

    name: str
    argv: tuple[str, ...]
    seconds: float
    result: Path | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--tree", type=Path, required=True)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; use --device cpu to try the script itself.")
    options.out = options.source / options.out  # a relative one means the checkout
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes - 15
    target = options.out / f"{prefix(options.device)}check.json"
    document: dict[str, Any] = {
        "bench": "gpu_check",
        "version": 2,
        "complete": False,
        "machine": machine(),
        "commit": commit_of(options.source),
        "command": f"bench/gpu_check.sh --device {options.device}",
        "config": {"device": options.device},
        "rows": [],
    }
    for part in parts(options.device, options.source, options.tree):
        begun = time.monotonic()
        limit = min(part.seconds, deadline - begun)
        status, said = ("skipped", "no time left") if limit < 5 else run(part, limit)
        row: dict[str, Any] = {
            "part": part.name,
            "status": status,
            "seconds": round(time.monotonic() - begun, 1),
            "said": said,
        }
        print(f"{part.name}: {status}, {row['seconds']} s. {said}", flush=True)
        if part.result is not None and part.result.is_file():
            row["result"] = json.loads(part.result.read_text())
        document["rows"].append(row)
        write_atomically(target, json.dumps(document) + "\n")
    document["complete"] = True
    write_atomically(target, json.dumps(document) + "\n")
    table(document["rows"])
    raise SystemExit(any(row["status"] not in ("ok", "skipped") for row in document["rows"]))


def prefix(device: str) -> str:
    """What the result's name begins with, so that a dry run never replaces a GPU's."""
    return "gpu-" if device == "cuda" else "gpu-dry-run-"


def parts(device: str, source: Path, tree: Path) -> list[Part]:
    """What is run, in order of worth: what comes first is done even when time runs out."""
    build, python = tree / "build", sys.executable
    configure = (
        f"cmake -S {source} -B {build} -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE={python} "
        f"-Dpybind11_DIR=$({python} -m pybind11 --cmakedir) -DMEMOS_ENGINE_OUTPUT={tree}/memos_engine"
    )
    small, big = ("tiny", "smollm2-135m") if device == "cpu" else ("smollm2-135m", "qwen3-8b")
    results = tree / "results"
    results.mkdir(exist_ok=True)

    def own(module: str, limit: float, *words: str, shapes: str = "") -> Part:
        target = results / f"{module}{shapes}.json"
        rest = (str(target), *words) if words else (shapes, str(target))
        argv = (python, "-m", f"memos_engine.bench.gpu_{module}", device, *rest)
        return Part(f"{module} {shapes}".strip(), argv, limit, target)

    shapes = small if device == "cpu" else big
    found = [
        Part("build", ("bash", "-c", f"{configure} && cmake --build {build} -j {os.cpu_count()}"), 200),
        own("kernels", 120, shapes=shapes),
        own("lora", 60, shapes=shapes),
        own("model", 120, shapes=shapes),
        own("writers", 60, *((small,) if device == "cpu" else (small, big))),
    ]
    if device == "cuda":
        # The interpreter's tests are slow and need no GPU; they run wherever the suite runs.
        tests = f"{python} -m pytest -q -x --import-mode=importlib -p no:cacheprovider {tree}/tests/kernels"
        left_out = "--ignore-glob=*test_triton_attention.py --ignore-glob=*test_triton_rows.py"
        found.append(Part("kernel tests", ("bash", "-c", f"{tests} {left_out}"), 120))
    benches: list[tuple[str, str, list[str], float]] = [
        ("ttft", big, ["--context", "1024", "--context", "4096", "--n", "5"], 90),
        ("decode", big, ["--n", "3"], 60),
        ("paper-table5", big, ["--n", "3"], 120),
        ("kernels", big, ["--context", "1024"], 60),
    ]
    if device == "cuda":
        benches.append(("paper-table5", "qwen3-32b", ["--n", "2"], 120))
    else:
        benches = [(name, small, [*more, "--quick"], limit) for name, _, more, limit in benches]
    for name, shapes, more, limit in benches:
        folder, target = results / f"{name}-{shapes}", results / f"bench-{name}-{shapes}.json"
        words = [python, "-m memos_engine.bench.gpu_bench", name, device, shapes, str(folder), str(target)]
        command = " ".join([*words, *more])
        found.append(Part(f"bench {name} {shapes}", ("bash", "-c", command), limit, target))
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


def table(rows: list[dict[str, Any]]) -> None:
    """What a person wants to see first: parts, then failed checks and the headline rows of each result."""
    print()
    for row in rows:
        print(f"{row['part']:32} {row['status']:8} {row['seconds']:6.1f} s")
    for part in rows:
        for row in part.get("result", {}).get("rows", ()):
            if row.get("ok") is False or row.get("bit_equal") is False or row.get("graph_differs"):
                print(f"WRONG {part['part']}: {row}")
            keys = ("ttft_ms_p50", "ours_ms", "ms_per_token_p50", "ms_graph", "ms_eager", "us_p50")
            value = next((row[k] for k in keys if row.get(k) is not None), None)
            if value is not None and row.get("system") != "torch":
                what = [row.get(k) for k in ("op", "shape", "mode", "context", "query", "batch")]
                name = " ".join(str(w) for w in what if w not in (None, ""))
                print(f"{part['part']:28} {name:48} {value:10.3f}  share {row.get('share_of_limit', '-')}")


if __name__ == "__main__":
    main()
