"""What is measured: a pulled model, or shapes with random weights; and whether it fits the machine."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.options import Options

from memos_engine.config import ConfigError
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights, expected_shapes
from memos_engine.errors import MemosEngineError
from memos_engine.models import resolve

# hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, theta, max positions. Run as Llama
# layers: where a family adds a norm of q and k (Qwen3), that small cost is left out.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool, float, int]] = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, True, 1e4, 16384),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True, 1e5, 8192),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 64, 49152, True, 13e4, 8192),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True, 5e5, 131072),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False, 1e6, 40960),
    "qwen3-32b": (5120, 25600, 64, 64, 8, 128, 151936, False, 1e6, 40960),
}
_PROCESS_BYTES = 600 << 20  # what a process with torch and transformers takes beside weights and KV


class TooBigError(MemosEngineError):
    """The model does not fit this machine; the message says what would."""


@dataclass(frozen=True)
class Target:
    """The model of a run. random: the name of the shapes when weights are random."""

    name: str
    folder: Path
    spec: ModelSpec
    random: str | None = None

    @property
    def weight_elements(self) -> int:
        return sum(math.prod(shape) for shape in expected_shapes(self.spec).values())

    def nbytes(self, dtype: str, tokens: int) -> int:
        """Weights and the KV of `tokens` tokens, in one process."""
        size = int(getattr(torch, dtype).itemsize)
        return self.weight_elements * size + tokens * self.spec.kv_bytes_per_token(size)

    def window(self, tokens: int) -> None:
        """Raises ConfigError if the model's window cannot hold `tokens`."""
        if tokens > self.spec.max_positions:
            raise ConfigError(
                f"{tokens} tokens (context, query and what the prompt adds) are more than the "
                f"{self.spec.max_positions} of {self.name}'s window. Use a shorter --context."
            )


@contextlib.contextmanager
def open_target(options: Options) -> Iterator[Target]:
    """The model named by the options; random weights get a folder with a config for the time of the run."""
    if options.random_weights is None:
        folder = resolve(options.model)
        yield Target(options.model, folder, ModelSpec.from_folder(folder))
        return
    name = options.random_weights
    if name not in SHAPES:
        raise ConfigError(f"random-weights {name}: this bench knows the shapes {', '.join(SHAPES)}.")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config = _config(name)
        (folder / "config.json").write_text(json.dumps(config))
        yield Target(f"{name} (random weights)", folder, ModelSpec.from_dict(config), name)


def random_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights of this spec, normal with sigma 0.02 and always the same ones; in one piece of memory, so that
    q, k, v and gate, up are one product each."""
    expected = expected_shapes(spec)
    arena = torch.empty(sum(map(math.prod, expected.values())), dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    tensors, at = {}, 0
    for name, shape in expected.items():
        part = tensors[name] = arena[at : at + math.prod(shape)].view(shape)
        at += math.prod(shape)
        if len(shape) == 1:
            part.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            part.normal_(0.0, 0.02, generator=generator)
    return Weights(tensors, spec)


def check_fits(target: Target, dtype: str, tokens: int, processes: int, device: str) -> None:
    """Raises TooBigError, before anything is loaded, if all systems together need more than is free."""
    free = free_bytes(device)
    beside = _PROCESS_BYTES if device == "cpu" else 0
    need = processes * (target.nbytes(dtype, tokens) + beside)
    if need <= free:
        return
    fitting = [
        name
        for name in SHAPES
        if name != "tiny"
        and Target(name, target.folder, ModelSpec.from_dict(_config(name))).nbytes(dtype, tokens) + beside
        <= free
    ]
    advice = [f"models of these shapes fit alone: {', '.join(fitting)}" if fitting else "no known model fits"]
    if processes > 1 and target.nbytes(dtype, tokens) + beside <= free:
        advice.insert(0, "it fits with --peers none")
    elif dtype == "float32" and target.nbytes("bfloat16", tokens) + beside <= free:
        advice.insert(0, "it fits with --dtype bfloat16 --peers none")
    raise TooBigError(
        f"{target.name} in {dtype} with {tokens} tokens of KV in {processes} processes needs "
        f"{need / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free on this {device} machine: "
        f"{'; '.join(advice)}."
    )


def free_bytes(device: str) -> int:
    """Memory that a new process could take."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 1 << 62  # unknown here; the operating system will say


def check_device(device: str) -> None:
    """Raises ConfigError for a device this machine does not have."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device here; use --device cpu.")


def _config(name: str) -> dict[str, Any]:
    hidden, inner, layers, heads, kv_heads, head_dim, vocab, tied, theta, positions = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
