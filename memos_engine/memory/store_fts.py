"""Words in the store: an FTS5 table for each tenant, which knows which word is in which memory and no more.

It keeps neither texts nor positions. Scores are not FTS5's: it would count the words of all who share a
table, and a caller's scores would tell of memories that are not the caller's.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

from memos_engine.memory.governance import Principal

TOKENIZER = "porter unicode61 remove_diacritics 2"
Keys = npt.NDArray[np.int64]
_WORD = re.compile(r"\w+")


def _table(tenant: int) -> str:
    return f"fts_{int(tenant)}"


def _tenant(conn: sqlite3.Connection, name: str) -> int | None:
    row = conn.execute("SELECT id FROM tenant WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def _made_tenant(conn: sqlite3.Connection, name: str) -> int:
    """The tenant's number; its tables are made on demand."""
    known = _tenant(conn, name)
    if known is not None:
        return known
    number = int(conn.execute("INSERT INTO tenant (name) VALUES (?) RETURNING id", (name,)).fetchone()[0])
    _make_tables(conn, _table(number))
    return number


def _make_tables(conn: sqlite3.Connection, table: str) -> None:
    conn.execute(
        f"CREATE VIRTUAL TABLE {table} USING fts5(body, content='', detail=none, columnsize=0, "
        f"tokenize='{TOKENIZER}')"
    )
    conn.execute(f"CREATE VIRTUAL TABLE {table}_words USING fts5vocab({table}, 'instance')")


def insert_passage(
    conn: sqlite3.Connection,
    owner: Principal,
    cube_id: str,
    version: int,
    text: str,
    valid_from: str,
    session: str | None = None,
) -> None:
    """Make a memory's version findable by its words, within the transaction that adds it.

    A later version keeps the session of the first one. To be called once for every version with a body.
    """
    tenant = _made_tenant(conn, owner.tenant)
    first = conn.execute(
        "SELECT place, session FROM passage WHERE cube_id = ? ORDER BY id LIMIT 1", (cube_id,)
    ).fetchone()
    (key,) = conn.execute(
        "INSERT INTO passage (cube_id, version, place, session, words, valid_from) VALUES (?, ?, "
        "coalesce(?, 1 + coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'passage'), 0)), ?, ?, ?) "
        "RETURNING id",
        (
            cube_id,
            version,
            first[0] if first else None,
            first[1] if first else session,
            len(_WORD.findall(text)),
            valid_from,
        ),
    ).fetchone()
    conn.execute(f"INSERT INTO {_table(tenant)} (rowid, body) VALUES (?, ?)", (key, text))


def copy_passage(conn: sqlite3.Connection, scope: Principal, source: tuple[str, int], copy: str) -> None:
    """Make the first version of a memory findable, that was copied from a version of another one."""
    text, since, session = conn.execute(
        "SELECT b.body, f.valid_from, f.session FROM passage f JOIN cube_body b ON b.cube_id = f.cube_id AND "
        "b.version = f.version WHERE f.cube_id = ? AND f.version = ?",
        source,
    ).fetchone()
    insert_passage(conn, scope, copy, 1, text, since, session)


def forget_passages(conn: sqlite3.Connection, cube_id: str) -> None:
    """Take a memory's words out of search, within an erasure and before its bodies go."""
    rows = conn.execute(
        "SELECT t.id, f.id, b.body FROM passage f JOIN cube c ON c.id = f.cube_id JOIN principal p ON p.id = "
        "c.owner JOIN tenant t ON t.name = p.tenant JOIN cube_body b ON b.cube_id = f.cube_id AND b.version "
        "= f.version WHERE f.cube_id = ?",
        (cube_id,),
    ).fetchall()
    for tenant, key, body in rows:
        table = _table(tenant)
        conn.execute(f"INSERT INTO {table} ({table}, rowid, body) VALUES ('delete', ?, ?)", (key, body))
    conn.execute("DELETE FROM passage WHERE cube_id = ?", (cube_id,))


def purge_words(conn: sqlite3.Connection, cube_ids: Iterable[str]) -> None:
    """Write the FTS tables that held these memories anew: a deletion alone leaves words in old segments."""
    tenants: set[int] = set()
    for cube_id in cube_ids:
        row = conn.execute(
            "SELECT t.id FROM cube c JOIN principal p ON p.id = c.owner JOIN tenant t ON t.name = p.tenant "
            "WHERE c.id = ?",
            (cube_id,),
        ).fetchone()
        if row:
            tenants.add(int(row[0]))
    for tenant in sorted(tenants):
        table = _table(tenant)
        conn.execute(f"INSERT INTO {table} ({table}) VALUES ('optimize')")


def postings(conn: sqlite3.Connection, tenant: str, word: str, after: int = 0, last: int = 2**63 - 1) -> Keys:
    """Ids above `after`, up to `last`, of the tenant's passages that hold a word of the same stem, ascending.

    `word` is one of those that `Stemmer.words` gives.
    """
    number = _tenant(conn, tenant)
    if number is None:
        return np.zeros(0, np.int64)
    table, phrase = _table(number), '"' + word.replace('"', '""') + '"'
    (found,) = conn.execute(
        f"SELECT group_concat(rowid) FROM {table} WHERE {table} MATCH ? AND rowid > ? AND rowid <= ?",
        (phrase, after, last),
    ).fetchone()
    keys = np.fromstring(found or "", dtype=np.int64, sep=",")
    return keys if (keys[1:] > keys[:-1]).all() else np.sort(keys)  # the order is FTS5's, not SQL's


class PostingsCache:
    """Postings that were read before: passages are only ever added, under higher ids, so that the next
    reading is of those added since. Ids of passages that are gone stay: whoever reads them knows which are
    there."""

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[str, str], tuple[int, Keys]] = OrderedDict()

    def read(self, conn: sqlite3.Connection, tenant: str, stem: str, word: str) -> Keys:
        """As `postings`, for all of a stem's passages. One caller at a time."""
        row = conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'passage'").fetchone()
        last = int(row[0]) if row else 0
        known, keys = self._kept.pop((tenant, stem), (0, np.zeros(0, np.int64)))
        if last > known:
            new = postings(conn, tenant, word, known, last)  # what comes meanwhile is for the next reading
            keys = np.concatenate([keys, new]) if len(keys) else new
        self._kept[tenant, stem] = max(last, known), keys
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return keys

    def clear(self) -> None:
        """Ids of passages may be given out again, or words are to be forgotten."""
        self._kept.clear()


def fill_passages(conn: sqlite3.Connection) -> None:
    """Make all texts of an older store findable, within its migration."""
    rows = conn.execute(
        "SELECT p.tenant, p.user, b.cube_id, b.version, b.body, c.created_at FROM cube_body b JOIN cube c ON "
        "c.id = b.cube_id JOIN principal p ON p.id = c.owner ORDER BY b.cube_id, b.version"
    ).fetchall()
    for tenant, user, cube_id, version, body, created_at in rows:
        insert_passage(conn, Principal(tenant, user), cube_id, version, body, created_at)


def tenants(conn: sqlite3.Connection) -> list[int]:
    """Numbers of the tenants that have words here."""
    return [int(row[0]) for row in conn.execute("SELECT id FROM tenant ORDER BY id")]


def _bodies(conn: sqlite3.Connection, tenant: int) -> sqlite3.Cursor:
    """`(passage, memory, text)` of everything that the tenant's table should know."""
    return conn.execute(
        "SELECT f.id, f.cube_id, b.body FROM tenant t JOIN principal p ON p.tenant = t.name JOIN cube c ON "
        "c.owner = p.id JOIN cube_body b ON b.cube_id = c.id LEFT JOIN passage f ON f.cube_id = b.cube_id "
        "AND f.version = b.version WHERE t.id = ? AND c.kind <> 'lora'",
        (tenant,),
    )


def wrong_words(conn: sqlite3.Connection, tenant: int, stem: Stemmer) -> tuple[int, list[str]]:
    """How many texts a tenant's table holds, and ids of memories that are not found by exactly their words.

    An empty id stands for words of no memory. Raises `sqlite3.Error` where the table itself is damaged.
    """
    table = _table(tenant)
    conn.execute(f"INSERT INTO {table} ({table}) VALUES ('integrity-check')")
    found: dict[int, int] = {}
    for key, term in conn.execute(f"SELECT doc, term FROM {table}_words"):
        found[key] = found.get(key, 0) ^ xxhash.xxh3_64_intdigest(term.encode())
    count, wrong = 0, []
    for key, cube_id, body in _bodies(conn, tenant):
        count += 1
        expected = 0
        for term in set(stem(body)):
            expected ^= xxhash.xxh3_64_intdigest(term.encode())
        if key is None or found.pop(key, 0) != expected:
            wrong.append(str(cube_id or ""))
    return count, wrong + [""] * bool(found)


def rebuild_words(conn: sqlite3.Connection, tenant: int) -> None:
    """Make a tenant's table anew from the texts, within the caller's transaction."""
    table = _table(tenant)
    for name in (f"{table}_words", table):
        conn.execute(f"DROP TABLE IF EXISTS {name}")
    _make_tables(conn, table)
    rows = ((key, body) for key, _, body in _bodies(conn, tenant).fetchall() if key is not None)
    conn.executemany(f"INSERT INTO {table} (rowid, body) VALUES (?, ?)", rows)
    conn.execute("INSERT INTO index_log (cube_id) VALUES (NULL)")  # old words are forgotten


class Stemmer:
    """The tokenizer of the tables above, for queries: any text is safe, there is no query syntax."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._conn = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        for name, tokenizer in (("stems", TOKENIZER), ("plain", TOKENIZER.removeprefix("porter "))):
            self._conn.execute(
                f"CREATE VIRTUAL TABLE {name} USING fts5(text, content='', tokenize='{tokenizer}')"
            )
            self._conn.execute(f"CREATE VIRTUAL TABLE {name}_words USING fts5vocab({name}, 'instance')")

    def __call__(self, text: str) -> list[str]:
        """The stems of all words, in the order of the text."""
        with self._lock:
            return self._terms("stems", text)

    def words(self, text: str) -> dict[str, str]:
        """The first word of each stem, by stem, in the order of the text."""
        with self._lock:
            pairs = zip(self._terms("stems", text), self._terms("plain", text), strict=True)
        found: dict[str, str] = {}
        for stem, word in pairs:
            found.setdefault(stem, word)
        return found

    def _terms(self, name: str, text: str) -> list[str]:
        clean = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
        self._conn.execute(f"INSERT INTO {name} (rowid, text) VALUES (1, ?)", (clean,))
        rows = self._conn.execute(f"SELECT term FROM {name}_words ORDER BY offset").fetchall()
        self._conn.execute(f"INSERT INTO {name} ({name}) VALUES ('delete-all')")
        return [row[0] for row in rows]
