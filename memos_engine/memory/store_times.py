"""Times that memories name, in the store: beside a version's words for search, and gone with them.

A first version's relative dates count from when it holds, a later version's from when it was written; words
that it has from the version before keep what they meant there.
"""

from __future__ import annotations

import json
import sqlite3

from memos_engine.memory.dates import named_times
from memos_engine.memory.values import time_from_text, time_to_text

MAX_TIMES = 16
"""Times of a memory that are kept."""

TIMES: tuple[str, ...] = (
    # Pairs of ISO 8601 times, first and last moment; nothing where the words name no time.
    "ALTER TABLE passage ADD COLUMN named TEXT CHECK (named IS NULL OR json_valid(named))",
)


def insert_times(
    conn: sqlite3.Connection, cube_id: str, version: int, parent: int | None, text: str, said: str
) -> None:
    """Resolve what the words of a version just inserted name, counted from `said`; see above for `parent`."""
    row = None
    if parent is not None:
        row = conn.execute(
            "SELECT b.body, f.named FROM passage f JOIN cube_body b ON b.cube_id = f.cube_id AND b.version = "
            "f.version WHERE f.cube_id = ? AND f.version = ?",
            (cube_id, parent),
        ).fetchone()
    known: list[list[str]] = []
    if row is not None and text.startswith(row[0]):
        known, text = json.loads(row[1] or "[]"), text[len(row[0]) :]
    _keep(conn, cube_id, version, known + _times(text, said))


def copy_times(conn: sqlite3.Connection, source: tuple[str, int], copy: str) -> None:
    """The first version of a copied memory names what the version copied does."""
    conn.execute(
        "UPDATE passage SET named = (SELECT named FROM passage WHERE cube_id = ? AND version = ?) "
        "WHERE cube_id = ? AND version = 1",
        (*source, copy),
    )


def fill_times(conn: sqlite3.Connection) -> None:
    """Resolve the times of an older store's memories, within its migration."""
    rows = conn.execute(
        "SELECT f.cube_id, f.version, v.parent, b.body, f.valid_from, v.at FROM passage f JOIN cube_body b "
        "ON b.cube_id = f.cube_id AND b.version = f.version JOIN cube_version v ON v.cube_id = f.cube_id "
        "AND v.version = f.version ORDER BY f.cube_id, f.version"
    ).fetchall()
    for cube_id, version, parent, body, valid_from, at in rows:
        insert_times(conn, cube_id, version, parent, body, valid_from if version == 1 else at)


def _times(text: str, said: str) -> list[list[str]]:
    return [[time_to_text(a), time_to_text(b)] for a, b in named_times(text, time_from_text(said))]


def _keep(conn: sqlite3.Connection, cube_id: str, version: int, times: list[list[str]]) -> None:
    kept = [list(pair) for pair in dict.fromkeys(map(tuple, times))][:MAX_TIMES]
    if kept:
        conn.execute(
            "UPDATE passage SET named = ? WHERE cube_id = ? AND version = ?",
            (json.dumps(kept), cube_id, version),
        )
