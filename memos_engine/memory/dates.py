"""Times that a memory names, counted from the moment it was said: `yesterday` in a text of 8 May is 7 May.

The text itself is never changed. A regular expression finds candidates; dateparser, which takes about a
millisecond each, sees these alone. What is longer than a day is an interval: `last month` is that month.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from itertools import islice
from typing import Any

from memos_engine.memory.values import time_from_text, time_to_text
from memos_engine.memory.when import Interval, intervals, whole_days

MAX_CHARS = 20_000
"""Characters of a text that are looked at."""
MAX_DATES = 6
"""Relative dates of a text that are resolved, so that a text full of them costs a few milliseconds."""

_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
_COUNTS |= {"eight": 8, "nine": 9, "ten": 10, "couple": 2, "few": 3}
_COUNT = rf"(?:\d{{1,3}}|(?:a\s+)?(?:couple(?:\s+of)?|few)|{'|'.join(_COUNTS)})"
_DAY = "monday|tuesday|wednesday|thursday|friday|saturday|sunday"
_CANDIDATE = re.compile(
    r"\b(?:"
    r"the\s+day\s+before\s+yesterday|the\s+day\s+after\s+tomorrow|yesterday|today|tomorrow|tonight"
    r"|(?:last|this)\s+night|this\s+(?:morning|afternoon|evening)"
    rf"|(?P<which>last|next|this|past)\s+(?P<span>week|weekend|month|year|{_DAY})"
    rf"|(?P<count>{_COUNT})\s+(?P<unit>day|week|month|year)s?\s+(?P<way>ago|from\s+now)"
    rf"|in\s+(?P<ahead>{_COUNT})\s+(?P<step>day|week|month|year)s?"
    rf"|on\s+(?P<day>{_DAY})"
    r")\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class NamedTime:
    """A time that a text names: its words, where they begin (an index into the text), and what they mean.

    `first` and `last` are aware and both inside; whole days, in the zone of the moment of speaking.
    """

    words: str
    at: int
    first: datetime
    last: datetime

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; times are ISO 8601 in UTC."""
        ends = {"first": time_to_text(self.first), "last": time_to_text(self.last)}
        return {"words": self.words, "at": self.at, **ends}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NamedTime:
        """The inverse of `to_dict`, in UTC. Raises `MemoryInputError`, `KeyError`."""
        return cls(data["words"], data["at"], time_from_text(data["first"]), time_from_text(data["last"]))


def relative_times(text: str, said: datetime, *, ahead: bool = False) -> list[NamedTime]:
    """The relative dates that `text` names, in its order, counted from the aware moment `said`.

    A weekday alone (`on Friday`) is the last one before, `ahead`: the next one after. At most `MAX_DATES` of
    the first `MAX_CHARS` characters; what dateparser cannot read is passed over.
    """
    found = []
    for match in islice(_CANDIDATE.finditer(text[:MAX_CHARS]), MAX_DATES):
        days = _resolved(re.sub(r"\s+", " ", match[0].lower()), said.date(), ahead)
        if days is not None:
            found.append(NamedTime(match[0], match.start(), *whole_days(*days, said)))
    return found


def prepare(text: str) -> None:
    """Load what resolving this text's relative dates takes: a quarter of a second, once in a process. To be
    called before a lock is taken."""
    if _CANDIDATE.search(text[:MAX_CHARS]):
        _resolved("today", date(2000, 1, 1), False)


def named_times(text: str, said: datetime) -> list[Interval]:
    """First and last moment of every time that `text` names, dates without a year in the year of `said`."""
    near = [(one.first, one.last) for one in relative_times(text, said)]
    return list(dict.fromkeys([*intervals(text[:MAX_CHARS], said, [said.year], relative=False), *near]))


@lru_cache(maxsize=4096)
def _resolved(words: str, today: date, ahead: bool) -> tuple[date, date] | None:
    """First and last day; the same few words of one day come again and again."""
    match = _CANDIDATE.fullmatch(words)
    if match is None:
        return None
    try:
        return _days(match, words, today, ahead)
    except (OverflowError, ValueError):
        return None


def _days(match: re.Match[str], words: str, today: date, ahead: bool) -> tuple[date, date] | None:
    which, span = match["which"], match["span"]
    if span == "weekend":
        saturday = today + timedelta(days=5 - today.weekday())
        shift = {"last": -7, "past": -7, "next": 7}.get(which, 0)
        return saturday + timedelta(days=shift), saturday + timedelta(days=shift + 1)
    if which and span not in ("week", "month", "year"):
        words = span if which in ("this", "past") else f"{which} {span}"
        ahead = ahead or which == "this"
    elif which:
        words = f"{'last' if which == 'past' else which} {span}" if which != "this" else "today"
    elif match["day"]:
        words = match["day"]
    count, unit = match["count"] or match["ahead"], match["unit"] or match["step"]
    if count:
        number = _number(count)
        words = f"{number} {unit}s ago" if match["way"] == "ago" else f"in {number} {unit}s"
    middle = _point(words.removeprefix("the "), today, ahead)
    if middle is None:
        return None
    vague = 1 if count and ("few" in count or "couple" in count) else 0
    return _around(middle, unit or span or "day", vague, exact=not count)


def _around(middle: date, unit: str, vague: int, *, exact: bool) -> tuple[date, date]:
    if unit == "week":
        if exact:
            middle -= timedelta(days=middle.weekday())
            return middle, middle + timedelta(days=6)
        reach = 3 + 4 * vague
    elif unit == "month":
        if exact:
            after = (middle.replace(day=28) + timedelta(days=4)).replace(day=1)
            return middle.replace(day=1), after - timedelta(days=1)
        reach = 15 + 15 * vague
    elif unit == "year":
        years = 0 if exact else vague
        return date(middle.year - years, 1, 1), date(middle.year + years, 12, 31)
    else:
        reach = vague
    return middle - timedelta(days=reach), middle + timedelta(days=reach)


def _number(count: str) -> int:
    word = next((w for w in ("couple", "few") if w in count), count)
    return _COUNTS.get(word) or int(word)


def _point(words: str, today: date, ahead: bool) -> date | None:
    """The day that dateparser reads in these words."""
    # Noon, so that no zone and no summer time moves the day.
    base = datetime(today.year, today.month, today.day, 12)
    settings = {
        "RELATIVE_BASE": base,
        "PREFER_DATES_FROM": "future" if ahead else "past",
        "TIMEZONE": "UTC",
        "RETURN_AS_TIMEZONE_AWARE": False,
    }
    found = _parser()(languages=["en"], settings=settings).get_date_data(words).date_obj
    return None if found is None else found.date()


@lru_cache(maxsize=1)
def _parser() -> Callable[..., Any]:
    # Loading it takes a tenth of a second, and most processes never meet a relative date.
    from dateparser.date import DateDataParser

    parser: Callable[..., Any] = DateDataParser
    return parser
