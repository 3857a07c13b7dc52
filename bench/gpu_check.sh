#!/usr/bin/env bash
# Runs bench/gpu_check.py on a machine with torch and triton, without installing anything: the folders are
# laid out as the package would be. Its JSON line belongs under bench/results/.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
tree=$(mktemp -d); trap 'rm -rf "$tree"' EXIT
cp -r "$top/memos_engine" "$tree/memos_engine"
cp -r "$top/kernels" "$tree/memos_engine/kernels"
cp -r "$top/bench" "$tree/memos_engine/bench"
cd "$tree"
PYTHONPATH="$tree" "${PYTHON:-python3}" memos_engine/bench/gpu_check.py "$@"
