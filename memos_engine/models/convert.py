"""A GGUF file of the Llama family becomes a Hugging Face folder with fp32 safetensors weights.

Quantised tensors are dequantised with `gguf`, one at a time, so that memory stays at the size of the largest
tensor. llama.cpp stores q and k with the rotary halves interleaved; that permutation is undone here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memos_engine.errors import ModelFilesError, UnsupportedModelError
from memos_engine.models.progress import Reporter

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig

ARCHITECTURES = ("llama",)  # llama.cpp's name for Llama, Mistral 7B, SmolLM2 and their relatives
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(path: Path, out: Path, reporter: Reporter | None = None) -> None:
    """Writes config, generation config, tokenizer and `model.safetensors` (fp32) into the folder `out`.

    Raises UnsupportedModelError for other architectures or features, naming what is supported, and
    ModelFilesError where the file is cut short or damaged.
    """
    reporter = reporter or Reporter(False)
    with reporter.stage(f"reading {path.name}"):
        reader, fields = _open(path)
        config = _config(path, reader, fields)
        names = _names(path, reader, config)
        config.save_pretrained(out)
        _generation_config(fields).save_pretrained(out)
        _save_tokenizer(path, out, fields, config.max_position_embeddings)
    with reporter.stage(f"dequantising {path.name}", len(reader.tensors)) as advance:
        _write_weights(out / "model.safetensors", _tensors(path, reader, config, names, advance))


def _open(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """The reader and all scalar fields; arrays (vocabulary, merges) are left out."""
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != GGUFValueType.ARRAY
        }
    except FileNotFoundError:
        raise ModelFilesError(f"{path} does not exist; give the path of a GGUF file") from None
    except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{path} is not a whole GGUF file ({error}); download it again") from error
    architecture = fields.get("general.architecture")
    if architecture is None:
        raise ModelFilesError(f"{path} does not say its architecture; it is not a whole GGUF file")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path} holds the GGUF architecture {architecture!r}; supported: {', '.join(ARCHITECTURES)}. "
            "For other models use their safetensors folder or hub id"
        )
    if int(fields.get("split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"{path} is one part of a split GGUF; merge the parts into one file first"
        )
    return reader, fields


def _config(path: Path, reader: GGUFReader, fields: Mapping[str, Any]) -> LlamaConfig:
    from transformers import LlamaConfig

    def need(key: str) -> Any:
        try:
            return fields[f"llama.{key}"]
        except KeyError:
            raise ModelFilesError(
                f"{path} has no field llama.{key}; it may be a vocabulary-only file"
            ) from None

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise UnsupportedModelError(
            f"{path} scales its RoPE frequencies ({scaling}), which is not read from GGUF; "
            "supported are plain ones. Use the model's safetensors folder or hub id"
        )
    if "token_embd.weight" not in tensors:
        raise ModelFilesError(f"{path} has no token_embd.weight; download it again")
    heads = int(need("attention.head_count"))
    head_dim = int(fields.get("llama.attention.key_length", int(need("embedding_length")) // heads))
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{path} rotates only a part of each head; supported is the whole head")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=int(need("embedding_length")),
        intermediate_size=int(need("feed_forward_length")),
        num_hidden_layers=int(need("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        max_position_embeddings=int(need("context_length")),
        # GGUF holds these as fp32: 1e-05 must not come out as 9.999999747378752e-06
        rms_norm_eps=_shortest(need("attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _shortest(fields.get("llama.rope.freq_base", 1e4)),
        },
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _generation_config(fields: Mapping[str, Any]) -> Any:
    """End-of-text and end-of-turn tokens both stop generation."""
    from transformers import GenerationConfig

    stops = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(int(token) for token in stops if token is not None))
    return GenerationConfig(
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _save_tokenizer(path: Path, out: Path, fields: Mapping[str, Any], length: int) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        with TemporaryDirectory() as alone:  # files that lie beside the GGUF must not be mixed in
            (Path(alone) / "model.gguf").symlink_to(path.resolve())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", local_files_only=True)
    except Exception as error:
        raise ModelFilesError(
            f"no tokenizer could be read from {path} ({error}); download it again"
        ) from error
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # transformers leaves out that this family splits every digit off before the merges: without
        # it two spaces before a digit come out as other tokens than the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(out)
    # Traces of this conversion, and a class name that only transformers 5 knows.
    file = out / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend", "name_or_path", "gguf_file"):
        settings.pop(key, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    file.write_text(
        json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its GGUF name, as `[out, in]`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, q), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"blk.{i}.{part}.weight": shape for part, shape in layer.items()}
    shapes["output_norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, hidden)
    return shapes


def _names(path: Path, reader: GGUFReader, config: LlamaConfig) -> dict[str, str]:
    """GGUF name -> Hugging Face name; refuses a file with tensors missing, unknown or of another shape."""
    shapes = _shapes(config)
    found = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise ModelFilesError(f"{path} lacks {len(missing)} tensors ({missing[0]}, ...); download it again")
    unknown = sorted(found.keys() - shapes.keys())
    if unknown:
        raise UnsupportedModelError(
            f"{path} has tensors that a plain Llama has not ({', '.join(unknown[:3])}): biases, experts and "
            "scaled RoPE are not read from GGUF. Use the model's safetensors folder or hub id"
        )
    names = {}
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ModelFilesError(
                f"{path}: {name} has shape {found[name]}, expected {shape}; download it again"
            )
        block = name.split(".")
        names[name] = _TOP.get(name) or f"model.layers.{block[1]}.{_LAYER[block[2]]}.weight"
    return names


def _unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of each head from llama.cpp's even / odd pairs back to two halves: `[heads * dim, in]`."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


_Tensor = tuple[str, tuple[int, ...], Callable[[], npt.NDArray[np.float32]]]


def _tensors(
    path: Path,
    reader: GGUFReader,
    config: LlamaConfig,
    names: Mapping[str, str],
    advance: Callable[[int], None],
) -> list[_Tensor]:
    """Name, shape and a function that makes the fp32 values, for each tensor in the file's order."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def load(tensor: Any) -> npt.NDArray[np.float32]:
        try:
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UnsupportedModelError(
                f"{path}: {tensor.name} is quantised as {kind}, which the gguf package cannot dequantise; "
                "use another quantisation of this model, for example Q8_0 or Q4_K_M"
            ) from None
        if not np.isfinite(weight).all():
            raise ModelFilesError(f"{path}: {tensor.name} holds NaN or infinity; download it again")
        part = tensor.name.split(".")[-2]
        advance(1)
        return _unpermute(weight, heads[part]) if part in heads else weight

    def make(tensor: Any) -> _Tensor:
        return names[tensor.name], tuple(int(n) for n in reversed(tensor.shape)), lambda: load(tensor)

    return [make(tensor) for tensor in reader.tensors]


def _write_weights(path: Path, tensors: list[_Tensor]) -> None:
    """A safetensors file written tensor by tensor (the library's writer wants all of them in memory)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in tensors:
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, load in tensors:
            file.write(load().astype("<f4", copy=False).data)
