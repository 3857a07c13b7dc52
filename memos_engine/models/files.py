"""Is this folder a whole model? Structure only: headers, shards, sizes; `manifest.py` knows the hashes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memos_engine.errors import ModelFilesError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.safetensors$")
_MAX_HEADER = 100_000_000  # the format's own limit
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "BOOL": 8, "I8": 8, "U8": 8}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}


def sha256_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; `advance(bytes)` is called as it goes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def load_json(path: Path) -> Any:
    """The JSON document in `path`; ModelFilesError where it is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(f"{path} is missing; fetch the model again") from None
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} is not readable JSON ({error}); fetch the model again") from None


def safetensors_header(path: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file: name -> {dtype, shape, data_offsets}.

    The header must parse, every tensor's extent must match its shape and dtype, extents must follow each
    other without gaps, and the last must end exactly at the end of the file. Raises ModelFilesError.
    """
    again = "the file is half-written or damaged; fetch the model again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ModelFilesError(f"{path} ({size} bytes) has no whole safetensors header: {again}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelFilesError(f"{path} is missing; fetch the model again") from None
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} has an unreadable safetensors header ({error}): {again}") from None

    try:
        header.pop("__metadata__", None)
        end = 0
        for begin, stop, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
            entry = header[name]
            bits = _BITS.get(entry["dtype"])
            if begin != end or (bits and (stop - begin) * 8 != math.prod(entry["shape"]) * bits):
                raise ModelFilesError(f"{path}: tensor {name} does not fit its place: {again}")
            end = stop
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFilesError(f"{path} has a malformed safetensors header ({error!r}): {again}") from None
    if 8 + length + end != size:
        raise ModelFilesError(
            f"{path} has {size} bytes where its header promises {8 + length + end}: {again}"
        )
    return dict(header)


def _check_index(folder: Path) -> None:
    """Every shard that the index names is there, whole, and holds the tensors it should."""
    weight_map = load_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFilesError(f"{folder / INDEX} names no tensors; fetch the model again")
    headers = {shard: safetensors_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise ModelFilesError(f"{folder / shard} lacks tensor {tensor} that the index promises")


def check_folder(path: str | Path) -> Path:
    """Checks that a Hugging Face folder is complete: a config.json and whole safetensors weights.

    Returns the folder. Raises ModelFilesError naming the file that is missing, half-written or of a
    kind (pickled weights) that is refused. Reads headers only; contents are not hashed.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelFilesError(f"{folder} is not a folder; give a Hugging Face model folder")
    names = sorted(file.name for file in folder.iterdir())
    if "config.json" not in names:
        hint = next((f"; give the file itself: {folder / n}" for n in names if n.endswith(".gguf")), "")
        raise ModelFilesError(f"{folder} has no config.json, so it is not a Hugging Face model folder{hint}")
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights and INDEX not in names:
        pickled = [name for name in names if name.endswith(PICKLED)]
        if pickled:
            raise ModelFilesError(
                f"{folder} has only pickled weights ({', '.join(pickled)}), which can run code when loaded "
                "and are refused; save the model with safe_serialization=True and use that folder"
            )
        raise ModelFilesError(f"{folder} has no *.safetensors weights; fetch the model again")
    for name in names:
        if name.endswith(".json"):
            load_json(folder / name)
    if not isinstance(load_json(folder / "config.json"), dict):
        raise ModelFilesError(f"{folder / 'config.json'} is not a JSON object; fetch the model again")
    if INDEX in names:
        _check_index(folder)
    elif parts := [name for name in weights if _SHARD.search(name)]:
        raise ModelFilesError(f"{folder} has {parts[0]} but no {INDEX} that names all parts; fetch it again")
    for name in weights:
        safetensors_header(folder / name)
    return folder
