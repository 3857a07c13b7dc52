"""The janitor: sweeps a store now and then, in a thread of its own or by hand."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any

from memos_engine.errors import MemoryInputError, StoreError, StoreLockedError
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_kv import GRACE_S
from memos_engine.memory.store_sweep import MAX_S, SweepPolicy, Swept
from memos_engine.memory.worker import Worker

__all__ = ["Cleaned", "Janitor", "SweepPolicy", "Swept"]


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What a cleaning did: memories and records swept, files removed from the disk, and their bytes."""

    swept: Swept
    files: int
    bytes: int
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


class Janitor(Worker):
    """`with Janitor(store, policy):` sweeps every `every_s` seconds; `run_once()` does without a thread.

    What is due is decided by the store's clock. A sweep that fails in the thread is repeated at the next
    turn; `last_error` says why.
    """

    def __init__(self, store: MemoryStore, policy: SweepPolicy | None = None, every_s: float = 300.0) -> None:
        if not every_s > 0:
            raise MemoryInputError(f"every_s must be a number of seconds above 0, not {every_s!r}.")
        super().__init__("memory-janitor", every_s)
        self.store = store
        self.policy = policy or SweepPolicy()
        self.sweeps = 0
        self.last_error: StoreError | None = None

    def run_once(self) -> Swept:
        """One sweep, and what earlier erasures had to leave; raises `StoreError`."""
        swept = self.store.sweep(self.policy)
        with contextlib.suppress(StoreLockedError):  # another process still reads old pages
            self.store.finish_erasures()
        self.sweeps += 1
        return swept

    def clean(self, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Cleaned:
        """One sweep, and every file removed that nothing names and that is older than `grace_s` seconds.

        With `dry_run` nothing changes: then `files` and `bytes` are those of files that nothing names
        already, without those that the sweep would let go of. Raises `MemoryInputError`, `StoreError`.
        """
        if not 0 <= grace_s <= MAX_S:
            raise MemoryInputError(f"grace_s must lie between 0 and {MAX_S:g} seconds, not {grace_s!r}.")
        if dry_run:
            orphans = self.store.orphans(grace_s)
            swept = self.store.due(self.policy)
            return Cleaned(swept, len(orphans), sum(size for _, size in orphans), True)
        files, size = self.store.payload_usage()
        swept = self.run_once()
        self.store.collect(grace_s)
        left, left_size = self.store.payload_usage()  # others may write meanwhile
        return Cleaned(swept, max(files - left, 0), max(size - left_size, 0), False)

    def turn(self) -> bool:
        """A sweep; one that fails is remembered."""
        try:
            self.run_once()
            self.last_error = None
        except StoreError as error:
            self.last_error = error
        return True
