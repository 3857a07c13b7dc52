"""What search reads of the store: rows the caller may see, what changed among them, words, and filters."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from memos_engine.memory.cube import MemCube, time_from_text
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_fts import Keys
from memos_engine.memory.store_rows import SELECT_CUBE, Params, among, cube_of, visible

_ROWS = """SELECT f.id, c.id, f.place, c.owner, f.session, f.words, f.valid_from, c.state, c.ttl_at,
    c.closed_at, v.cube_id IS NOT NULL, f.named{vec}
FROM {cube} JOIN passage f ON f.cube_id = c.id AND f.version = c.version
LEFT JOIN vector v ON v.cube_id = c.id AND v.version = c.version AND v.model_id = :model"""

# Few memories by id: without the fixed order SQLite walks through all that the caller has.
_BY_IDS = "json_each(:ids) one CROSS JOIN cube c ON c.id = one.value"
_FOUND = SELECT_CUBE.replace("FROM cube c", f"FROM {_BY_IDS}")


@dataclass(frozen=True, slots=True)
class PassageRow:
    """A visible memory's current version. `key` names this version's words forever; times are ISO 8601.

    `until`: the end of its time to live, or when a later fact ended it, whichever comes first. `embedded`:
    the model asked for has a vector; `vector [dim]` is that, where vectors were asked for. `named`: first and
    last moment of each time that the words name.
    """

    key: int
    cube_id: str
    place: int
    owner: int
    session: str | None
    words: int
    valid_from: str
    state: str
    until: str | None
    embedded: bool
    named: tuple[tuple[str, str], ...] = ()
    vector: npt.NDArray[np.float32] | None = None


class RetrievalRows(StoreBase):
    """The store's verbs for retrieval. Each row comes through `visible`, in the query that reads it."""

    def passages(
        self,
        principal: Principal,
        model_id: str,
        *,
        ids: Collection[str] | None = None,
        vectors: bool = True,
    ) -> list[PassageRow]:
        """What the caller may see (of `ids`), in any state, also where its time is over: whoever keeps the
        rows asks the clock at each search."""
        where, params = visible(principal, self._now(), outlived=True)
        params["model"] = model_id
        if ids is not None:
            params["ids"] = among(ids)
        sql = _ROWS.format(vec=", v.vec" if vectors else "", cube="cube c" if ids is None else _BY_IDS)
        with self._db.read() as conn:
            rows = conn.execute(f"{sql} WHERE {where}", params).fetchall()
        return [_passage(row, row[12] if vectors else None) for row in rows]

    def changes(self, since: int | None) -> tuple[int, list[str] | None]:
        """The number of the last change to anything searchable, and the ids of memories that changed after
        `since`; None instead of ids: too much has, read everything anew. Other users' ids are among them."""
        with self._db.read() as conn:
            last = conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'index_log'").fetchone()
            seq = int(last[0]) if last else 0
            if since == seq:
                return seq, []
            (first,) = conn.execute("SELECT min(seq) FROM index_log").fetchone()
            if since is not None and since < seq and first is not None and first <= since + 1:
                sql = "SELECT DISTINCT cube_id FROM index_log WHERE seq > ?"
                rows = conn.execute(sql, (since,)).fetchall()
                if (None,) not in rows:
                    return seq, [row[0] for row in rows]
            self._postings.clear()  # words may have been built anew
        return seq, None

    def rights_change(self, principal: Principal) -> datetime | None:
        """When the next grant in the caller's tenant expires: rows read before are good until then."""
        with self._db.read() as conn:
            (moment,) = conn.execute(
                "SELECT min(g.expires_at) FROM grant_ g JOIN principal p ON p.id = g.owner WHERE p.tenant = "
                "? AND g.expires_at > ? AND g.revoked_at IS NULL",
                (principal.tenant, self._now()),
            ).fetchone()
        return None if moment is None else time_from_text(moment)

    def postings(self, principal: Principal, words: Mapping[str, str]) -> dict[str, Keys]:
        """Keys of the tenant's passages that hold each stem, ascending, for what `Stemmer.words` gives. They
        say nothing to the caller until they are narrowed to what the caller may see."""
        with self._db.read() as conn:
            return {
                stem: self._postings.read(conn, principal.tenant, stem, word) for stem, word in words.items()
            }

    def matching(self, principal: Principal, filters: Filters) -> Keys:
        """Keys of the visible passages that pass the filters, ascending: one query with the predicate."""
        seen = self._view(principal, closed=False)
        params = seen.params
        conditions = [seen.where, *_conditions(filters, params)]
        with self._db.read() as conn:
            rows = conn.execute(
                "SELECT f.id FROM cube c JOIN passage f ON f.cube_id = c.id AND f.version = c.version "
                "LEFT JOIN cube_body b ON b.cube_id = c.id AND b.version = c.version "
                f"WHERE {' AND '.join(conditions)} ORDER BY f.id",
                params,
            ).fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def found(
        self, principal: Principal, ids: Sequence[str], states: Collection[LifecycleState]
    ) -> dict[str, MemCube]:
        """Those of `ids` that the caller may see now and that are in one of these states, by id."""
        seen = self._view(principal, closed=False)
        params = seen.params
        params.update(ids=among(ids), states=among(state.value for state in states))
        with self._db.read() as conn:
            rows = conn.execute(
                f"{_FOUND} WHERE {seen.where} AND c.state IN (SELECT value FROM json_each(:states))",
                params,
            ).fetchall()
        return {row[0]: cube_of(row) for row in rows}

    def of_session(self, principal: Principal, session: str, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that the caller may see and that are from this conversation."""
        seen = self._view(principal, closed=False)
        params = seen.params
        params.update(ids=among(ids), session=session)
        with self._db.read() as conn:
            rows = conn.execute(
                "SELECT c.id FROM cube c JOIN passage f ON f.cube_id = c.id AND f.version = c.version "
                f"WHERE {seen.where} AND f.session = :session "
                "AND c.id IN (SELECT value FROM json_each(:ids))",
                params,
            ).fetchall()
        return {row[0] for row in rows}

    def erasures(self) -> int:
        """How many memories were ever erased here: an index built before the last one must not be kept."""
        with self._db.read() as conn:
            return int(conn.execute("SELECT count(*) FROM erasure").fetchone()[0])

    def keep_snapshot(self, name: str, save: Callable[[str], None], erasures: int, **about: Any) -> bool:
        """Keep an index that was built when there had been so many `erasures`; False if there were more
        meanwhile: its file would hold what was erased. Raises `StoreError`, `OSError`."""
        kept = False

        def publish(act: Callable[[], None]) -> None:
            nonlocal kept
            with self._db.write() as conn:
                if conn.execute("SELECT count(*) FROM erasure").fetchone()[0] == erasures:
                    act()
                    kept = True

        self.snapshots.write(name, save, publish, **about)
        return kept


def _passage(row: tuple[Any, ...], vector: bytes | None) -> PassageRow:
    """A row of `_ROWS`."""
    return PassageRow(
        key=row[0],
        cube_id=row[1],
        place=row[2],
        owner=row[3],
        session=row[4],
        words=row[5],
        valid_from=row[6],
        state=row[7],
        until=min((end for end in row[8:10] if end is not None), default=None),
        embedded=bool(row[10]),
        named=() if row[11] is None else tuple((first, last) for first, last in json.loads(row[11])),
        vector=None if vector is None else np.frombuffer(vector, "<f4").astype(np.float32),
    )


def _conditions(filters: Filters, params: Params) -> list[str]:
    """Filters as SQL conditions on `cube c`, `passage f` and `cube_body b`; their values go to `params`."""
    found: list[str] = []

    def add(sql: str, **values: str | int) -> None:
        found.append(sql)
        params.update(values)

    add(
        "c.state IN (SELECT value FROM json_each(:states))",
        states=among(state.value for state in filters.states),
    )
    tag = "FROM json_each(b.tags) t WHERE t.value IN (SELECT value FROM json_each(:{0}))"
    if filters.tags_any:
        add(f"EXISTS (SELECT 1 {tag.format('tags_any')})", tags_any=among(filters.tags_any))
    if filters.tags_all:
        wanted = set(filters.tags_all)
        add(
            f"(SELECT count(DISTINCT t.value) {tag.format('tags_all')}) = :tags_count",
            tags_all=among(wanted),
            tags_count=len(wanted),
        )
    if filters.tags_none:
        add(f"NOT EXISTS (SELECT 1 {tag.format('tags_none')})", tags_none=among(filters.tags_none))
    if filters.semantic_types:
        add("c.semantic_type IN (SELECT value FROM json_each(:types))", types=among(filters.semantic_types))
    if filters.ids is not None:
        add("c.id IN (SELECT value FROM json_each(:ids))", ids=json.dumps(list(filters.ids)))
    for name, column, sign, value in filters.times():
        add(f"{column} {sign} :{name}", **{name: value})
    return found
