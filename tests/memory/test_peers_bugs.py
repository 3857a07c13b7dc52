"""What went wrong in other memory systems does not happen here; each test names the report it is about.

Bugs of stored KV (a cache that generation mutates, no identity, keys without positions: MemOS 2300, 2301,
2313, 2315) are in the tests of the decoder; races for one database (mem0 7196) in test_cas.py.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from memos_engine.memory.aio import AsyncMemoryStore
from memos_engine.memory.cube import Fact
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore, NewMemory


def found(store: MemoryStore, user: Principal, text: str) -> list[str]:
    return [c.cube.id for c in MemOperator(store).recall(user, text, k=50)]


def test_adding_a_memory_twice_deletes_nothing(store: MemoryStore, alice: Principal) -> None:
    """mem0 1674."""
    twice = [store.add(alice, "I like tea").id for _ in range(2)]
    assert found(store, alice, "tea") == twice
    assert [e.kind for e in store.lineage(alice, twice[1])] == ["resembles"]  # shown, not dropped


def test_texts_are_kept_as_they_were_said(store: MemoryStore, alice: Principal) -> None:
    """mem0 3322: facts rewritten before they were stored."""
    text = "  My sister's  flat (No. 7b)\n is \u201cthe red one\u201d\t\u2014 I think?  "
    assert store.get(alice, store.add(alice, text).id).body == text


def test_what_was_deleted_is_nowhere_to_be_found(store: MemoryStore, alice: Principal) -> None:
    """MemOS 2331, Cognee 3526: deletion succeeded, search still found it; mem0 3245: so did edges."""
    operator = MemOperator(store)
    gone = store.add(alice, "the zebra sleeps", vector=[1.0, 0.0], model_id="m")
    derived = store.add(alice, "an animal sleeps", derived_from=[gone.id])
    assert [c.cube.id for c in operator.recall(alice, "zebra")] == [gone.id]
    store.put_kv(alice, gone.id, 1, "i", b"record", 2)
    store.delete(alice, gone.id)
    assert operator.recall(alice, "zebra") == []
    assert store.vectors(alice, "m")[0] == []
    assert store.find_kv(alice, gone.id, "i") is None
    assert store.get(alice, derived.id).source_gone_at is not None
    store.erase(alice, gone.id)
    left = b"".join(path.read_bytes() for path in store.directory.rglob("*") if path.is_file())
    assert b"zebra" not in left


def test_a_contradicted_fact_stays_readable(store: MemoryStore, alice: Principal, clock: Any) -> None:
    """mem0 4187: edges were deleted where the paper promises to invalidate them."""
    old = store.add(alice, "I live in Oslo", fact=Fact("I", "home"))
    clock.jump(days=1)
    store.add(alice, "I live in Turin", fact=Fact("I", "home"))
    assert found(store, alice, "Oslo") == []
    kept = store.get(alice, old.id)
    assert (kept.body, kept.state) == ("I live in Oslo", LifecycleState.GENERATED)
    assert [c.id for c in store.list(alice, valid_at=clock.now - timedelta(hours=12))] == [old.id]


def test_a_contradiction_ends_nothing_else(store: MemoryStore, alice: Principal, bob: Principal) -> None:
    """Graphiti 1728: a search of the whole graph retired almost half of all facts."""
    facts = [NewMemory(f"{n}", fact=Fact(f"subject {n % 50}", f"attribute {n // 50}")) for n in range(1000)]
    store.add_many(alice, facts)
    theirs = store.add(bob, "theirs", fact=Fact("subject 3", "attribute 3"))
    new = store.add(alice, "new", fact=Fact("Subject 3", "ATTRIBUTE 3"))
    ended = [c.body for c in store.list(alice) if c.fact is not None and c.fact.valid_to is not None]
    assert ended == [str(3 * 50 + 3)]
    for kept in (store.get(bob, theirs.id), store.get(alice, new.id)):
        assert kept.fact is not None
        assert kept.fact.valid_to is None


def test_nothing_is_asked_of_a_network_or_a_model(
    monkeypatch: pytest.MonkeyPatch, reopen: Callable[..., MemoryStore], alice: Principal
) -> None:
    """Graphiti 868, 1516, mem0 2813, 3097: adding waits for language models, or needs one that is online."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    store = reopen()
    cube = store.add(alice, "first memory")
    assert found(store, alice, "memory") == [cube.id]


def test_several_event_loops_use_one_store(store: MemoryStore, alice: Principal) -> None:
    """nexent 787: a lock bound to another event loop."""
    shared = AsyncMemoryStore(store)

    async def add(n: int) -> None:
        await asyncio.gather(*(shared.add(alice, f"memory {n} {m}") for m in range(5)))

    for n in range(3):
        asyncio.run(add(n))
    assert len(store.list(alice)) == 15


def test_a_rolled_back_suffix_leaves_search_as_it_was(
    reopen: Callable[..., MemoryStore], alice: Principal, clock: Any
) -> None:
    """No peer has it: whatever was done since a moment, searches give what they gave then."""
    store, rng = reopen(), random.Random(3)
    operator = MemOperator(store)
    words = ("river", "boat", "mill", "bridge", "garden")
    for n in range(60):
        session = rng.choice([None, "one", "two"])
        store.add(alice, " ".join(rng.sample(words, 3)) + f" {n}", session=session)
        clock.jump(days=1)
    queries = [*words, "the mill in January", "boat and bridge", "garden on 3 January 2026"]

    def outcomes() -> list[list[tuple[str, float, float, object]]]:
        return [
            [
                (c.cube.id, c.score, c.relevance, c.explanation and c.explanation.scaled)
                for c in operator.recall(alice, query, k=100, explain=True)
            ]
            for query in queries
        ]

    moment = store.add(alice, "the last one before").created_at
    before = outcomes()
    clock.jump(hours=1)
    for n in range(300):
        cube = rng.choice(store.list(alice))
        verb = rng.choice(["add", "update", "archive", "delete", "rollback"])
        if verb == "add":
            store.add(alice, f"new {rng.choice(words)} {n}", session="one")
        elif verb == "update":
            store.update(alice, cube.id, f"changed {rng.choice(words)}")
        elif verb == "rollback" and cube.version > 1:
            store.rollback(alice, cube.id, 1)
        elif verb == "archive":
            store.archive(alice, cube.id)
        elif verb == "delete" and rng.random() < 0.5:
            store.delete(alice, cube.id)
    assert outcomes() != before
    store.rollback_to(alice, moment)
    assert outcomes() == before
