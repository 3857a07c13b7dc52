"""Continuous batching: whatever runs beside a request, its tokens are those it has alone."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memos_engine.config import SamplingParams
from memos_engine.decoder.aio import AsyncDecoder
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan
from memos_engine.errors import MemoryInputError


def params(count):
    return SamplingParams(max_new_tokens=count)


def run_all(engine, requests):
    for _ in range(10_000):
        if all(r.finish_reason for r in requests):
            engine.check_integrity()
            return [r.output for r in requests]
        engine.step()
    raise AssertionError("the requests do not end")


def alone(model, make_engine, prompts, count):
    engine = make_engine(model, dtype="float32")
    out = []
    for ids in prompts:
        engine.forget_prefixes()
        out += run_all(engine, [engine.add_request([TextSpan(ids)], params(count))])
    return out


def record(engine, left, span):
    k, v = engine.encode_span(left, span)
    return KVRecord(k, v, tuple(span), "test", ids_digest(left))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
def test_a_batch_gives_what_each_request_gives_alone(tiny_llama, make_engine, random_ids, chunk):
    model = tiny_llama(heads=6, kv_heads=2, seed=3)
    prompts = [random_ids(n, seed=n) for n in (1, 16, 17, 40, 95, 33)]
    engine = make_engine(model, dtype="float32", prefill_chunk=chunk, prefill_beside=max(1, chunk // 2))
    requests = [engine.add_request([TextSpan(ids)], params(20)) for ids in prompts]
    assert run_all(engine, requests) == alone(model, make_engine, prompts, 20)


@pytest.mark.parametrize("pool", [96, 112, 160, 320])
def test_too_few_pages_preempt_and_replay(tiny_llama, make_engine, random_ids, pool):
    model = tiny_llama(seed=5)
    prompts = [random_ids(n, seed=n) for n in (30, 20, 45, 8)]
    engine = make_engine(model, dtype="float32", pool_tokens=pool)
    requests = [engine.add_request([TextSpan(ids)], params(40)) for ids in prompts]
    assert run_all(engine, requests) == alone(model, make_engine, prompts, 40)
    assert (sum(r.stats.preemptions for r in requests) > 0) == (pool < 320)
    assert engine.pool.available == engine.pool.num_blocks - 1


def test_a_preempted_request_replays_its_splices(tiny_llama, make_engine, random_ids):
    model = tiny_llama(seed=2)
    roomy = make_engine(model, dtype="float32")
    a, m1, m2, q = random_ids(9, 1), random_ids(20, 2), random_ids(15, 3), random_ids(6, 4)
    spans = [TextSpan(a), KVSpan(record(roomy, a, m2)), KVSpan(record(roomy, a, m1)), TextSpan(q)]
    expected = run_all(roomy, [roomy.add_request(spans, params(30))])
    tight = make_engine(model, dtype="float32", pool_tokens=112)
    other = tight.add_request([TextSpan(random_ids(20, 9))], params(60))
    spliced = tight.add_request(spans, params(30))
    run_all(tight, [other, spliced])
    assert spliced.stats.preemptions > 0
    assert [spliced.output] == expected


def test_a_long_prompt_does_not_hold_up_those_that_decode(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32", prefill_beside=16)
    first = engine.add_request([TextSpan(random_ids(5))], params(100))
    engine.step()
    long = engine.add_request([TextSpan(random_ids(200, 2))], params(4))
    short = engine.add_request([TextSpan(random_ids(6, 3))], params(4))
    before = len(first.output)
    for step in range(1, 6):
        engine.step()
        assert len(first.output) == before + step  # a token in every step
    assert short.finish_reason == "length"
    assert not long.output
    assert len(long.pending) < 200  # and the oldest prompt moves on
    run_all(engine, [first, long])


def test_more_requests_than_a_batch_holds_take_turns(tiny_llama, make_engine, random_ids):
    model = tiny_llama()
    prompts = [random_ids(10 + n, seed=n) for n in range(7)]
    engine = make_engine(model, dtype="float32", max_batch=3)
    requests = [engine.add_request([TextSpan(ids)], params(6)) for ids in prompts]
    engine.step()
    assert len(engine.batcher.running) == 3
    assert run_all(engine, requests) == alone(model, make_engine, prompts, 6)


# -- tokens chosen by the caller -----------------------------------------------------------------


@pytest.mark.parametrize(("pool", "batch"), [(1024, 32), (1024, 2), (80, 32)])
def test_callers_choose_tokens_in_lockstep(tiny_llama, make_engine, random_ids, pool, batch):
    """Also where neither the batch nor the pool takes all of them at once."""
    model = tiny_llama(seed=7)
    prompts = [random_ids(n, seed=n) for n in (12, 18, 5)]
    engine = make_engine(model, dtype="float32", pool_tokens=pool, max_batch=batch)
    requests = [engine.add_request([TextSpan(ids)], sampled=False) for ids in prompts]
    for _ in range(25):
        for _ in range(100):
            if all(r.logits is not None for r in requests):
                break
            engine.step()
        for r in requests:
            engine.feed(r, int(r.logits.argmax()))
    for r in requests:
        engine.finish(r)
    engine.check_integrity()
    assert [r.output for r in requests] == alone(model, make_engine, prompts, 25)


def test_feeding_what_does_not_wait_is_refused(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    seq = engine.add_request([TextSpan(random_ids(5))], sampled=False)
    with pytest.raises(MemoryInputError, match="does not wait"):
        engine.feed(seq, 5)
    engine.step()
    assert engine.idle
    with pytest.raises(MemoryInputError, match="vocabulary"):
        engine.feed(seq, 211)
    engine.finish(seq)
    with pytest.raises(MemoryInputError, match="does not wait"):
        engine.feed(seq, 5)
    engine.check_integrity()


def test_a_listener_that_raises_ends_its_own_request(tiny_llama, make_engine, random_ids):
    def bad(_):
        raise ValueError("no")

    engine = make_engine(tiny_llama(), dtype="float32")
    first = engine.add_request([TextSpan(random_ids(5))], params(4), on_output=bad)
    second = engine.add_request([TextSpan(random_ids(7))], params(4))
    run_all(engine, [first, second])
    assert isinstance(first.error, ValueError)
    assert len(second.output) == 4


def test_a_grown_pool_keeps_what_it_held(tiny_llama, make_engine, random_ids):
    model = tiny_llama(seed=3)
    engine = make_engine(model, dtype="float32", pool_tokens=64)
    seq = engine.add_request([TextSpan(random_ids(40, 1))], params(20))
    for _ in range(4):
        engine.step()
    engine.grow(320)
    assert engine.pool_tokens == 320
    other = engine.add_request([TextSpan(random_ids(150, 2))], params(20))
    expected = alone(model, make_engine, [random_ids(40, 1), random_ids(150, 2)], 20)
    assert run_all(engine, [seq, other]) == expected


# -- sessions ------------------------------------------------------------------------------------


def turns(engine, session, spans_of_turns, count=8):
    """Every turn's tokens; without a session each turn computes the whole conversation anew."""
    out, spans = [], []
    for turn in spans_of_turns:
        if session is None:
            engine.forget_prefixes()
        request = engine.add_request(turn if session else [*spans, *turn], params(count), session=session)
        run_all(engine, [request])
        spans += [*turn, TextSpan(tuple(request.output))]
        out.append(request)
    return out


@pytest.mark.parametrize("pressure", [False, True])
def test_a_session_goes_on_from_its_own_pages(tiny_llama, make_engine, random_ids, pressure):
    model = tiny_llama(seed=6)
    engine = make_engine(model, dtype="float32", pool_tokens=256)
    a = random_ids(12, 1)
    r1, r2 = (record(engine, a, random_ids(20, n)) for n in (2, 3))
    talk = [
        [TextSpan(a), KVSpan(r2), KVSpan(r1), TextSpan(random_ids(7, 4))],
        [KVSpan(r1), TextSpan(random_ids(9, 5))],
        [TextSpan(random_ids(1, 6))],
    ]
    expected = [r.output for r in turns(engine, None, talk)]
    session = engine.open_session()
    done = []
    for turn in talk:
        done += turns(engine, session, [turn])
        if pressure:  # another request takes all pages: the next turn replays the plan
            run_all(engine, [engine.add_request([TextSpan(random_ids(240, 9))], params(2))])
            assert not session.blocks
    assert [r.output for r in done] == expected
    reused = [r.stats.prefix_tokens for r in done[1:]]
    assert (min(reused) > 50) is not pressure
    engine.close_session(session)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.num_blocks - 1
    with pytest.raises(MemoryInputError, match="closed"):
        engine.add_request(talk[2], session=session)


def test_an_aborted_turn_leaves_the_session_where_it_was(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(seed=6), dtype="float32")
    first, second = [TextSpan(random_ids(30, 1))], [TextSpan(random_ids(10, 2))]
    expected = [r.output for r in turns(engine, None, [first, second])]
    session = engine.open_session()
    turns(engine, session, [first])
    broken = engine.add_request([TextSpan(random_ids(25, 3))], params(9), session=session)
    with pytest.raises(MemoryInputError, match="busy"):
        engine.add_request(second, session=session)
    engine.step()
    engine.step()
    engine.abort(broken)
    engine.check_integrity()
    (again,) = turns(engine, session, [second])
    assert again.output == expected[1]
    assert again.stats.prefix_tokens > 30
    engine.forget_prefixes()  # the weights changed, say: its pages must not be used
    (third,) = turns(engine, session, [second])
    assert third.stats.prefix_tokens == 0


# -- asyncio -------------------------------------------------------------------------------------


def test_coroutines_share_the_steps(tiny_llama, make_engine, random_ids):
    model = tiny_llama(seed=4)
    engine = make_engine(model, dtype="float32")
    prompts = [random_ids(n, seed=n) for n in (5, 40, 17)]

    async def one(decoder, ids):
        return [out.token async for out in decoder.generate([TextSpan(ids)], params(12))]

    async def cut(decoder):
        async for out in decoder.generate([TextSpan(random_ids(9))], params(300)):
            if len(out.sequence.output) > 3:
                break

    async def cancelled(decoder):
        await one(decoder, random_ids(50))

    async def main():
        async with AsyncDecoder(engine) as decoder:
            task = asyncio.create_task(cancelled(decoder))
            results = await asyncio.gather(*(one(decoder, ids) for ids in prompts), cut(decoder))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(MemoryInputError, match="vocabulary"):
                await one(decoder, (999,))
            return results[:3]

    assert asyncio.run(main()) == alone(model, make_engine, prompts, 12)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.num_blocks - 1


def test_an_error_reaches_its_coroutine(tiny_llama, make_engine, random_ids, monkeypatch):
    engine = make_engine(tiny_llama(), dtype="float32")
    monkeypatch.setattr(engine.runner, "run", lambda batch: 1 / 0)

    async def main():
        async with AsyncDecoder(engine) as decoder:
            async for _ in decoder.generate([TextSpan(random_ids(9))]):
                pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    engine.check_integrity()


# -- anything in any order -----------------------------------------------------------------------

_FIXTURES: dict = {}


@pytest.fixture(autouse=True, scope="module")
def _for_the_machine(tiny_llama):
    _FIXTURES["model"] = tiny_llama(seed=8)


class Traffic(RuleBasedStateMachine):
    """Requests come, are fed, cut off and forgotten on a pool that is always too small."""

    @initialize()
    def start(self):
        from memos_engine.config import DecoderConfig
        from memos_engine.decoder.engine import DecoderEngine
        from memos_engine.decoder.spec import ModelSpec
        from memos_engine.decoder.weights import Weights

        model = _FIXTURES["model"]
        spec = ModelSpec.from_config(model.config, type(model).__name__)
        config = DecoderConfig(
            dtype="float32", page=4, pool_tokens=72, prefill_chunk=16, prefill_beside=5, max_batch=3
        )
        self.engine = DecoderEngine(spec, Weights.from_model(model, spec), config)
        self.truth = DecoderEngine(spec, Weights.from_model(model, spec), DecoderConfig(dtype="float32"))
        self.live, self.ended = [], []
        self.session, self.talk = self.engine.open_session(), []

    def ids(self, seed, count):
        return tuple(5 + (seed * 31 + i * i * 7 + i) % 200 for i in range(count))

    @rule(seed=st.integers(0, 2), count=st.integers(1, 40), new=st.integers(1, 20), own=st.booleans())
    def add(self, seed, count, new, own):
        self.live.append(
            self.engine.add_request([TextSpan(self.ids(seed, count))], params(new), sampled=not own)
        )

    @precondition(lambda self: self.session.request is None and self.session.tokens < 40)
    @rule(seed=st.integers(3, 4), count=st.integers(1, 12))
    def talk_on(self, seed, count):
        span = [TextSpan(self.ids(seed, count))]
        self.live.append(self.engine.add_request(span, params(3), session=self.session))

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.engine.step()
        for seq in [s for s in self.live if s.finish_reason]:
            self.live.remove(seq)
            self.ended.append(seq)

    @rule()
    def feed(self):
        for seq in [s for s in self.live if s.logits is not None]:
            if len(seq.output) + 1 >= seq.params.max_new_tokens or len(seq.tokens) > 60:
                self.engine.finish(seq)
            else:
                self.engine.feed(seq, int(seq.logits.argmax()))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def abort(self, which):
        self.engine.abort(self.live.pop(which % len(self.live)))

    @rule()
    def forget(self):
        self.engine.forget_prefixes()

    @invariant()
    def sound(self):
        self.engine.check_integrity()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(500):
            self.step(1)
            self.feed()
            if not self.live:
                break
        assert not self.live
        for seq in self.ended:
            assert seq.error is None
            prompt = tuple(seq.tokens[: seq.prompt_len])
            if seq.output:
                (expected,) = run_all(
                    self.truth, [self.truth.add_request([TextSpan(prompt)], params(len(seq.output)))]
                )
                assert seq.output == expected
        self.engine.close_session(self.session)
        self.engine.check_integrity()
        assert self.engine.pool.available == self.engine.pool.num_blocks - 1


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
