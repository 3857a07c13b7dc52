"""A child process dies at every step around fsync, rename and commit; the parent looks at what is left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_db import StoreDB
from memos_engine.memory.vault import FileSystem

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ALICE = Principal("t", "alice")
UNIT = {"vector": [1.0, 0.0], "model_id": "m"}


class Bomb:
    """Ends the process, as kill -9 would, at the n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self) -> None:
        if self.left == 0:
            os._exit(9)
        self.left -= 1

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            self.step()
            result = function(*args)
            self.step()
            return result

        return wrapped


class MinedFS(FileSystem):
    def __init__(self, bomb: Bomb) -> None:
        for name in ("create", "write", "fsync", "fsync_directory", "rename", "unlink"):
            setattr(self, name, bomb.around(getattr(self, name)))


def work(root: Path, steps: int, say: Callable[[str], None]) -> None:
    """Runs in the child: every line said is an acknowledged change."""
    bomb = Bomb(steps)
    StoreDB.commit = bomb.around(StoreDB.commit)  # type: ignore[method-assign]
    StoreDB.shrink = bomb.around(StoreDB.shrink)  # type: ignore[method-assign]
    store = MemoryStore.open(root / "store", keyring=KeyRing(root / "keys"), fs=MinedFS(bomb))
    ids = []
    for n in range(3):
        ids.append(store.add(ALICE, f"CANARY {n}", **UNIT).id)
        say(f"add {ids[n]}")
    for n in range(2):
        store.put_kv(ALICE, ids[n], 1, "i", b"record of CANARY %d" % n, 2)
        say(f"kv {ids[n]}")
    store.put_kv(ALICE, ids[0], 1, "i", b"another record of CANARY 0", 2)
    say(f"kv {ids[0]}")
    store.archive(ALICE, ids[2])
    say(f"archive {ids[2]}")
    store.delete(ALICE, ids[0])
    say(f"delete {ids[0]}")
    store.erase(ALICE, ids[1])
    say(f"erase {ids[1]}")
    store.close()
    say("done")


def in_child(run: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Forks; returns the child's pid and the end of a pipe that it writes acknowledgements to."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    code = 1
    try:
        os.close(out)
        run(lambda line: os.write(into, line.encode() + b"\n") and None)
        code = 0
    finally:
        os._exit(code)


def acknowledged(pid: int, pipe: int, data: bytes = b"") -> tuple[list[list[str]], int]:
    while piece := os.read(pipe, 65536):
        data += piece
    os.close(pipe)
    _, status = os.waitpid(pid, 0)
    return [line.split() for line in data.decode().splitlines()], status


def check(root: Path, said: list[list[str]]) -> None:
    """Nothing acknowledged is lost, nothing dangles, the trail verifies, and the store can be written."""
    with MemoryStore.open(root / "store", keyring=KeyRing(root / "keys")) as store:
        store.audit_verify()
        done = {
            verb: [line[1] for line in said if line[0] == verb]
            for verb in ("add", "kv", "archive", "delete", "erase")
        }
        for cube_id in done["add"]:
            events = [entry.event for entry in store.history(ALICE, cube_id)]
            for verb, event in (("archive", "archived"), ("delete", "deleted"), ("erase", "erased")):
                assert (cube_id not in done[verb]) or event in events
        with store._db.read() as conn:
            rows = conn.execute("SELECT count(DISTINCT sha256) FROM kv_artifact").fetchone()[0]
            erased = [row[0] for row in conn.execute("SELECT cube_id FROM erasure")]
            texts = conn.execute("SELECT count(*) FROM cube_body").fetchone()[0]
            marked = conn.execute("SELECT count(*) FROM cube_body WHERE body LIKE 'CANARY%'").fetchone()[0]
            cubes = conn.execute("SELECT count(*) FROM cube").fetchone()[0]
            assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
        assert store.scrub() == rows  # every row's file is there and sound
        assert texts == cubes - len(erased)
        gone = set(done["delete"]) | set(done["erase"])
        for cube_id in done["kv"]:
            if cube_id not in gone and store.history(ALICE, cube_id)[-1].event == "added":
                assert store.find_kv(ALICE, cube_id, "i") is not None
        store.collect(grace_s=0)
        left = b"".join(path.read_bytes() for path in store.directory.rglob("*") if path.is_file())
        if erased:  # also when it was never acknowledged: once it has begun, opening finishes it
            assert b"CANARY 1" not in left
        assert left.count(b"CANARY") >= marked
        again = store.add(ALICE, "after the crash", **UNIT)
        store.put_kv(ALICE, again.id, 1, "i", b"record", 2)
        assert store.get(ALICE, again.id) == again


def test_death_at_every_step(tmp_path: Path) -> None:
    finished, steps = False, 0
    while not finished:
        root = tmp_path / str(steps)
        root.mkdir()
        said, status = acknowledged(*in_child(lambda say, root=root, n=steps: work(root, n, say)))  # type: ignore[misc]
        finished = ["done"] in said
        assert os.waitstatus_to_exitcode(status) == (0 if finished else 9)
        check(root, said)
        steps += 1
    assert steps > 60, "the mines were not stepped on"


def test_death_at_any_moment(tmp_path: Path) -> None:
    rng = random.Random(7)

    def endless(say: Callable[[str], None]) -> None:
        with MemoryStore.open(tmp_path / "store", keyring=KeyRing(tmp_path / "keys")) as store:
            while True:
                cube = store.add(ALICE, "CANARY", **UNIT)
                say(f"add {cube.id}")
                store.put_kv(ALICE, cube.id, 1, "i", os.urandom(50), 2)
                say(f"kv {cube.id}")

    everything: list[list[str]] = []
    for _ in range(6):
        pid, pipe = in_child(endless)
        first = os.read(pipe, 65536)  # it is at work now, however slow the machine
        time.sleep(rng.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        said, status = acknowledged(pid, pipe, first)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        everything += said
        check(tmp_path, everything)
    assert len(everything) >= 6
