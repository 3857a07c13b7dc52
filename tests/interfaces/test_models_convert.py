"""GGUF conversion against a tiny Llama whose weights are known. No network, no real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from memos_engine.errors import ModelFilesError, UnsupportedModelError
from memos_engine.models import cache_dir, list_models, pull, resolve, verify
from memos_engine.models.convert import convert_gguf
from memos_engine.models.files import check_folder

TYPES = gguf.GGMLQuantizationType
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of a byte-level vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(rest))]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "he", "ll", "ĠĠ"]
MERGES = ["h e", "l l", "Ġ Ġ"]


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**(settings | changes))


def tiny_model(config: LlamaConfig) -> Any:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # default norms are all ones: a mix-up would not show
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k: row 2i of a head is row i, row 2i + 1 is row dim/2 + i."""
    dim = weight.shape[0] // heads
    rows = [h * dim + half * dim // 2 + i for h in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return weight[rows]


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def write_gguf(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = TYPES.F32,
    architecture: str = "llama",
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
    drop: str = "",
) -> Path:
    """Writes `model` the way llama.cpp's converter would; `edit` adds to the file, `drop` omits a tensor."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        target = gguf_name(name)
        if target == drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        part = target.split(".")[-2]
        values = (interleave(weight, heads[part]) if part in heads else weight).numpy()
        if values.ndim == 1 or kind == TYPES.F32:
            writer.add_tensor(target, values)
        else:
            writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(tmp_path: Path, file: Path) -> Path:
    out = tmp_path / "converted"
    out.mkdir()
    convert_gguf(file, out)
    return check_folder(out)


@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.F16, TYPES.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 48},  # q is wider than hidden
    ],
    ids=["tied", "untied", "mha", "mqa", "wide-heads"],
)
def test_weights_and_logits_survive(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, changes: dict[str, Any]
) -> None:
    model = tiny_model(tiny_config(**changes))
    out = convert(tmp_path, write_gguf(tmp_path / "tiny.gguf", model, kind))
    stored = load_file(out / "model.safetensors")
    wanted = {
        name: weight if weight.ndim == 1 else _through(weight, kind)
        for name, weight in model.state_dict().items()
        if name in stored or not model.config.tie_word_embeddings
    }
    assert stored.keys() == wanted.keys()
    assert ("lm_head.weight" in stored) is not model.config.tie_word_embeddings
    for name, weight in wanted.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], weight), name

    model.load_state_dict(wanted, strict=False)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    ids = torch.randint(3, len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def _through(weight: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """The weight after quantisation in its original row order (rows are quantised one by one)."""
    return torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)))


def test_config_and_tokenizer(tmp_path: Path) -> None:
    def more_stops(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(0)
        writer.add_name("a model of somebody")

    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(tiny_config()), edit=more_stops)
    out = convert(tmp_path, file)
    config = AutoConfig.from_pretrained(out)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rms_norm_eps == 1e-5  # exactly: not the nearest fp32
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (16, 2, len(TOKENS))
    assert config.tie_word_embeddings is True
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 0]

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == config.max_position_embeddings == 128
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token_id == 2
    space, spaces, one = TOKENS.index("Ġ"), TOKENS.index("ĠĠ"), TOKENS.index("1")
    assert tokenizer("  1")["input_ids"] == [spaces, one]  # digits are split off before the merges
    assert tokenizer(" 11")["input_ids"] == [space, one, one]
    assert tokenizer("hell<|im_end|>")["input_ids"] == [TOKENS.index("he"), TOKENS.index("ll"), 2]
    text = "Grüße, 42 naïve 猫\n\n  end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    written = "".join(f.read_text() for f in out.glob("*.json"))
    assert str(tmp_path) not in written
    assert "_name_or_path" not in written
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


def test_files_beside_the_gguf_do_not_leak_in(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}'
    )
    (tmp_path / "tokenizer.json").write_text("{broken")
    out = convert(tmp_path, write_gguf(tmp_path / "tiny.gguf", tiny_model(tiny_config())))
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"


def _add(name: str, shape: tuple[int, ...]) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.zeros(shape, dtype=np.float32))


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "qwen2"}, "'qwen2'; supported: llama"),
    "bias": ({"edit": _add("blk.0.attn_q.bias", (64,))}, "attn_q.bias"),
    "experts": ({"edit": _add("blk.0.ffn_gate_exps.weight", (2, 96, 64))}, "ffn_gate_exps"),
    "rope factors": ({"edit": _add("rope_freqs.weight", (8,))}, "RoPE"),
    "rope scaling": ({"edit": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "RoPE.*yarn"),
    "split": ({"edit": lambda w: w.add_uint16("split.count", 2)}, "merge the parts"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_is_named(tmp_path: Path, case: str) -> None:
    arguments, message = UNSUPPORTED[case]
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(tiny_config()), **arguments)
    with pytest.raises(UnsupportedModelError, match=message):
        convert(tmp_path, file)


def test_missing_or_misshapen_tensors(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    for drop in ("blk.1.attn_k.weight", "token_embd.weight"):
        with pytest.raises(ModelFilesError, match=drop):
            convert_gguf(write_gguf(tmp_path / "a.gguf", model, drop=drop), tmp_path)
    swapped = write_gguf(
        tmp_path / "b.gguf", model, drop="output_norm.weight", edit=_add("output_norm.weight", (32,))
    )
    with pytest.raises(ModelFilesError, match=r"output_norm.weight has shape \(32,\), expected \(64,\)"):
        convert_gguf(swapped, tmp_path)


def test_not_finite(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ModelFilesError, match=r"blk\.1\.ffn_up\.weight holds NaN"):
        convert(tmp_path, write_gguf(tmp_path / "tiny.gguf", model))


def test_truncated_anywhere(tmp_path: Path) -> None:
    """A GGUF that was cut off is refused at any length, never converted into something shorter."""
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_model(tiny_config())).read_bytes()
    cut = tmp_path / "cut.gguf"
    out = tmp_path / "out"
    out.mkdir()
    for length in [0, 3, 4, 20, 24, 100, *range(200, len(whole), len(whole) // 12), len(whole) - 40]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFilesError, match=r"cut\.gguf"):
            convert_gguf(cut, out)
    with pytest.raises(ModelFilesError, match="does not exist"):
        convert_gguf(tmp_path / "nowhere.gguf", out)


KILLED = """
import os, signal, sys
from memos_engine.models import convert, pull

def half(path, tensors):
    written(path, tensors)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

written, convert._write_weights = convert._write_weights, half
pull(sys.argv[1], progress=False)
"""


def test_a_killed_pull_is_healed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(tiny_config()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", KILLED, str(file)], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(list(cache_dir().glob(".tmp-*"))) == 1  # what the kill left
    assert list_models() == []
    with pytest.raises(ModelFilesError, match="memos-engine models pull"):
        resolve(file)

    folder = pull(file, progress=False)
    assert not list(cache_dir().glob(".tmp-*"))
    assert resolve(file) == folder
    assert verify(folder, progress=False).source["kind"] == "gguf"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64
    assert [info.complete for info in list_models()] == [True]
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ModelFilesError, match="not converted"):
        resolve(file)
