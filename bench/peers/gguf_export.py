"""A model folder becomes a GGUF file with the same weights, for llama.cpp.

Runs in our interpreter: the peer's environment has neither torch nor gguf. Weights are rounded to the bench's
dtype exactly as every other system rounds them; nothing is quantised. Norms are widened to fp32 after that,
which is the only form llama.cpp takes them in. bfloat16 values are written as F16, which holds those of usual
models exactly: llama.cpp's prebuilt kernels multiply F16 several times faster than BF16.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memos_engine.errors import MemosEngineError, UnsupportedModelError
from memos_engine.models.cache import cache_dir
from memos_engine.models.files import load_json

_FORM = 2  # of the files written here; part of their names
# How llama.cpp calls a byte-level tokenizer's first split. Others are written as "default", and whoever reads
# the file must not let llama.cpp tokenise: see `text_is_exact`.
_DIGITS_THEN_BYTES, _BYTES = "smollm", "gpt-2"


def cached(folder: Path, dtype: str) -> Path:
    """The GGUF of a model folder, made if it is not there yet; a changed folder gets a file of its own."""
    import xxhash

    told = xxhash.xxh3_64(f"{_FORM} {folder.resolve()}".encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        about = path.stat()
        told.update(f"{path.name} {about.st_size} {about.st_mtime_ns}".encode())
    path = cache_dir().parent / "peers" / "gguf" / f"{folder.name[:60]}-{told.hexdigest()}-{dtype}.gguf"
    if not path.is_file():
        export(folder, dtype, path)
    return path


def export(folder: Path, dtype: str, path: Path) -> None:
    """Writes the model in `folder` to `path` as float32 or bfloat16, whole or not at all.

    Raises UnsupportedModelError for a model that is not a plain Llama, MemosEngineError where it cannot be
    written.
    """
    import torch

    from memos_engine.decoder.spec import ModelSpec
    from memos_engine.decoder.weights import Weights

    spec = ModelSpec.from_folder(folder)
    if (reason := _unfit(spec, load_json(folder / "config.json"))) is not None:
        raise UnsupportedModelError(f"{folder.name} is not a plain Llama for llama.cpp here: {reason}.")
    weights = Weights.from_folder(folder, spec, getattr(torch, dtype))
    with _written(path) as unfinished:
        _write(unfinished, folder, spec, weights.tensors)


def _unfit(spec: Any, config: dict[str, Any]) -> str | None:
    """What this exporter would leave out of a model, or None: a file without it would compute nonsense."""
    if config.get("model_type") != "llama":
        return f"its model_type is {config.get('model_type')}"
    if spec.biases or spec.activation != "silu":
        return "it has biases" if spec.biases else f"its activation is {spec.activation}"
    kinds = {rope.kind for rope in spec.ropes} - {"default", "linear", "llama3"}
    return f"its RoPE is {', '.join(sorted(kinds))}" if kinds else None


def text_is_exact(folder: Path) -> bool:
    """Whether llama.cpp splits text into tokens as the model's own tokenizer does."""
    return _split(load_json(folder / "tokenizer.json")) != "default"


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=".gguf", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, 0o644)  # mkstemp makes it private; the cache follows the folder's permissions
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise MemosEngineError(
            f"{path} cannot be written ({error}); free some space or set MEMOS_ENGINE_CACHE to a folder "
            "elsewhere."
        ) from error


def _write(path: Path, folder: Path, spec: Any, tensors: dict[str, Any]) -> None:
    import gguf
    import torch

    writer = gguf.GGUFWriter(path, "llama")
    _architecture(writer, spec)
    _vocabulary(writer, folder, spec)
    wide = next(iter(tensors.values())).dtype == torch.float32
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if wide else gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.num_layers)
    factors = _rope_factors(spec)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, tensor in tensors.items():
        form = gguf.GGMLQuantizationType[_form(tensor)]
        size = tensor.numel() * (4 if form == gguf.GGMLQuantizationType.F32 else 2)
        written = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(written, tuple(tensor.shape), np.dtype(np.uint16), size, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, tensor in tensors.items():
        writer.write_tensor_data(_values(name, tensor, spec))
    writer.close()


def _architecture(writer: Any, spec: Any) -> None:
    writer.add_name("memos_engine bench")
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.rms_eps)


def _rope_factors(spec: Any) -> npt.NDArray[np.float32] | None:
    """What llama.cpp divides each rotary frequency by: Llama 3.1's scaling is a table to it."""
    if spec.rope.kind == "default":
        return None
    from dataclasses import replace

    plain = replace(spec.rope, kind="default").inv_freq(spec.head_dim)
    return np.asarray((plain / spec.rope.inv_freq(spec.head_dim)).numpy(), dtype=np.float32)


def _values(name: str, tensor: Any, spec: Any) -> npt.NDArray[Any]:
    """A tensor's bytes. Rows of q and k go from two halves to even and odd pairs, as llama.cpp rotates."""
    import torch

    if tensor.dim() == 1:
        return np.ascontiguousarray(tensor.float().numpy())
    for part, heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads)):
        if part in name:
            rows, columns = tensor.shape
            halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
            tensor = halves.transpose(1, 2).reshape(rows, columns)
    raw, form = tensor.contiguous(), _form(tensor)
    if form == "BF16":
        return np.asarray(raw.view(torch.uint16).numpy())
    return np.asarray((raw.half() if form == "F16" else raw).numpy())


def _form(tensor: Any) -> str:
    """bfloat16 reaches further than F16 on both sides. Below, F16 is off by 2^-25 at most, which no product
    notices; a tensor with values above stays BF16."""
    import torch

    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        return "F32"
    return "F16" if float(tensor.abs().max()) <= torch.finfo(torch.float16).max else "BF16"


def _split(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the tokenizer's first split, "default" where none is known to be equal."""
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    plain = tokenizer.get("model", {}).get("type") == "BPE" and not tokenizer.get("normalizer")
    if not plain or not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return "default"
    if not steps[-1].get("use_regex", True):
        return "default"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return _DIGITS_THEN_BYTES
    return _BYTES if kinds == ["ByteLevel"] else "default"


def _vocabulary(writer: Any, folder: Path, spec: Any) -> None:
    """The tokenizer, without which llama.cpp loads no model, even where it is only ever sent token ids."""
    import gguf

    tokenizer = load_json(folder / "tokenizer.json")
    model = tokenizer.get("model", {})
    if not isinstance(model.get("vocab"), dict):
        raise UnsupportedModelError(
            f"{folder / 'tokenizer.json'} holds no table of tokens ({model.get('type')}); llama.cpp can be "
            "compared on models with a BPE tokenizer."
        )
    tokens = [f"[PAD{i}]" for i in range(spec.vocab_size)]
    types = [gguf.TokenType.UNUSED] * spec.vocab_size
    for text, token in model["vocab"].items():
        if token < spec.vocab_size:
            tokens[token], types[token] = text, gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens", []):
        if added["id"] < spec.vocab_size:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = model.get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # An empty list cannot be written; a merge of tokens that no text has changes nothing.
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges] or ["[PAD0] [PAD1]"])
    config = load_json(folder / "config.json")
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        token = config.get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            add(int(token))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def main(folder: str, dtype: str) -> None:
    """Prints where the file is and whether llama.cpp may be given text, as one line of JSON."""
    path = cached(Path(folder), dtype)
    print(json.dumps({"path": str(path), "text": text_is_exact(Path(folder))}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except MemosEngineError as error:
        sys.exit(f"{error}")
