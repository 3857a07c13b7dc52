"""Safetensors from strangers: read whole, by our own parser, with every claim checked before it is used.

A file is opened without following links and without waiting (a pipe would hang), once, so that what was
checked is what is used. Nothing in it is ever executed: the format holds numbers and JSON only.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memos_engine.errors import AdapterError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 8 << 20
_DISGUISED = {b"PK\x03\x04": "zip", b"\x80": "pickle"}


def read_whole(folder: Path, name: str, limit: int) -> memoryview:
    """A file's bytes, writable memory of our own. Raises AdapterError for links, devices, pipes, and files of
    more than `limit` bytes."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    path = folder / name
    if path.is_symlink():
        raise AdapterError(
            f"{path} is a link: an adapter's files must be files. Copy it with `cp -rL` and name the copy."
        )
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise AdapterError(f"{path} is no regular file; an adapter's files must be files.")
        if found.st_size > limit:
            raise AdapterError(
                f"{path} has {found.st_size:,} bytes, more than the {limit:,} that are allowed; is this "
                "really a LoRA adapter? Raise max_bytes if so."
            )
        buffer = memoryview(bytearray(found.st_size))
        done = 0
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done:]], done)
            if count == 0:
                raise AdapterError(f"{path} became shorter while it was read; repeat when it is at rest.")
            done += count
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); check the disk.") from error
    finally:
        os.close(fd)
    return buffer


def strict_json(raw: bytes | memoryview, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys or numbers that JSON does not have. Raises AdapterError."""
    try:
        found = json.loads(bytes(raw).decode("utf-8"), object_pairs_hook=_once, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is no sound JSON ({error}); export the adapter again.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{what} must hold a JSON object; export the adapter again.")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(double)} is there twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def shown(text: object) -> str:
    """A stranger's text for a message: short, and without anything that a terminal would obey."""
    plain = ascii(str(text))
    return plain if len(plain) <= 120 else f"{plain[:117]}...'"


def parse(data: memoryview, what: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors by name, as views of `data`, and the metadata.

    The tensors must fill the file without gap or overlap, as the format asks. Raises AdapterError.
    """
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 2 <= size <= min(MAX_HEADER, len(data) - 8):
        for start, kind in _DISGUISED.items():
            if data[: len(start)] == start:
                raise AdapterError(
                    f"{what} is a {kind} in disguise: opening it could run code, so it is refused. Save the "
                    "adapter with save_pretrained(..., safe_serialization=True)."
                )
        raise AdapterError(f"{what} is no safetensors file, or cut short; export the adapter again.")
    header = strict_json(data[8 : 8 + size], f"the header of {what}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"the metadata of {what} must be texts; export the adapter again.")
    base, end = 8 + size, 0
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(header.items(), key=_start):
        dtype, shape, begin, stop = _entry(name, entry, what)
        if begin != end:
            raise AdapterError(f"{what}: {shown(name)} overlaps or leaves a gap; export the adapter again.")
        end = stop
        if base + end > len(data):
            raise AdapterError(f"{what}: {shown(name)} reaches past the end of the file; it was cut short.")
        count = (stop - begin) // dtype.itemsize
        flat = (
            torch.frombuffer(data, dtype=dtype, count=count, offset=base + begin)
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
    if base + end != len(data):
        raise AdapterError(
            f"{what} holds {len(data) - base - end} bytes that no tensor names; it is refused."
        )
    return tensors, metadata


def _start(item: tuple[str, Any]) -> tuple[int, int]:
    entry = item[1]
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets):
        return offsets[0], offsets[1]
    return 0, 0


def _entry(name: str, entry: Any, what: str) -> tuple[torch.dtype, list[int], int, int]:
    try:
        kind, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{what}: the entry {shown(name)} is malformed; export the adapter again."
        ) from error
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise AdapterError(f"{what}: {shown(name)} is {shown(kind)}; adapters are F32, F16 or BF16.")
    count = 1
    for length in shape if whole else ():
        count *= length
    if not whole or len(shape) > 8 or stop - begin != count * dtype.itemsize:
        raise AdapterError(f"{what}: the size of {shown(name)} is not that of its shape; it is refused.")
    return dtype, list(shape), begin, stop
