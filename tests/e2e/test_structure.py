"""The rules of the layout: imports point one way, files stay small, only the store writes SQL."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each layer may import itself and what stands after it.
LAYERS = ["interfaces", "bench", "api", "meeting", "parts", "ops", "kernels", "base"]
LAYER_OF = {
    "interfaces": "interfaces",
    "bench": "bench",
    "api": "api",
    "user": "api",
    "activation": "meeting",
    "contexts": "meeting",
    "neutral": "meeting",
    "profile": "meeting",
    "canary": "meeting",
    "planning": "meeting",
    "outlook": "meeting",
    "preparing": "meeting",
    "calibration": "meeting",
    "parameter": "meeting",
    "user_adapters": "meeting",
    "consolidate": "meeting",
    "tiers": "meeting",
    "transforming": "meeting",
    "combined": "meeting",
    "background": "meeting",
    "reply": "meeting",
    "chats": "meeting",
    "prompt": "meeting",
    "models": "parts",
    "memory": "parts",
    "decoder": "parts",
    "ops": "ops",
    "kernels": "kernels",
    "config": "base",
    "errors": "base",
}
SEPARATE = {"memory": {"decoder"}, "decoder": {"memory", "models"}, "models": {"memory", "decoder"}}


def python_files():
    for top, package in (("memos_engine", ""), ("kernels", "kernels"), ("bench", "bench")):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            yield path, package or parts[0]


def imported(path):
    """Parts of memos_engine a file imports, type-checking imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "memos_engine" and len(pieces) > 1 and pieces[1] in LAYER_OF:
                yield pieces[1]


def test_imports_point_one_way():
    wrong = []
    for path, part in python_files():
        if part == "__init__":
            continue
        for other in imported(path):
            if other == part:
                continue
            below = LAYERS.index(LAYER_OF[other]) >= LAYERS.index(LAYER_OF[part])
            if not below or other in SEPARATE.get(part, ()):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    # The command line starts benchmarks; benchmarks never start the command line.
    wrong = [w for w in wrong if not w.startswith("bench/") or "interfaces" in w]
    assert not wrong


def test_no_file_is_over_400_lines():
    patterns = ("memos_engine/**/*.py", "kernels/**/*.py", "bench/**/*.py", "tests/**/*.py", "csrc/**/*.*")
    long = {
        str(p.relative_to(ROOT)): n
        for g in patterns
        for p in ROOT.glob(g)
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_only_the_store_writes_sql():
    sql = re.compile(r"\b(SELECT .+ FROM|INSERT (OR \w+ )?INTO|DELETE FROM|UPDATE \w+ SET)\b")
    allowed = re.compile(r"memory/(store\w*|schema\w*|migrations|audit)\.py$")
    found = [p for p, _ in python_files() if sql.search(p.read_text()) and not allowed.search(str(p))]
    assert not found


def test_one_class_is_called_scheduler():
    names = [
        node.name
        for path, _ in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and "Scheduler" in node.name
    ]
    assert names == ["MemScheduler"]


def test_native_code_includes_no_torch_header():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    assert not [p for p in sources if re.search(r"#include\s*[<\"](torch|ATen|c10)/", p.read_text())]


@pytest.mark.parametrize("name", ["kernels", "bench"])
def test_the_folders_at_the_top_are_not_packages_of_their_own(name):
    import importlib

    module = importlib.import_module(f"memos_engine.{name}")
    assert module.__name__ == f"memos_engine.{name}"
