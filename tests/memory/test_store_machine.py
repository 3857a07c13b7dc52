"""The store against a model made of dictionaries, across reopening, by random walks."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from memos_engine.errors import LifecycleError, MemoryNotFoundError
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState
from memos_engine.memory.store import MemoryStore

S = LifecycleState
USERS = [Principal("t", "a"), Principal("t", "b"), Principal("u", "a")]
users = st.sampled_from(USERS)
texts = st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and "\0" not in t)


@dataclass
class Expected:
    owner: Principal
    text: str | None
    state: LifecycleState
    events: list[str]
    uses: int = 0
    erased: bool = False
    kv: dict[str, bytes] = field(default_factory=dict)


class StoreMachine(RuleBasedStateMachine):
    cubes = Bundle("cubes")

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.now = datetime(2026, 1, 1, tzinfo=timezone.utc)
        self.model: dict[str, Expected] = {}
        self.open()

    def tick(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    def open(self) -> None:
        self.store = MemoryStore.open(self.root / "s", keyring=KeyRing(self.root / "k"), clock=self.tick)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.audit_verify() > 0
            self.store.close()
            shutil.rmtree(self.root)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule(target=cubes, user=users, text=texts)
    def add(self, user: Principal, text: str) -> str:
        cube = self.store.add(user, text, vector=[1.0, 2.0], model_id="m")
        assert cube.id not in self.model
        self.model[cube.id] = Expected(user, text, S.GENERATED, ["added"])
        return cube.id

    def attempt(self, verb: str, user: Principal, cube: str, legal: set[LifecycleState]) -> Expected | None:
        """Run a verb that must fail in the right way unless the model allows it."""
        expected = self.model[cube]
        call = getattr(self.store, verb)
        if expected.owner != user or (expected.state is S.EXPIRED and verb != "erase") or expected.erased:
            with pytest.raises(MemoryNotFoundError):
                call(user, cube)
        elif expected.state not in legal:
            with pytest.raises(LifecycleError):
                call(user, cube)
        else:
            call(user, cube)
            return expected
        return None

    @rule(user=users, cube=cubes)
    def archive(self, user: Principal, cube: str) -> None:
        done = self.attempt("archive", user, cube, {S.GENERATED, S.ACTIVATED})
        if done:
            done.state = S.ARCHIVED
            done.events.append("archived")

    @rule(user=users, cube=cubes)
    def restore(self, user: Principal, cube: str) -> None:
        done = self.attempt("restore", user, cube, {S.ARCHIVED})
        if done:
            done.state = S.ACTIVATED
            done.events.append("restored")

    @rule(user=users, cube=cubes)
    def delete(self, user: Principal, cube: str) -> None:
        done = self.attempt("delete", user, cube, set(S))
        if done:
            done.state = S.EXPIRED
            done.events.append("deleted")
            done.kv.clear()

    @rule(user=users, cube=cubes)
    def erase(self, user: Principal, cube: str) -> None:
        done = self.attempt("erase", user, cube, set(S))
        if done:
            done.state, done.text, done.erased = S.EXPIRED, None, True
            done.events.append("erased")
            done.kv.clear()

    @rule(user=users, some=st.lists(cubes, max_size=4))
    def use(self, user: Principal, some: list[str]) -> None:
        counted = self.store.record_use(user, some)
        fit = [c for c in some if self.model[c].owner == user and self.model[c].state is not S.EXPIRED]
        assert counted == len(fit)
        for cube in fit:
            expected = self.model[cube]
            expected.uses += 1
            if expected.state is S.GENERATED:
                expected.state = S.ACTIVATED
                expected.events.append("activated")

    @rule(user=users, cube=cubes, identity=st.sampled_from(["i", "j"]), blob=st.sampled_from([b"x", b"y"]))
    def put_kv(self, user: Principal, cube: str, identity: str, blob: bytes) -> None:
        expected = self.model[cube]
        if expected.owner != user or expected.state is S.EXPIRED:
            with pytest.raises(MemoryNotFoundError):
                self.store.put_kv(user, cube, 1, identity, blob, 1)
            return
        self.store.put_kv(user, cube, 1, identity, blob, 1)
        expected.kv[identity] = blob

    @rule(identity=st.sampled_from(["i", "j"]))
    def drop_kv(self, identity: str) -> None:
        held = sum(identity in expected.kv for expected in self.model.values())
        assert self.store.drop_kv(identity, "test") == held
        for expected in self.model.values():
            expected.kv.pop(identity, None)

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        for user in USERS:
            mine = {i: e for i, e in self.model.items() if e.owner == user}
            for states in (LIVE, {S.ARCHIVED}, set(S)):
                listed = self.store.list(user, states=states)
                expected = {i for i, e in mine.items() if e.state in states and e.state is not S.EXPIRED}
                assert {c.id for c in listed} == expected
                assert [c.id for c in listed] == sorted(c.id for c in listed)
                for cube in listed:
                    seen = mine[cube.id]
                    assert (cube.body, cube.state, cube.uses) == (seen.text, seen.state, seen.uses)
            ids, matrix = self.store.vectors(user, "m")
            assert set(ids) == {i for i, e in mine.items() if e.state in LIVE}
            assert np.isfinite(matrix).all()
            for cube_id, expected in mine.items():
                entries = self.store.history(user, cube_id)
                assert [e.event for e in entries] == expected.events
                assert entries[-1].state is expected.state
                assert {e.text for e in entries} == {expected.text}
                for identity in ("i", "j"):
                    ref = self.store.find_kv(user, cube_id, identity)
                    assert (ref is not None) == (identity in expected.kv)
                    if ref is not None:
                        assert bytes(self.store.vault.read(ref)) == expected.kv[identity]


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
