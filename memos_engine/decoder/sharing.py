"""Pages that hold nothing but rows of records: who splices the same rows to the same places may share them.

What such a page holds is determined by its records and their positions, whoever stands to the left of it. It
is found by who holds the very record object (its serial), never by a name.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Container, Iterator
from collections.abc import Sequence as Seq

from memos_engine.decoder.sequence import KVSpan, Span, Splice

_DOMAIN = b"memos_engine.spliced_page"


def spliced_pages(spans: Seq[Span], first: int, page: int) -> dict[int, bytes]:
    """Keys of the full pages of spliced rows alone among a prompt's pages from number `first` on, by number.

    A key covers where its page begins, and of each piece: serial of its record, first row, rows, position.
    """
    pieces: dict[int, list[int]] = {}
    start = 0
    for span in spans:
        end = start + len(span.token_ids)
        if isinstance(span, KVSpan):
            for number in range(max(first, start // page), -(-end // page)):
                at = max(start, number * page)
                count = min(end, (number + 1) * page) - at
                pieces.setdefault(number, []).extend((span.record.serial, at - start, count, at))
        start = end
    full = {number: parts for number, parts in pieces.items() if sum(parts[2::4]) == page}
    return {number: _key(number * page, parts) for number, parts in full.items()}


def outside(pages: Container[int], splices: Seq[Splice], page: int) -> list[Splice]:
    """What is left to write of these splices where the pages of these numbers are there already."""
    left = []
    for part in splices:
        for start, end in _gaps(pages, part.start, part.start + part.count, page):
            skip = part.skip + start - part.start
            left.append(Splice(part.record, start, skip, skip + end - start))
    return left


def _gaps(pages: Container[int], start: int, end: int, page: int) -> Iterator[tuple[int, int]]:
    """The runs of positions from `start` to `end` that are in none of these pages."""
    for number in range(start // page, -(-end // page)):
        if number in pages:
            if start < number * page:
                yield start, number * page
            start = (number + 1) * page
    if start < end:
        yield start, end


def _key(position: int, pieces: list[int]) -> bytes:
    return hashlib.sha256(_DOMAIN + array("q", [position, *pieces]).tobytes()).digest()
