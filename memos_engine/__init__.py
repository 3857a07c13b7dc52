"""Memory inside the decoder: see docs/architecture.md for the life of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "MemoryEngine": "memos_engine.api",
    "UserMemory": "memos_engine.user",
    "Reply": "memos_engine.reply",
    "DecoderConfig": "memos_engine.config",
    "MemoryConfig": "memos_engine.config",
    "SamplingParams": "memos_engine.config",
    "attach": "memos_engine.interfaces.attach",
    "detach": "memos_engine.interfaces.attach",
    "MemosEngineError": "memos_engine.errors",
}
__all__ = [
    "DecoderConfig",
    "MemoryConfig",
    "MemoryEngine",
    "MemosEngineError",
    "Reply",
    "SamplingParams",
    "UserMemory",
    "__version__",
    "attach",
    "detach",
]

if TYPE_CHECKING:
    from memos_engine.api import MemoryEngine
    from memos_engine.config import DecoderConfig, MemoryConfig, SamplingParams
    from memos_engine.errors import MemosEngineError
    from memos_engine.interfaces.attach import attach, detach
    from memos_engine.reply import Reply
    from memos_engine.user import UserMemory


def __getattr__(name: str) -> Any:
    """Public names are imported at first use: the command line answers `--help` without loading torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
