"""Files in a store's `index/`: caches that can be made anew, and are not believed without their checksums.

A snapshot is two files: the index, named by its SHA-256, and a header beside it that says what it is an index
of. hnswlib itself loads a file with flipped bits and answers from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_DRAFT = ".draft-"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an index file holds: `count` vectors of width `dim` of `model_id`, as of change `applied`."""

    sha256: str
    applied: int
    dim: int
    model_id: str
    count: int


class SnapshotFiles:
    """Snapshots by name; a damaged, half-written or missing one is None, never an error."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, snapshot: Snapshot) -> Path:
        return self.directory / f"{snapshot.sha256}.hnsw"

    def load(self, name: str) -> Snapshot | None:
        """The snapshot of this name, when header and file are whole: reads all of the file."""
        snapshot = self._read(name)
        try:
            whole = snapshot is not None and _sha256(self.path(snapshot)) == snapshot.sha256
        except OSError:
            return None
        return snapshot if whole else None

    def _read(self, name: str) -> Snapshot | None:
        """What a whole header says; its file is not looked at."""
        try:
            text = self._header(name).read_text(encoding="utf-8")
            content, _, digest = text.rstrip("\n").rpartition("\n")
            if hashlib.sha256(content.encode()).hexdigest() != digest:
                return None
            return Snapshot(**json.loads(content))
        except (OSError, ValueError, TypeError):
            return None

    def names(self) -> list[str]:
        """Names of all snapshots, sound or not, sorted. Raises `OSError`."""
        return sorted(path.stem for path in self.directory.glob("*.json") if not path.name.startswith("."))

    def damaged(self) -> list[str]:
        """Names of those that `load` refuses; reads every file. Raises `OSError`."""
        # Twice: another process may just have put a new snapshot in the place of the one looked at.
        return [name for name in self.names() if self.load(name) is None and self.load(name) is None]

    def drop(self, names: Iterable[str]) -> None:
        """Remove snapshots, to be built anew; under the lock of `publish`. Raises `OSError`."""
        for name in names:
            self._header(name).unlink(missing_ok=True)
        for path, _ in self.orphans():
            if path.suffix == ".hnsw":
                path.unlink(missing_ok=True)

    def orphans(self, grace_s: float = 0.0) -> Iterator[tuple[Path, int]]:
        """Index files that no header names, and left-over drafts, with their bytes, older than `grace_s`
        seconds. Raises `OSError`."""
        named = {known.sha256 for name in self.names() if (known := self._read(name)) is not None}
        for path in sorted(self.directory.iterdir()):
            ours = path.name.startswith(_DRAFT) or (path.suffix == ".hnsw" and path.stem not in named)
            with suppress(FileNotFoundError):  # another process was faster
                if ours and time.time() - path.lstat().st_mtime >= grace_s:
                    yield path, path.lstat().st_size

    def write(
        self,
        name: str,
        save: Callable[[str], None],
        publish: Callable[[Callable[[], None]], None],
        **about: Any,
    ) -> None:
        """Have `save(path)` write the index and put it in the place of the old one of this name.

        `publish(act)` calls `act` when the snapshot may still be kept, under a lock against erasures. Raises
        `OSError`; nothing is left behind then.
        """
        draft = self.directory / (_DRAFT + secrets.token_hex(8))
        old = self.load(name)
        try:
            save(str(draft))
            os.chmod(draft, 0o600)
            snapshot = Snapshot(sha256=_sha256(draft), **about)
            content = json.dumps(asdict(snapshot), sort_keys=True)
            header = f"{content}\n{hashlib.sha256(content.encode()).hexdigest()}\n"

            def act() -> None:
                os.replace(draft, self.path(snapshot))
                beside = draft.with_suffix(".json")
                beside.write_text(header, encoding="utf-8")
                os.replace(beside, self._header(name))

            publish(act)
            if old is not None and old.sha256 != snapshot.sha256:
                self.path(old).unlink(missing_ok=True)
        finally:
            for path in (draft, draft.with_suffix(".json")):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every snapshot and draft: indices keep the vectors of what was erased. Raises `OSError`."""
        for path in self.directory.iterdir():
            if path.suffix in (".hnsw", ".json") or path.name.startswith(_DRAFT):
                path.unlink(missing_ok=True)

    def _header(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
