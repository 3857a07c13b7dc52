"""Search shows each caller what the rules allow, and its scores tell nothing of anything else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from memos_engine.memory.cube import Fact
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore
from tests.memory.test_access_model import SESSIONS, USERS, VOCABULARY, Walk
from tests.memory.test_retrieval_sync import Random, found

MANY = 1000


class Sessions(Walk):
    """A walk that knows which session a memory is from."""

    def session_of(self, cube_id: str) -> str | None:
        with self.store._db.read() as conn:
            row = conn.execute("SELECT session FROM passage WHERE cube_id = ?", (cube_id,)).fetchone()
        assert row[0] in SESSIONS
        return row[0]


def outcomes(operator: MemOperator, user: Principal, query: str) -> list[tuple[Any, ...]]:
    """All that a search tells of each memory, its id left out."""
    return [
        (c.cube.body, c.score, c.relevance, e.raw, e.scaled, e.terms, e.spread)
        for c in operator.recall(user, query, k=MANY, explain=True)
        if (e := c.explanation) is not None
    ]


@pytest.mark.parametrize("seed", range(6))
def test_a_search_is_the_same_as_if_there_were_nothing_else(
    tmp_path: Any, reopen: Callable[..., MemoryStore], clock: Any, seed: int
) -> None:
    store = reopen()
    walk = Sessions(store, clock, seed)
    for user in USERS:
        store.add(user, "the first words of all", session="one")  # so that every cache has begun
    walk.world.cubes = {c.id: c for user in USERS for c in store.list(user)}
    walk.world.visibility = dict.fromkeys(walk.world.cubes, "private")
    operators = [MemOperator(store), MemOperator(store, Random())]
    for round_ in range(5):
        for _ in range(12):
            walk.step()
        for user in USERS:
            seen = store.list(user)
            alone = MemoryStore.open(
                tmp_path / f"{round_}-{user.tenant}-{user.user}", clock=lambda: clock.now
            )
            for cube in seen:
                session = walk.session_of(cube.id)
                label = None if session is None else f"{session} of {cube.owner.user}"
                alone.add(user, cube.body or "", session=label)
            others = [MemOperator(alone), MemOperator(alone, Random())]
            for operator, other in zip(operators, others, strict=True):
                for query in (walk.random.choice(VOCABULARY), "the garden of the mill"):
                    assert outcomes(operator, user, query) == outcomes(other, user, query)
            ids = {c.cube.id for c in operators[1].recall(user, "anything", k=MANY)}
            assert ids == {cube.id for cube in seen}
            alone.close()


def test_rights_that_end_by_themselves(
    reopen: Callable[..., MemoryStore], alice: Principal, bob: Principal, clock: Any
) -> None:
    store = reopen()
    operator = MemOperator(store, Random())
    cube = store.add(alice, "the harbour")
    assert found(operator, bob, "harbour") == []
    store.grant(alice, "read", to=bob, expires_at=clock.now + timedelta(hours=1))
    assert found(operator, bob, "harbour") == [cube.id]
    clock.jump(hours=2)
    assert found(operator, bob, "harbour") == []
    assert len(operator.view(bob).passages) == 0  # nor do its words count any longer
    store.govern(alice, cube.id, visibility="read_only")
    denial = store.grant(alice, "read", to=bob, effect="deny", expires_at=clock.now + timedelta(hours=1))
    assert found(operator, bob, "harbour") == []
    clock.jump(hours=2)
    assert found(operator, bob, "harbour") == [cube.id]
    assert denial.effect == "deny"


def test_an_ended_fact_is_not_found_but_its_history_stays(
    reopen: Callable[..., MemoryStore], alice: Principal, clock: Any
) -> None:
    store = reopen()
    operator = MemOperator(store, Random())
    old = store.add(alice, "I live in Oslo", fact=Fact("alice", "home"))
    assert found(operator, alice, "I live in") == [old.id]
    clock.jump(hours=1)
    new = store.add(alice, "I live in Turin", fact=Fact("alice", "home"))
    assert found(operator, alice, "I live in", k=9) == [new.id]
    later = store.add(alice, "I will live in Rome", fact=Fact("alice", "home", clock.now + timedelta(days=9)))
    assert set(found(operator, alice, "I live in", k=9)) == {new.id, later.id}
    clock.jump(days=10)
    assert found(operator, alice, "I live in", k=9) == [later.id]
    store.rollback_to(alice, clock.now - timedelta(days=10, minutes=30))
    assert found(operator, alice, "I live in", k=9) == [old.id]


def test_each_version_is_found_by_its_own_words(
    reopen: Callable[..., MemoryStore], alice: Principal, clock: Any
) -> None:
    store = reopen()
    operator = MemOperator(store)
    cube = store.add(alice, "the boat is blue", session="one")
    store.update(alice, cube.id, "the lantern is red")
    assert found(operator, alice, "boat") == []
    assert found(operator, alice, "lantern") == [cube.id]
    branch = store.branch(alice, "aside")
    (copy,) = found(operator, branch, "lantern")
    store.update(branch, copy, "the lantern is green")
    assert found(operator, branch, "green") == [copy]
    assert found(operator, alice, "green") == []
    store.rollback(alice, cube.id, 1)
    assert found(operator, alice, "boat") == [cube.id]
    store.erase(alice, cube.id)
    assert found(operator, alice, "boat") == []
    assert found(operator, branch, "lantern") == []  # copies go with their original
