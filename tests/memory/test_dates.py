"""Times that memories name: counted from the moment of speaking, kept beside the words, used by search."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.memory.cube import Fact
from memos_engine.memory.dates import MAX_DATES, NamedTime, named_times, relative_times
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_times import MAX_TIMES

NOW = datetime(2026, 11, 25, 12, tzinfo=timezone.utc)  # a Wednesday


def days(text: str, said: datetime = NOW, **options: Any) -> list[tuple[str, str]]:
    found = relative_times(text, said, **options)
    return [(one.first.date().isoformat(), one.last.date().isoformat()) for one in found]


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("I met her yesterday.", "2026-11-24", "2026-11-24"),
        ("the day before yesterday", "2026-11-23", "2026-11-23"),
        ("Today we bake", "2026-11-25", "2026-11-25"),
        ("TOMORROW", "2026-11-26", "2026-11-26"),
        ("last night", "2026-11-24", "2026-11-24"),
        ("this morning", "2026-11-25", "2026-11-25"),
        ("last Friday", "2026-11-20", "2026-11-20"),
        ("on Friday", "2026-11-20", "2026-11-20"),
        ("this Friday", "2026-11-27", "2026-11-27"),
        ("next  friday", "2026-11-27", "2026-11-27"),
        ("last week", "2026-11-16", "2026-11-22"),
        ("last weekend", "2026-11-21", "2026-11-22"),
        ("next month", "2026-12-01", "2026-12-31"),
        ("last year", "2025-01-01", "2025-12-31"),
        ("two weeks ago", "2026-11-08", "2026-11-14"),
        ("3 days ago", "2026-11-22", "2026-11-22"),
        ("a few days ago", "2026-11-21", "2026-11-23"),
        ("in five days", "2026-11-30", "2026-11-30"),
        ("a month ago", "2026-10-10", "2026-11-09"),
        ("three years ago", "2023-01-01", "2023-12-31"),
    ],
)
def test_relative_dates(text: str, first: str, last: str) -> None:
    assert days(text) == [(first, last)]


@pytest.mark.parametrize(
    "text",
    ["yesterdays", "an ago", "the last straw", "next door", "Fridays", "in a hurry", "5 ago", "0.5 days"],
)
def test_what_is_no_date(text: str) -> None:
    assert days(text) == []


def test_where_and_how_far() -> None:
    (one,) = relative_times("We met last week in Rome.", NOW)
    assert (one.words, one.at) == ("last week", 7)
    assert one.last - one.first == timedelta(days=7, microseconds=-1)
    assert NamedTime.from_dict(one.to_dict()) == one
    assert days("on Friday", ahead=True) == [("2026-11-27", "2026-11-27")]
    assert days("yesterday", datetime(1, 1, 1, tzinfo=timezone.utc)) == []
    assert len(relative_times("yesterday and today " * 50, NOW)) == MAX_DATES


def test_all_times_of_a_text() -> None:
    named = named_times("In May 2023 we met; yesterday, on 3 December and in May 2023 again.", NOW)
    assert [first.date().isoformat() for first, _ in named] == ["2023-05-01", "2026-12-03", "2026-11-24"]


def test_it_costs_little() -> None:
    relative_times("yesterday", NOW)  # loads the parser
    begun = time.perf_counter()
    for day in range(50):
        relative_times("I met her two weeks ago", NOW + timedelta(days=day))
        relative_times("There is nothing in here that names a day.", NOW)
    assert (time.perf_counter() - begun) / 50 < 0.05
    begun = time.perf_counter()
    named_times("in 2023 " * 125_000, NOW)
    assert time.perf_counter() - begun < 2


WORDS = (
    "last next this on in week friday month year weekend two few a couple of days weeks ago yesterday 999 "
    "from now"
)


@given(st.lists(st.sampled_from(WORDS.split()), max_size=8).map(" ".join) | st.text(max_size=30), st.dates())
def test_no_text_and_no_clock_breaks_it(text: str, today: date) -> None:
    said = datetime(today.year, today.month, today.day, 23, tzinfo=timezone.utc)
    for one in relative_times(text, said):
        assert one.first <= one.last
        assert text[one.at : one.at + len(one.words)] == one.words
    assert named_times(text, said) == named_times(text, said)


@given(st.integers(0, 20_000), st.integers(1, 30))
def test_days_are_counted_as_a_calendar_counts_them(start: int, count: int) -> None:
    said = datetime(1980, 1, 1, 12, tzinfo=timezone.utc) + timedelta(days=start)
    (one,) = relative_times(f"{count} days ago", said)
    assert one.first.date() == (said - timedelta(days=count)).date()
    (weekday,) = relative_times("last friday", said)
    assert weekday.first.weekday() == 4
    assert 0 < (said.date() - weekday.first.date()).days <= 7


# -- in the store and in search --------------------------------------------------------------------------


def named(store: MemoryStore, principal: Principal, cube_id: str) -> list[tuple[str, str]]:
    (row,) = store.passages(principal, "", ids=[cube_id])
    return [(first[:10], last[:10]) for first, last in row.named]


def test_a_memory_keeps_what_its_words_meant(store: MemoryStore, alice: Principal, clock: Any) -> None:
    cube = store.add(alice, "I met Anna yesterday.", valid_from=datetime(2023, 5, 8, tzinfo=timezone.utc))
    assert cube.body == "I met Anna yesterday."
    met = ("2023-05-07", "2023-05-07")
    assert named(store, alice, cube.id) == [met]
    plain = store.add(alice, "No time here.")
    assert named(store, alice, plain.id) == []
    later = store.update(alice, cube.id, "I met Bob today.", mode="append")
    today = (clock.now.date().isoformat(),) * 2
    assert named(store, alice, cube.id) == [met, today]  # what was said then still means then
    store.update(alice, cube.id, "I meet Bob tomorrow.")
    assert named(store, alice, cube.id) == [("2026-01-02", "2026-01-02")]
    clock.jump(days=100)
    store.rollback(alice, cube.id, later.version)
    assert named(store, alice, cube.id) == [met, today]
    branch = store.branch(alice, "what_if")
    copied = next(c for c in store.list(branch) if "Anna" in (c.body or ""))
    assert named(store, branch, copied.id) == [met, today]
    many = store.add(alice, " ".join(f"in {year}" for year in range(1950, 2020)))
    assert len(named(store, alice, many.id)) == MAX_TIMES


def test_erased_times_are_gone(store: MemoryStore, alice: Principal) -> None:
    cube = store.add(alice, "Surgery in March 2031.")
    store.erase(alice, cube.id)
    conn = sqlite3.connect(store.directory / "memory.db")
    assert conn.execute("SELECT count(*) FROM passage WHERE named IS NOT NULL").fetchone() == (0,)
    conn.close()
    assert b"2031-03" not in b"".join(path.read_bytes() for path in store.directory.glob("memory.db*"))


def test_search_is_drawn_to_the_times_that_memories_name(store: MemoryStore, alice: Principal) -> None:
    operator = MemOperator(store)
    said = datetime(2023, 5, 8, tzinfo=timezone.utc)
    facts = [("We painted the fence.", said), ("We painted the fence last month.", said)]
    plain, telling = (operator.remember(alice, text, valid_from=at) for text, at in facts)
    best = operator.recall(alice, "What did we paint in April 2023?", explain=True)[0]
    assert best.cube.id == telling.id
    assert best.explanation is not None
    assert (best.explanation.named, best.explanation.dated) == (True, False)
    assert not operator.explain(alice, "What did we paint in April 2023?", plain.id).named
    assert not operator.explain(alice, "What did we paint in March 2023?", telling.id).named


def test_an_older_store_learns_the_times(
    reopen: Callable[..., MemoryStore], alice: Principal, clock: Any
) -> None:
    store = reopen()
    fact = Fact("Anna", "seen", valid_from=datetime(2023, 5, 8, tzinfo=timezone.utc))
    cube = store.add(alice, "I met Anna yesterday.", fact=fact)
    store.update(alice, cube.id, "I meet her today.", mode="append")
    before = named(store, alice, cube.id)
    assert len(before) == 2
    with store._db.write() as conn:
        conn.execute("ALTER TABLE passage DROP COLUMN named")
        conn.execute("DELETE FROM schema_migration WHERE name = '0004_named_times'")
        conn.execute("PRAGMA user_version = 3")
    store.close()
    clock.jump(days=40)
    assert named(reopen(), alice, cube.id) == before
