"""MemVault: payload files (KV records, adapters), named by content and checked whenever they are read.

A file is durable (fsync, rename, fsync of its folder) before `write` returns, so that a database row may
name it. Files are read with pread into a buffer, never mapped: a truncated file would kill the process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from memos_engine.errors import PayloadError, StoreError, StoreFullError

SUFFIX = ".safetensors"
_DRAFT = ".draft-"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_XXH128 = re.compile(r"[0-9a-f]{32}")
_MAX_READ = 1 << 30  # the kernel reads at most 2 GiB - 4 KiB at once
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class BlobRef:
    """A payload file: SHA-256 (64 hex digits), size in bytes, xxh3-128 of the whole file (32 hex digits)."""

    sha256: str
    size: int
    checksum: str

    def __post_init__(self) -> None:
        if not (_SHA256.fullmatch(self.sha256) and _XXH128.fullmatch(self.checksum) and self.size >= 0):
            raise PayloadError(
                "this payload reference is damaged; drop it and build the payload anew.", "format"
            )


class FileSystem:
    """The system calls of the vault, in one place so that tests can fail, record and reorder them."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def touch(self, path: Path) -> None:
        os.utime(path)

    def age_s(self, path: Path) -> float:
        return time.time() - os.lstat(path).st_mtime


class MemVault:
    """Payload files below one directory: `ab/abcdef....safetensors`, the name being the SHA-256."""

    def __init__(self, directory: str | os.PathLike[str], fs: FileSystem | None = None) -> None:
        self.directory = Path(directory)
        self._fs = fs or FileSystem()

    def path(self, ref: BlobRef) -> Path:
        return self.directory / ref.sha256[:2] / (ref.sha256 + SUFFIX)

    def write(self, data: bytes | bytearray | memoryview) -> BlobRef:
        """Keep `data`, durably, and say how to find it; writing the same data again keeps one file.

        Raises `StoreFullError` when the disk or quota is full, `StoreError` for other failures; neither
        leaves anything behind.
        """
        view = memoryview(data).cast("B")
        ref = BlobRef(hashlib.sha256(view).hexdigest(), view.nbytes, xxhash.xxh3_128_hexdigest(view))
        path = self.path(ref)
        try:
            if not self._keep_existing(ref, path):
                self._write_new(view, path)
        except OSError as error:
            raise _translate(error, path) from error
        return ref

    def _keep_existing(self, ref: BlobRef, path: Path) -> bool:
        """Whether a sound file is there already, made durable and young again (see `collect`)."""
        try:
            self.read(ref)
        except PayloadError:
            return False
        self._fs.touch(path)
        fd = self._fs.open(path)
        try:
            self._fs.fsync(fd)
        finally:
            self._fs.close(fd)
        self._sync_folders(path)
        return True

    def _write_new(self, view: memoryview, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.parent / (_DRAFT + secrets.token_hex(8))
        try:
            fd = self._fs.create(draft)
            try:
                done = 0
                while done < view.nbytes:
                    done += self._fs.write(fd, view[done : done + _MAX_READ])
                self._fs.fsync(fd)
            finally:
                self._fs.close(fd)
            self._fs.rename(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        self._sync_folders(path)

    def _sync_folders(self, path: Path) -> None:
        self._fs.fsync_directory(path.parent)
        self._fs.fsync_directory(self.directory)  # the folder itself may be new

    def holds(self, ref: BlobRef) -> bool:
        """Whether a file of the right name and size is there; its content is not read."""
        try:
            return self.path(ref).lstat().st_size == ref.size
        except OSError:
            return False

    def read(self, ref: BlobRef, into: Callable[[int], memoryview] | None = None) -> memoryview:
        """The payload's bytes, with size and fast checksum verified.

        `into(size)` may hand out a writable buffer of at least `size` bytes (pinned or pooled memory); the
        result is its first `size` bytes. Raises `PayloadError` with reason missing, size or checksum.
        """
        path = self.path(ref)
        try:
            fd = self._fs.open(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            found = self._fs.size(fd)
            if found != ref.size:
                raise PayloadError(
                    f"payload {path.name} has {found} bytes instead of {ref.size}; drop and rebuild it.",
                    "size",
                )
            buffer = _buffer(ref.size, into)
            done = 0
            while done < ref.size:
                count = self._fs.read_into(fd, buffer[done : done + _MAX_READ], done)
                if count == 0:
                    raise PayloadError(
                        f"payload {path.name} ended after {done} of {ref.size} bytes; drop and rebuild it.",
                        "size",
                    )
                done += count
        except OSError as error:
            raise _unreadable(path, error) from error
        finally:
            self._fs.close(fd)
        if xxhash.xxh3_128_hexdigest(buffer) != ref.checksum:
            raise PayloadError(f"payload {path.name} was altered on disk; drop and rebuild it.", "checksum")
        return buffer

    def verify(self, ref: BlobRef) -> None:
        """The scrub: everything `read` checks, and SHA-256. Raises `PayloadError`."""
        if hashlib.sha256(self.read(ref)).hexdigest() != ref.sha256:
            raise PayloadError(
                f"payload {self.path(ref).name} is not the content it is named after; drop and rebuild it.",
                "checksum",
            )

    def delete(self, ref: BlobRef) -> None:
        """Remove the file; one that is already gone is fine. Raises `StoreError`.

        A store's payloads are removed by the store, which first checks that no row names them.
        """
        path = self.path(ref)
        try:
            self._fs.unlink(path)
            self._fs.fsync_directory(path.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _translate(error, path) from error

    def orphans(self, live: AbstractSet[str], grace_s: float = 0.0) -> Iterator[tuple[Path, int]]:
        """Payloads whose SHA-256 is not in `live`, and left-over drafts, older than `grace_s` seconds; with
        their bytes. Files that the vault did not make are not among them. Raises `StoreError`."""
        try:
            for path in sorted(self.directory.glob("??/*")):
                draft = path.name.startswith(_DRAFT)
                ours = path.name.endswith(SUFFIX) and _SHA256.fullmatch(path.name.removesuffix(SUFFIX))
                if not draft and (not ours or path.name.removesuffix(SUFFIX) in live):
                    continue
                try:
                    if self._fs.age_s(path) >= grace_s:
                        yield path, path.lstat().st_size
                except FileNotFoundError:
                    continue  # another process was faster
        except OSError as error:
            raise _translate(error, self.directory) from error

    def collect(self, live: AbstractSet[str], grace_s: float) -> int:
        """Remove what `orphans` finds; returns how many files those were. Raises `StoreError`."""
        removed = 0
        for path, _ in self.orphans(live, grace_s):
            try:
                self._fs.unlink(path)
                removed += 1
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                raise _translate(error, self.directory) from error
        return removed


def _buffer(size: int, into: Callable[[int], memoryview] | None) -> memoryview:
    if into is None:
        return np.empty(size, np.uint8).data
    given = memoryview(into(size)).cast("B")
    if given.readonly or given.nbytes < size:
        raise StoreError(
            f"a buffer for a payload must be writable and hold {size} bytes, not {given.nbytes}."
        )
    return given[:size]


def _unreadable(path: Path, error: OSError) -> PayloadError:
    return PayloadError(
        f"payload {path.name} cannot be read ({error.strerror}); drop and rebuild it.", "missing"
    )


def _translate(error: OSError, path: Path) -> StoreError:
    if error.errno in FULL:
        return StoreFullError(
            f"no room for {path.name}: the disk or quota is full; free some space and repeat."
        )
    return StoreError(f"{path} cannot be written ({error.strerror}); check the disk and its permissions.")
