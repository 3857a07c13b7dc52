"""`memos-engine cube verify | gc`: damage of every kind is told, with the exit status; what is due done."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memos_engine.interfaces import cli, options
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

ALICE, BOB = Principal("default", "alice"), Principal("default", "bob")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with three memories, a KV record and an index snapshot."""
    monkeypatch.setenv("MEMOS_ENGINE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(options.console, "_width", 160)
    with MemoryStore.open(tmp_path / "store") as store:
        dog = store.add(ALICE, "My dog is called Biscuit.")
        store.add(ALICE, "Alice lives in Paris.")
        store.add(BOB, "My cat is called Tom.")
        store.put_kv(ALICE, dog.id, 1, "i", b"record" * 9, 3)
        store.snapshots.write(
            "one",
            lambda path: Path(path).write_bytes(b"a graph of vectors"),
            lambda act: act(),
            applied=1,
            dim=2,
            model_id="m",
            count=3,
        )
    return tmp_path / "store"


def run(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False)


def text(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def data(*args: object) -> Any:
    """The one JSON document that a command prints."""
    return json.loads(text(*args, "--json"))


Damage = Callable[[Path], None]


def _flip(path: Path, at: int = 11) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _one(place: Path, pattern: str) -> Path:
    return next(place.rglob(pattern))


def _tamper(place: Path) -> None:
    conn = sqlite3.connect(place / "memory.db")
    conn.execute("DROP TRIGGER audit_no_update")
    conn.execute("UPDATE audit SET event = replace(event, 'bob', 'eve')")
    conn.commit()
    conn.close()


def _flip_text(place: Path) -> None:
    content = (place / "memory.db").read_bytes()
    _flip(place / "memory.db", content.index(b"Biscuit"))


@pytest.mark.parametrize(
    ("damage", "parts", "mendable"),
    [
        (lambda place: _flip(_one(place, "*.safetensors")), ["payloads"], True),
        (lambda place: _one(place, "*.safetensors").write_bytes(b"short"), ["payloads"], True),
        (lambda place: _one(place, "*.safetensors").unlink(), ["payloads"], True),
        (lambda place: _flip(_one(place, "*.hnsw")), ["index"], True),
        (_tamper, ["audit"], False),
        (_flip_text, ["texts", "words"], False),
        (lambda place: _flip(place / "memory.db", 4100), ["database"], False),
    ],
    ids=["payload flipped", "payload cut", "payload gone", "index flipped", "audit", "text", "page"],
)
def test_verify(place: Path, damage: Damage, parts: list[str], mendable: bool) -> None:
    assert data("cube", "verify")["sound"] is True
    assert "WRONG" not in text("cube", "verify")
    damage(place)
    result = run("cube", "verify", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    wrong = [part["name"] for part in found["parts"] if part["problems"]]
    assert wrong == parts or (parts == ["database"] and "database" in wrong)
    shown = run("cube", "verify")
    assert shown.exit_code == 1
    assert "WRONG" in shown.stdout
    assert "wrong: " in shown.stdout
    assert ("--repair" in shown.stdout) is (mendable or "words" in parts)
    repaired = run("cube", "verify", "--repair")
    assert repaired.exit_code == (0 if mendable else 1)
    assert data("cube", "verify")["sound"] if mendable else run("cube", "verify").exit_code == 1


def test_gc(place: Path) -> None:
    with MemoryStore.open(place) as store:
        store.vault.write(b"orphan")
    would = data("cube", "gc", "--dry-run", "--grace", 0, "--idle-days", 0)
    assert would == {
        "swept": {"expired": 0, "faded": 0, "idle": 3, "forgotten": 0, "kv_records": 0},
        "files": 1,
        "bytes": 6,
        "dry_run": True,
    }
    assert "gc removes them" in text("cube", "verify")
    assert data("cube", "gc")["files"] == 0
    assert "files removed" in text("cube", "gc", "--grace", 0, "--idle-days", 0)
    assert data("cube", "ls", "--user", "alice") == []
    assert len(data("cube", "ls", "--all", "--user", "alice")) == 2
