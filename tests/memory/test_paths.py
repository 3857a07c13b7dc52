"""Paths from topics over concepts to facts: in order, and only through what the caller may see."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import pytest

from memos_engine.errors import MemoryInputError
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.paths import MemoryPathResolver
from memos_engine.memory.store import MemoryStore


@pytest.fixture
def resolver(store: MemoryStore) -> MemoryPathResolver:
    return MemoryPathResolver(store, MemOperator(store))


def test_facts_of_a_concept_in_the_order_of_time(
    store: MemoryStore, alice: Principal, resolver: MemoryPathResolver
) -> None:
    late = store.add(
        alice,
        "In the end Anna moved to Turin",
        tags=["family"],
        valid_from=datetime(2025, 1, 1, tzinfo=timezone.utc),
    )
    early = store.add(
        alice,
        "At first Anna lived in Oslo",
        tags=["family"],
        valid_from=datetime(2020, 1, 1, tzinfo=timezone.utc),
    )
    work = store.add(alice, "At work I met Anna", tags=["work"], derived_from=[early.id])
    store.add(alice, "the river is cold")
    found = resolver.resolve(alice, "Where did Anna live?")
    anna = [path for path in found if path.concept == "Anna"]
    assert [(path.topic, [c.id for c in path.facts]) for path in anna] == [
        ("family", [early.id, late.id]),
        ("work", [work.id]),
    ]
    assert found[0].concept == "Anna"  # the question names her
    assert json.loads(json.dumps(anna[0].to_dict()))["topic"] == "family"


def test_edges_between_facts(store: MemoryStore, alice: Principal, resolver: MemoryPathResolver) -> None:
    one = store.add(alice, "We saw Anna")
    two = store.add(alice, "We saw Anna again", derived_from=[one.id])
    (path,) = [p for p in resolver.resolve(alice, "Anna") if p.concept == "Anna"]
    assert path.topic is None
    assert path.edges == ((two.id, "derived_from", one.id),)


def test_nobody_walks_through_what_is_not_theirs(
    store: MemoryStore, alice: Principal, bob: Principal, resolver: MemoryPathResolver
) -> None:
    mine = store.add(alice, "We saw Anna")
    store.add(bob, "We saw Anna too", tags=["secret"])
    paths = resolver.resolve(alice, "Anna")
    assert {cube.id for path in paths for cube in path.facts} == {mine.id}
    assert all(path.topic is None for path in paths)
    assert resolver.resolve(Principal("acme", "nobody"), "Anna") == []


def test_bad_input(alice: Principal, resolver: MemoryPathResolver) -> None:
    with pytest.raises(MemoryInputError):
        resolver.resolve(alice, "Anna", most=0)
    with pytest.raises(MemoryInputError):
        resolver.resolve(alice, "")
