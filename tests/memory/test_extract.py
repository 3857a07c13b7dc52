"""Facts from a conversation: new memories, derived from turns that stay as they are, once each."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError, MemoryNotFoundError
from memos_engine.memory.extract import Statement, extract, personal_facts
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My name is Zoë Smith.", [("My name is Zoë Smith", "name")]),
        ("Hi, call me Max!", [("call me Max", "name")]),
        ("I live in Lisbon with my wife.", [("I live in Lisbon", "home")]),
        ("I've just moved to New York.", [("I've just moved to New York", "home")]),
        ("I work at Acme and I live in Bonn", [("I work at Acme", "workplace"), ("I live in Bonn", "home")]),
        ("My favourite tea is mint.", [("My favourite tea is mint", "favourite tea")]),
        ("My email is zoe@example.org.", [("My email is zoe@example.org", "email")]),
        ("My birthday is on 3 May, by the way", [("My birthday is on 3 May", "birthday")]),
        ("Do I live in Rome?", []),
        ("If I live in Rome, I will be happy.", []),
        ("I would love it. She said I live in Rome.", []),
        ('"I live in Rome", she said.', []),
        ("I don't live in Rome. I never lived in Rome.", []),
        ("Call me later. I live in fear. I work for hours.", []),
        ("My name is not important", []),
        ("", []),
    ],
)  # fmt: skip
def test_the_rules(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(one.text, one.attribute) for one in personal_facts(text)] == expected


def test_new_memories_once_and_no_turn_is_touched(
    store: MemoryStore, alice: Principal, toy: Callable[..., Any]
) -> None:
    operator = MemOperator(store, toy())
    turns = [
        operator.remember(alice, text, session="s")
        for text in ("Hello there!", "I live in Paris. My name is Alice.", "I moved to Rome last week.")
    ]
    found = extract(operator, alice, turns)
    assert [cube.body for cube in found] == [
        "I live in Paris",
        "My name is Alice",
        "I moved to Rome last week",
    ]
    assert [store.get(alice, turn.id) for turn in turns] == turns
    for cube in found:
        assert (cube.origin, cube.version, cube.owner) == ("inference", 1, alice)
        assert cube.fact is not None
        assert cube.fact.subject == "alice"
        assert cube.provenance is not None
        assert cube.provenance.trigger == "extract"
    sources = [
        edge for cube in found for edge in store.lineage(alice, cube.id) if edge.kind == "derived_from"
    ]
    assert [edge.target for edge in sources] == [turns[1].id, turns[1].id, turns[2].id]
    everything = store.list(alice)
    assert [cube.id for cube in extract(operator, alice, store.list(alice))] == [cube.id for cube in found]
    assert store.list(alice) == everything
    homes = [cube.body for cube in everything if cube.fact is not None and cube.fact.attribute == "home"]
    assert homes in (["I moved to Rome last week"], ["I live in Paris", "I moved to Rome last week"])
    seen = [hit.cube.body for hit in operator.recall(alice, "Where do I live? Paris or Rome", k=9)]
    assert "I moved to Rome last week" in seen
    assert "I live in Paris" not in seen  # ended by the move; the turn itself is still there


def test_what_was_deleted_does_not_come_back(store: MemoryStore, alice: Principal) -> None:
    operator = MemOperator(store)
    turn = operator.remember(alice, "I live in Paris.")
    (fact,) = extract(operator, alice, [turn])
    store.delete(alice, fact.id)
    assert extract(operator, alice, [turn]) == []


def test_it_holds_since_it_was_said(store: MemoryStore, alice: Principal) -> None:
    operator = MemOperator(store)
    said = datetime(2023, 5, 8, tzinfo=timezone.utc)
    turn = operator.remember(alice, "Caroline: I live in Paris.", valid_from=said)
    assert extract(operator, alice, [turn]) == []
    (fact,) = extract(operator, alice, [turn], speaker="Caroline")
    assert fact.fact is not None
    assert (fact.fact.subject, fact.fact.valid_from) == ("Caroline", said)


def test_any_rule_will_do(store: MemoryStore, alice: Principal, bob: Principal) -> None:
    operator = MemOperator(store)
    turn = store.add(alice, "Tom has two kids.", visibility="shared")

    def rule(text: str) -> list[Statement]:
        return [Statement(text, "kids", "Tom"), Statement("Tom is a father.")]

    mine = extract(operator, bob, [turn], rule)
    assert [cube.owner for cube in mine] == [bob, bob]
    assert mine[0].fact is not None
    assert (mine[0].fact.subject, mine[0].fact.attribute) == ("Tom", "kids")
    assert mine[1].fact is not None
    assert mine[1].fact.key is None
    with pytest.raises(MemoryInputError, match="Statement"):
        extract(operator, bob, [turn], lambda text: [text])  # type: ignore[list-item]
    hidden = store.add(alice, "I live in Oslo.")
    with pytest.raises(MemoryNotFoundError):
        extract(operator, bob, [hidden])


@pytest.mark.parametrize("wrong", [("",), ("x", ""), ("x", None, "Tom"), ("x", "a\0")])
def test_statements_are_checked(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(MemoryInputError):
        Statement(*wrong)


WORDS = [
    "I",
    "my",
    "name",
    "is",
    "live",
    "in",
    "work",
    "at",
    "Rome",
    "and",
    ",",
    ".",
    "?",
    "favourite",
    "colour",
    "green",
    "moved",
    "to",
    "call",
    "me",
    "Max",
    "if",
    "not",
    "’",
    "'",
    "last",
    "week",
]


@given(st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join) | st.text(max_size=60))
def test_only_words_of_the_turn_are_stored(text: str) -> None:
    found = personal_facts(text)
    assert all(one.text in text for one in found)
    assert found == personal_facts(text)
