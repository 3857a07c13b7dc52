"""The worker: whatever stops it, what it did stays right; nobody sees a combined record by a part of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine
from memos_engine.combined import build_combined, combined_identity, load_combined
from memos_engine.decoder.sequence import TextSpan
from memos_engine.errors import MemoryNotFoundError, StoreError
from memos_engine.memory.embed import HashingEmbedder
from memos_engine.memory.store_kv import COMBINED
from memos_engine.memory.transform import Action
from memos_engine.transforming import Transformer


@pytest.fixture
def engine(tiny_folder, tmp_path):
    with MemoryEngine.open(
        tiny_folder,
        tmp_path / "store",
        decoder=DecoderConfig(dtype="float32"),
        memory=MemoryConfig(min_score=-1.0, distraction=0.0, contexts="neutral"),
        embedder=HashingEmbedder(64),
    ) as opened:
        yield opened
        opened.decoder.check_integrity()


@pytest.fixture
def work(engine):
    return Transformer(engine.store, engine.activation, worker="w")


@pytest.fixture
def alice(engine):
    return engine.user("alice")


def stored(engine, user, cube):
    return engine.activation.find(user.principal, cube, engine.layout.memory(cube.body))


def test_text_to_kv_up_down_and_back_to_text(engine, work, alice):
    cube = alice.remember("My dog is called Biscuit.")
    who = alice.principal
    work.queue(who, [Action("encode", (cube.id,), 1.0, "")])
    assert work.run_once().state == "done"
    whole = stored(engine, alice, cube)
    assert whole.whole
    keys = [identity.digest() for identity, _ in whole.records.values()]
    work.queue(who, [Action("demote", (cube.id,), 1.0, "", {"to": "disk"})])
    assert work.run_once().state == "done"
    assert {engine.activation.tiers.holds(key) for key in keys} == {"disk"}
    work.queue(who, [Action("promote", (cube.id,), 1.0, "")])
    assert work.run_once().state == "done"
    assert {engine.activation.tiers.holds(key) for key in keys} == {"host"}
    work.queue(who, [Action("drop", (cube.id,), 1.0, "")])
    assert work.run_once().reason == f"dropped {len(keys)} records; the text stays"
    assert not stored(engine, alice, cube).records
    assert alice.memories()[0].body == "My dog is called Biscuit."
    assert work.run_once() is None


def test_a_request_goes_first(engine, work, alice):
    cubes = [alice.remember(f"Note number {i}.") for i in range(3)]
    work.queue(alice.principal, [Action("encode", tuple(c.id for c in cubes), 1.0, "")])
    request = engine.decoder.add_request([TextSpan(engine.layout.query("Hello"))])
    assert work.run_once() is None  # not even claimed
    engine.decoder.abort(request)
    build, requests = engine.activation.build, []

    def interrupted(principal, some):
        requests.append(engine.decoder.add_request([TextSpan(engine.layout.query("Hello"))]))
        return 1

    engine.activation.build = interrupted
    job = work.run_once()
    assert (job.state, job.reason, job.attempts, len(requests)) == ("waiting", "made way for a request", 0, 1)
    engine.decoder.abort(requests[0])
    engine.activation.build = build


def test_jobs_wait_for_a_handler_and_for_the_model_and_say_so(engine, work, alice):
    cube = alice.remember("Always answer in French.")
    work.queue(alice.principal, [Action("distil", (cube.id,), 2.0, "", {"gates": ["recall"]})])
    assert work.run_once() is None
    assert "nothing that does 'distil' is registered" in engine.store.jobs(alice.principal)[0].reason
    work.register("distil", lambda job, step: f"{job.detail['gates'][0]} passed")
    assert work.run_once().reason == "recall passed"
    work.queue(alice.principal, [Action("encode", (cube.id,), 1.0, "")])
    work.activation = None
    job = work.run_once()
    assert (job.state, job.reason, job.attempts) == ("waiting", "waits: the model was unloaded", 0)


def test_a_model_that_goes_in_the_middle(engine, work, alice):
    cubes = [alice.remember(f"Note number {i}.") for i in range(2)]
    work.queue(alice.principal, [Action("encode", tuple(c.id for c in cubes), 1.0, "")])
    build = engine.activation.build

    def last(principal, some):
        work.activation = None
        return build(principal, some)

    engine.activation.build = last
    assert "unloaded" in work.run_once().reason
    assert stored(engine, alice, cubes[0]).whole
    assert not stored(engine, alice, cubes[1]).records


@settings(max_examples=6)
@given(
    at=st.integers(0, 5),
    what=st.sampled_from([StoreError("the disk is full"), OSError("gone"), MemoryError()]),
)
def test_a_tier_that_dies_at_any_step(tiny_folder, tmp_path_factory, at, what):
    """Every write of a payload in turn: the job fails, is tried again, and ends as if nothing had been."""
    place = tmp_path_factory.mktemp("dies")
    config, embedder = MemoryConfig(contexts="neutral"), HashingEmbedder(64)
    with MemoryEngine.open(tiny_folder, place / "store", memory=config, embedder=embedder) as engine:
        alice = engine.user("alice")
        cubes = [alice.remember(f"Note number {i}.") for i in range(2)]
        names = tuple(cube.id for cube in cubes)
        work = Transformer(engine.store, engine.activation)
        work.queue(alice.principal, [Action("encode", names, 2.0, ""), Action("combine", names, 1.0, "")])
        write, count = engine.store.vault.write, [0]

        def dying(data):
            count[0] += 1
            if count[0] == at + 1:
                raise what
            return write(data)

        engine.store.vault.write = dying
        first = [work.run_once(), work.run_once()]
        failed = [job for job in first if job.state == "waiting"]
        assert len(failed) == (1 if at < 5 else 0)
        assert all(type(what).__name__ in job.reason for job in failed)
        engine.store.vault.write = write
        for job in failed:
            (live,) = engine.store.jobs(states=["waiting"])
            assert live.id == job.id
            handler = work._handlers[job.kind]
            handler(job, lambda progress: None)  # what the next attempt does
        assert all(stored(engine, alice, cube).whole for cube in cubes)
        assert load_combined(engine.activation, alice.principal, cubes) is not None
        assert engine.store.check().sound


def test_a_cancelled_job_stops_at_its_next_step(engine, work, alice):
    cubes = [alice.remember(f"Note number {i}.") for i in range(3)]
    (job,) = work.queue(alice.principal, [Action("encode", tuple(c.id for c in cubes), 1.0, "")])
    build = engine.activation.build

    def cancelling(principal, some):
        engine.store.cancel_job(principal, job.id)
        return build(principal, some)

    engine.activation.build = cancelling
    assert work.run_once().state == "cancelled"
    assert [bool(stored(engine, alice, cube).records) for cube in cubes] == [True, False, False]


def test_a_combined_record_is_seen_by_who_sees_every_part(engine, work, alice):
    store, model, bob = engine.store, engine.activation, engine.user("bob")
    one, two = alice.remember("My dog is called Biscuit."), alice.remember("Biscuit is three years old.")
    names, who = (one.id, two.id), alice.principal
    work.queue(who, [Action("combine", names, 1.0, "")])
    assert work.run_once().state == "done"
    record = load_combined(model, who, [one, two])
    assert record.token_ids == (*engine.layout.memory(one.body), *engine.layout.memory(two.body))
    key = combined_identity(model, who, [one, two])[0].digest()
    assert load_combined(model, who, [two, one]) is None  # another order is another record
    assert store.find_combined(who, [one.id], key) is None
    # Whoever knows the identity and sees one part, or sees the first part's records, gets nothing.
    store.grant(who, "read", cube_id=one.id, to=bob.principal)
    assert store.find_combined(bob.principal, names, key) is None
    assert store.find_kv(bob.principal, one.id, f"{COMBINED}{key}") is None
    assert store.kv_identities(bob.principal, one.id) == []
    second = store.grant(who, "read", cube_id=two.id, to=bob.principal)
    assert store.find_combined(bob.principal, names, key) is not None
    store.revoke(who, second.id)
    assert store.find_combined(bob.principal, names, key) is None
    with pytest.raises(MemoryNotFoundError):
        build_combined(model, bob.principal, [one, two])
    store.update(who, two.id, "Biscuit is four years old.")
    assert load_combined(model, who, [one, store.get(who, two.id)]) is None
    store.delete(who, two.id)
    assert store.find_combined(who, names, key) is None


def test_the_thread_works_and_stops(engine, alice):
    cube = alice.remember("My dog is called Biscuit.")
    with Transformer(engine.store, engine.activation, every_s=0.01) as work:
        work.queue(alice.principal, [Action("encode", (cube.id,), 1.0, "")])
        for _ in range(1000):
            if engine.store.jobs(states=["done"]):
                break
            work._stop.wait(0.02)
    assert stored(engine, alice, cube).whole


def test_a_look_encodes_what_is_used_and_drops_what_is_not(engine, work, alice):
    used, idle = alice.remember("My dog is called Biscuit."), alice.remember("Alice lives in Paris.")
    engine.activation.build(alice.principal, [idle])
    engine.store.record_use(alice.principal, [used.id] * 5)

    def saved(tokens, nbytes):
        return {"disk": 0.6 * tokens, "host": 0.7 * tokens}

    def look():
        jobs = work.look(alice.principal, saved, {"disk": 1e-11, "host": 1e-3})
        return {(job.kind, *job.cube_ids) for job in jobs}

    assert look() == {("encode", used.id), ("drop", idle.id)}
    assert look() == {("encode", used.id), ("drop", idle.id)}
    assert len(engine.store.jobs(states=["waiting"])) == 2  # queued once
    assert {work.run_once().kind for _ in range(2)} == {"encode", "drop"}
    assert look() == {("demote", used.id)}  # built, it lies in host memory, which is dear
    assert work.run_once().state == "done"
    assert look() == set()


def test_a_tier_that_stalls_past_the_lease_and_ends_after_all(engine, alice):
    """Another worker has taken the job meanwhile and done it: what the first one brings changes nothing."""
    cube = alice.remember("My dog is called Biscuit.")
    slow = Transformer(engine.store, engine.activation, worker="slow", lease_s=0.0)
    other = Transformer(engine.store, engine.activation, worker="other")
    slow.queue(alice.principal, [Action("encode", (cube.id,), 1.0, "")])
    write, taken = engine.store.vault.write, []

    def stalling(data):
        engine.store.vault.write = write
        taken.append(other.run_once())
        return write(data)

    engine.store.vault.write = stalling
    assert slow.run_once() is None
    assert [job.state for job in taken] == ["done"]
    assert [(job.state, job.attempts) for job in engine.store.jobs()] == [("done", 2)]
    assert stored(engine, alice, cube).whole
    assert engine.store.check().sound
