"""Adapter files in PEFT's format: what goes in comes out, and PEFT computes the same with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from memos_engine.decoder.adapter import Adapter, LowRank
from memos_engine.decoder.adapter_file import CONFIG, WEIGHTS, export_peft, import_peft
from memos_engine.decoder.adapter_record import (
    concatenated,
    decode_adapter,
    encode_adapter,
    made,
    model_print,
    projection_shapes,
)
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import AdapterError


@pytest.fixture(scope="module")
def spec(tiny_folder: Path) -> ModelSpec:
    return ModelSpec.from_folder(tiny_folder)


def random_adapter(
    spec: ModelSpec, ranks: dict[tuple[int, str], int], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Adapter:
    """Random A and B of these ranks; scales differ by module."""
    shapes, generator = projection_shapes(spec), torch.Generator().manual_seed(seed)
    modules = {}
    for n, ((layer, name), rank) in enumerate(ranks.items()):
        out, width = shapes[name]
        a = torch.randn(rank, width, generator=generator).to(dtype)
        b = torch.randn(out, rank, generator=generator).to(dtype) * 0.05
        modules[layer, name] = LowRank(a, b, 1.0 + n % 3)
    return made(modules)


def delta(adapter: Adapter) -> dict[tuple[int, str], torch.Tensor]:
    """The deltas `[out, in]` in float64."""
    return {key: m.scale * (m.b.double() @ m.a.double()) for key, m in adapter.modules.items()}


SOME = {(0, "q"): 4, (0, "down"): 3, (1, "k"): 8, (2, "gate"): 4, (2, "v"): 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_round_trip_through_peft_files_keeps_the_digest(
    spec: ModelSpec, tmp_path: Path, dtype: torch.dtype
) -> None:
    adapter = random_adapter(spec, SOME, dtype=dtype)
    export_peft(adapter, tmp_path / "out", spec)
    again = import_peft(tmp_path / "out", spec)
    assert again.digest == adapter.digest
    assert again.modules.keys() == adapter.modules.keys()
    with pytest.raises(AdapterError, match="name a new folder"):
        export_peft(adapter, tmp_path / "out", spec)


@settings(max_examples=25, deadline=None)
@given(
    alpha=st.floats(0.1, 300),
    rank=st.integers(1, 12),
    rslora=st.booleans(),
    pattern=st.sampled_from([2, 5, 7]),
)
def test_any_scale_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    alpha: float,
    rank: int,
    rslora: bool,
    pattern: int,
) -> None:
    spec = ModelSpec.from_folder(tiny_folder)
    adapter = random_adapter(spec, {(0, "q"): rank, (1, "q"): pattern})
    folder = tmp_path_factory.mktemp("peft")
    export_peft(adapter, folder / "a", spec)
    config = json.loads((folder / "a" / CONFIG).read_text())
    config |= {"lora_alpha": alpha, "use_rslora": rslora, "alpha_pattern": {}}
    (folder / "a" / CONFIG).write_text(json.dumps(config))
    first = import_peft(folder / "a", spec)
    root = rank**0.5 if rslora else rank
    assert first.modules[0, "q"].scale == pytest.approx(alpha / root, rel=1e-6)
    export_peft(first, folder / "b", spec)
    assert import_peft(folder / "b", spec).digest == first.digest


def test_the_payload_is_read_back_bit_for_bit(spec: ModelSpec) -> None:
    adapter = random_adapter(spec, SOME, dtype=torch.bfloat16)
    data = memoryview(bytearray(encode_adapter(adapter)))
    again = decode_adapter(data, adapter.digest, whole=True)
    assert again.digest == adapter.digest
    assert (again.rank, again.nbytes, again.kv_floor) == (adapter.rank, adapter.nbytes, adapter.kv_floor)
    for key, module in adapter.modules.items():
        assert torch.equal(module.a, again.modules[key].a)
        assert torch.equal(module.b, again.modules[key].b)
    with pytest.raises(AdapterError, match="another one"):
        decode_adapter(data, "0" * 64)
    data[-1] ^= 1
    decode_adapter(data, adapter.digest)  # the vault's checksum is what finds this in use
    with pytest.raises(AdapterError, match="not that of its digest"):
        decode_adapter(data, adapter.digest, whole=True)


def test_the_digest_is_of_content_alone(spec: ModelSpec) -> None:
    adapter = random_adapter(spec, SOME)
    assert made(dict(reversed(adapter.modules.items()))).digest == adapter.digest
    first = adapter.modules[0, "q"]
    for other in (
        replace(first, scale=first.scale * (1 + 1e-6)),
        replace(first, a=first.a + 1e-6),
        replace(first, b=first.b.to(torch.float16), a=first.a.to(torch.float16)),
    ):
        assert made({**adapter.modules, (0, "q"): other}).digest != adapter.digest
    moved = {(1 if key == (0, "q") else key[0], key[1]): m for key, m in adapter.modules.items()}
    assert made(moved).digest != adapter.digest


@settings(max_examples=30, deadline=None)
@given(
    scales=st.lists(st.sampled_from([1.0, -0.5, 0.25, 0.3, 0.0, 2.0]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rank_concatenation_is_the_sum(tiny_folder: Path, scales: list[float], dtype: torch.dtype) -> None:
    spec = ModelSpec.from_folder(tiny_folder)
    keys = list(SOME)
    parts = [
        random_adapter(spec, {key: SOME[key] for key in keys[n % 3 :]}, seed=n, dtype=dtype)
        for n in range(len(scales))
    ]
    joined = concatenated(parts, scales)
    assert joined.rank <= sum(part.rank for part in parts)
    sums: dict[Any, torch.Tensor] = {}
    for part, scale in zip(parts, scales, strict=True):
        for key, value in delta(part).items():
            sums[key] = sums.get(key, 0) + scale * value
    got = delta(joined)
    assert got.keys() == sums.keys()
    for key, value in sums.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6)
    if dtype == torch.bfloat16 and all(scale in (1.0, -0.5, 0.25, 2.0) for scale in scales):
        pairs = [len({p.modules[key].scale for p in parts if key in p.modules}) for key in joined.modules]
        if max(pairs) == 1:
            assert all(m.a.dtype == dtype for m in joined.modules.values())


def test_concatenation_wants_a_scale_each(spec: ModelSpec) -> None:
    adapter = random_adapter(spec, SOME)
    for scales in ([], [1.0, 2.0]):
        with pytest.raises(AdapterError, match="as many scales"):
            concatenated([adapter], scales)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        concatenated([adapter], [float("nan")])


def test_the_model_print_is_the_same_in_each_dtype(spec: ModelSpec, tiny_folder: Path) -> None:
    prints = {
        model_print(spec, Weights.from_folder(tiny_folder, spec, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(prints) == 1
    changed = Weights.from_folder(tiny_folder, spec, torch.float32)
    with torch.no_grad():
        changed.layers[1].down.mul_(1.01)
    assert model_print(spec, changed) not in prints


# -- against PEFT --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="PEFT NOT TESTED: pip install --no-deps peft accelerate")


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trained_is_what_we_read(
    peft: Any, tiny_folder: Path, spec: ModelSpec, tmp_path: Path, rslora: bool
) -> None:
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"model.layers.1.mlp.down_proj": 7, "v_proj": 2},
        alpha_pattern={"down_proj": 3, "^model.layers.0.self_attn.q_proj$": 5},
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), config
    )
    model.save_pretrained(tmp_path / "trained")
    adapter = import_peft(tmp_path / "trained", spec)
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            parts = name.split(".")
            where = int(parts[4]), parts[-1].removesuffix("_proj")
            expected[where] = module.get_delta_weight("default").double()
    got = delta(adapter)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_what_we_write_is_what_peft_reads(
    peft: Any, tiny_folder: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    adapter = random_adapter(spec, SOME)
    export_peft(adapter, tmp_path / "ours", spec, "tiny")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    plain = {name: value.clone() for name, value in base.named_parameters()}
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    merged = dict(model.merge_and_unload().named_parameters())
    changed = {name for name, value in plain.items() if not torch.equal(value, merged[name])}
    found = delta(adapter)
    for (layer, name), value in found.items():
        block = "self_attn" if name in "qkvo" else "mlp"
        full = f"model.layers.{layer}.{block}.{name}_proj.weight"
        changed.remove(full)
        torch.testing.assert_close((merged[full] - plain[full]).double(), value, rtol=1e-4, atol=1e-5)
    assert not changed


def test_fused_projections_are_split_and_joined(spec: ModelSpec, tmp_path: Path) -> None:
    fused = replace(spec, fused=True)
    sizes = projection_shapes(spec)
    a, b = torch.randn(3, 48), torch.randn(sum(sizes[name][0] for name in "qkv"), 3)
    export_peft(random_adapter(spec, {(0, "down"): 3}), tmp_path / "phi")
    key = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_{}.weight"
    tensors = {key.format("A"): a, key.format("B"): b}
    save_file(tensors, tmp_path / "phi" / WEIGHTS)
    with pytest.raises(AdapterError, match="no such projection"):
        import_peft(tmp_path / "phi", spec)
    adapter = import_peft(tmp_path / "phi", fused)
    assert all(adapter.modules[0, name].b.shape[0] == sizes[name][0] for name in "qkv")
    export_peft(adapter, tmp_path / "again", fused)
    for name, value in load_file(tmp_path / "again" / WEIGHTS).items():
        assert torch.equal(value, tensors[name])
    apart = {key: replace(m, scale=m.scale + (key[1] == "k")) for key, m in adapter.modules.items()}
    with pytest.raises(AdapterError, match="adapts them apart"):
        export_peft(made(apart), tmp_path / "never", fused)
