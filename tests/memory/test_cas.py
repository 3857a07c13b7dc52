"""Processes that update one memory by compare-and-swap: one winner per version, none is locked out.

MEMOS_ENGINE_TEST_CAS=8x1000 runs as many processes and updates each (default: 4x12).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memos_engine.errors import ConflictError
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.store import MemoryStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ALICE = Principal("t", "alice")
WORKERS, UPDATES = (int(n) for n in os.environ.get("MEMOS_ENGINE_TEST_CAS", "4x12").split("x"))


def open_store(root: Path) -> MemoryStore:
    return MemoryStore.open(root / "store", keyring=KeyRing(root / "keys"), busy_timeout_ms=60_000)


def work(root: Path, worker: int, cube_id: str) -> None:
    with open_store(root) as store, open(root / f"won-{worker}", "w") as won:
        for n in range(UPDATES):
            while True:
                version = store.get(ALICE, cube_id).version
                try:
                    new = store.update(ALICE, cube_id, f"{worker} {n}", if_version=version)
                except ConflictError:
                    continue
                assert new.version == version + 1
                won.write(f"{new.version} {worker} {n}\n")
                break


def test_one_winner_per_version(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        cube_id = store.add(ALICE, "first").id
    children = []
    for worker in range(WORKERS):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work(tmp_path, worker, cube_id)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * WORKERS
    won = [
        line.split(" ", 1)
        for w in range(WORKERS)
        for line in (tmp_path / f"won-{w}").read_text().splitlines()
    ]
    with open_store(tmp_path) as store:
        history = store.history(ALICE, cube_id)
        assert [e.version for e in history] == list(range(1, WORKERS * UPDATES + 2))
        assert {e.version: e.text for e in history[1:]} == {int(version): text for version, text in won}
        assert [e.at for e in history] == sorted({e.at for e in history})
        store.audit_verify()
