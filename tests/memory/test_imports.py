"""The control plane stands alone: neither torch nor the decoder is imported by it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import memos_engine.memory

FOLDER = Path(memos_engine.memory.__file__).parent
FORBIDDEN = ("torch", "memos_engine.decoder", "memos_engine.ops", "memos_engine.kernels", "memos_engine.api")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_no_module_imports_the_other_side() -> None:
    for path in FOLDER.glob("*.py"):
        wrong = {n for n in imported(path) if any(n == f or n.startswith(f + ".") for f in FORBIDDEN)}
        assert not wrong or path.name in ("embed.py", "bert.py"), (path.name, wrong)


def test_using_a_store_does_not_load_torch() -> None:
    modules = "store, operator, scheduler, vault, index, governance, lifecycle, cube, audit, reader, extract"
    code = f"import sys; from memos_engine.memory import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_store_writes_sql() -> None:
    allowed = ("store", "schema", "migrations")
    verbs = re.compile(r"INSERT INTO|DELETE FROM|UPDATE \w|SELECT ")
    for path in FOLDER.glob("*.py"):
        if path.name.startswith(allowed):
            continue
        text = path.read_text(encoding="utf-8")
        assert not verbs.search(text), path.name
