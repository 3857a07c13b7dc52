"""The systems that are compared: how they are found and set up, and that their first tokens agree."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from memos_engine.bench.peers import gguf_export, install, registry
from memos_engine.bench.peers.process import PeerError, PeerProcess

from memos_engine.config import ConfigError
from memos_engine.errors import ModelFilesError, UnsupportedModelError


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which no peer is set up."""
    for name in registry.PEERS:
        monkeypatch.delenv(f"MEMOS_ENGINE_PEER_{name.upper().replace('-', '_')}", raising=False)
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_unknown_names_list_the_known_ones(empty_cache):
    with pytest.raises(ConfigError, match=r"'nope'.*transformers, vllm, llamacpp"):
        registry.select(("transformers", "nope"), "cpu")
    with pytest.raises(ConfigError):
        registry.why_absent("nope", "cpu")


def test_default_is_what_is_here_and_named_ones_stay(empty_cache):
    assert registry.select(None, "cpu") == ("transformers",)
    assert registry.select((), "cpu") == ()
    assert registry.select(("vllm", "peft", "vllm"), "cpu") == ("vllm", "peft")


def test_absent_ones_say_why(empty_cache):
    why = {row["name"]: row["why"] for row in registry.table("cpu")}
    assert set(why) == set(registry.PEERS)
    assert why["transformers"] == ""
    assert why["vllm"] == why["llamacpp"] == "it is not installed"
    assert "CUDA device" in why["flash-attn"]
    assert "CUDA device" in why["flexattention"]
    assert "comes later" in registry.why_absent("flexattention", "cuda")
    assert "CPU only" in registry.why_absent("llamacpp", "cuda")
    with pytest.raises(PeerError, match="bench peers --install --only vllm") as caught:
        registry.start("vllm", 1, "cpu", 1)
    assert caught.value.status == "absent"
    with pytest.raises(PeerError, match="peft is not used") as caught:
        registry.start("peft", 1, "cpu", 1)
    assert caught.value.status == "absent"


def test_half_an_environment_is_none(empty_cache):
    python = registry.python_in(registry.home("llamacpp"))
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert registry.why_absent("llamacpp", "cpu") == "it is not installed"
    registry.marker(registry.home("llamacpp")).write_text("{}")
    assert registry.why_absent("llamacpp", "cpu") is None
    assert registry.python_for("llamacpp") == str(python)
    python.unlink()
    assert registry.why_absent("llamacpp", "cpu") == "it is not installed"


def test_a_variable_names_another_python(empty_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMOS_ENGINE_PEER_LLAMACPP", sys.executable)
    assert registry.python_for("llamacpp") == sys.executable
    assert "has no package xllamacpp" in registry.why_absent("llamacpp", "cpu")
    monkeypatch.setenv("MEMOS_ENGINE_PEER_LLAMACPP", str(tmp_path / "none"))
    assert "cannot be run" in registry.why_absent("llamacpp", "cpu")
    monkeypatch.setenv("MEMOS_ENGINE_PEER_LLAMACPP", "/bin/false")
    assert "not a Python" in registry.why_absent("llamacpp", "cpu")
    monkeypatch.setenv("MEMOS_ENGINE_PEER_TRANSFORMERS", sys.executable)
    assert registry.why_absent("transformers", "cpu") is None
    assert registry.python_for("transformers") == sys.executable


# -- install -------------------------------------------------------------------------------------


def borrow(argv: list[str]) -> bool:
    """In place of a new environment: one whose Python is ours. True where that was asked for."""
    if argv[1:3] != ["-m", "venv"]:
        return False
    python = registry.python_in(Path(argv[3]))
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return True


def test_a_failing_pip_leaves_nothing_and_says_what_to_do(empty_cache, monkeypatch):
    run = install._run
    monkeypatch.setattr(install, "_run", lambda name, argv, what="": borrow(argv) or run(name, argv, what))
    monkeypatch.setitem(
        install.RECIPES, "llamacpp", install.Recipe((3, 10), ("memos-engine-none==9",), None, "")
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    with pytest.raises(install.PeerInstallError) as caught:
        install.install("llamacpp", said.append)
    assert "No matching distribution found for memos-engine-none==9" in str(caught.value)
    assert "bench peers --install --only llamacpp" in str(caught.value)
    assert said
    assert not registry.home("llamacpp").exists()
    assert registry.why_absent("llamacpp", "cpu") == "it is not installed"


def test_a_whole_environment_is_made_once(empty_cache, monkeypatch):
    steps: list[list[str]] = []

    def run(name: str, argv: list[str], what: str = "") -> None:
        steps.append(argv)
        borrow(argv)

    monkeypatch.setattr(install, "_run", run)
    python = install.install("llamacpp")
    made = len(steps)
    assert steps[-1][1:] == ["-c", "import xllamacpp"]
    assert install.install("llamacpp") == python
    assert len(steps) == made
    assert registry.why_absent("llamacpp", "cpu") is None
    registry.marker(registry.home("llamacpp")).write_text("an older recipe")
    install.install("llamacpp")
    assert len(steps) == 2 * made


def test_only_engines_with_a_recipe_are_set_up(empty_cache):
    with pytest.raises(install.PeerInstallError, match="comes with memos-engine"):
        install.install("transformers")
    with pytest.raises(install.PeerInstallError, match="vllm, llamacpp"):
        install.install("flash-attn")
    with pytest.raises(ConfigError):
        install.install("nope")


def test_requirements_come_from_the_wheel(tmp_path):
    wheel = tmp_path / "x-1-py3-none-any.whl"
    lines = (
        "Metadata-Version: 2.1", "Name: x", "Version: 1", "Requires-Dist: regex>=1",
        'Requires-Dist: xgrammar==0.2.8; platform_system == "Linux" or platform_system == "Darwin"',
        'Requires-Dist: only-windows; platform_system == "Windows"', "Requires-Dist: torch==2.13.0+cpu",
        'Requires-Dist: plotly; extra == "bench"', "Requires-Dist: fastapi[standard]<1",
    )  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x-1.dist-info/METADATA", "\n".join(lines) + "\n\nText\n")
    assert install.requirements_of(wheel) == ["regex>=1", "xgrammar==0.2.8", "fastapi[standard]<1"]


# -- workers -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a shape that every system computes (vLLM's CPU kernels want heads of 32 or more)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small") / "model"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["he"] = len(vocab)
    tokenizer["model"]["merges"] = [["h", "e"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


PROMPTS = [
    [[1, 40, 41], [42] * 150, [50, 51, 52, 53], [60, 61, 62]],
    [[1, 40, 41], [50, 51, 52, 53], [42] * 150, [60, 61, 62]],
    [[7], [9, 8, 7, 6]],
    [[30], [33]],
]


def loaded(name: str, folder: Path) -> PeerProcess:
    process = registry.start(name, 240, "cpu", 1)
    answer = process.call(
        "load",
        model=str(folder),
        dtype="float32",
        threads=1,
        max_tokens=256,
        device="cpu",
        random_weights=None,
    )
    assert all(answer["versions"].values())
    return process


@pytest.fixture(scope="session")
def truth(small_folder: Path) -> list[int]:
    """The first greedy token of each prompt, computed in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [torch.tensor([[token for part in parts for token in part]]) for parts in PROMPTS]
        return [int(model(row).logits[0, -1].argmax()) for row in rows]


def check(process: PeerProcess, truth: list[int], block: int) -> None:
    """Modes agree with the truth and reuse what they say; rows of a batch; text; refusals."""
    for mode in ("full", "prefix", "full"):
        for parts, token in zip([*PROMPTS, PROMPTS[0]], [*truth, truth[0]], strict=True):
            answer = process.call("first_token", mode=mode, parts=parts)
            whole, last = sum(map(len, parts)), len(parts[-1])
            assert answer["token"] == token
            assert answer["ms"] > 0
            left = whole if mode == "full" else last + (whole - last) % block
            assert answer["computed"] == left
    steps = process.call("decode", context=[1, 40, 41, 42] * 20, batch=2, steps=4)["step_ms"]
    assert len(steps) == 4
    assert min(steps) > 0
    with pytest.raises(PeerError) as caught:
        process.call("first_token", mode="bogus", parts=[[1], [2]])
    assert caught.value.status == "unsupported"


def test_transformers(small_folder, truth):
    with loaded("transformers", small_folder) as process:
        check(process, truth, 1)
        answer = process.call("request", text="<|im_start|>user\nhello<|im_end|>\n")
        assert answer["ms"] > 0


def test_llamacpp(small_folder, truth, tmp_path, monkeypatch):
    why = registry.why_absent("llamacpp", "cpu")
    if why:
        pytest.skip(f"llama.cpp is not tested: {why}")
    monkeypatch.setenv("MEMOS_ENGINE_PEER_LLAMACPP", registry.python_for("llamacpp"))
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path))  # its GGUF does not stay
    with loaded("llamacpp", small_folder) as process:
        check(process, truth, 1)
        text = "<|im_start|>user\n12  hellos,\tü<|im_end|>\n"
        from memos_engine.prompt import load_tokenizer

        ids = load_tokenizer(small_folder)(text, add_special_tokens=False)["input_ids"]
        answer = process.call("request", text=text)
        assert answer["computed"] == len(ids)
        assert answer["token"] == process.call("first_token", mode="full", parts=[ids])["token"]
    assert len(list((tmp_path / "peers" / "gguf").iterdir())) == 1


@pytest.mark.slow
def test_vllm(small_folder, truth, monkeypatch):
    why = registry.why_absent("vllm", "cpu")
    if why:
        pytest.skip(f"vLLM is not tested: {why}")
    monkeypatch.setenv("MEMOS_ENGINE_VLLM_EAGER", "1")
    with loaded("vllm", small_folder) as process:
        check(process, truth, 128)
        assert process.call("request", text="<|im_start|>user\nhello<|im_end|>\n")["ms"] > 0


def test_exported_weights_come_back(small_folder, tmp_path):
    """llama.cpp's order of q and k is undone by the conversion that reads GGUF files."""
    from safetensors.torch import load_file

    from memos_engine.models.convert import convert_gguf

    gguf_export.export(small_folder, "float32", tmp_path / "x.gguf")
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    before = load_file(small_folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "activation|gelu"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "qwen2|biases"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
            "yarn",
        ),
    ],
    ids=["biases", "activation", "family", "yarn"],
)
def test_what_an_export_would_leave_out_is_refused(small_folder, tmp_path, changed, reason):
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | changed
    config.pop("rope_parameters", None) if "rope_scaling" in changed else None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((UnsupportedModelError, ModelFilesError), match=reason):
        gguf_export.export(folder, "float32", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_exports_are_cached_and_follow_the_folder(small_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    first = gguf_export.cached(folder, "bfloat16")
    made = first.stat().st_mtime_ns
    assert gguf_export.cached(folder, "bfloat16") == first
    assert first.stat().st_mtime_ns == made
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert gguf_export.cached(folder, "bfloat16") != first
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFilesError, match="tokenizer"):
        gguf_export.cached(folder, "bfloat16")
