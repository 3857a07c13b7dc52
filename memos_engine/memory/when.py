"""Times that an English text names, by rules: `in May 2023`, `on 3 May`, `last week`, `yesterday`."""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta

_NUMBER = {name.lower(): number for number, name in enumerate(calendar.month_name) if name}
_NUMBER.update({name[:3]: number for name, number in list(_NUMBER.items())})
_MONTH = "|".join(sorted(_NUMBER, key=len, reverse=True))
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s+(?P<year>(?:19|20)\d\d))"
_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?P<year>(?:19|20)\d\d)-(?P<number>\d\d)(?:-(?P<day>\d\d))?\b",
        rf"\b{_DAY}\s+(?:of\s+)?(?P<month>{_MONTH})\b\.?{_YEAR}?",
        rf"\b(?P<month>{_MONTH})\.?\s+{_DAY}\b(?!\s*:){_YEAR}?",
        rf"\b(?P<month>{_MONTH})\.?{_YEAR}",
        # "may" and "march" are other words too: alone they are months behind a preposition only.
        rf"\b(?:in|of|during|since|until|by|for|last|this|next|early|late|mid)[\s-]+(?P<month>{_MONTH})\b",
        r"\b(?:in|of|during|since|until|by|for)\s+(?P<year>(?:19|20)\d\d)\b",
        r"\b(?P<year>20\d\d)\b",
    )
)
_RELATIVE = re.compile(
    r"\b(?P<word>today|yesterday|(?:last|this|past)\s+(?P<span>week|weekend|month|year))\b"
    r"|\b(?P<count>\d{1,3}|a|an|one|two|three|four|five|six)\s+(?P<unit>day|week|month|year)s?\s+ago\b",
    re.IGNORECASE,
)
_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_DAYS = {"day": 1.0, "week": 7.0, "weekend": 7.0, "month": 30.44, "year": 365.2425}

Interval = tuple[datetime, datetime]


def intervals(text: str, now: datetime, years: Sequence[int], *, relative: bool = True) -> list[Interval]:
    """First and last moment of each time that `text` names, in order of the text and without repetitions.

    `now` is an aware datetime, which relative times count from (unless `relative` is off); a date without a
    year means that day in each of `years`. What is no date (31 February, the year 0) is passed over.
    """
    found: dict[Interval, int] = {}
    taken: set[int] = set()  # places in the text
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            if not taken.isdisjoint(range(*match.span())):
                continue
            taken.update(range(*match.span()))
            for first, last in _days(match.groupdict(), years):
                found.setdefault(whole_days(first, last, now), match.start())
    for match in _RELATIVE.finditer(text) if relative else ():
        span = _relative(match, now.date())
        if span is not None:
            found.setdefault(whole_days(*span, now), match.start())
    return sorted(found, key=lambda interval: (found[interval], interval))


def _days(parts: dict[str, str | None], years: Sequence[int]) -> Iterator[tuple[date, date]]:
    month = parts.get("month")
    number = _NUMBER[month.lower()] if month else int(parts.get("number") or 0)
    day = parts.get("day")
    given = parts.get("year")
    for year in [int(given)] if given else years:
        try:
            if day:
                yield date(year, number, int(day)), date(year, number, int(day))
            elif number:
                yield date(year, number, 1), _month_end(year, number)
            else:
                yield date(year, 1, 1), date(year, 12, 31)
        except (ValueError, OverflowError):
            continue


def _month_end(year: int, month: int) -> date:
    return date(year, 12, 31) if month == 12 else date(year, month + 1, 1) - timedelta(days=1)


def _relative(match: re.Match[str], today: date) -> tuple[date, date] | None:
    parts = match.groupdict()
    try:
        if parts["count"]:
            count, unit = parts["count"].lower(), parts["unit"].lower()
            length = _DAYS[unit]
            middle = today - timedelta(days=round((_COUNTS.get(count) or int(count)) * length))
            around = timedelta(days=int(length / 2))
            return middle - around, middle + around
        word = parts["word"].lower()
        if word in ("today", "yesterday"):
            day = today - timedelta(days=word == "yesterday")
            return day, day
        length = _DAYS[parts["span"].lower()]
        back = length if word.startswith(("this", "past")) else 2 * length
        return today - timedelta(days=round(back)), today
    except OverflowError:
        return None


def whole_days(first: date, last: date, now: datetime) -> Interval:
    """The first and the last moment of these days in `now`'s zone."""
    start = datetime(first.year, first.month, first.day, tzinfo=now.tzinfo)
    end = datetime(last.year, last.month, last.day, 23, 59, 59, 999_999, tzinfo=now.tzinfo)
    return start, end
