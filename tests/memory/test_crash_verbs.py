"""A child dies before and after every commit of the control plane's verbs: each happened whole or not at all.

A first run without a death notes what the store holds after each verb. After a death the store must hold what
it held after the last verb that was acknowledged, or after the one that was under way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from memos_engine.memory.cube import Fact
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore, NewMemory
from memos_engine.memory.store_db import StoreDB
from memos_engine.memory.store_sweep import SweepPolicy

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ALICE, BOB = Principal("t", "alice"), Principal("t", "bob")
BRANCH = Principal("t", "alice", "what_if")
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def open_store(root: Path, clock: Clock | None = None) -> MemoryStore:
    return MemoryStore.open(root / "store", keyring=KeyRing(root / "keys"), clock=clock or Clock())


def verbs(store: MemoryStore, clock: Clock) -> list[Callable[[], object]]:
    """One transaction each (erasing takes several), in an order in which each finds what it needs."""

    def cube(text: str, who: Principal = ALICE) -> str:
        return next(c.id for c in store.list(who, states=set(LifecycleState)) if c.body == text)

    home = Fact("Alice", "home")
    return [
        lambda: store.add_many(ALICE, [NewMemory(f"many {n}", tags=["t"]) for n in range(3)]),
        lambda: store.add(ALICE, "Paris", fact=home, vector=[1.0, 0.0], model_id="m"),
        lambda: store.put_kv(ALICE, cube("Paris"), 1, "i", b"record", 2),
        lambda: store.update(ALICE, cube("many 0"), "more", mode="append", idempotency_key="k"),
        lambda: store.add(ALICE, "Rome", fact=home, derived_from=[cube("Paris")]),
        lambda: store.grant(ALICE, "write", to=BOB),
        lambda: store.update(BOB, cube("many 1"), "by bob", merged_from=[cube("many 2")]),
        lambda: store.freeze(ALICE, cube("Rome")),
        lambda: store.rollback(ALICE, cube("many 0\nmore"), 1),
        lambda: store.branch(ALICE, "what_if"),
        lambda: store.update(BRANCH, cube("Paris", BRANCH), "London", fact=home),
        lambda: store.rollback_to(ALICE, store.history(ALICE, cube("Rome"))[0].at),
        lambda: store.drop_branch(ALICE, "what_if"),
        lambda: store.govern(ALICE, store.list(ALICE)[0].id, ttl_at=clock.now + timedelta(minutes=5)),
        lambda: setattr(clock, "now", clock.now + timedelta(hours=1)),
        lambda: store.sweep(SweepPolicy(idle_s=1e9)),
        lambda: store.erase(ALICE, cube("Paris"), cascade=True),
    ]


def picture(store: MemoryStore) -> tuple[Any, ...]:
    """What the store holds, without ids and times, which differ from run to run."""
    with store._db.read() as conn:
        seen = conn.execute(
            "SELECT p.user, b.body, b.tags, c.version, c.state, c.closed_at IS NOT NULL, "
            "c.source_gone_at IS NOT "
            "NULL FROM cube c JOIN principal p ON p.id = c.owner LEFT JOIN cube_body b ON b.cube_id = "
            "c.id AND "
            "b.version = c.version"
        ).fetchall()
        tables = ("cube", "cube_version", "cube_body", "fact", "fact_closing", "edge", "vector", "grant_")
        counts = [
            conn.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in (*tables, "branch", "done")
        ]
        kv = conn.execute("SELECT count(*) FROM kv_artifact").fetchone()[0]
    return (sorted(map(repr, seen)), counts, kv)


def child(root: Path, commits: int | None, said: Path) -> None:
    """Do all verbs, dying before (even) or after (odd) one of the commits; every verb done is noted."""
    if commits is not None:
        left, commit = [commits], StoreDB.commit

        def deadly(self: StoreDB, conn: Any) -> None:
            for action in (None, commit):
                if action is not None:
                    action(self, conn)
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1

        StoreDB.commit = deadly  # type: ignore[method-assign]
    clock = Clock()
    store = open_store(root, clock)
    with open(said, "a") as notes:
        for number, verb in enumerate(verbs(store, clock)):
            verb()
            notes.write(f"{number}\n")
            notes.flush()


def run_child(root: Path, commits: int | None) -> tuple[int, int]:
    """How many verbs were acknowledged, and how the child ended."""
    root.mkdir()
    said = root / "said"
    said.touch()
    pid = os.fork()
    if not pid:
        try:
            child(root, commits, said)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return len(said.read_text().splitlines()), os.waitstatus_to_exitcode(status)


def test_each_verb_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    clock = Clock()
    with open_store(tmp_path / "whole", clock) as store:
        pictures = [picture(store)]
        for verb in verbs(store, clock):
            verb()
            pictures.append(picture(store))
    step, finished = 2, False  # the first commits make the store
    while not finished:
        root = tmp_path / str(step)
        done, code = run_child(root, step)
        finished = code == 0
        assert code in (0, 9)
        with open_store(root) as store:
            held = picture(store)
            store.audit_verify()
            store.scrub()
            with store._db.read() as conn:
                assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
            assert held in pictures[done : done + 2], (step, done)
            store.add(ALICE, "after the crash")
        step += 1
    assert done == len(pictures) - 1
    assert step > 2 * len(pictures)
