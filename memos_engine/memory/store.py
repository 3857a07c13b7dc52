"""MemoryStore: SQLite is the sole truth about memories.

A store is a directory: `memory.db`, `vault/` (payload files), `index/` (rebuildable caches); its key lies
elsewhere. Every verb takes the caller and sees the caller's rows only, through one predicate (`visible`).
Every change is one transaction together with its audit event.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from memos_engine.errors import StoreError
from memos_engine.memory.cube import HistoryEntry
from memos_engine.memory.governance import KeyRing
from memos_engine.memory.new import NewMemory
from memos_engine.memory.store_access import AccessVerbs
from memos_engine.memory.store_adapters import AdapterVerbs
from memos_engine.memory.store_base import Clock, utc_now
from memos_engine.memory.store_check import CheckVerbs
from memos_engine.memory.store_combined import CombinedRows
from memos_engine.memory.store_jobs import JobRows
from memos_engine.memory.store_log import LogVerbs
from memos_engine.memory.store_past import TimeVerbs
from memos_engine.memory.store_read import ReadVerbs
from memos_engine.memory.store_retrieval import RetrievalRows
from memos_engine.memory.store_sweep import SweepVerbs
from memos_engine.memory.store_top import TopRows
from memos_engine.memory.store_transfer import TransferVerbs
from memos_engine.memory.store_vectors import VectorRows
from memos_engine.memory.vault import FileSystem

__all__ = ["HistoryEntry", "MemoryStore", "NewMemory"]


class MemoryStore(
    ReadVerbs,
    TimeVerbs,
    TransferVerbs,
    AccessVerbs,
    AdapterVerbs,
    SweepVerbs,
    CheckVerbs,
    LogVerbs,
    RetrievalRows,
    VectorRows,
    JobRows,
    CombinedRows,
    TopRows,
):
    """An open store; made by `MemoryStore.open`, usable by all threads of the process that opened it."""

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        keyring: KeyRing | None = None,
        clock: Clock | None = None,
        busy_timeout_ms: int = 5000,
        fs: FileSystem | None = None,
    ) -> MemoryStore:
        """Open the store in `directory`, or make one where nothing is yet.

        `clock` gives aware datetimes; `fs` stands in for the vault's file system in tests. Raises
        `NotAStoreError` (and changes nothing) for a place that is not ours, `StoreVersionError` for a store
        of a newer memos_engine, `StoreLockedError`, `StoreFullError`, and `StoreError` for everything else.
        """
        store = cls(Path(directory), keyring or KeyRing(), clock or utc_now, busy_timeout_ms, fs)
        with contextlib.suppress(StoreError):  # still pending then, for the next opening
            store.finish_erasures()
        return store

    def __enter__(self) -> MemoryStore:
        return self
