"""What time does to memories, under a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from memos_engine.errors import MemoryInputError, MemoryNotFoundError
from memos_engine.memory import store_sweep
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.janitor import Janitor, SweepPolicy
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore, NewMemory

Add = Callable[..., MemCube]
S = LifecycleState
NOTHING = store_sweep.Swept(0, 0, 0, 0, 0)


def test_the_time_to_live_becomes_an_event(
    store: MemoryStore, alice: Principal, bob: Principal, add: Add, clock: Any
) -> None:
    soon = clock.now + timedelta(hours=1)
    a, b = add(store, alice, "a", ttl_at=soon), add(store, bob, "b", ttl_at=soon)
    stays = add(store, alice, "stays")
    ref = store.put_kv(alice, a.id, 1, "i", b"record", 1)
    store.archive(bob, b.id)
    assert store.sweep() == NOTHING
    clock.jump(hours=2)
    assert store.sweep().expired == 2
    assert store.sweep() == NOTHING
    assert not store.vault.holds(ref)
    assert store.history(alice, a.id)[-1].event == "expired"
    assert store.history(bob, b.id)[-1].state is S.EXPIRED
    with pytest.raises(MemoryNotFoundError):
        store.get(alice, a.id)
    assert store.list(alice) == [stays]
    store.audit_verify()


def test_fading(store: MemoryStore, alice: Principal, add: Add, clock: Any) -> None:
    used = add(store, alice, "used", half_life_s=3600)
    unused = add(store, alice, "unused", half_life_s=3600)
    strong = add(store, alice, "no half-life")
    frozen = add(store, alice, "frozen", half_life_s=1)
    store.freeze(alice, frozen.id)
    clock.jump(hours=3)
    store.record_use(alice, [used.id])
    clock.jump(hours=2)
    now = clock.now
    assert store.get(alice, used.id).strength(now) == pytest.approx(0.25, rel=1e-3)
    assert store.get(alice, unused.id).strength(now) == pytest.approx(1 / 32, rel=1e-3)
    assert strong.strength(now) == 1
    assert unused.strength(unused.created_at - timedelta(days=1)) == 1
    assert store.sweep(SweepPolicy(halvings=4)).faded == 1
    assert store.get(alice, unused.id).state is S.ARCHIVED
    assert store.history(alice, unused.id)[-1].event == "faded"
    assert {c.id for c in store.list(alice)} == {used.id, strong.id, frozen.id}
    assert store.restore(alice, unused.id).state is S.ACTIVATED


def test_idle_ones_are_put_away_and_at_last_forgotten(
    store: MemoryStore, alice: Principal, add: Add, clock: Any
) -> None:
    idle = add(store, alice, "idle")
    frozen = add(store, alice, "frozen")
    store.freeze(alice, frozen.id)
    clock.jump(days=20)
    fresh = add(store, alice, "fresh")
    clock.jump(days=20)
    policy = SweepPolicy(idle_s=30 * 86400, forget_s=365 * 86400)
    assert store.sweep(policy).idle == 1
    assert {c.id for c in store.list(alice)} == {frozen.id, fresh.id}
    clock.jump(days=300)
    assert store.sweep(policy).idle == 1
    clock.jump(days=100)
    assert store.sweep(policy).forgotten == 1
    assert store.history(alice, idle.id)[-1].event == "forgotten"
    assert store.get(alice, fresh.id).state is S.ARCHIVED
    assert store.sweep(SweepPolicy(idle_s=1e10, forget_s=1e10)) == NOTHING


def test_kv_of_old_versions_goes_after_a_while(
    store: MemoryStore, alice: Principal, add: Add, clock: Any
) -> None:
    cube = add(store, alice, "a")
    ref = store.put_kv(alice, cube.id, 1, "i", b"record", 1)
    store.update(alice, cube.id, "b")
    kept = store.put_kv(alice, cube.id, 2, "j", b"another record", 1)
    assert store.sweep().kv_records == 0
    clock.jump(days=8)
    assert store.sweep().kv_records == 1
    assert not store.vault.holds(ref)
    assert store.vault.holds(kept)


def test_many_in_small_transactions(
    store: MemoryStore, alice: Principal, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_sweep, "BATCH", 3)
    soon = clock.now + timedelta(hours=1)
    store.add_many(alice, [NewMemory(str(n), ttl_at=soon) for n in range(10)])
    clock.jump(hours=2)
    assert store.sweep().expired == 10


def test_the_thread_sweeps_and_stops(store: MemoryStore, alice: Principal, add: Add, clock: Any) -> None:
    add(store, alice, "a", ttl_at=clock.now + timedelta(seconds=1))
    clock.jump(hours=1)
    with Janitor(store, every_s=0.01) as janitor:
        janitor.start()
        deadline = time.monotonic() + 30
        while janitor.sweeps < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert janitor.sweeps >= 2
    assert store.stats()["cubes_by_state"] == {"expired": 1}
    done = janitor.sweeps
    time.sleep(0.05)
    assert janitor.sweeps == done
    store.close()
    with janitor:
        while janitor.last_error is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "closed" in str(janitor.last_error)


@pytest.mark.parametrize("bad", [{"idle_s": -1}, {"halvings": float("nan")}, {"old_kv_s": 1e11}])
def test_bad_policies_are_refused(bad: dict[str, float], store: MemoryStore) -> None:
    with pytest.raises(MemoryInputError):
        SweepPolicy(**bad)
    with pytest.raises(MemoryInputError):
        Janitor(store, every_s=0)
