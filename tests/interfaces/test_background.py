"""Transformations by themselves: what is looked at, what it is worth; and requests take joined records."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine, SamplingParams
from memos_engine.background import LOOK_S, Background, in_order, saved_by
from memos_engine.combined import build_combined, load_combined
from memos_engine.config import ConfigError
from memos_engine.decoder.sequence import KVSpan
from memos_engine.errors import MemosEngineError, StoreError
from memos_engine.memory.embed import HashingEmbedder
from memos_engine.memory.scheduler import MemScheduler
from memos_engine.memory.store_kv import COMBINED
from tests.memory.test_costs import TABLE

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = SamplingParams(max_new_tokens=6, stop_token_ids=(0,))
FACTS = ["My dog is called Biscuit.", "My sister lives in Lisbon.", "I play the cello on Mondays."]
QUESTION = "What is my dog called?"
DEAR = replace(TABLE, forward=((1, 10.0), (1024, 10_000.0)))  # so that short memories are worth storing


@pytest.fixture
def started(tiny_folder, tmp_path):
    """started(**MemoryConfig fields) -> (engine, alice with her facts)."""
    engines = []

    def start(**memory):
        config = MemoryConfig(**{"min_score": -1.0, "distraction": 0.0, "contexts": "neutral", **memory})
        engine = MemoryEngine.open(
            tiny_folder, tmp_path / "store", decoder=DecoderConfig(dtype="float32"), memory=config,
            embedder=HashingEmbedder(64),
        )  # fmt: skip
        engines.append(engine)
        engine.preparer.use(MemScheduler(DEAR, distraction=0.0))
        alice = engine.user("alice")
        for fact in FACTS:
            alice.remember(fact)
        return engine, alice

    yield start
    for engine in engines:
        engine.close()
        engine.decoder.check_integrity()


def stored(engine, user, cube):
    return engine.activation.find(user.principal, cube, engine.layout.memory(cube.body))


def joined(engine, alice, reply, count):
    """Has the first memories of a reply made into one record; returns them."""
    order = [segment.cube_id for segment in reply.plan.segments[:count]]
    cubes = [engine.store.get(alice.principal, one) for one in order]
    assert build_combined(engine.activation, alice.principal, cubes).startswith("one record")
    return cubes


def spans_of(engine, alice, **how):
    """The stored spans of a prompt, without the anchor."""
    from memos_engine.preparing import Ask

    prepared = engine.prepare(
        alice.principal, QUESTION, engine.layout.anchor, engine.layout.query(QUESTION), Ask(**how)
    )
    return prepared, [s for s in prepared.spans if isinstance(s, KVSpan) and s.memory]


# -- what a record saves -------------------------------------------------------------------------


def test_a_record_saves_the_forward_less_splice_and_less_fetch_from_disk():
    saved = saved_by(TABLE, {}, 30, 200, 4 << 20)
    assert 0 < saved["disk"] < saved["host"]
    assert saved["host"] - saved["disk"] == pytest.approx(TABLE.fetch[0] + 4 * TABLE.fetch[1])
    assert saved_by(TABLE, {}, 30, 400, 4 << 20)["host"] > saved["host"]
    slow = saved_by(TABLE, {"fetch": 2.0}, 30, 200, 4 << 20)
    assert slow["disk"] < saved["disk"]
    dear = replace(TABLE, splice=(1e6, 0.0, 0.0))
    assert saved_by(dear, {}, 30, 200, 0)["host"] < 0  # splicing that costs more than it saves says so


def test_memories_stand_as_they_mostly_stood():
    assert in_order(["a", "b", "c"], {("c", "a"): 2, ("a", "b"): 3, ("c", "b"): 1}) == ("c", "a", "b")
    assert in_order(["b", "a"], {}) == ("a", "b")


# -- by hand -------------------------------------------------------------------------------------


def test_what_is_used_gets_its_kv_and_what_is_used_together_becomes_one_record(started):
    engine, alice = started(build=False, max_memories=2)
    for _ in range(5):
        reply = alice.chat(QUESTION, SHORT)
    assert set(reply.forms.values()) == {"text"}
    used = [engine.store.get(alice.principal, one) for one in reply.forms]
    jobs = alice.transform()
    assert {job.state for job in jobs} == {"done"}
    assert {job.kind for job in jobs} == {"encode", "combine"}
    assert all(stored(engine, alice, cube).whole for cube in used)
    assert load_combined(engine.activation, alice.principal, used) is not None  # in the order of the plans
    assert "combine" not in {job.kind for job in alice.transform()}  # once
    reply = alice.chat(QUESTION, SHORT)
    assert all("one record with" in segment.reason for segment in reply.plan.segments)


def test_without_a_store_or_with_splicing_off_it_says_so(started, tiny_folder):
    engine, alice = started()
    engine.activation.turn("drift")
    with pytest.raises(MemosEngineError, match="drift"):
        alice.transform()
    with MemoryEngine.open(tiny_folder, embedder=HashingEmbedder(64)) as bare, pytest.raises(StoreError):
        bare.user("alice").transform()


def test_kv_that_was_just_made_is_not_dropped_for_want_of_use(started):
    engine, alice = started()
    alice.warm()
    assert {job.kind for job in alice.transform()} <= {"promote", "demote"}
    assert all(stored(engine, alice, cube).whole for cube in alice.memories())


def test_uses_together_fade_are_bounded_and_forgotten(started, monkeypatch):
    from memos_engine import background as module

    engine, alice = started()
    reply = alice.chat(QUESTION, SHORT)
    now = [0.0]
    background = Background(engine.activation, engine._costs, clock=lambda: now[0])
    background.used(alice.principal, reply.plan)
    first, second, *_ = (segment.cube_id for segment in reply.plan.segments)
    assert background.together(alice.principal)[first, second] == 1.0
    assert (second, first) not in background.together(alice.principal)
    now[0] = module.HALF_LIFE_S
    assert background.together(alice.principal)[first, first] == pytest.approx(0.5)
    monkeypatch.setattr(module, "PAIRS", 4)
    background.used(alice.principal, reply.plan)
    assert len(background.together(alice.principal)) < 6
    background.forget(alice.principal)
    assert background.together(alice.principal) == {}
    alice.delete(first)
    assert engine.background.together(alice.principal) == {}


def test_owners_are_looked_at_after_requests_and_not_too_often(started):
    engine, alice = started(build=False)
    reply = alice.chat(QUESTION, SHORT)
    now, looks = [0.0], []
    background = Background(engine.activation, engine._costs, clock=lambda: now[0])
    look = background.look
    background.look = lambda who: looks.append(who) or look(who)
    background.look_around()
    assert not looks  # nobody asked anything
    background.used(alice.principal, reply.plan)
    for moment, expected in [(1.0, 1), (2.0, 1), (LOOK_S, 1)]:
        now[0] = moment
        background.look_around()
        assert len(looks) == expected
    background.used(alice.principal, reply.plan)
    background.look_around()
    assert len(looks) == 1
    now[0] = 1.0 + LOOK_S
    background.look_around()
    assert len(looks) == 2


# -- by itself -----------------------------------------------------------------------------------


def test_it_begins_after_the_first_reply_and_ends_with_the_engine(started):
    engine, alice = started(background=True, build=False)
    transformer = engine.background.transformer
    transformer.every_s = 0.01
    assert transformer._thread is None
    reply = alice.chat(QUESTION, SHORT)
    thread = transformer._thread
    assert thread is not None
    used = [engine.store.get(alice.principal, one) for one in reply.forms]
    for _ in range(1000):
        if all(stored(engine, alice, cube).whole for cube in used):
            break
        time.sleep(0.02)
    jobs = [(job.kind, job.state, job.reason) for job in engine.store.jobs(alice.principal)]
    assert all(stored(engine, alice, cube).whole for cube in used), jobs
    assert set(alice.chat(QUESTION, SHORT).forms.values()) == {"kv"}
    engine.close()
    assert not thread.is_alive()


def test_off_by_default_and_never_for_a_live_model(started, load, tokenizer, tmp_path):
    engine, alice = started()
    alice.chat(QUESTION, SHORT)
    assert engine.background.transformer._thread is None
    config = MemoryConfig(min_score=-1.0, distraction=0.0, background=True)
    with MemoryEngine.from_model(
        load(), tokenizer, tmp_path / "live", memory=config, embedder=HashingEmbedder(64)
    ) as live:
        bob = live.user("bob")
        bob.remember(FACTS[0])
        bob.chat(QUESTION, SHORT)
        assert live.background.transformer._thread is None
        assert all(job.state == "done" for job in bob.transform())
    with pytest.raises(ConfigError, match="background"):
        MemoryConfig(background="yes")


# -- requests take what was joined ---------------------------------------------------------------


def test_one_record_at_the_head_answers_as_full_prefill_does(started):
    engine, alice = started(recompute=0.0)
    alice.warm()
    reply = alice.chat(QUESTION, SHORT)
    full = alice.chat(QUESTION, SHORT, form="text")
    cubes = joined(engine, alice, reply, 3)
    prepared, spans = spans_of(engine, alice)
    assert len(spans) == 1
    assert spans[0].token_ids == tuple(t for cube in cubes for t in engine.layout.memory(cube.body))
    assert [s.cube_id for s in prepared.plan.segments] == [cube.id for cube in cubes]
    assert all("one record with" in s.reason for s in prepared.plan.segments)
    text = spans_of(engine, alice, form="text")[0].spans
    assert [t for s in prepared.spans for t in s.token_ids] == [t for s in text for t in s.token_ids]
    engine.decoder.forget_prefixes()
    again = alice.chat(QUESTION, SHORT)
    assert again.token_ids == full.token_ids
    assert list(again.forms) == [cube.id for cube in cubes]
    assert alice.chat(QUESTION, SHORT, recompute=0.3).token_ids == full.token_ids


def test_two_of_three_are_joined_and_the_third_stays_its_own(started):
    engine, alice = started(recompute=0.0)
    alice.warm()
    reply = alice.chat(QUESTION, SHORT)
    cubes = joined(engine, alice, reply, 2)
    prepared, spans = spans_of(engine, alice)
    assert len(spans) == 2
    assert ["one record" in s.reason for s in prepared.plan.segments] == [True, True, False]
    assert len(spans[0].token_ids) == sum(len(engine.layout.memory(cube.body)) for cube in cubes)


def test_any_doubt_means_the_parts(started):
    engine, alice = started(recompute=0.0)
    alice.warm()
    reply = alice.chat(QUESTION, SHORT)
    cubes = joined(engine, alice, reply, 2)
    # Elsewhere than right behind the anchor, it would be no better than its parts.
    head = engine.layout.anchor + engine.layout.history([("Hello.", "Hello!")])
    prepared = engine.prepare(alice.principal, QUESTION, head, engine.layout.query(QUESTION))
    assert len([s for s in prepared.spans if isinstance(s, KVSpan) and s.memory]) == 3
    # Under a budget nothing is read for it.
    engine.activation.evict()
    assert len(spans_of(engine, alice, budget_ms=60_000.0, recompute=0.0, form="kv")[1]) == 3
    assert len(spans_of(engine, alice)[1]) == 2
    # A file that was altered.
    engine.activation.evict()
    read = engine.store.vault.read

    def altered(blob):
        data = bytearray(read(blob))
        data[len(data) // 2] ^= 1
        return data

    engine.store.vault.read = altered
    assert load_combined(engine.activation, alice.principal, cubes) is None
    engine.store.vault.read = read
    assert len(spans_of(engine, alice)[1]) == 3
    # Another text of a part.
    joined(engine, alice, reply, 2)
    engine.store.update(alice.principal, cubes[1].id, "My brother lives in Porto.")
    _, spans = spans_of(engine, alice)
    assert all(len(span.token_ids) <= max(len(engine.layout.memory(f)) for f in FACTS) for span in spans)


def test_who_does_not_see_a_part_gets_the_others_by_themselves(started):
    engine, alice = started(recompute=0.0)
    alice.warm()
    cubes = joined(engine, alice, alice.chat(QUESTION, SHORT), 2)
    bob = engine.user("bob")
    engine.store.grant(alice.principal, "read", cube_id=cubes[0].id, to=bob.principal)
    prepared, spans = spans_of(engine, bob)
    assert [s.cube_id for s in prepared.plan.segments] == [cubes[0].id]
    assert all(len(span.token_ids) == len(engine.layout.memory(cubes[0].body)) for span in spans)
    assert engine.store.combined_sizes(alice.principal, cubes[0].id) == {2}
    assert engine.store.combined_sizes(alice.principal, cubes[1].id) == set()
    assert engine.store.combined_sizes(engine.user("carol").principal, cubes[0].id) == set()
    assert not any(key.startswith(COMBINED) for key in engine.store.kv_identities(bob.principal, cubes[0].id))
    # A part that goes takes the record along.
    assert len(spans_of(engine, alice)[1]) == 2
    alice.erase(cubes[1].id)
    _, spans = spans_of(engine, alice)
    gone = engine.layout.memory(cubes[1].body)
    assert all(span.token_ids != gone and len(span.token_ids) < len(gone) * 2 for span in spans)
