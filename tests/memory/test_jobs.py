"""Jobs: queued once, leased, tried again, cancelled, each as a state machine; seen by their owners alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine.errors import ConflictError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_jobs import LIVE_STATES, STATES


@pytest.fixture
def cube(store, alice):
    return store.add(alice, "My dog is called Biscuit.")


def test_the_most_valuable_is_done_first_and_queueing_twice_is_once(store, alice, cube):
    other = store.add(alice, "My cat is called Tom.")
    low = store.queue_job(alice, "encode", [cube.id], value=1.0)
    high = store.queue_job(alice, "encode", [other.id], value=2.0)
    again = store.queue_job(alice, "encode", [cube.id], value=3.0)
    assert (again.id, again.value, len(store.jobs(alice))) == (low.id, 3.0, 2)
    first = store.claim_job("w", ["encode"])
    assert (first.id, first.state, first.attempts) == (low.id, "running", 1)
    assert store.claim_job("w", ["other"]) is None
    assert store.renew_job(first, 0.5) is False
    assert store.jobs(alice)[0].progress == 0.5
    assert store.finish_job(first).progress == 1.0
    assert store.claim_job("w", ["encode"]).id == high.id
    assert store.queue_job(alice, "encode", [cube.id]).id != low.id  # it has ended: it may come again
    with pytest.raises(ConflictError, match="any longer"):
        store.finish_job(first)


def test_failures_come_later_and_later_and_end(store, alice, cube, clock):
    store.queue_job(alice, "encode", [cube.id], most_attempts=3)
    for pause in (5, 10):
        store.fail_job(store.claim_job("w", ["encode"]), "no room")
        assert store.claim_job("w", ["encode"]) is None
        clock.jump(seconds=pause - 1)
        assert store.claim_job("w", ["encode"]) is None
        clock.jump(seconds=1.5)
    ended = store.fail_job(store.claim_job("w", ["encode"]), "no room")
    assert (ended.state, ended.reason, ended.attempts) == ("failed", "no room", 3)


def test_a_lost_worker_is_followed_by_another_one(reopen, alice, clock):
    store = reopen()
    cube = store.add(alice, "My dog is called Biscuit.")
    store.queue_job(alice, "encode", [cube.id], most_attempts=2)
    lost = store.claim_job("one", ["encode"], lease_s=60)
    store.close()  # and nobody said anything
    store = reopen()
    assert store.claim_job("two", ["encode"]) is None
    clock.jump(seconds=61)
    taken = store.claim_job("two", ["encode"], lease_s=60)
    assert (taken.id, taken.attempts) == (lost.id, 2)
    with pytest.raises(ConflictError):
        store.renew_job(lost, 0.9)
    clock.jump(seconds=61)
    assert store.claim_job("three", ["encode"]) is None
    assert store.jobs(alice)[0].reason == "its worker was lost 2 times"


def test_cancelling(store, alice, bob, cube):
    waiting = store.queue_job(alice, "encode", [cube.id])
    with pytest.raises(MemoryNotFoundError):
        store.cancel_job(bob, waiting.id)
    assert store.cancel_job(alice, waiting.id).state == "cancelled"
    assert store.cancel_job(alice, waiting.id).state == "cancelled"
    store.queue_job(alice, "encode", [cube.id])
    running = store.claim_job("w", ["encode"])
    assert store.cancel_job(alice, running.id).state == "running"
    assert store.renew_job(running, 0.1) is True
    assert store.stop_job(running).state == "cancelled"


def test_only_who_sees_every_memory_may_queue_and_only_owners_see_jobs(store, alice, bob, cube):
    hers, his = cube, store.add(bob, "My bike is red.")
    with pytest.raises(MemoryNotFoundError):
        store.queue_job(alice, "combine", [hers.id, his.id])
    store.grant(bob, "read", cube_id=his.id, to=alice)
    store.queue_job(alice, "combine", [hers.id, his.id])
    assert (len(store.jobs(alice)), store.jobs(bob), len(store.jobs())) == (1, [], 1)


def test_an_erasure_takes_jobs_along_even_those_that_run(store, alice, cube):
    store.queue_job(alice, "encode", [cube.id])
    running = store.claim_job("w", ["encode"])
    store.delete(alice, cube.id)
    store.erase(alice, cube.id)
    assert store.jobs() == []
    with pytest.raises(ConflictError, match="erased"):
        store.finish_job(running)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "two words!"},
        {"cube_ids": []},
        {"value": float("nan")},
        {"most_attempts": 0},
        {"detail": {1: {2}}},
    ],
)
def test_what_is_no_job_is_refused(store, alice, cube, wrong):
    call = {"kind": "encode", "cube_ids": [cube.id], **wrong}
    with pytest.raises(MemoryInputError):
        store.queue_job(alice, **call)
    assert store.jobs() == []


def act(store, step, held):
    """What a worker says of the job it holds."""
    if step == "renew":
        store.renew_job(held, 0.5)
    elif step == "finish":
        store.finish_job(held)
    elif step == "fail":
        store.fail_job(held, "why")
    elif step == "release":
        store.release_job(held, "why")


STEPS = st.sampled_from(["queue", "claim", "renew", "finish", "fail", "release", "cancel", "crash", "wait"])


@settings(max_examples=25)
@given(st.lists(STEPS, max_size=25))
def test_whatever_happens_a_job_has_one_worker_and_an_end(tmp_path_factory, steps):
    """A model beside the store: one job, of which at most one is under way, and old holders get nowhere."""
    from tests.memory.conftest import TickingClock

    place, clock, alice = tmp_path_factory.mktemp("jobs"), TickingClock(), Principal("acme", "alice")
    with MemoryStore.open(place / "store", keyring=KeyRing(place / "keys"), clock=clock) as store:
        cube = store.add(alice, "My dog is called Biscuit.")
        held, ended = None, 0
        for step in steps:
            if step == "queue":
                store.queue_job(alice, "encode", [cube.id])
            elif step == "claim":
                held = store.claim_job("w", ["encode"]) or held
            elif step == "cancel" and store.jobs(states=LIVE_STATES):
                store.cancel_job(alice, store.jobs(states=LIVE_STATES)[0].id)
            elif step == "wait":
                clock.jump(seconds=61)
            elif step == "crash":
                held = None
            elif held is not None:
                try:
                    act(store, step, held)
                except ConflictError:
                    running = store.jobs(states=["running"])
                    assert (held.id, held.attempts) not in {(job.id, job.attempts) for job in running}
            jobs = store.jobs()
            live = [job for job in jobs if job.state in LIVE_STATES]
            assert len(live) <= 1
            assert all(job.state in STATES and 0 <= job.attempts <= job.most_attempts for job in jobs)
            assert all((job.worker is not None) == (job.state == "running") for job in jobs)
            assert len(jobs) - len(live) >= ended  # what has ended stays ended
            ended = len(jobs) - len(live)
        store.audit_verify()
