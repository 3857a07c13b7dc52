"""`memos_engine_manifest.json`: what a pulled folder must hold. Written last: it vouches for the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from memos_engine.errors import ModelFilesError
from memos_engine.models.files import load_json, sha256_file

MANIFEST = "memos_engine_manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """One file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Where a model came from and every file it consists of, by path relative to its folder."""

    name: str
    source: Mapping[str, str]  # kind: hub | pypi | gguf | local, and what identifies the origin
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Total size in bytes."""
        return sum(entry.size for entry in self.files.values())

    def sha256(self, file: str) -> str:
        """Hex SHA-256 of one file; ModelFilesError where the model has no such file."""
        try:
            return self.files[file].sha256
        except KeyError:
            raise ModelFilesError(
                f"the model {self.name} has no file {file}; it has {sorted(self.files)}"
            ) from None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def describe(
    folder: Path, name: str, source: Mapping[str, str], advance: Callable[[int], None] | None = None
) -> Manifest:
    """A manifest of the folder as it is now: hashes every file (sub-folders included)."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {
        p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, sha256_file(p, advance)) for p in paths
    }
    versions = {package: _version(package) for package in ("memos-engine", "transformers", "gguf")}
    return Manifest(name, dict(source), files, versions)


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes the manifest into the folder; the caller makes it durable."""
    path = folder / MANIFEST
    path.write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a model folder, None where it has none; ModelFilesError where it is unreadable."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    raw: Any = load_json(path)
    try:
        if raw["format"] != FORMAT:
            raise ModelFilesError(
                f"{path} has format {raw['format']}, this memos_engine reads {FORMAT}; pull the model again"
            )
        files = {name: FileEntry(int(e["size"]), str(e["sha256"])) for name, e in raw["files"].items()}
        return Manifest(str(raw["name"]), dict(raw["source"]), files, dict(raw["versions"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFilesError(f"{path} is malformed ({error!r}); pull the model again") from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every file is there with its size; ModelFilesError names the first that is not. Reads no contents."""
    for name, entry in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry.size}"
            raise ModelFilesError(
                f"{file} {found}; pull the model again (or, if you changed it on purpose, delete {MANIFEST})"
            )


def check_hashes(folder: Path, manifest: Manifest, advance: Callable[[int], None] | None = None) -> None:
    """Every file hashes to what the manifest says; ModelFilesError names the first that does not."""
    check_sizes(folder, manifest)
    for name, entry in manifest.files.items():
        if sha256_file(folder / name, advance) != entry.sha256:
            raise ModelFilesError(
                f"{folder / name} does not match its checksum; pull the model again with force"
            )
