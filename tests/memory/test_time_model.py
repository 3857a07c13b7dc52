"""The store's past against a model that keeps a picture of every moment, by random walks.

MEMOS_ENGINE_TEST_STEPS=10000 walks that many steps in all (default: a few hundred).
"""

from __future__ import annotations

import copy
import os
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

from memos_engine.errors import LifecycleError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.cube import Fact, MemCube
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.lifecycle import CHANGEABLE, LIVE, MOVES, LifecycleState
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_rows import last_moment

S = LifecycleState
STEPS = int(os.environ.get("MEMOS_ENGINE_TEST_STEPS", "400"))
USERS = [Principal("t", "a"), Principal("t", "b")]
users = st.sampled_from(USERS)
texts = st.text(min_size=1, max_size=12).filter(lambda t: t.strip() and "\0" not in t)
BASE = datetime(2026, 1, 1, tzinfo=timezone.utc)
VERBS = {"archive": S.ARCHIVED, "restore": S.ACTIVATED, "freeze": S.FROZEN, "delete": S.EXPIRED}


@dataclass
class Version:
    text: str
    since: datetime | None = None  # of its fact, if it has one
    closed: datetime | None = None


@dataclass
class Memory:
    owner: Principal
    key: str | None
    state: LifecycleState
    version: int
    versions: dict[int, Version]
    thawed: LifecycleState = S.GENERATED
    uses: int = 0

    @property
    def now(self) -> Version:
        return self.versions[self.version]

    def shown(self) -> tuple[object, ...]:
        return (self.now.text, self.state, self.version, self.now.since, self.now.closed, self.uses)


@dataclass
class World:
    memories: dict[str, Memory] = field(default_factory=dict)

    def seen(self, user: Principal, states: object = LIVE) -> dict[str, tuple[object, ...]]:
        return {
            i: m.shown()
            for i, m in self.memories.items()
            if m.owner == user and m.state in states and m.state is not S.EXPIRED  # type: ignore[operator]
        }

    def settle(self, cube_id: str) -> None:
        """Of facts about the same thing, each ends where the next one begins; the rest stays."""
        new = self.memories[cube_id]
        start, end = new.now.since, new.now.closed
        later: list[datetime] = []
        for other_id, other in self.memories.items():
            if other_id == cube_id or other.owner != new.owner or other.key != new.key:
                continue
            that = other.now
            if other.state is S.EXPIRED or that.since is None or start is None:
                continue
            if that.closed is not None and that.closed <= max(that.since, min(start, that.since)):
                continue
            if that.since > start:
                if end is None or that.since < end:
                    later.append(that.since)
                continue
            within = end is not None and (that.closed is None or that.closed > end)
            if (that.closed is None or that.closed > start) and not within and other.state is not S.FROZEN:
                that.closed = start
        if later:
            new.now.closed = min(later)


def shown(cube: MemCube) -> tuple[object, ...]:
    fact = cube.fact
    since, until = (fact.valid_from, fact.valid_to) if fact else (None, None)
    return (cube.body, cube.state, cube.version, since, until, cube.uses)


class TimeMachine(RuleBasedStateMachine):
    cubes = Bundle("cubes")

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.clock = BASE
        self.world = World()
        self.past: list[tuple[str, World]] = []
        self.open()

    def tick(self) -> datetime:
        self.clock += timedelta(seconds=1)
        return self.clock

    def open(self) -> None:
        self.store = MemoryStore.open(self.root / "s", keyring=KeyRing(self.root / "k"), clock=self.tick)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.audit_verify()
            self.store.close()
            shutil.rmtree(self.root)

    def done(self) -> None:
        """Keep a picture of this moment."""
        with self.store._db.read() as conn:
            moment = last_moment(conn)
        assert moment is not None
        assert not self.past or moment >= self.past[-1][0]
        self.past.append((moment, copy.deepcopy(self.world)))
        for user in USERS:
            assert {c.id: shown(c) for c in self.store.list(user)} == self.world.seen(user)

    @rule(back=st.integers(1, 100_000))
    def the_clock_jumps(self, back: int) -> None:
        self.clock -= timedelta(seconds=back)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule(
        target=cubes,
        user=users,
        text=texts,
        key=st.sampled_from([None, "x", "y"]),
        days=st.none() | st.integers(-3, 3),
    )
    def add(self, user: Principal, text: str, key: str | None, days: int | None) -> str:
        since = None if days is None else BASE + timedelta(days=days)
        fact = None if key is None else Fact("it", key, since)
        cube = self.store.add(user, text, vector=[len(text), 1.0], model_id="m", fact=fact)
        begins = None if key is None else since or cube.created_at
        self.world.memories[cube.id] = Memory(user, key, S.GENERATED, 1, {1: Version(text, begins)})
        if key is not None:
            self.world.settle(cube.id)
        self.done()
        return cube.id

    def allowed(self, user: Principal, cube: str, states: object, call: object) -> Memory | None:
        memory = self.world.memories.get(cube)
        if memory is None or memory.owner != user or memory.state is S.EXPIRED:
            with pytest.raises(MemoryNotFoundError):
                call()  # type: ignore[operator]
        elif memory.state not in states:  # type: ignore[operator]
            with pytest.raises(LifecycleError):
                call()  # type: ignore[operator]
        else:
            call()  # type: ignore[operator]
            return memory
        return None

    @rule(user=users, cube=cubes, text=texts)
    def update(self, user: Principal, cube: str, text: str) -> None:
        memory = self.allowed(user, cube, CHANGEABLE, lambda: self.store.update(user, cube, text))
        if memory:
            fresh = Version(text, memory.now.since, memory.now.closed)
            memory.version = max(memory.versions) + 1
            memory.versions[memory.version] = fresh
            memory.state = S.MERGED
            if memory.key is not None:
                self.world.settle(cube)
            self.done()

    @rule(user=users, cube=cubes, verb=st.sampled_from(sorted(VERBS)))
    def move(self, user: Principal, cube: str, verb: str) -> None:
        legal = {state for state in S if VERBS[verb] in MOVES[state]}
        legal = {S.ARCHIVED} if verb == "restore" else legal
        memory = self.allowed(user, cube, legal, lambda: getattr(self.store, verb)(user, cube))
        if memory:
            memory.thawed, memory.state = memory.state, VERBS[verb]
            self.done()

    @rule(user=users, cube=cubes)
    def unfreeze(self, user: Principal, cube: str) -> None:
        memory = self.allowed(user, cube, {S.FROZEN}, lambda: self.store.unfreeze(user, cube))
        if memory:
            memory.state = memory.thawed
            self.done()

    @rule(user=users, cube=cubes)
    def use(self, user: Principal, cube: str) -> None:
        memory = self.world.memories.get(cube)
        counted = self.store.record_use(user, [cube])
        assert counted == (memory is not None and memory.owner == user and memory.state is not S.EXPIRED)
        if counted and memory is not None:
            memory.uses += 1
            memory.state = S.ACTIVATED if memory.state is S.GENERATED else memory.state
            self.done()

    @rule(user=users, cube=cubes)
    def erase(self, user: Principal, cube: str) -> None:
        memory = self.world.memories.get(cube)
        if memory is None or memory.owner != user:
            with pytest.raises(MemoryNotFoundError):
                self.store.erase(user, cube)
            return
        self.store.erase(user, cube)
        for _, world in self.past:
            world.memories.pop(cube, None)
        del self.world.memories[cube]
        self.done()

    @rule(user=users, cube=cubes, back=st.integers(1, 5))
    def rollback(self, user: Principal, cube: str, back: int) -> None:
        memory = self.world.memories.get(cube)
        version = 1 if memory is None else memory.version - back
        if memory is not None and memory.owner == user and version not in memory.versions:
            if memory.state in {*CHANGEABLE, S.ARCHIVED}:
                with pytest.raises(MemoryInputError):
                    self.store.rollback(user, cube, version)
            return
        legal = {*CHANGEABLE, S.ARCHIVED}
        if self.allowed(user, cube, legal, lambda: self.store.rollback(user, cube, version)):
            assert memory is not None
            memory.versions[max(memory.versions) + 1] = copy.copy(memory.versions[version])
            memory.version, memory.state = max(memory.versions), S.ACTIVATED
            if memory.key is not None:
                self.world.settle(cube)
            self.done()

    @rule(user=users, data=st.data())
    def rollback_to(self, user: Principal, data: st.DataObject) -> None:
        if not self.past:
            return
        moment, then = data.draw(st.sampled_from(self.past))
        self.store.rollback_to(user, moment)
        for cube_id, memory in self.world.memories.items():
            old = then.memories.get(cube_id)
            if memory.owner != user:
                continue
            if old is None:
                if memory.state in LIVE:
                    memory.state = S.ARCHIVED
            elif old.state is S.EXPIRED:
                memory.state = S.EXPIRED
            else:
                if memory.version != old.version:
                    memory.version = max(memory.versions) + 1
                memory.versions[memory.version] = copy.copy(old.now)
                memory.state, memory.thawed = old.state, old.thawed
        self.done()
        visible = {i: row[0] for i, row in self.world.seen(user).items()}
        assert visible == {i: row[0] for i, row in then.seen(user).items()}

    @invariant()
    def every_picture_can_be_seen_again(self) -> None:
        if not hasattr(self, "past"):
            return
        for moment, world in self.past[:: max(1, len(self.past) // 4)]:
            for user in USERS:
                for states in (LIVE, set(S)):
                    found = self.store.list(user, states=states, as_of=moment)
                    assert {c.id: shown(c) for c in found} == world.seen(user, states)
                ids, matrix = self.store.vectors(user, "m", as_of=moment)
                assert np.isfinite(matrix).all()
                assert set(ids) <= set(world.seen(user))


TestTimeMachine = TimeMachine.TestCase
TestTimeMachine.settings = settings(
    max_examples=max(1, STEPS // 40),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
