"""Adapter files that were made to harm: each is refused with a reason, and nothing of it is used."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from memos_engine.decoder.adapter_file import CONFIG, PICKLED, WEIGHTS, AdapterLimits, import_peft
from memos_engine.decoder.adapter_record import projection_shapes
from memos_engine.decoder.safefile import parse, shown, strict_json
from memos_engine.decoder.spec import ModelSpec
from memos_engine.errors import AdapterError

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def spec(tiny_folder: Path) -> ModelSpec:
    return ModelSpec.from_folder(tiny_folder)


def pair(spec: ModelSpec, rank: int = 2) -> dict[str, torch.Tensor]:
    out, width = projection_shapes(spec)["q"]
    return {KEY.format(0, "A"): torch.ones(rank, width), KEY.format(0, "B"): torch.ones(out, rank)}


@pytest.fixture
def folder(spec: ModelSpec, tmp_path: Path) -> Callable[..., Path]:
    """folder(tensors=, **settings): an adapter; None removes a setting."""

    def make(tensors: Any = None, **changes: Any) -> Path:
        config = {k: v for k, v in {**PLAIN, **changes}.items() if v is not ...}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        data = tensors if isinstance(tensors, bytes) else save(tensors or pair(spec), {"format": "pt"})
        (tmp_path / WEIGHTS).write_bytes(data)
        return tmp_path

    return make


def test_the_plain_one_is_fine(spec: ModelSpec, folder: Callable[..., Path]) -> None:
    assert import_peft(folder(), spec).modules[0, "q"].scale == 2.0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"peft_type": ...}, "only LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "biases of its own"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"alora_invocation_tokens": [1, 2]}, "active_from"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"init_lora_weights": ["pissa"]}, "changes the base weights"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"trainable_token_indices": [3]}, "token embeddings"),
        ({"something_new": 1}, "not known here"),
        ({"r": 10**9}, "integers of 1 to 256"),
        ({"r": True}, "integers of 1 to 256"),
        ({"r": 0}, "integers of 1 to 256"),
        ({"r": ...}, "integers of 1 to 256"),
        ({"rank_pattern": {"q_proj": 1000}}, "integers of 1 to 256"),
        ({"rank_pattern": {"(a+)+$": 2}}, "regular expressions"),
        ({"alpha_pattern": {"../../etc/passwd": 2}}, "regular expressions"),
        ({"alpha_pattern": ["q_proj"]}, "plain module names"),
        ({"alpha_pattern": {"q_proj": "8"}}, "must be numbers"),
        ({"lora_alpha": 1e300}, "must be numbers"),
        ({"lora_alpha": float("nan")}, "no JSON number"),
        ({"lora_alpha": "1e3"}, "must be numbers"),
        ({"r": 3}, "do not fit"),
        ({"\x1b[2J": 1}, r"\\x1b\[2J"),
    ],
)
def test_settings_are_refused_by_name(
    spec: ModelSpec, folder: Callable[..., Path], changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(AdapterError, match=why):
        import_peft(folder(**changes), spec)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("../../../etc/passwd", "no LoRA matrix"),
        ("/base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "no LoRA matrix"),
        (KEY.format("0/../1", "A"), "no LoRA matrix"),
        (KEY.format("00", "A"), "no LoRA matrix"),  # the same layer under another name
        (KEY.format("+1", "A"), "no LoRA matrix"),
        (KEY.format("\u0663", "A"), "no LoRA matrix"),  # a digit, but not one of ours
        (KEY.format(3, "A"), "layers 0 to 2"),
        (KEY.format(9999, "A"), "layers 0 to 2"),
        (KEY.format(99999999999, "A"), "no LoRA matrix"),
        (KEY.format(0, "A") + "\n", "no LoRA matrix"),
        (KEY.format(0, "A").replace("lora_A", "lora_A.default"), "no LoRA matrix"),
        (KEY.format(1, "A"), "only lora_A"),
        (KEY.format(0, "magnitude_vector"), "DoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "no LoRA matrix"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "projections only"),
        ("base_model.model.lm_head.weight", "projections only"),
        ("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", "no such projection"),
        ("\x1b]0;owned\x07", "no LoRA matrix"),
    ],
)
def test_crafted_keys(spec: ModelSpec, folder: Callable[..., Path], key: str, why: str) -> None:
    tensors = {**pair(spec), key: torch.ones(2, 48)}
    with pytest.raises(AdapterError, match=why) as caught:
        import_peft(folder(tensors), spec)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_numbers_that_are_none(spec: ModelSpec, folder: Callable[..., Path], value: float, side: str) -> None:
    tensors = pair(spec)
    tensors[KEY.format(0, side)][-1, -1] = value
    with pytest.raises(AdapterError, match="NaN or infinity"):
        import_peft(folder(tensors), spec)


def test_shapes_dtypes_and_sizes(spec: ModelSpec, folder: Callable[..., Path]) -> None:
    good = pair(spec)
    bad = [
        ({**good, KEY.format(0, "A"): torch.ones(2, 47)}, "do not fit"),
        ({**good, KEY.format(0, "B"): torch.ones(2, 96)}, "do not fit"),
        ({**good, KEY.format(0, "A"): torch.ones(96)}, "do not fit"),
        ({**good, KEY.format(0, "A"): torch.ones(0, 48)}, "do not fit"),
        ({**good, KEY.format(0, "A"): torch.ones(2, 48, dtype=torch.int8)}, "F32, F16 or BF16"),
        ({**good, KEY.format(0, "A"): torch.ones(2, 48, dtype=torch.float64)}, "F32, F16 or BF16"),
        ({**good, KEY.format(0, "A"): torch.ones(2, 48, dtype=torch.float16)}, "one dtype"),
        ({}, "changes no projection"),
    ]
    for tensors, why in bad:
        data = save(tensors, {"format": "pt"})
        with pytest.raises(AdapterError, match=why):
            import_peft(folder(data), spec)
    with pytest.raises(AdapterError, match="more than the 64"):
        import_peft(folder(), spec, AdapterLimits(max_bytes=64))
    with pytest.raises(AdapterError, match="integers of 1 to 1 "):
        import_peft(folder(), spec, AdapterLimits(max_rank=1))


class _Bomb:
    """Would make a file if anything unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


def test_pickles_and_zips_are_never_opened(
    spec: ModelSpec, folder: Callable[..., Path], tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(_Bomb(mark))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", bomb)
        file.writestr("../../outside", b"x")
    for data, why in ((bomb, "pickle in disguise"), (archive.getvalue(), "zip in disguise")):
        with pytest.raises(AdapterError, match=why):
            import_peft(folder(data), spec)
    (folder() / WEIGHTS).unlink()
    (tmp_path / PICKLED).write_bytes(bomb)
    with pytest.raises(AdapterError, match="safe_serialization"):
        import_peft(tmp_path, spec)
    with pytest.raises(AdapterError, match="archives are not"):
        import_peft(tmp_path / PICKLED, spec)
    assert not mark.exists()


def test_links_and_pipes(spec: ModelSpec, folder: Callable[..., Path], tmp_path: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        place = folder()
        moved = tmp_path / f"real-{name}"
        (place / name).rename(moved)
        (place / name).symlink_to(moved)
        with pytest.raises(AdapterError, match="is a link"):
            import_peft(place, spec)
        (place / name).unlink()
        os.mkfifo(place / name)
        with pytest.raises(AdapterError, match="no regular file"):
            import_peft(place, spec)
        (place / name).unlink()
    (folder() / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="save_pretrained"):
        import_peft(tmp_path, spec)


def _file(header: Any, body: bytes = b"") -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(bytearray(struct.pack("<Q", len(text)) + text + body))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no safetensors file"),
        (b"\0" * 8, "no safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "no safetensors file"),
        (_file(b'{"a": {}, "a": {}}'), "there twice"),
        (_file(b'{"a": NaN}'), "no JSON number"),
        (_file(b"[" * 100000), "no sound JSON"),
        (_file(b"[]"), "JSON object"),
        (_file(b"{\xff}"), "no sound JSON"),
        (_file({"__metadata__": {"a": 1}}), "must be texts"),
        (_file({"a": 1}), "malformed"),
        (_file({"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}), "malformed"),
        (_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "past the end"),
        (_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "its shape"),
        (
            _file({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
            "its shape",
        ),
        (_file({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"), "its shape"),
        (_file({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"), "F32, F16"),
        (_file({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "F32, F16"),
        (_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), "leaves a gap"),
        (_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"), "no tensor names"),
        (
            _file(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
                },
                b"12345678",
            ),
            "overlaps",
        ),
    ],
)
def test_crafted_containers(data: bytes, why: str) -> None:
    with pytest.raises(AdapterError, match=why):
        parse(memoryview(bytearray(data)), "file")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(1, 255))
def test_whatever_the_bytes_it_is_read_or_refused(noise: bytes, place: int, flip: int) -> None:
    good = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(4)}, {"format": "pt"}))
    good[place % len(good)] ^= flip
    for data in (noise, struct.pack("<Q", len(noise)) + noise, bytes(good)):
        try:
            tensors, _ = parse(memoryview(bytearray(data)), "file")
        except AdapterError:
            continue
        assert sum(t.nbytes for t in tensors.values()) <= len(data)


def test_names_in_messages_are_short_and_harmless() -> None:
    assert len(shown("x" * 10**6)) <= 121
    assert shown("\x1b[31m\u202e") == "'\\x1b[31m\\u202e'"
    with pytest.raises(AdapterError, match="there twice"):
        strict_json(b'{"r": 1, "r": 2}', "file")
