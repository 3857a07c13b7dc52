"""One bench with random weights, its result under a name of its own.

python -m memos_engine.bench.gpu_bench BENCH DEVICE SHAPES FOLDER TARGET [--context N ...] [--n N] [--quick]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from memos_engine.bench.document import result_path
from memos_engine.bench.options import Options
from memos_engine.bench.suite import runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bench", "device", "shapes"):
        parser.add_argument(name)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--n", type=int)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    options = Options(
        device=given.device,
        dtype="bfloat16",
        random_weights=given.shapes,
        contexts=tuple(given.context or ()),
        n=given.n,
        quick=given.quick,
        peers=(),
        out=given.folder,
    )
    try:
        document = runner(given.bench)(options, lambda text, done, total: None)
    finally:  # what was measured before an error counts
        written = result_path(given.folder, given.bench)
        if written.is_file():
            shutil.copy(written, given.target)
    failed = [row["reason"] for row in document["rows"] if "status" in row]
    print(failed[0] if failed else f"{len(document['rows'])} rows")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
