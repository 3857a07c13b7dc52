"""Stores through many deaths: children change them at random until they are killed, at a step or any moment.

MEMOS_ENGINE_TEST_KILLS=1000 kills as many (default: 50). Every change that a child reported must be there
after its death; the one under way may be there or not; whatever is there is whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memos_engine.memory.cube import Fact
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_db import StoreDB
from tests.memory.test_crash import Bomb, MinedFS, acknowledged, in_child

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLS = int(os.environ.get("MEMOS_ENGINE_TEST_KILLS", "50"))
ALICE = Principal("t", "alice")
WORDS = ("river", "boat", "mill", "bridge", "garden", "harbour")
S = LifecycleState
VERBS = ("add", "add", "update", "update", "archive", "kv", "delete", "erase", "together", "rollback")


def open_store(root: Path, **options: Any) -> MemoryStore:
    return MemoryStore.open(root / "store", keyring=KeyRing(root / "keys"), **options)


Done = list[tuple[str, int, str]]


def change(store: MemoryStore, rng: random.Random, number: str) -> Done:
    """One random change; id, version and state of the memories that it made or changed."""
    cubes = store.list(ALICE, states=[*LIVE, S.ARCHIVED])
    verb = rng.choice(VERBS)
    if verb == "add" or not cubes:
        text = f"{number} {rng.choice(WORDS)}"
        fact = Fact("alice", rng.choice(WORDS)) if rng.random() < 0.3 else None
        cube = store.add(ALICE, text, vector=[rng.random(), 1.0], model_id="m", fact=fact)
        return [(cube.id, 1, str(cube.state))]
    cube = rng.choice(cubes)
    if verb == "update" and cube.state in LIVE:
        cube = store.update(ALICE, cube.id, f"{number} {rng.choice(WORDS)}", if_version=cube.version)
    elif verb == "rollback" and cube.version > 1:
        cube = store.rollback(ALICE, cube.id, rng.randrange(1, cube.version))
    elif verb == "archive" and cube.state in LIVE:
        cube = store.archive(ALICE, cube.id)
    elif verb == "kv":
        store.put_kv(ALICE, cube.id, cube.version, f"k{rng.randrange(3)}", rng.randbytes(300), 3)
    elif verb == "delete":
        store.delete(ALICE, cube.id)
        return [(cube.id, cube.version, str(S.EXPIRED))]
    elif verb == "erase" and rng.random() < 0.3:
        store.erase(ALICE, cube.id)
        return [(cube.id, cube.version, str(S.EXPIRED))]
    elif verb == "together":
        with store.transaction():
            first = store.add(ALICE, f"{number} first of two")
            second = store.add(ALICE, f"{number} second of two", derived_from=[first.id])
        return [(one.id, 1, str(one.state)) for one in (first, second)]
    else:
        return []
    return [(cube.id, cube.version, str(cube.state))]


def work(root: Path, seed: int, steps: int | None, say: Callable[[str], None]) -> None:
    rng = random.Random(seed)
    options = {}
    if steps is not None:
        bomb = Bomb(steps)
        StoreDB.commit = bomb.around(StoreDB.commit)  # type: ignore[method-assign]
        StoreDB.shrink = bomb.around(StoreDB.shrink)  # type: ignore[method-assign]
        options["fs"] = MinedFS(bomb)
    store = open_store(root, **options)
    say("open - 0 -")
    for number in range(200):
        done = change(store, rng, f"{seed}.{number}")
        if done:
            say("did " + json.dumps(done))


def check(root: Path, known: dict[str, tuple[int, str]]) -> None:
    with open_store(root) as store:
        with store._db.read() as conn:
            assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
            rows = conn.execute("SELECT count(DISTINCT sha256) FROM kv_artifact").fetchone()[0]
            now = {
                row[0]: (row[1], row[2], row[3])
                for row in conn.execute(
                    "SELECT c.id, c.version, c.state, b.body FROM cube c LEFT JOIN cube_body b ON b.cube_id "
                    "= c.id AND b.version = c.version"
                )
            }
            pairs = conn.execute(
                "SELECT substr(body, 1, instr(body, ' ')), count(*) FROM cube_body WHERE version = 1 AND "
                "body LIKE '% of two' GROUP BY 1"
            ).fetchall()
            erased = conn.execute("SELECT count(*) FROM erasure").fetchone()[0]
        assert store.scrub() == rows
        store.audit_verify()
        late = 0
        for cube_id, (version, state) in known.items():
            assert cube_id in now, "an acknowledged memory is gone"
            assert now[cube_id][0] >= version, "an acknowledged version is gone"
            late += now[cube_id][:2] != (version, state)
        assert late <= 1, "more than the change under way happened unreported"
        assert len(now) - len(known) <= 2  # as many as a change under way can have added
        if not erased:
            assert all(count == 2 for _, count in pairs), "half of a transaction is there"
        operator = MemOperator(store)
        found = {c.cube.id for word in WORDS for c in operator.recall(ALICE, word, k=5000)}
        alive = {str(state) for state in LIVE}
        live = {i for i, (_, state, body) in now.items() if state in alive and body.split()[-1] in WORDS}
        closed = {c.id for c in store.list(ALICE) if c.fact is not None and c.fact.valid_to is not None}
        assert live - closed <= found <= live
        known.clear()
        known.update({cube_id: (version, state) for cube_id, (version, state, _) in now.items()})


def begun(root: Path, known: dict[str, tuple[int, str]]) -> Path:
    root.mkdir()
    with open_store(root) as store:
        cube = store.add(ALICE, "the first river")
    known.clear()
    known[cube.id] = (1, str(cube.state))
    return root


def test_random_deaths(tmp_path: Path) -> None:
    rng = random.Random(0)
    known: dict[str, tuple[int, str]] = {}
    deaths = place = 0
    root = begun(tmp_path / "0", known)
    while deaths < KILLS:
        seed, mined = rng.randrange(10**9), rng.random() < 0.5
        steps = rng.randrange(120) if mined else None
        pid, pipe = in_child(lambda say, s=seed, n=steps, r=root: work(r, s, n, say))  # type: ignore[misc]
        start = b""
        if not mined:
            while not start.endswith(b"\n"):
                start += os.read(pipe, 1)
            time.sleep(rng.random() * 0.15)
            os.kill(pid, signal.SIGKILL)
        said, status = acknowledged(pid, pipe, start)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9, -9), json.dumps(said[-3:])
        deaths += code != 0
        for line in said:
            if line[0] == "did":
                for cube_id, version, state in json.loads(" ".join(line[1:])):
                    known[cube_id] = (version, state)
        check(root, known)
        if len(known) > 250:  # a new store, before the checks take longer than the deaths
            place += 1
            root = begun(tmp_path / str(place), known)
