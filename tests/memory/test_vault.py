from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.errors import PayloadError, StoreError, StoreFullError
from memos_engine.memory.vault import BlobRef, FileSystem, MemVault

DATA = bytes(range(256)) * 40


class FaultyFS(FileSystem):
    """Records calls; fails the chosen one; writes and reads in small pieces."""

    def __init__(self, fail: str = "", error: int = errno.ENOSPC, piece: int = 1000) -> None:
        self.calls: list[str] = []
        self.fail, self.error, self.piece = fail, error, piece

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fail:
            raise OSError(self.error, os.strerror(self.error))

    def create(self, path: Path) -> int:
        self._call("create")
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._call("write")
        return super().write(fd, data[: self.piece])

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._call("read_into")
        return super().read_into(fd, buffer[: self.piece], offset)

    def fsync(self, fd: int) -> None:
        self._call("fsync")
        super().fsync(fd)

    def fsync_directory(self, path: Path) -> None:
        self._call(f"fsync_directory {path.name}")
        super().fsync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename")
        assert source.parent == target.parent
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._call("unlink")
        super().unlink(path)


def files(vault: MemVault) -> list[Path]:
    return [path for path in vault.directory.rglob("*") if path.is_file()]


@pytest.fixture
def vault(tmp_path: Path) -> MemVault:
    (tmp_path / "vault").mkdir()
    return MemVault(tmp_path / "vault")


@pytest.mark.parametrize("data", [b"", b"x", DATA, bytearray(DATA), memoryview(DATA)[3:77]])
def test_what_is_written_is_read(vault: MemVault, data: bytes) -> None:
    ref = vault.write(data)
    assert vault.read(ref) == bytes(data)
    assert ref.sha256 == hashlib.sha256(data).hexdigest()
    assert vault.path(ref).relative_to(vault.directory).parts == (ref.sha256[:2], ref.sha256 + ".safetensors")
    assert vault.holds(ref)
    vault.verify(ref)
    assert vault.write(data) == ref
    assert len(files(vault)) == 1


def test_it_is_durable_in_order_before_write_returns(tmp_path: Path) -> None:
    fs = FaultyFS()
    ref = MemVault(tmp_path, fs).write(DATA)
    steps = [call for call in fs.calls if call not in ("create", "write", "read_into")]
    assert steps == [
        "fsync",
        "rename",
        f"fsync_directory {ref.sha256[:2]}",
        f"fsync_directory {tmp_path.name}",
    ]
    assert fs.calls.index("fsync") > max(i for i, call in enumerate(fs.calls) if call == "write")
    fs.calls.clear()
    MemVault(tmp_path, fs).write(
        DATA
    )  # there already, perhaps not yet durable: another process may be writing
    assert "rename" not in fs.calls
    assert [call.split()[0] for call in fs.calls[-3:]] == ["fsync", "fsync_directory", "fsync_directory"]


@pytest.mark.parametrize("call", ["create", "write", "fsync", "rename"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_nothing_and_can_be_repeated(tmp_path: Path, call: str, error: int) -> None:
    vault = MemVault(tmp_path, FaultyFS(call, error))
    with pytest.raises(StoreError) as caught:
        vault.write(DATA)
    assert isinstance(caught.value, StoreFullError) == (error != errno.EIO)
    assert files(vault) == []
    sound = MemVault(tmp_path)
    assert sound.read(sound.write(DATA)) == DATA


def test_reads_go_into_the_given_buffer(vault: MemVault) -> None:
    ref = vault.write(DATA)
    pool = bytearray(len(DATA) + 100)
    got = vault.read(ref, lambda size: memoryview(pool))
    assert got == DATA
    assert pool[: len(DATA)] == DATA
    for bad in (memoryview(DATA), memoryview(bytearray(len(DATA) - 1))):
        with pytest.raises(StoreError, match="buffer"):
            vault.read(ref, lambda size, bad=bad: bad)  # type: ignore[misc]


def test_short_reads_are_put_together(tmp_path: Path) -> None:
    vault = MemVault(tmp_path, FaultyFS(piece=7))
    assert vault.read(vault.write(DATA[:100])) == DATA[:100]


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    vault = MemVault(tmp_path)
    ref = vault.write(DATA)
    with pytest.raises(PayloadError) as caught:
        MemVault(tmp_path, FaultyFS("read_into", errno.EIO)).read(ref)
    assert caught.value.reason == "missing"
    vault.delete(ref)
    vault.delete(ref)
    assert not vault.holds(ref)
    for look in (vault.read, vault.verify):
        with pytest.raises(PayloadError) as caught:
            look(ref)
        assert caught.value.reason == "missing"
    vault.path(ref).mkdir()
    with pytest.raises(PayloadError):
        vault.read(ref)


def test_a_link_is_not_followed(vault: MemVault, tmp_path: Path) -> None:
    ref = vault.write(DATA)
    vault.path(ref).rename(tmp_path / "elsewhere")
    vault.path(ref).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PayloadError):
        vault.read(ref)


def test_a_bit_flip_anywhere_is_found_and_a_rewrite_mends_it(vault: MemVault) -> None:
    data = DATA[:600]
    ref = vault.write(data)
    for byte in range(len(data)):
        damaged = bytearray(data)
        damaged[byte] ^= 1 << (byte % 8)
        vault.path(ref).write_bytes(damaged)
        with pytest.raises(PayloadError) as caught:
            vault.read(ref)
        assert caught.value.reason == "checksum"
    assert vault.write(data) == ref
    assert vault.read(ref) == data


@settings(max_examples=30, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.booleans())
def test_truncation_and_growth_are_found(
    tmp_path_factory: pytest.TempPathFactory, size: int, grow: bool
) -> None:
    vault = MemVault(tmp_path_factory.mktemp("vault"))
    ref = vault.write(DATA)
    vault.path(ref).write_bytes(DATA + DATA[: size + 1] if grow else DATA[:size])
    with pytest.raises(PayloadError) as caught:
        vault.read(ref)
    assert caught.value.reason == "size"


def test_swapped_files_are_found(vault: MemVault) -> None:
    a, b = vault.write(b"a" * 50), vault.write(b"b" * 50)
    vault.path(a).rename(vault.directory / "t")
    vault.path(b).rename(vault.path(a))
    (vault.directory / "t").rename(vault.path(b))
    for ref in (a, b):
        with pytest.raises(PayloadError) as caught:
            vault.read(ref)
        assert caught.value.reason == "checksum"


def test_the_scrub_also_checks_sha256(vault: MemVault) -> None:
    good, other = vault.write(b"good"), vault.write(b"evil")
    forged = BlobRef(good.sha256, other.size, other.checksum)
    vault.path(good).write_bytes(b"evil")
    assert vault.read(forged) == b"evil"  # the fast checksum cannot know
    with pytest.raises(PayloadError) as caught:
        vault.verify(forged)
    assert caught.value.reason == "checksum"


@pytest.mark.parametrize(
    "fields", [("../../etc/passwd", 1, "0" * 32), ("0" * 64, -1, "0" * 32), ("0" * 64, 1, "x" * 32)]
)
def test_a_damaged_reference_is_refused(fields: tuple[str, int, str]) -> None:
    with pytest.raises(PayloadError) as caught:
        BlobRef(*fields)
    assert caught.value.reason == "format"


def test_orphans_and_drafts_are_collected_after_the_grace(vault: MemVault) -> None:
    live, orphan = vault.write(b"live"), vault.write(b"orphan")
    draft = vault.path(live).parent / ".draft-0011"
    foreign = vault.path(live).parent / "notes.txt"
    draft.write_bytes(b"")
    foreign.write_bytes(b"")
    assert vault.collect({live.sha256}, 3600) == 0
    assert vault.collect({live.sha256}, 0) == 2
    assert vault.holds(live)
    assert not vault.holds(orphan)
    assert foreign.exists()
    assert not draft.exists()


def test_writing_again_makes_an_old_orphan_young(vault: MemVault) -> None:
    ref = vault.write(b"x")
    os.utime(vault.path(ref), (1, 1))
    vault.write(b"x")
    assert vault.collect(set(), 3600) == 0
