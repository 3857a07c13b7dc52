"""Contradictions end facts of the same owner, subject and attribute, and nothing else, on a clock of "
"their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import Fact, MemCube
from memos_engine.memory.fact import Provenance, folded, gist_of
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore, NewMemory

Add = Callable[..., MemCube]


def day(year: int, month: int = 1) -> datetime:
    return datetime(year, month, 1, tzinfo=timezone.utc)


def home(since: int | None = None, until: int | None = None, subject: str = "Alice") -> Fact:
    return Fact(
        subject, "home", day(since) if since is not None else None, day(until) if until is not None else None
    )


def until(store: MemoryStore, who: Principal, cube: MemCube) -> int | None:
    fact = store.get(who, cube.id).fact
    assert fact is not None
    return fact.valid_to.year if fact.valid_to else None


def test_a_newer_fact_ends_the_older(store: MemoryStore, alice: Principal, add: Add) -> None:
    paris = add(store, alice, "lives in Paris", fact=home(2010))
    other = add(store, alice, "works in Paris", fact=Fact("Alice", "work", day(2010)))
    rome = add(store, alice, "lives in Rome", fact=Fact(" ALICE ", "Home", day(2020)))
    assert (until(store, alice, paris), until(store, alice, rome)) == (2020, None)
    assert [(e.kind, e.source, e.target) for e in store.lineage(alice, rome.id)] == [
        ("supersedes", rome.id, paris.id)
    ]
    assert store.history(alice, paris.id)[-1].event == "closed"
    assert store.get(alice, paris.id).version == 1
    assert store.vectors(alice, "toy")[0] == [other.id, rome.id]
    assert len(store.list(alice)) == 3
    for year, there in ((2005, []), (2015, [paris, other]), (2025, [other, rome])):
        ids = [c.id for c in there]
        assert [c.id for c in store.list(alice, valid_at=day(year))] == ids
        assert store.vectors(alice, "toy", valid_at=day(year))[0] == ids
    # What was known before Rome is seen as it was known then.
    assert store.list(alice, as_of=other.created_at) == [paris, other]
    assert [c.id for c in store.list(alice, as_of=other.created_at, valid_at=day(2025))] == [
        paris.id,
        other.id,
    ]
    assert store.vectors(alice, "toy", as_of=other.created_at)[0] == [paris.id, other.id]


@pytest.mark.parametrize(
    ("old", "new", "ends"),
    [
        ((2010, None), (2020, None), (2020, None)),
        ((2020, None), (2010, None), (None, 2020)),  # learned late
        ((2010, None), (2010, None), (2010, None)),  # a correction
        ((2010, 2012), (2020, None), (2012, None)),
        ((2010, 2030), (2020, None), (2020, None)),
        ((2010, None), (2015, 2016), (None, 2016)),  # a visit within
        ((2010, 2018), (2015, 2020), (2015, 2020)),
        ((2020, 2025), (2010, 2015), (2025, 2015)),
        ((2020, 2025), (2010, 2022), (2025, 2020)),
    ],
)
def test_intervals(store: MemoryStore, alice: Principal, add: Add, old: Any, new: Any, ends: Any) -> None:
    first, second = add(store, alice, "first", fact=home(*old)), add(store, alice, "second", fact=home(*new))
    assert (until(store, alice, first), until(store, alice, second)) == ends


def test_others_facts_stay(store: MemoryStore, alice: Principal, bob: Principal, add: Add) -> None:
    mine = add(store, alice, "a", fact=home(2010), visibility="shared")
    add(store, bob, "b", fact=home(2020))
    add(store, alice, "c", fact=home(2020, subject="Alice's mother"))
    add(store, alice, "d", fact=Fact("home", "Alice", day(2020)))
    add(store, alice, "e")
    assert until(store, alice, mine) is None


def test_no_false_ends_among_many(store: MemoryStore, alice: Principal) -> None:
    rng = random.Random(3)
    things = [(f"subject {n % 40}", f"attribute {n // 40}") for n in range(400)]
    made = store.add_many(alice, [NewMemory(f"{s} {a}", fact=Fact(s, a, day(2000))) for s, a in things])
    chosen = rng.sample(range(len(things)), 20)
    store.add_many(alice, [NewMemory("new", fact=Fact(*things[n], day(2020))) for n in chosen])
    for n, cube in enumerate(made):
        assert until(store, alice, cube) == (2020 if n in chosen else None)


def test_a_grant_for_one_memory_ends_and_reveals_no_other(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add
) -> None:
    secret, later = add(store, alice, "a", fact=home(2000)), add(store, alice, "b", fact=home(2020))
    board = add(store, alice, "for all", visibility="shared")
    written = store.update(bob, board.id, "bob says", fact=home(2010))
    assert written.fact == home(2010)
    assert until(store, alice, secret) == 2020
    assert until(store, alice, later) is None
    assert store.update(alice, board.id, "alice says", fact=home(2011)).fact == home(2011, 2020)
    assert until(store, alice, secret) == 2011


def test_ended_and_frozen_facts(store: MemoryStore, alice: Principal, add: Add) -> None:
    frozen = add(store, alice, "a", fact=home(2000))
    store.freeze(alice, frozen.id)
    gone = add(store, alice, "b", fact=home(2001))
    store.delete(alice, gone.id)
    new = add(store, alice, "c", fact=home(2010))
    assert until(store, alice, frozen) is None
    assert store.get(alice, frozen.id).state is LifecycleState.FROZEN
    assert [(e.kind, e.target) for e in store.lineage(alice, new.id)] == [("contradicts", frozen.id)]
    assert store.history(alice, gone.id)[-1].event == "deleted"


def test_an_update_carries_or_changes_the_fact(store: MemoryStore, alice: Principal, add: Add) -> None:
    old = add(store, alice, "a", fact=home(2000))
    new = add(store, alice, "b", fact=home(2010))
    kept = store.update(alice, old.id, "a, in other words")
    assert kept.fact is not None
    assert kept.fact.valid_to == day(2010)
    moved = store.update(alice, new.id, "b2", fact=home(2005))
    assert moved.fact == home(2005)
    assert until(store, alice, old) == 2005
    # Going back opens what was open then.
    store.rollback_to(alice, old.created_at)
    assert until(store, alice, old) is None


def test_a_rollback_of_one_memory_settles_with_the_others(
    store: MemoryStore, alice: Principal, add: Add
) -> None:
    one = add(store, alice, "a", fact=home(2000))
    store.update(alice, one.id, "nothing about homes", fact=None)
    add(store, alice, "b", fact=home(2010))
    assert store.rollback(alice, one.id, 1).fact == home(2000, 2010)


def test_bad_facts_are_refused(store: MemoryStore, alice: Principal) -> None:
    for bad in (
        {"subject": "a"},
        {"attribute": "b"},
        {"subject": "", "attribute": "b"},
        {"subject": "a\0", "attribute": "b"},
        {"subject": "x" * 257, "attribute": "b"},
        {"valid_from": datetime(2020, 1, 1)},
        {"valid_from": day(2021), "valid_to": day(2020)},
        {"valid_to": "2020-01-01"},
    ):
        with pytest.raises(MemoryInputError):
            Fact(**bad)  # type: ignore[arg-type]
    for worse in ({"model": ""}, {"links": ["a"]}, {"links": ("a",) * 33}, {"context": "x" * 1001}):
        with pytest.raises(MemoryInputError):
            Provenance(**worse)  # type: ignore[arg-type]
    with pytest.raises(MemoryInputError, match="valid_from"):
        store.add(alice, "x", fact=home(None, 2020))
    assert store.list(alice) == []


@given(st.text(max_size=40))
def test_folding_is_stable(text: str) -> None:
    assert folded(folded(text)) == folded(text)
    assert gist_of(f"word {text}, other") == gist_of(f"Other! {text} (WORD)")


def test_erasing_takes_facts_and_sources_along(store: MemoryStore, alice: Principal, add: Add) -> None:
    cube = add(
        store,
        alice,
        "CANARY",
        fact=Fact("CANARY subject", "CANARY attribute", day(1987, 6)),
        provenance=Provenance("CANARY trigger", links=("CANARY link",)),
    )
    store.update(alice, cube.id, "CANARY 2", provenance=Provenance(context="CANARY context"))
    newer = add(store, alice, "newer", fact=Fact("canary SUBJECT", "CANARY attribute", day(1993, 7)))
    store.branch(alice, "copy")
    store.erase(alice, cube.id)
    store.erase(alice, newer.id)
    data = b"".join(p.read_bytes() for p in store.directory.rglob("*") if p.is_file())
    assert b"canary" not in data.lower()
    assert b"1987-06" not in data
    assert b"1993-07" not in data
    store.audit_verify()
