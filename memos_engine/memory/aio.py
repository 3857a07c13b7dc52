"""The store for asyncio: the same verbs, run by threads, so that no event loop waits for a disk."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from memos_engine.memory.store import MemoryStore

T = TypeVar("T")


class AsyncMemoryStore:
    """`await AsyncMemoryStore(store).add(...)`: every verb of `MemoryStore`, with its arguments and errors.

    A verb that has begun runs to its end, also when the task that awaits it is cancelled: what it changed is
    stored. `executor`: threads to use (default: two of its own). Closing closes the store.
    """

    def __init__(self, store: MemoryStore, executor: Executor | None = None) -> None:
        self.store = store
        self._own = None if executor else ThreadPoolExecutor(2, thread_name_prefix="memory-store")
        self._executor = executor or self._own

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        verb = getattr(self.store, name)
        if name.startswith("_") or not callable(verb):
            raise AttributeError(f"{name} is no verb of the store; use `.store.{name}`.")
        return functools.partial(self.run, verb)

    async def run(self, verb: Callable[..., T], *args: Any, **options: Any) -> T:
        """What `verb` returns; any function of the store will do."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, functools.partial(verb, *args, **options))

    async def close(self) -> None:
        """Wait for verbs that have begun, then close the store."""
        await self.run(self.store.close)
        if self._own is not None:
            self._own.shutdown()

    async def __aenter__(self) -> AsyncMemoryStore:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
