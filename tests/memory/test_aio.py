"""The store for asyncio: the same verbs, off the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from memos_engine.errors import MemoryNotFoundError, StoreError
from memos_engine.memory.aio import AsyncMemoryStore
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore


def test_verbs_can_be_awaited_side_by_side(store: MemoryStore, alice: Principal) -> None:
    async def work() -> None:
        async with AsyncMemoryStore(store) as later:
            cubes = await asyncio.gather(*(later.add(alice, f"m {n}") for n in range(20)))
            assert {c.id for c in cubes} == {c.id for c in await later.list(alice)}
            new = await later.update(alice, cubes[0].id, "new", if_version=1)
            assert await later.run(store.get, alice, new.id) == new
            with pytest.raises(MemoryNotFoundError):
                await later.get(alice, "nonsense")
            assert await later.run(threading.get_ident) != threading.get_ident()
            for name in ("nonsense", "_db", "directory"):
                with pytest.raises(AttributeError):
                    getattr(later, name)
        with pytest.raises(StoreError, match="closed"):
            store.list(alice)

    asyncio.run(work())
