"""Builds the wheel, installs it and an editable copy into clean environments and tries both.

`make wheel-test` runs it; it is not a pytest file, since it takes a compiler and a minute. Prints a line per
check and exits 1 if one failed. The tree is copied first: stale build folders cannot help the wheel, and the
checkout stays as it was. Heavy dependencies (torch, transformers) are borrowed from the running environment
by a .pth file instead of installed anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# folder in the checkout -> package it is installed as
PACKAGES = {"memos_engine": "memos_engine", "kernels": "memos_engine/kernels", "bench": "memos_engine/bench"}
MODULES = (
    "memos_engine",
    "memos_engine.kernels",
    "memos_engine.bench",
    "memos_engine.bench.peers",
    "memos_engine.bench.report",
    "memos_engine.models",
    "memos_engine.api",
)
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.pyd", "results", "node_modules"
)
PROBE = """
import importlib, importlib.metadata, json
found = {}
for name in %r:
    try:
        found[name] = importlib.import_module(name).__file__
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"modules": found, "version": importlib.metadata.version("memos-engine")}))
"""


class Checks:
    """Counts and prints."""

    def __init__(self) -> None:
        self.failed = 0

    def that(self, what: str, good: bool, detail: object = "") -> bool:
        """Records one check."""
        self.failed += not good
        print(
            f"{'ok  ' if good else 'FAIL'}  {what}" + (f": {detail}" if detail and not good else ""),
            flush=True,
        )
        return good


def run(command: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs without PYTHONPATH, with the build tools of this environment on PATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if has_compiler():
        environment["MEMOS_ENGINE_REQUIRE_NATIVE"] = "1"
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def has_compiler() -> bool:
    """Without one the package installs all the same, only without its native module."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def tail(result: subprocess.CompletedProcess[str]) -> str:
    """The end of what a failed command said."""
    return "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])


def sources(tree: Path) -> set[str]:
    """Every file the wheel should hold, by its name there: all but the checkout's scripts and results."""
    return {
        f"{package}/{path.relative_to(tree / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix != ".sh" and "results" not in path.parts
    }


def check_contents(checks: Checks, wheel: Path, tree: Path) -> None:
    """Nothing is missing, nothing foreign is at the top, the native module is inside."""
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = sorted(sources(tree) - names)
    checks.that("wheel: holds every source and data file", not missing, f"missing {missing}")
    tops = {name.split("/")[0] for name in names}
    foreign = {top for top in tops if top != "memos_engine" and not top.endswith(".dist-info")}
    checks.that("wheel: claims no import name but memos_engine", not foreign, foreign)
    checks.that("wheel: carries its licence", any(name.endswith("/LICENSE") for name in names))
    if has_compiler():
        native = [name for name in names if name.startswith("memos_engine/_cpu") and name.endswith(".so")]
        checks.that("wheel: carries the native module", len(native) == 1, native)


def environment(folder: Path) -> Path:
    """A fresh, empty virtual environment; returns its python."""
    venv.create(folder, symlinks=os.name != "nt")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def install(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """This environment's pip installs into another one, from local files only."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    return run([*pip, *arguments], cwd)


def borrow(python: Path) -> Path:
    """Puts this environment's packages behind the new one's own; returns the new site-packages.

    Folders named by a .pth file have their own .pth files ignored: an editable install here stays out.
    """
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    ours = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
    (site / "zz_borrowed.pth").write_text("\n".join(ours) + "\n")
    return site


def check_install(
    checks: Checks, kind: str, python: Path, elsewhere: Path, ours: Callable[[str], bool]
) -> None:
    """Imports and the command, from a folder that has nothing to do with the checkout."""
    names = [*MODULES, "kernels", "bench"] + (["memos_engine._cpu"] if has_compiler() else [])
    result = run([python, "-I", "-c", PROBE % (names,)], elsewhere)
    if not checks.that(
        f"{kind}: python starts and the package has metadata", result.returncode == 0, tail(result)
    ):
        return
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    for name in names:
        file = str(found["modules"][name])
        if name in ("kernels", "bench"):
            checks.that(f"{kind}: `import {name}` is not ours", not ours(file), file)
        else:
            checks.that(f"{kind}: {name} imports from where it was installed", ours(file), file)
    if not has_compiler():
        print(f"skip  {kind}: the native module (no C++ compiler here)")
    command = python.parent / "memos-engine"
    if checks.that(f"{kind}: the command memos-engine is there", command.exists(), command):
        result = run([command, "--help"], elsewhere)
        good = result.returncode == 0 and "models" in result.stdout
        checks.that(f"{kind}: `memos-engine --help` works", good, tail(result))


def main() -> int:
    """All checks; the exit status."""
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="memos-engine-wheel-") as name:
        work = Path(name).resolve()
        tree, elsewhere = work / "tree", work / "elsewhere"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        elsewhere.mkdir()

        result = run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", work / "dist", tree], work
        )
        wheels = list((work / "dist").glob("*.whl"))
        if not checks.that("wheel: builds", result.returncode == 0 and len(wheels) == 1, tail(result)):
            return 1
        shutil.rmtree(tree / "build", ignore_errors=True)
        check_contents(checks, wheels[0], tree)

        python = environment(work / "wheel-env")
        result = install(python, wheels[0], cwd=elsewhere)
        if checks.that("wheel: installs", result.returncode == 0, tail(result)):
            site = borrow(python)
            check_install(checks, "wheel", python, elsewhere, lambda file: file.startswith(str(site)))

        python = environment(work / "editable-env")
        site = borrow(python)  # the build tools are borrowed as well
        # --ignore-installed: what is installed in the borrowed environment must not be taken for ours
        options = ["--no-build-isolation", "--ignore-installed"]
        result = install(python, *options, "-e", tree, cwd=elsewhere)
        if checks.that("editable: installs", result.returncode == 0, tail(result)):
            check_install(
                checks, "editable", python, elsewhere, lambda file: file.startswith((str(tree), str(site)))
            )
    print(f"{checks.failed} of the checks failed" if checks.failed else "all checks passed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
