"""One exception tree. Every message says what was wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping


class MemosEngineError(Exception):
    """Root of all errors this package raises on purpose."""


# -- models --------------------------------------------------------------------------------------


class ModelError(MemosEngineError):
    """A model cannot be used."""


class UnsupportedModelError(ModelError):
    """The architecture or a feature of it is not supported; the message names what is."""


class ModelFilesError(ModelError):
    """Model files are missing, half-written or do not match their checksums."""


class ContextLengthError(MemosEngineError):
    """A prompt, or a prompt plus its answer, is longer than the model's window."""


class OutOfPagesError(MemosEngineError):
    """The KV pool has no free page left; ask for less or open the engine with a larger pool."""


class AdapterError(ModelError, ValueError):
    """An adapter (LoRA) cannot be used: its files, its shapes, its numbers, its model, or a request's stored
    KV do not fit; the message says why."""


class IntegrityError(MemosEngineError):
    """An internal invariant is broken (a bug): found by `check_integrity()`, never papered over."""


class AdapterInUseError(AdapterError):
    """An adapter, or every slot, is held by running requests."""


class KernelContractError(MemosEngineError, ValueError):
    """A tensor handed to an op breaks its contract in docs/kernels.md."""


# -- memories ------------------------------------------------------------------------------------


class MemoryInputError(MemosEngineError, ValueError):
    """A memory or a query is empty, too long or not text."""


class MemoryNotFoundError(MemosEngineError, KeyError):
    """No such memory, or none that the caller may see."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class RefusedError(MemosEngineError):
    """Something is not allowed. `event` is what the audit trail keeps about the attempt, if anything."""

    def __init__(self, message: str, event: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.event = event


class LifecycleError(RefusedError):
    """The lifecycle table has no such move."""


class AccessError(RefusedError):
    """The caller sees the memory, but may not do this with it."""


class ConflictError(MemosEngineError):
    """Somebody else changed the memory first; read it again and repeat."""


# -- the store -----------------------------------------------------------------------------------


class StoreError(MemosEngineError):
    """The store directory cannot be used or a write to it failed; nothing was half-written."""


class StoreLockedError(StoreError):
    """Another process holds the database longer than the busy timeout."""


class NotAStoreError(StoreError):
    """The directory or database was not made by memos_engine."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of memos_engine."""


class StoreFullError(StoreError):
    """The disk (or quota) is full; the memory was not stored."""


class PayloadError(StoreError):
    """A payload file (KV record) is missing, truncated, altered or not the one asked for.

    `reason` is one word for programs: missing, size, checksum, format, identity, not_finite.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
