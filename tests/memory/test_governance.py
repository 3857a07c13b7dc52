from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from memos_engine.errors import MemoryInputError, StoreError
from memos_engine.memory.governance import KeyRing, Principal, StoreKeys, default_key_directory

ID = "0123456789abcdef"


@pytest.mark.parametrize("name", ["", " ", "x" * 129, "a\nb", "a\x7f", "\ud800", "a\u2028b", None, 7])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(MemoryInputError):
        Principal("t", name)
    with pytest.raises(MemoryInputError):
        Principal(name, "u")


@pytest.mark.parametrize("name", ["a", "x" * 128, "Zoë 用户", "o'; DROP TABLE cube;--"])
def test_good_names_pass(name: str) -> None:
    assert Principal(name, name).user == name


def test_a_key_is_made_once_private_and_atomically(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "a" / "b")
    assert ring.load(ID) is None
    key = ring.create(ID)
    assert ring.create(ID) == key == ring.load(ID)
    (path,) = (tmp_path / "a" / "b").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key.secret) == 32
    assert key.secret.hex() not in repr(key)
    assert ring.create("another") != key


def test_racing_makers_agree(tmp_path: Path) -> None:
    made: list[StoreKeys] = []
    makers = [threading.Thread(target=lambda: made.append(KeyRing(tmp_path).create(ID))) for _ in range(8)]
    for one in makers:
        one.start()
    for one in makers:
        one.join()
    assert len(set(made)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_without_hard_links_a_key_is_still_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert KeyRing(tmp_path).create(ID) == KeyRing(tmp_path).load(ID)


def test_a_damaged_key_is_an_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / f"{ID}.key").write_bytes(b"short")
    with pytest.raises(StoreError, match="5 bytes"):
        KeyRing(tmp_path).load(ID)


def test_an_unusable_key_directory_is_an_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="MEMOS_ENGINE_KEYS"):
        KeyRing(tmp_path / "file" / "keys").create(ID)


def test_the_default_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_ENGINE_KEYS", "/k")
    assert default_key_directory() == Path("/k")
    monkeypatch.delenv("MEMOS_ENGINE_KEYS")
    monkeypatch.setenv("XDG_DATA_HOME", "/x")
    assert default_key_directory() == Path("/x/memos_engine/keys")
    monkeypatch.setenv("XDG_DATA_HOME", "relative is to be ignored")
    assert default_key_directory() == Path.home() / ".local/share/memos_engine/keys"


def test_derived_keys_are_separate() -> None:
    a, b = StoreKeys(b"a" * 32), StoreKeys(b"b" * 32)
    values = {
        a.body_hmac("x"),
        b.body_hmac("x"),
        a.body_hmac("y"),
        a.tenant_salt("x"),
        b.tenant_salt("x"),
        a.tenant_salt("y"),
        a.token_hmac(Principal("a", "bc"), "x"),
        a.token_hmac(Principal("ab", "c"), "x"),
    }
    assert len(values) == 8
    assert a.id != b.id
    assert a.body_hmac("x") == StoreKeys(b"a" * 32).body_hmac("x")
