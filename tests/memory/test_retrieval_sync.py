"""What was written is found by the next search, whoever wrote it, and whatever index answers.

MEMOS_ENGINE_TEST_PAIRS=10000 does as many random changes, each with a search (default: 400).
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError, StoreError
from memos_engine.memory import store_fts, view
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.hnsw import IndexLimits
from memos_engine.memory.index import cosines
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.schema_retrieval import LOG_ROWS
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_db import translate

DIM = 24
PAIRS = int(os.environ.get("MEMOS_ENGINE_TEST_PAIRS", "400"))


class Random:
    """A vector that hangs on the text alone."""

    model_id, dim = "random", DIM

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.array([np.random.default_rng(list(t.encode())).normal(size=DIM) for t in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Later:
    """Background work that waits until it is told to run."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def run(self) -> int:
        work, self.waiting = self.waiting, []
        for one in work:
            one()
        return len(work)


def now(work: Callable[[], None]) -> None:
    work()


def found(operator: MemOperator, user: Principal, text: str, k: int = 1) -> list[str]:
    return [c.cube.id for c in operator.recall(user, text, k=k)]


def check_exact(operator: MemOperator, store: MemoryStore, user: Principal, text: str) -> None:
    """The index holds just the live vectors, and the best of a search is the best of all."""
    ids, matrix = store.vectors(user, "random")
    best = operator.recall(user, text, k=5)
    scores = cosines(Random().embed([text])[0], matrix)
    top = max(best, key=lambda c: c.score)
    assert top.score == pytest.approx(float(scores.max()), abs=2e-6)
    assert top.cube.id == ids[int(scores.argmax())]


@pytest.mark.parametrize("limits", [IndexLimits(), IndexLimits(exact=20)])
def test_everybodys_writes_are_found_at_once(
    reopen: Callable[..., MemoryStore], alice: Principal, bob: Principal, limits: IndexLimits
) -> None:
    """Two openings of one store; writes by one, searches by the other, with an index that is rebuilt at
    random times; then the same after a reopening."""
    rng, later = random.Random(0), Later()
    stores = [reopen(), reopen()]
    operators = [MemOperator(one, Random(), limits=limits, run=later) for one in stores]
    live: dict[Principal, dict[str, str]] = {alice: {}, bob: {}}
    for step in range(PAIRS):
        user = rng.choice([alice, alice, alice, bob])
        writer, reader = rng.sample([0, 1], 2) if rng.random() < 0.8 else (0, 0)
        if rng.random() < 0.2 and live[user]:
            text = rng.choice(sorted(live[user]))
            verb = rng.choice(["archive", "delete"])
            getattr(stores[writer], verb)(user, live[user][text])
            gone = live[user].pop(text)
            assert gone not in found(operators[reader], user, text, k=20)
        else:
            text = f"memory {step} {rng.random()}"
            live[user][text] = operators[writer].remember(user, text).id
            assert found(operators[reader], user, text) == [live[user][text]]
        if rng.random() < 0.03:
            later.run()
        if rng.random() < 0.02:
            stores[0].close()
            stores[0] = reopen()
            operators[0] = MemOperator(stores[0], Random(), limits=limits, run=later)
    for user, known in live.items():
        for text in sorted(known)[:40]:
            assert found(operators[0], user, text) == [known[text]]
            check_exact(operators[1], stores[1], user, text)


def test_a_cache_that_fell_behind_reads_everything_anew(
    reopen: Callable[..., MemoryStore], alice: Principal
) -> None:
    one, two = reopen(), reopen()
    reader, writer = MemOperator(one, Random()), MemOperator(two, Random())
    first = writer.remember(alice, "first").id
    assert found(reader, alice, "first") == [first]
    with two._db.write() as conn:  # as after very many changes
        conn.execute("UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'index_log'", (2 * LOG_ROWS,))
    second = writer.remember(alice, "second").id
    assert found(reader, alice, "second") == [second]
    with two._db.write() as conn:  # as when rights change
        conn.execute("INSERT INTO index_log (cube_id) VALUES (NULL)")
    assert found(reader, alice, "first") == [first]
    with two._db.read() as conn:
        kept = conn.execute("SELECT count(*) FROM index_log").fetchone()[0]
        assert kept == 3  # the second memory's words and vector, and the rights


def test_a_replaced_vector_is_seen(reopen: Callable[..., MemoryStore], alice: Principal) -> None:
    one, two = reopen(), reopen()
    for limits in (IndexLimits(), IndexLimits(exact=1)):
        operator = MemOperator(one, Random(), limits=limits, run=now)
        cubes = [operator.remember(alice, f"text {n} {limits.exact}") for n in range(3)]
        before = operator.recall(alice, "zzz", k=50)
        two.put_vectors(alice, "random", [cubes[1]], Random().embed(["zzz"]))
        after = {c.cube.id: c.score for c in operator.recall(alice, "zzz", k=50)}
        assert after[cubes[1].id] == pytest.approx(1, abs=1e-5)
        two.put_vectors(alice, "random", [cubes[1]], Random().embed([cubes[1].body or ""]))
        assert operator.recall(alice, "zzz", k=50) == before


_WRITER = """
import sys
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_db import translate
with MemoryStore.open(sys.argv[1], keyring=KeyRing(sys.argv[2])) as store:
    for n in range(40):
        cube = store.add(Principal("acme", "alice"), f"parcel{n} from the other process")
        print(cube.id, flush=True)
        sys.stdin.readline()
"""


def test_another_processs_writes_are_found_at_once(
    store: MemoryStore, alice: Principal, tmp_path: Path
) -> None:
    words = MemOperator(store)
    argv = [sys.executable, "-c", _WRITER, str(store.directory), str(tmp_path / "keys")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for n in range(40):
            cube_id = child.stdout.readline().strip()
            assert found(words, alice, f"parcel{n}") == [cube_id]
            if n % 10 == 3:
                store.archive(alice, cube_id)
                assert found(words, alice, f"parcel{n}") == []
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.returncode == 0


def test_views_are_let_go(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "MAX_VIEWS", 3)
    words = MemOperator(store)
    for n in range(6):
        user = Principal("acme", f"user {n}")
        cube = store.add(user, "a dog")
        assert found(words, user, "dog") == [cube.id]
    assert len(words._views._views) == 3


def test_an_older_store_becomes_searchable(
    reopen: Callable[..., MemoryStore], alice: Principal, bob: Principal, add: Any
) -> None:
    store = reopen()
    cubes = [add(store, alice, "my dog is called biscuit"), add(store, alice, "archived dog")]
    theirs = add(store, bob, "my dog")
    gone = add(store, alice, "an erased dog")
    store.archive(alice, cubes[1].id)
    store.erase(alice, gone.id)
    with store._db.write() as conn:  # back to the first schema
        for name in ("fts_1_words", "fts_1", "passage", "index_log", "tenant"):
            conn.execute(f"DROP TABLE {name}")
        triggers = ("cube_moved", "vector_added")
        for name in triggers:
            conn.execute(f"DROP TRIGGER {name}")
        conn.execute("DELETE FROM schema_migration WHERE name IN ('0002_retrieval', '0004_named_times')")
        conn.execute("PRAGMA user_version = 1")
    store.close()
    again = reopen()
    words = MemOperator(again)
    assert found(words, alice, "dog", k=9) == [cubes[0].id]
    assert found(words, bob, "dog", k=9) == [theirs.id]
    again.restore(alice, cubes[1].id)
    assert set(found(words, alice, "dog", k=9)) == {cubes[0].id, cubes[1].id}
    again.erase(alice, cubes[0].id)
    assert found(words, alice, "biscuit") == []
    again.audit_verify()


def test_a_tenants_words_are_in_a_table_of_its_own(tmp_path: Path, alice: Principal) -> None:
    with MemoryStore.open(tmp_path / "s", keyring=KeyRing(tmp_path / "k")) as store:
        store.add(alice, "dog")
        store.add(Principal("other", "alice"), "dog cat")
        with store._db.read() as conn:
            assert store_fts.postings(conn, "acme", "dog").tolist() == [1]
            assert store_fts.postings(conn, "acme", "cat").tolist() == []
            assert store_fts.postings(conn, "other", "dog").tolist() == [2]
            assert store_fts.postings(conn, "nobody", "dog").tolist() == []


def test_python_without_fts5_is_named(tmp_path: Path) -> None:
    error = translate(Exception("no such module: fts5"), tmp_path)
    assert isinstance(error, StoreError)
    assert "FTS5" in str(error)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8))
def test_a_word_finds_what_holds_its_stem(tmp_path_factory: Any, texts: list[str]) -> None:
    """The index is asked by words, scores go by stems: both must mean the same memories."""
    stemmer = store_fts.Stemmer()
    place = tmp_path_factory.mktemp("words")
    with MemoryStore.open(place / "store", keyring=KeyRing(place / "keys")) as store:
        user = Principal("t", "u")
        kept = [text for text in texts if text.strip() and "\0" not in text and "running" not in text]
        for text in (*kept, "Running runners ran; caf\u00e9s and cafes"):
            with contextlib.suppress(MemoryInputError):
                store.add(user, text)
        bodies = [cube.body or "" for cube in store.list(user)]
        words: dict[str, str] = {}
        for body in bodies:
            words |= stemmer.words(body)
        for _ in range(2):  # from the store, then as they were kept
            found = store.postings(user, words)
            for stem in words:
                holding = [n for n, body in enumerate(bodies, 1) if stem in stemmer(body)]
                assert found[stem].tolist() == holding
            bodies.append("one more: running caf\u00e9")
            store.add(user, bodies[-1])


def test_what_is_written_between_two_statements_counts_once(
    reopen: Callable[..., MemoryStore], alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = reopen(), reopen()
    two.add(alice, "first dog")
    read = store_fts.postings

    def late(*args: Any) -> Any:
        monkeypatch.setattr(store_fts, "postings", read)
        two.add(alice, "second dog")
        return read(*args)

    monkeypatch.setattr(store_fts, "postings", late)
    assert one.postings(alice, {"dog": "dog"})["dog"].tolist() == [1]
    assert one.postings(alice, {"dog": "dog"})["dog"].tolist() == [1, 2]
