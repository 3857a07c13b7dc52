"""The user's model cache: one folder per model, published whole by a rename, guarded by a lock per slot."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from memos_engine.errors import ModelFilesError
from memos_engine.models.files import check_folder
from memos_engine.models.manifest import (
    Manifest,
    check_hashes,
    check_sizes,
    describe,
    read_manifest,
    write_manifest,
)
from memos_engine.models.progress import Reporter

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ModelInfo:
    """One folder of the cache. `problem` says why an incomplete one is not usable."""

    name: str
    path: Path
    bytes: int
    source: str  # hub, pypi or gguf; "unknown" without a manifest
    complete: bool
    problem: str = ""


def cache_dir() -> Path:
    """`${MEMOS_ENGINE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/memos_engine}/models`; not created here."""
    own = os.environ.get("MEMOS_ENGINE_CACHE")
    if own:
        return Path(own).expanduser() / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "memos_engine" / "models"


def check_slot(folder: Path) -> Manifest:
    """The manifest of a cached model whose sizes are right; ModelFilesError says what is wrong otherwise."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelFilesError(f"{folder} has no manifest: a pull was cut short; pull the model again")
    check_sizes(folder, manifest)
    return manifest


def list_models() -> list[ModelInfo]:
    """Everything in the cache, complete or not, by name. Work in progress is left out."""
    root = cache_dir()
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        name, source, problem = folder.name, "unknown", ""
        try:
            manifest = read_manifest(folder)
            if manifest is not None:
                name, source = manifest.name, manifest.source["kind"]
            check_slot(folder)
        except ModelFilesError as error:
            problem = str(error)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        found.append(ModelInfo(name, folder, size, source, not problem, problem))
    return found


def verify(path: str | Path, *, progress: bool = True) -> Manifest:
    """Hashes every file of a model folder again and compares with its manifest.

    A folder without one (not pulled by us) is checked for structure and hashed for the first time. Returns
    the manifest. Raises ModelFilesError naming the first file that is missing, half-written or altered.
    """
    folder = Path(path).expanduser()
    reporter = Reporter(progress)
    manifest = read_manifest(folder)
    if manifest is None:
        check_folder(folder)
        with reporter.stage(
            f"hashing {folder.name}", sum(p.stat().st_size for p in folder.rglob("*"))
        ) as advance:
            return describe(folder, folder.name, {"kind": "local"}, advance)
    with reporter.stage(f"hashing {manifest.name}", manifest.bytes) as advance:
        check_hashes(folder, manifest, advance)
    return manifest


@contextmanager
def slot_lock(slot: str, reporter: Reporter) -> Iterator[Path]:
    """Holds the lock of one slot and yields the slot's path; a second pull of the same model waits.

    The kernel drops the lock when the process ends, however it ends.
    """
    root = cache_dir()
    with _explained(root):
        root.mkdir(parents=True, exist_ok=True)
        handle = _open_lock(root, slot)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.line(f"another process is pulling {slot}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield root / slot
    finally:
        os.close(handle)


def sweep() -> None:
    """Removes what killed pulls left: temporary folders whose slot nobody holds."""
    root = cache_dir()
    for leftover in root.glob(".tmp-*-*") if root.is_dir() else ():
        with suppress(OSError):  # the slot is in use, or the cache is somebody else's and not ours to tidy
            handle = _open_lock(root, leftover.name.removeprefix(".tmp-").rpartition("-")[0])
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(handle)


def _open_lock(root: Path, slot: str) -> int:
    return os.open(root / f".lock-{slot}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


@contextmanager
def build_slot(
    slot: Path, name: str, source: Mapping[str, str], reporter: Reporter
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yields an empty folder beside `slot` and the source record; on success it becomes the slot.

    The block fills both. Then the folder is checked, hashed, described by a manifest, flushed and
    renamed into place. On any failure it is removed and the slot stays as it was. Hold `slot_lock`.
    """
    with _explained(slot.parent):
        staging = Path(tempfile.mkdtemp(prefix=f".tmp-{slot.name}-", dir=slot.parent))
        try:
            record = dict(source)
            yield staging, record
            check_folder(staging)
            total = sum(p.stat().st_size for p in staging.rglob("*"))
            with reporter.stage(f"hashing {name}", total) as advance:
                manifest = describe(staging, name, record, advance)
            _flush(staging)
            write_manifest(staging, manifest)
            _flush(staging)
            _replace(staging, slot)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, slot: Path) -> None:
    """Puts `staging` in the slot's place. A kill in between leaves no slot, never a mixed one."""
    os.chmod(staging, 0o755)  # mkdtemp makes it private; the cache follows the parent's permissions
    if slot.exists():
        old = Path(tempfile.mkdtemp(prefix=f".tmp-{slot.name}-", dir=slot.parent))
        os.rename(slot, old)  # onto an empty folder
        os.rename(staging, slot)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(staging, slot)
    _fsync(slot.parent)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(where: Path) -> Iterator[None]:
    """Turns a full disk or a cache that cannot be written into an error that says what to do."""
    try:
        yield
    except OSError as error:
        other = "or set MEMOS_ENGINE_CACHE to a folder elsewhere; nothing half-written was kept"
        if error.errno in _DISK_FULL:
            raise ModelFilesError(f"the disk of {where} is full; free some space {other}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ModelFilesError(f"{where} cannot be written ({error}); make it writable {other}") from error
        raise
