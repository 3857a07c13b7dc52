"""Files in a store's `index/`: caches that can be made anew, and are not believed without their checksums.

A snapshot is two files: the index, named by its SHA-256, and a header beside it that says what it is an index
of. hnswlib itself loads a file with flipped bits and answers from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


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
        try:
            text = self._header(name).read_text(encoding="utf-8")
            content, _, digest = text.rstrip("\n").rpartition("\n")
            if hashlib.sha256(content.encode()).hexdigest() != digest:
                return None
            snapshot = Snapshot(**json.loads(content))
            return snapshot if _sha256(self.path(snapshot)) == snapshot.sha256 else None
        except (OSError, ValueError, TypeError):
            return None

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
        draft = self.directory / f".draft-{secrets.token_hex(8)}"
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
            if path.suffix in (".hnsw", ".json") or path.name.startswith(".draft-"):
                path.unlink(missing_ok=True)

    def _header(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
