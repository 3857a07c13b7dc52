"""A check of the whole store: the database, what it says about itself, and every file beside it."""

from __future__ import annotations

import hmac
import json
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from memos_engine.errors import StoreError, StoreLockedError
from memos_engine.memory.checkup import Checkup, Part, Problem, summary
from memos_engine.memory.store_db import translate
from memos_engine.memory.store_fts import Stemmer, rebuild_words, tenants, wrong_words
from memos_engine.memory.store_kv import KVRows

_Found = tuple[int, list[Problem], list[str]]  # how many were looked at, what is wrong, what is to be known
_BATCH = 1000
_UNIT = 1e-3  # how far from 1 the length of a stored embedding may be
_RESTORE = "restore a backup"
Mend = Callable[[], None]


class CheckVerbs(KVRows):
    """Checking everything, for the operator of the store."""

    def check(self, *, repair: bool = False, progress: Callable[[str], None] | None = None) -> Checkup:
        """Look at every page, row and file of the store.

        Words themselves are compared with their keyed fingerprints, histories with the audit trail, files
        with their checksums. `repair` drops or builds anew what the store has elsewhere (KV records,
        embeddings, words for search, index files); damage to memories themselves it leaves as it is, and
        where pages of the database are damaged it writes nothing. `progress` is told each part's name. Takes
        time proportional to the store. Raises `StoreLockedError`, and nothing for damage.
        """
        parts: list[Part] = []
        for name, unit, look in (
            ("database", "pages", self._check_database),
            ("references", "tables", self._check_references),
            ("audit", "events", self._check_audit),
            ("histories", "memories", self._check_histories),
            ("texts", "texts", self._check_texts),
            ("words", "texts", self._check_words),
            ("embeddings", "vectors", self._check_embeddings),
            ("payloads", "files", self._check_payloads),
            ("index", "snapshots", self._check_index),
            ("files", "orphans", self._check_files),
        ):
            if progress is not None:
                progress(name)
            # Words made anew from a damaged text would hide which ones it had.
            needed = ("database", "texts") if name == "words" else ("database",)
            mend = repair and all(part.sound for part in parts if part.name in needed)
            try:
                count, problems, notes = look(mend)
            except StoreLockedError:
                raise
            except (StoreError, OSError, ValueError, TypeError) as error:
                # Whatever cannot be read is damaged, whichever layer stumbles over it.
                count, problems, notes = 0, [Problem(str(error))], []
            parts.append(Part(name, count, unit, tuple(problems), tuple(notes)))
        return Checkup(tuple(parts))

    def _check_database(self, mend: bool) -> _Found:
        with self._db.read() as conn:
            (pages,) = conn.execute("PRAGMA page_count").fetchone()
            rows = [row[0] for row in conn.execute("PRAGMA integrity_check(20)")]
        wrong = [] if rows == ["ok"] else [line for row in rows for line in str(row).splitlines()]
        return pages, [Problem(f"memory.db: {line}; {_RESTORE}.") for line in wrong[:20]], []

    def _check_references(self, mend: bool) -> _Found:
        with self._db.read() as conn:
            (count,) = conn.execute("SELECT count(*) FROM sqlite_schema WHERE type = 'table'").fetchone()
            rows = conn.execute("PRAGMA foreign_key_check").fetchall()
        tables = sorted({f"{table} (of {parent})" for table, _, parent, _ in rows})
        lost = f"{len(rows)} rows name others that are not there, in {summary(tables)}; {_RESTORE}."
        return count, [Problem(lost)] if rows else [], []

    def _check_audit(self, mend: bool) -> _Found:
        return self.audit_verify(), [], []

    def _check_histories(self, mend: bool) -> _Found:
        problems = []
        with self._db.read() as conn:
            (count,) = conn.execute("SELECT count(*) FROM cube").fetchone()
            rows = conn.execute(
                "SELECT c.id FROM cube c LEFT JOIN cube_event e ON e.seq = (SELECT max(x.seq) FROM "
                "cube_event x WHERE x.cube_id = c.id) WHERE e.version IS NOT c.version OR e.state IS NOT "
                "c.state ORDER BY c.id"
            ).fetchall()
            astray = _not_audited(conn)
        if rows:
            ids = summary([row[0] for row in rows])
            problems.append(Problem(f"the present of {ids} is not what its history says; {_RESTORE}."))
        if astray is not None:
            problems.append(Problem(f"{astray} is not in the audit trail as it is; {_RESTORE}."))
        return count, problems, []

    def _check_texts(self, mend: bool) -> _Found:
        count, unknown, wrong = 0, 0, []
        for cube_id, version, body, fingerprint, key_id in self._rows(
            "SELECT b.cube_id, b.version, b.body, v.body_hmac, v.key_id FROM cube_body b JOIN cube_version v "
            "ON v.cube_id = b.cube_id AND v.version = b.version WHERE (b.cube_id, b.version) > (?, ?) ORDER "
            "BY b.cube_id, b.version LIMIT ?"
        ):
            count += 1
            if key_id != self.keys.id:
                unknown += 1
            elif not hmac.compare_digest(self.keys.body_hmac(body), fingerprint):
                wrong.append(f"{cube_id} version {version}")
        problems = (
            [Problem(f"the text of {summary(wrong)} was altered on disk; {_RESTORE}.")] if wrong else []
        )
        notes = [f"{unknown} texts of an earlier key cannot be checked"] if unknown else []
        return count, problems, notes

    def _check_words(self, mend: bool) -> _Found:
        count, problems, stem = 0, [], Stemmer()
        with self._db.read() as conn:
            numbers = tenants(conn)
        for tenant in numbers:
            try:
                with self._db.read() as conn:
                    found, wrong = wrong_words(conn, tenant, stem)
                count += found
                if not wrong:
                    continue
                what = f"{len(wrong)} texts are not found by exactly their words"
            except StoreLockedError:
                raise
            except StoreError as error:
                what = f"the words of tenant {tenant} cannot be read ({error})"
            problems.append(self._mend(f"{what}; build them anew.", mend, partial(self._reword, tenant)))
        return count, problems, []

    def _reword(self, tenant: int) -> None:
        with self._db.write() as conn:
            rebuild_words(conn, tenant)

    def _check_embeddings(self, mend: bool) -> _Found:
        count, wrong = 0, []
        for cube_id, version, model, dim, data in self._rows(
            "SELECT cube_id, version, model_id, dim, vec FROM vector WHERE (cube_id, version, model_id) > "
            "(?, ?, ?) ORDER BY cube_id, version, model_id LIMIT ?",
            columns=3,
        ):
            count += 1
            vector = np.frombuffer(data, "<f4") if len(data) == 4 * dim else np.zeros(0)
            length = float(np.linalg.norm(vector.astype(np.float64))) if len(vector) else float("nan")
            if not (abs(length - 1) <= _UNIT or length == 0):
                wrong.append((cube_id, version, model))
        if not wrong:
            return count, [], []
        ids = summary([row[0] for row in wrong])
        what = f"the embeddings of {ids} are damaged; drop them, the embedder makes them anew."
        return count, [self._mend(what, mend, partial(self._drop_vectors, wrong))], []

    def _drop_vectors(self, keys: list[tuple[str, int, str]]) -> None:
        with self._db.write() as conn:
            conn.executemany("DELETE FROM vector WHERE cube_id = ? AND version = ? AND model_id = ?", keys)
            # Caches of other processes hold them too, and so do graphs.
            conn.executemany("INSERT INTO index_log (cube_id) VALUES (?)", [key[:1] for key in keys])

    def _check_payloads(self, mend: bool) -> _Found:
        sound, damaged = self.damaged_payloads()
        with self._db.read() as conn:
            adapters = {row[0] for row in conn.execute("SELECT sha256 FROM adapter_payload")}
            astray = conn.execute(
                "SELECT a.cube_id, a.version FROM adapter_version a LEFT JOIN adapter_payload f ON f.cube_id "
                "= a.cube_id AND f.version = a.version WHERE (a.revoked_at IS NULL) <> (f.sha256 IS NOT NULL)"
            ).fetchall()
        problems = [
            Problem(f"{error} It is an adapter: import it again, or {_RESTORE}.")
            if ref.sha256 in adapters
            else self._mend(str(error), mend, partial(self._drop_payload, ref, error))
            for ref, error in damaged
        ]
        problems += [
            Problem(f"version {v} of adapter {i} and its payload disagree; {_RESTORE}.") for i, v in astray
        ]
        return sound + len(damaged), problems, []

    def _check_index(self, mend: bool) -> _Found:
        count, damaged = len(self.snapshots.names()), self.snapshots.damaged()
        if not damaged:
            return count, [], []
        what = f"index snapshot {summary(damaged)} is damaged and not used; drop it, search builds it anew."
        return count, [self._mend(what, mend, partial(self._drop_snapshots, damaged))], []

    def _drop_snapshots(self, names: list[str]) -> None:
        with self._db.write():
            try:
                self.snapshots.drop(name for name in names if self.snapshots.load(name) is None)
            except OSError as error:
                raise translate(error, self.snapshots.directory) from error

    def _check_files(self, mend: bool) -> _Found:
        orphans = self.orphans(grace_s=0)
        notes = []
        if orphans:
            notes.append(
                f"{sum(size for _, size in orphans):,} bytes in files that nothing names; gc removes them"
            )
        with self._db.read() as conn:
            (open_,) = conn.execute("SELECT count(*) FROM erasure WHERE scrubbed_at IS NULL").fetchone()
        if open_:
            notes.append(f"{open_} erasures are not finished; close other processes and run gc")
        return len(orphans), [], notes

    @staticmethod
    def _mend(what: str, mend: bool, act: Mend) -> Problem:
        if not mend:
            return Problem(what, mendable=True)
        try:
            act()
        except StoreError as error:
            return Problem(f"{what} That failed: {error}", mendable=True)
        return Problem(what, mendable=True, mended=True)

    def _rows(self, sql: str, columns: int = 2) -> Iterator[tuple[Any, ...]]:
        """Rows of a query, some at a time, so that writers get a turn; it goes on behind the last row's first
        columns."""
        last: tuple[Any, ...] = ("", 0, "")[:columns]
        while True:
            with self._db.read() as conn:
                rows = conn.execute(sql, (*last, _BATCH)).fetchall()
            yield from rows
            if len(rows) < _BATCH:
                return
            last = rows[-1][:columns]


def _not_audited(conn: sqlite3.Connection) -> str | None:
    """The first event in a memory's history that the trail does not have in its place.

    Both are appended in one transaction, so that histories are the trail with other events left out. One
    read transaction holds for both cursors, as the first one stays open.
    """
    names = ("cube_id", "version", "at", "event", "state")
    events = conn.execute(f"SELECT seq, {', '.join(names)} FROM cube_event ORDER BY seq")
    audited = (json.loads(row[0]) for row in conn.execute("SELECT event FROM audit ORDER BY seq"))
    for _, *event in events:
        wanted = dict(zip(names, event, strict=True))
        if not any(wanted.items() <= dict(found).items() for found in audited):
            return f"the event {wanted['event']!r} of {wanted['cube_id']} at {wanted['at']}"
    return None
