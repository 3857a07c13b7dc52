"""Model files: fetch them once, convert them if need be, and never take half a model for a whole one.

    path = pull("smollm2")      # may use the network; safe to repeat, safe to run twice at once
    path = resolve("smollm2")   # never uses the network
    verify(path)                # hashes every file again

A source is an alias (`smollm2`, `minilm`), a hub id (`org/name`), a local folder or a GGUF file.
Everything that was pulled lies under `cache_dir()` as an ordinary Hugging Face folder.
"""

from __future__ import annotations

from memos_engine.models.cache import ModelInfo, cache_dir, list_models, verify
from memos_engine.models.files import check_folder
from memos_engine.models.manifest import MANIFEST, Manifest, read_manifest
from memos_engine.models.sources import pull, resolve

__all__ = [
    "MANIFEST",
    "Manifest",
    "ModelInfo",
    "cache_dir",
    "check_folder",
    "list_models",
    "pull",
    "read_manifest",
    "resolve",
    "verify",
]
