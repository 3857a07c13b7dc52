#!/usr/bin/env bash
# Builds, tests and times everything on a machine with torch, triton, nvcc, pybind11 and cmake, in one call and
# without network: nothing is installed, the folders are laid out as the package would be.
#   bench/gpu_check.sh [--device cuda] [--out bench/results] [--minutes 9.5]
# Packages that are missing there can be carried along: PYTHONPATH=<folder of unpacked wheels> bench/gpu_check.sh
# Prints a short table last; the result is gpu-check.json in --out. With --device cpu everything is tried at tiny
# sizes, Triton's kernels in its interpreter (gpu-dry-run-check.json).
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
tree=$(mktemp -d); trap 'rm -rf "$tree"' EXIT
cp -r "$top/memos_engine" "$tree/memos_engine"
rm -f "$tree"/memos_engine/*.so
cp -r "$top/kernels" "$tree/memos_engine/kernels"
cp -r "$top/bench" "$tree/memos_engine/bench"
cp -r "$top/tests" "$tree/tests"
cp -r "$top/csrc" "$tree/csrc"  # tests build parts of it
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
case " $* " in *" cpu "* | *"=cpu "*) export TRITON_INTERPRET=1 ;; esac
cd "$tree"  # so that nothing is imported from the checkout, whose folders are not laid out as the package
exec_check() { "$python" -m memos_engine.bench.gpu_check --source "$top" --tree "$tree" "$@"; }
exec_check "$@"
