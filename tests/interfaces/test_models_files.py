"""Folders and safetensors headers: anything but a whole model is refused, and the file at fault is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from memos_engine.errors import ModelFilesError
from memos_engine.models import cache_dir, check_folder, list_models
from memos_engine.models.files import INDEX, safetensors_header


def hf_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file({"w": np.arange(12, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@given(length=st.integers(0, 400), tail=st.booleans())
@settings(max_examples=150)
def test_only_the_whole_file_passes(
    tmp_path_factory: pytest.TempPathFactory, length: int, tail: bool
) -> None:
    whole = save({"a": np.ones((3, 5), np.float32), "b": np.zeros(7, np.float16)}, {"format": "pt"})
    file = tmp_path_factory.getbasetemp() / "length.safetensors"
    file.write_bytes(whole + bytes(1 + length) if tail else whole[: min(length, len(whole) - 1)])
    with pytest.raises(ModelFilesError, match=r"length\.safetensors"):
        safetensors_header(file)
    file.write_bytes(whole)
    assert safetensors_header(file).keys() == {"a", "b"}


_JSON = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets"]), x),
)


@given(header=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150)
def test_nonsense_headers(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "nonsense.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    with pytest.raises(ModelFilesError):
        safetensors_header(file)


def test_shards(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    for tensor, shard in shards.items():
        save_file({tensor: np.ones(9, np.float32)}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    assert check_folder(folder) == folder
    (folder / INDEX).write_text(json.dumps({"weight_map": shards | {"c": shards["b"]}}))
    with pytest.raises(ModelFilesError, match="lacks tensor c"):
        check_folder(folder)
    (folder / INDEX).unlink()  # some parts without the index: how many there should be is unknown
    with pytest.raises(ModelFilesError, match=r"model-1-of-2\.safetensors but no .*index"):
        check_folder(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(ModelFilesError, match="names no tensors"):
        check_folder(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    os.truncate(folder / shards["b"], 70)
    with pytest.raises(ModelFilesError, match=shards["b"]):
        check_folder(folder)
    (folder / shards["b"]).unlink()
    with pytest.raises(ModelFilesError, match=f"{shards['b']} is missing"):
        check_folder(folder)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=r"pickled weights \(pytorch_model\.bin\)"):
        check_folder(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelFilesError, match=r"no .*safetensors weights"):
        check_folder(folder)
    hf_folder(folder)
    (folder / "tokenizer.json").write_text('{"version":')
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json is not readable JSON"):
        check_folder(folder)
    (folder / "config.json").rename(folder / "small.gguf")
    with pytest.raises(ModelFilesError, match=r"no config\.json.*small\.gguf"):
        check_folder(folder)
    with pytest.raises(ModelFilesError, match="is not a folder"):
        check_folder(tmp_path / "nowhere")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own" / "models"
    assert list_models() == []
    monkeypatch.delenv("MEMOS_ENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "memos_engine" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "memos_engine" / "models"
