"""Access control against a model that looks at every rule one by one, in random worlds.

MEMOS_ENGINE_TEST_TRIPLES=100000 asks that many questions (default: some thousands). A question is a caller,
a memory and an action, in a world of random visibilities, grants, denials and expiries.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest

from memos_engine.errors import AccessError, MemoryNotFoundError, MemosEngineError
from memos_engine.memory.cube import VISIBILITIES, MemCube
from memos_engine.memory.governance import Grant, Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_view import visible

TRIPLES = int(os.environ.get("MEMOS_ENGINE_TEST_TRIPLES", "2500"))
USERS = [Principal(tenant, user) for tenant in ("t", "u") for user in ("a", "b", "c")]
ACTIONS = ("read", "write", "share")
VOCABULARY = ("river", "boat", "mill", "bridge", "garden", "harbour", "island", "lantern")
SESSIONS = (None, "one", "two")
S = LifecycleState


@dataclass
class World:
    """What the rules say, the slow way."""

    cubes: dict[str, MemCube] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    grants: dict[int, Grant] = field(default_factory=dict)

    def applies(self, grant: Grant, who: Principal, cube: MemCube, now: datetime) -> bool:
        return (
            grant.owner == cube.owner
            and grant.cube_id in (None, cube.id)
            and (grant.grantee is None or grant.grantee == who)
            and grant.revoked_at is None
            and (grant.expires_at is None or grant.expires_at > now)
        )

    def may(self, who: Principal, cube: MemCube, action: str, now: datetime) -> bool:
        if who == cube.owner:
            return True
        if who.tenant != cube.owner.tenant or cube.id in self.deleted:
            return False
        effects = {
            (grant.effect, grant.action)
            for grant in self.grants.values()
            if self.applies(grant, who, cube, now)
        }
        visibility = self.visibility[cube.id]
        if ("deny", "read") in effects or ("deny", action) in effects:
            return False
        if action == "read":
            return visibility != "private" or any(effect == "allow" for effect, _ in effects)
        return ("allow", action) in effects or (action == "write" and visibility == "shared")


def error_of(verb: Callable[[str], object], cube_id: str) -> tuple[type, str]:
    try:
        verb(cube_id)
    except MemosEngineError as error:
        return type(error), str(error).replace(cube_id, "ID")
    return type(None), ""


class Walk:
    """A random world in a store, changed step by step."""

    def __init__(self, store: MemoryStore, clock: Any, seed: int) -> None:
        self.store, self.clock, self.world = store, clock, World()
        self.random = random.Random(seed)

    def add(self) -> None:
        owner, visibility = self.random.choice(USERS), self.random.choice(VISIBILITIES)
        text = " ".join(self.random.sample(VOCABULARY, 3))
        cube = self.store.add(
            owner,
            text,
            vector=[1.0, 2.0],
            model_id="m",
            visibility=visibility,
            session=self.random.choice(SESSIONS),
        )
        self.store.put_kv(owner, cube.id, 1, "i", cube.id.encode(), 1)
        self.world.cubes[cube.id] = cube
        self.world.visibility[cube.id] = visibility

    def grant(self) -> None:
        giver, to = self.random.choice(USERS), self.random.choice([None, *USERS])
        cube = self.random.choice([None, *self.world.cubes.values()])
        effect = "deny" if self.random.random() < 0.3 else "allow"
        action = self.random.choice(ACTIONS)
        expires = self.clock.now + timedelta(hours=1) if self.random.random() < 0.3 else None
        allowed = to is None or to.tenant == giver.tenant
        if cube is not None and cube.owner != giver:
            both = all(self.world.may(giver, cube, one, self.clock.now) for one in ("share", action))
            allowed = allowed and both and effect == "allow"
        if cube is not None and cube.id in self.world.deleted:
            allowed = False
        try:
            made = self.store.grant(
                giver,
                action,
                cube_id=cube.id if cube else None,
                to=to,
                effect=effect,
                expires_at=expires,
            )
        except MemosEngineError:
            assert not allowed
        else:
            assert allowed
            self.world.grants[made.id] = made

    def revoke(self) -> None:
        if not self.world.grants:
            return
        number = self.random.choice(sorted(self.world.grants))
        grant = self.world.grants[number]
        stranger = next(user for user in USERS if user.tenant != grant.owner.tenant)
        with pytest.raises(MemoryNotFoundError):
            self.store.revoke(stranger, number)
        self.store.revoke(grant.owner, number)
        del self.world.grants[number]

    def settings(self) -> None:
        if not self.world.cubes:
            return
        cube = self.random.choice(list(self.world.cubes.values()))
        who, visibility = self.random.choice(USERS), self.random.choice(VISIBILITIES)
        gone = cube.id in self.world.deleted
        needed = ("share", "write") if visibility == "shared" else ("share",)
        if all(self.world.may(who, cube, one, self.clock.now) for one in needed) and not gone:
            self.store.govern(who, cube.id, visibility=visibility)
            self.world.visibility[cube.id] = visibility
        else:
            with pytest.raises((AccessError, MemoryNotFoundError)):
                self.store.govern(who, cube.id, visibility=visibility)

    def delete(self) -> None:
        if not self.world.cubes or self.random.random() < 0.7:
            return
        cube = self.random.choice(list(self.world.cubes.values()))
        if cube.id not in self.world.deleted:
            self.store.delete(cube.owner, cube.id)
            self.world.deleted.add(cube.id)

    def wait(self) -> None:
        self.clock.jump(minutes=self.random.choice([1, 40]))

    def step(self) -> None:
        self.random.choice(
            [self.add, self.grant, self.grant, self.revoke, self.settings, self.delete, self.wait]
        )()

    def check(self) -> int:
        """Ask every question about this world; returns how many those were."""
        asked, now = 0, self.store._now()
        moment = self.clock.now
        missing = "00000000-0000-7000-8000-000000000000"
        for who in USERS:
            reads = {c.id for c in self.world.cubes.values() if self.world.may(who, c, "read", moment)}
            alive = reads - self.world.deleted
            assert {c.id for c in self.store.list(who, states=set(S))} == alive
            assert {c.id for c in self.store.list(who, as_of=moment)} == alive
            assert set(self.store.get_many(who, self.world.cubes)) == alive
            assert set(self.store.vectors(who, "m")[0]) == alive
            assert {c.id for c in self.store.without_vector(who, "other", 999)} == alive
            for cube in self.world.cubes.values():
                for action in ACTIONS:
                    where, params = visible(who, now, action=action)
                    with self.store._db.read() as conn:
                        row = conn.execute(
                            f"SELECT 1 FROM cube c WHERE {where} AND c.id = :id", {**params, "id": cube.id}
                        ).fetchone()
                    may = self.world.may(who, cube, action, moment) and cube.id not in self.world.deleted
                    assert (row is not None) == may, (who, cube.owner, action)
                    asked += 1
                assert (self.store.find_kv(who, cube.id, "i") is not None) == (cube.id in alive)
                if cube.id in reads:
                    continue
                verbs: list[Callable[[str], object]] = [
                    lambda i, who=who: self.store.get(who, i),  # type: ignore[misc]
                    lambda i, who=who: self.store.get(who, i, as_of=moment),  # type: ignore[misc]
                    lambda i, who=who: self.store.history(who, i),  # type: ignore[misc]
                    lambda i, who=who: self.store.lineage(who, i),  # type: ignore[misc]
                    lambda i, who=who: self.store.update(who, i, "x"),  # type: ignore[misc]
                    lambda i, who=who: self.store.erase(who, i),  # type: ignore[misc]
                    lambda i, who=who: self.store.grant(who, "read", cube_id=i),  # type: ignore[misc]
                ]
                for verb in verbs if asked % 5 == 0 else verbs[:2]:
                    # Not to be seen is just like not to be there, down to the words of the error.
                    assert error_of(verb, cube.id) == error_of(verb, missing)
        return asked


def test_nobody_sees_more_or_less_than_the_rules_say(
    tmp_path: Any, reopen: Callable[..., MemoryStore], clock: Any
) -> None:
    asked = seed = 0
    store = reopen()
    while asked < TRIPLES:
        walk = Walk(store, clock, seed)
        for user in USERS:  # a new world: what was there before is gone
            for cube in store.list(user, own=True, states=set(S)):
                store.delete(user, cube.id)
            for grant in store.grants(user):
                if grant.owner == user:
                    store.revoke(user, grant.id)
        for _ in range(25):
            walk.step()
        asked += walk.check()
        seed += 1
    store.audit_verify()
