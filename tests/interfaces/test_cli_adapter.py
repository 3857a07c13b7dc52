"""`memos-engine adapter`: every command, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from memos_engine.decoder.adapter import LowRank
from memos_engine.decoder.adapter_file import CONFIG, WEIGHTS, export_peft
from memos_engine.decoder.adapter_record import made
from memos_engine.errors import AdapterError, MemosEngineError
from memos_engine.interfaces.cli import app
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """run(words): what the command prints; JSON as data. code: the exit code wanted."""
    monkeypatch.setenv("MEMOS_ENGINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MEMOS_ENGINE_USER", "alice")
    monkeypatch.setenv("MEMOS_ENGINE_MODEL", str(tiny_folder))

    def call(*words: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["adapter", *map(str, words)])
        if isinstance(result.exception, MemosEngineError):
            raise result.exception
        assert result.exit_code == code, result.output
        return json.loads(result.stdout.splitlines()[-1]) if "--json" in words else result.stdout

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Path]:
    def write(seed: int) -> Path:
        torch.manual_seed(seed)
        adapter = made({(0, "down"): LowRank(torch.randn(3, 80), torch.randn(48, 3), 2.0)})
        export_peft(adapter, tmp_path / f"skill-{seed}")
        return tmp_path / f"skill-{seed}"

    return write


def test_the_life_of_an_adapter(
    run: Callable[..., Any], folder: Callable[[int], Path], tmp_path: Path
) -> None:
    with MemoryStore.open(tmp_path / "store") as store:
        dog = store.add(Principal("default", "alice"), "My dog is called Biscuit.")
    one = run("import", folder(1), "--name", "skill", "--source", dog.id[:13], "--json")
    assert (one["name"], one["state"], one["rank"], one["sources"][0]["id"]) == (
        "skill",
        "current",
        3,
        dog.id,
    )
    assert "version 2 is stored" in run("import", folder(2), "--name", "skill", "--no-promote")
    assert "skill" in run("ls")
    assert [v["state"] for v in run("ls", "--all", "--json")] == ["current", "stored"]
    assert "version 2" in run("promote", "skill", 2).replace("at ", "")
    assert "2 (current)" in run("show", "skill")
    shown = run("show", "skill", "--version", 1, "--json")
    assert (shown["digest"], shown["kv_floor"], len(shown["versions"])) == (one["digest"], 1, 2)
    assert "version 1 again" in run("rollback", one["id"][:8])
    assert run("rollback", "skill", 2, "--json")["version"] == 2
    run("export", "skill", tmp_path / "out", "--version", 1)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 3
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(folder(7) / WEIGHTS).keys()
    assert [row["sound"] for row in run("verify", "--json")] == [True, True]
    assert "sound" in run("verify")
    with MemoryStore.open(tmp_path / "store") as store:
        store.erase(Principal("default", "alice"), dog.id)
    assert [v["state"] for v in run("ls", "--all", "--json")] == ["revoked", "current"]
    with pytest.raises(AdapterError, match="was revoked"):
        run("export", "skill", tmp_path / "never", "--version", 1)
    assert run("rm", "skill", "--erase", "--json")["erased"] is True
    assert run("ls") == "No adapter is in use.\n"
    assert "(erased)" in run("ls", "--all")


def test_what_goes_wrong_is_said(
    run: Callable[..., Any], folder: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("import", folder(1))
    for words in (("show", "other"), ("rollback", "other"), ("show", "skill-1", "--version", 9)):
        with pytest.raises(MemosEngineError, match="adapter"):
            run(*words)
    with pytest.raises(MemosEngineError, match="no other one"):
        run("rollback", "skill-1")
    with pytest.raises(AdapterError, match="is no folder"):
        run("import", tmp_path / "nowhere")
    with pytest.raises(MemosEngineError, match="0 adapters"):
        run("show", "skill-1", "--user", "bob")
    payload = next((tmp_path / "store" / "vault").rglob("*.safetensors"))
    data = payload.read_bytes()
    payload.write_bytes(data[:-4] + bytes(byte ^ 0xFF for byte in data[-4:]))
    assert "damaged" in run("verify", code=1)
    assert run("verify", "--json", code=1)[0]["sound"] is False
