from __future__ import annotations

from datetime import date, datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.memory.when import intervals

NOW = datetime(2026, 11, 25, 12, tzinfo=timezone.utc)
YEARS = [2025, 2026]


def days(text: str) -> list[tuple[str, str]]:
    return [(a.date().isoformat(), b.date().isoformat()) for a, b in intervals(text, NOW, YEARS)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What did Anna do on 3 May 2025?", [("2025-05-03", "2025-05-03")]),
        ("on May 3rd, 2025", [("2025-05-03", "2025-05-03")]),
        ("the 3rd of May, 2025", [("2025-05-03", "2025-05-03")]),
        ("on 2025-05-03, and in 2025-06", [("2025-05-03", "2025-05-03"), ("2025-06-01", "2025-06-30")]),
        ("in February 2024", [("2024-02-01", "2024-02-29")]),
        ("in December", [("2025-12-01", "2025-12-31"), ("2026-12-01", "2026-12-31")]),
        ("on 29 February", []),
        ("on 31 April 2025", []),
        ("in 1999", [("1999-01-01", "1999-12-31")]),
        ("What did she plan for 2027?", [("2027-01-01", "2027-12-31")]),
        ("yesterday", [("2026-11-24", "2026-11-24")]),
        ("today", [("2026-11-25", "2026-11-25")]),
        ("two weeks ago", [("2026-11-08", "2026-11-14")]),
        ("last week", [("2026-11-11", "2026-11-25")]),
        ("this month", [("2026-10-26", "2026-11-25")]),
        ("May I march in the second hand car?", []),
        ("in May I was there", [("2025-05-01", "2025-05-31"), ("2026-05-01", "2026-05-31")]),
        ("room 2025b, 12:30, 5 mayors", []),
        ("999 years ago", [("1027-05-28", "1028-05-26")]),
        ("9999 days ago, 0 days ago", [("2026-11-25", "2026-11-25")]),
    ],
)
def test_times_that_a_text_names(text: str, expected: list[tuple[str, str]]) -> None:
    assert days(text) == expected


def test_a_whole_day_is_meant() -> None:
    ((first, last),) = intervals("3 May 2025", NOW, YEARS)
    assert first == datetime(2025, 5, 3, tzinfo=timezone.utc)
    assert last == datetime(2025, 5, 3, 23, 59, 59, 999_999, tzinfo=timezone.utc)


@given(st.text(alphabet="0123456789 -/,mayjunedecstrdthagofyiwklp", max_size=40), st.dates())
def test_no_text_and_no_clock_breaks_it(text: str, today: date) -> None:
    now = datetime(today.year, today.month, today.day, tzinfo=timezone.utc)
    for first, last in intervals(text, now, [1, 2026, 9999]):
        assert first <= last
