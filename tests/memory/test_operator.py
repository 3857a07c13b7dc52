from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import BATCH, MemOperator
from memos_engine.memory.store import MemoryStore

Add = Callable[..., MemCube]


def test_recall_finds_the_closest_first(store: MemoryStore, alice: Principal, toy: Any) -> None:
    operator = MemOperator(store, toy())
    dog = operator.remember(alice, "my dog is called biscuit", tags=["pets"])
    operator.remember(alice, "zzzzz qqqqq")
    first, second = operator.recall(alice, "dog called biscuit")
    assert first.cube == dog
    assert 1 >= first.score > second.score
    assert [c.cube for c in operator.recall(alice, "dog called biscuit", k=1)] == [dog]
    assert operator.recall(alice, "dog called biscuit", min_score=first.score) == [first]
    assert operator.recall(alice, "dog", min_score=1.1) == []


def test_only_live_memories_of_the_caller(
    store: MemoryStore, alice: Principal, bob: Principal, toy: Any
) -> None:
    operator = MemOperator(store, toy())
    ids = [operator.remember(alice, f"fact number {i}").id for i in range(4)]
    operator.remember(bob, "fact number five")
    store.archive(alice, ids[0])
    store.delete(alice, ids[1])
    store.erase(alice, ids[2])
    assert [c.cube.id for c in operator.recall(alice, "fact number")] == [ids[3]]
    assert operator.recall(Principal("other", "alice"), "fact") == []


def test_a_new_embedder_embeds_what_is_there_once(
    store: MemoryStore, alice: Principal, add: Add, toy: Any
) -> None:
    cubes = [add(store, alice, f"fact {i}") for i in range(BATCH + 5)]
    archived = add(store, alice, "put away")
    store.archive(alice, archived.id)
    new = toy("new", 16)
    operator = MemOperator(store, new)
    assert len(operator.recall(alice, "fact 3", k=100)) == len(cubes)
    assert new.batches == [BATCH, 5, 1]
    operator.recall(alice, "fact 3")
    assert new.batches == [BATCH, 5, 1, 1]
    store.restore(alice, archived.id)
    assert archived.id in {c.cube.id for c in operator.recall(alice, "put away", k=100)}


def test_an_embedder_that_breaks_its_word(store: MemoryStore, alice: Principal, add: Add) -> None:
    class Broken:
        model_id, dim = "broken", 8

        def embed(self, texts: Sequence[str]) -> Any:
            return np.zeros((len(texts) + 1, 8), np.float32)

    add(store, alice, "x")
    with pytest.raises(MemoryInputError, match="shape"):
        MemOperator(store, Broken()).recall(alice, "x")


@pytest.mark.parametrize(("text", "k"), [("", 1), ("a\0", 1), ("x", 0), ("\ud800", 3)])
def test_bad_queries_are_refused(store: MemoryStore, alice: Principal, toy: Any, text: str, k: int) -> None:
    with pytest.raises(MemoryInputError):
        MemOperator(store, toy()).recall(alice, text, k=k)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(min_size=1, max_size=40).filter(lambda t: t.strip() and "\0" not in t))
def test_what_was_just_written_is_found(store: MemoryStore, alice: Principal, toy: Any, text: str) -> None:
    operator = MemOperator(store, toy())
    cube = operator.remember(alice, text)
    found = {c.cube.id: c.score for c in operator.recall(alice, text, k=1000)}
    assert found[cube.id] == pytest.approx(1, abs=1e-5)
    # Not always first: what an earlier example left in the store may say the same words more often.
    assert max(found.values()) <= 1 + 1e-5
