"""Pages of spliced rows alone are shared, and nobody can tell by the answers."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import replace

import pytest
import torch

from memos_engine.config import Recompute, SamplingParams
from memos_engine.decoder.averaging import encode_averaged
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, Splice, TextSpan
from memos_engine.decoder.sharing import outside, spliced_pages

PAGE = 16
LEFT = 7


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(heads=6, kv_heads=2, seed=3)


@pytest.fixture
def engine(model, make_engine):
    return make_engine(model, dtype="float32")


@pytest.fixture
def records(engine, random_ids):
    texts = [random_ids(n, n) for n in (40, 25, 33)]
    made = encode_averaged(engine, random_ids(5, 1), texts, [random_ids(n, 50 + n) for n in (11, 25)])
    pairs = zip(made, texts, strict=True)
    return [KVRecord(a.k, a.v, ids, "", "", a.sigma_v, a.rank) for a, ids in pairs]


def spans(random_ids, records, seed=0, left=LEFT):
    return [TextSpan(random_ids(left, seed)), *map(KVSpan, records), TextSpan(random_ids(6, 90 + seed))]


def started(engine, prompt, share=0.0, by="attention", **more):
    """A request that waits for its first token."""
    request = engine.add_request(prompt, sampled=False, recompute=Recompute(share, by), **more)
    while request.logits is None:
        assert request.error is None, request.error
        engine.step()
    return request


def pages(engine, request):
    blocks = torch.tensor(request.blocks)
    return engine.runner.cache.k[:, blocks].clone(), engine.runner.cache.v[:, blocks].clone()


# -- keys ------------------------------------------------------------------------------------------


def test_only_full_pages_of_rows_alone_have_keys(random_ids, records):
    prompt = spans(random_ids, records[:2])  # text 0-6, rows 7-46 and 47-71, text 72-77
    keys = spliced_pages(prompt, 0, PAGE)
    assert sorted(keys) == [1, 2, 3]
    assert sorted(spliced_pages(prompt, 2, PAGE)) == [2, 3]
    assert spliced_pages(spans(random_ids, records[:2], seed=5), 0, PAGE) == keys  # whoever stands left
    assert sorted(spliced_pages(spans(random_ids, []), 0, PAGE)) == []


def test_a_key_tells_record_row_and_position(random_ids, records):
    one = spliced_pages(spans(random_ids, records[:1]), 0, PAGE)
    for other in (
        spans(random_ids, records[:1], left=LEFT + PAGE),  # the same row on another page
        spans(random_ids, records[:1], left=LEFT + 1),
        spans(random_ids, [replace(records[0])]),  # equal tensors, another object
    ):
        assert not set(one.values()) & set(spliced_pages(other, 0, PAGE).values())


def test_each_record_object_has_its_own_serial(records):
    made = [*records, replace(records[0]), pickle.loads(pickle.dumps(records[0])), copy.deepcopy(records[0])]
    assert len({record.serial for record in made}) == len(made)


def test_what_is_left_to_splice(records):
    part = Splice(records[0], 7)
    assert [(p.start, p.skip, p.count) for p in outside({1}, [part], PAGE)] == [(7, 0, 9), (32, 25, 15)]
    assert [(p.start, p.skip, p.count) for p in outside({0, 2}, [part], PAGE)] == [(16, 9, 16)]
    assert outside({0, 1, 2}, [part], PAGE) == []
    whole = outside((), [Splice(records[0], 20, 13)], PAGE)
    assert [(p.start, p.skip, p.count) for p in whole] == [(20, 13, 27)]


# -- sharing ---------------------------------------------------------------------------------------


def test_requests_side_by_side_share_and_splice_the_rest(engine, random_ids, records):
    one = started(engine, spans(random_ids, records))
    two = started(engine, spans(random_ids, [records[0], records[2]], seed=1))
    assert one.stats.shared_tokens == 0
    assert one.blocks[1:2] == two.blocks[1:2]
    assert not set(one.blocks[2:]) & set(two.blocks[2:])  # behind the first record, others follow
    assert two.stats.shared_tokens == PAGE
    assert two.stats.spliced_tokens == 40 + 33 - PAGE
    engine.check_integrity()
    engine.abort(one)
    three = started(engine, spans(random_ids, records, seed=2))  # nobody holds most of them any more
    assert three.stats.shared_tokens == (98 + LEFT) // PAGE * PAGE - PAGE
    alone = engine.runner.cache
    for request in (two, three):
        engine.forget_prefixes()
        again = started(engine, request.spans)
        assert again.stats.shared_tokens == 0
        assert torch.equal(again.logits, request.logits)
        for mine, fresh in zip(pages(engine, request), pages(engine, again), strict=True):
            assert torch.equal(mine[:, :-1], fresh[:, :-1])
        engine.abort(again)
    assert engine.runner.cache is alone


def test_only_who_holds_the_record_shares(engine, random_ids, records):
    engine.abort(started(engine, spans(random_ids, records)))
    named_alike = [replace(record) for record in records]
    other = started(engine, spans(random_ids, named_alike))
    assert other.stats.shared_tokens == 0
    engine.abort(other)
    assert started(engine, spans(random_ids, records)).stats.shared_tokens > 0


def test_it_can_be_turned_off(model, make_engine, random_ids, records):
    engine = make_engine(model, dtype="float32", share_spliced=False)
    engine.abort(started(engine, spans(random_ids, records)))
    assert started(engine, spans(random_ids, records)).stats.shared_tokens == 0


def test_exact_pages_stay_in_the_prefix_chain(engine, random_ids, records):
    """A record in its own place is found by its tokens, and what follows it by its rows."""
    anchor, text = random_ids(5, 1), random_ids(40, 2)
    k, v = engine.encode_span(anchor, text)
    first = KVSpan(KVRecord(k, v, text, "", ids_digest(anchor)))
    prompt = [TextSpan(anchor), first, KVSpan(records[0]), TextSpan(random_ids(4))]
    engine.abort(started(engine, prompt))
    plain = started(engine, [TextSpan((*anchor, *text, *random_ids(9, 4)))])
    assert plain.stats.prefix_tokens == 45 // PAGE * PAGE
    again = started(engine, prompt)
    assert (again.stats.prefix_tokens, again.stats.shared_tokens) == (2 * PAGE, 3 * PAGE)


def test_what_failed_or_was_forgotten_is_not_shared(engine, random_ids, records, monkeypatch):
    splice = engine.runner.splice
    monkeypatch.setattr(engine.runner, "splice", lambda seq, parts: splice(seq, parts) or 1 / 0)
    broken = engine.add_request(spans(random_ids, records))
    engine.step()
    assert broken.finish_reason == "error"
    monkeypatch.undo()
    engine.check_integrity()
    one = started(engine, spans(random_ids, records))
    assert one.stats.shared_tokens == 0
    engine.forget_prefixes()
    two = started(engine, spans(random_ids, records))  # though `one` still holds its pages
    assert two.stats.shared_tokens == 0
    engine.use_weights(engine.runner.model.weights)
    assert started(engine, spans(random_ids, records)).stats.shared_tokens == 0


# -- copy-on-write -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "by"), [(0.3, "attention"), (0.04, "rank")])
def test_computing_again_changes_nobody_elses_pages(engine, random_ids, records, share, by):
    one = started(engine, spans(random_ids, records))
    before = pages(engine, one)
    two = started(engine, spans(random_ids, records, seed=1), share, by)
    assert two.selected
    assert two.stats.shared_tokens > 0
    written = {p // PAGE for p in two.selected}
    assert not {one.blocks[n] for n in written} & set(two.blocks)
    for old, new in zip(before, pages(engine, one), strict=True):
        assert torch.equal(old, new)
    engine.abort(two)
    three = started(engine, spans(random_ids, records))  # and what the index still holds is as spliced
    assert three.stats.shared_tokens > 0
    assert torch.equal(three.logits, one.logits)


def test_without_a_free_page_a_request_alone_writes_in_place(model, make_engine, random_ids, records):
    prompt = spans(random_ids, records)
    roomy, tight = make_engine(model, dtype="float32"), make_engine(model, dtype="float32", pool_tokens=112)
    want, got = started(roomy, prompt, 0.3), started(tight, prompt, 0.3)
    assert tight.pool.available == 0
    assert got.stats.preemptions == 0
    assert got.selected == want.selected
    assert torch.equal(got.logits, want.logits)
    tight.abort(got)
    assert started(tight, prompt).stats.shared_tokens < 5 * PAGE  # what it wrote to has left the index


def test_without_a_free_page_a_request_beside_others_is_replayed(model, make_engine, random_ids, records):
    prompt, other = spans(random_ids, records), spans(random_ids, records, seed=1)
    roomy = make_engine(model, dtype="float32")
    want = started(roomy, prompt, 0.3)
    tight = make_engine(model, dtype="float32", pool_tokens=160)
    held = started(tight, other)
    while tight.pool.available > 3:  # its own first and last page, and one for the other's next token
        tight.pool.allocate(1)
    late = tight.add_request(prompt, sampled=False, recompute=Recompute(0.3))
    tight.step()
    assert late.stats.preemptions == 1
    assert late.selected == want.selected
    tight.abort(held)
    while late.logits is None:
        tight.step()
    assert torch.allclose(late.logits, want.logits, atol=1e-5)


def test_a_session_keeps_its_copies(engine, random_ids, records):
    """Turns behind shared and recomputed pages, and a session that lost its pages, tell the same."""

    def dialogue(fresh, lose):
        session = engine.open_session()
        out = []
        for turn, share in enumerate((0.3, 0.0, 0.3)):
            if fresh:
                engine.pool.forget()
                session.epoch = engine.pool.epoch  # its own pages stay
            if lose:
                engine.batcher.give_session_away()
            added = records[:2] if turn == 0 else records[2:] if turn == 2 else []
            request = engine.add_request(
                spans(random_ids, added, turn),
                SamplingParams(max_new_tokens=5),
                session=session,
                recompute=Recompute(share),
            )
            while request.finish_reason is None:
                engine.step()
            engine.check_integrity()
            out.append((request.output, request.selected))
        engine.close_session(session)
        return out

    first = dialogue(fresh=True, lose=False)
    assert dialogue(fresh=False, lose=False) == first
    assert dialogue(fresh=False, lose=True) == first


# -- on and off alike --------------------------------------------------------------------------------


class Script:
    """The same random traffic for every engine: what it said in every step."""

    def __init__(self, engine, random_ids, records, seed, longest=8, talk=True):
        self.draw, self.engine, self.records, self.ids = random.Random(seed), engine, records, random_ids
        self.longest = longest
        self.logits: list[torch.Tensor] = []
        run = engine.runner.run
        engine.runner.run = lambda batch: self.logits.append(run(batch)) or self.logits[-1]
        self.requests, self.sessions = [], [engine.open_session() for _ in range(2)] if talk else []

    def play(self, steps=40):
        draw = self.draw
        for _ in range(steps):
            what = draw.random()
            if what < 0.45:
                self.add()
            elif what < 0.5 and self.requests:
                self.engine.abort(draw.choice(self.requests))
            elif what < 0.53:
                self.engine.forget_prefixes()
            self.engine.step()
            self.engine.check_integrity()
        while any(request.finish_reason is None for request in self.requests):
            self.engine.step()
        return [request.output for request in self.requests]

    def add(self):
        draw = self.draw
        order = draw.choice([[0, 1], [0, 2, 1], [0], [2]])
        prompt = spans(self.ids, [self.records[i] for i in order], draw.randrange(4), draw.choice([7, 16]))
        wish = draw.choice([Recompute(), Recompute(0.05, "rank"), Recompute(0.3), Recompute(1.0)])
        session = draw.choice([None, None, *self.sessions])
        if session is not None and (session.request is not None or session.tokens > 120):
            session = None
        params = SamplingParams(max_new_tokens=draw.randint(1, self.longest))
        self.requests.append(self.engine.add_request(prompt, params, session=session, recompute=wish))

    @property
    def shared(self):
        return sum(request.stats.shared_tokens for request in self.requests)


@pytest.mark.parametrize("seed", range(4))
def test_answers_and_logits_are_the_same_bits(model, make_engine, random_ids, records, seed):
    fields = {"dtype": "float32", "prefill_chunk": 64, "prefill_beside": 20, "pool_tokens": 16384}
    on, off = (
        Script(make_engine(model, share_spliced=share, **fields), random_ids, records, seed)
        for share in (True, False)
    )
    assert on.play() == off.play()
    assert on.shared > 0 == off.shared
    for mine, other in zip(on.logits, off.logits, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("seed", range(4))
def test_too_few_pages_change_no_answer(model, make_engine, random_ids, records, seed):
    fields = {"dtype": "float32", "prefill_chunk": 64, "prefill_beside": 20}
    tight = Script(
        make_engine(model, pool_tokens=320, **fields), random_ids, records, seed, longest=120, talk=False
    )
    roomy = make_engine(model, pool_tokens=16384, share_spliced=False, **fields)
    off = Script(roomy, random_ids, records, seed, longest=120, talk=False)
    tight.play(), off.play()
    for mine, other in zip(tight.requests, off.requests, strict=True):
        if "abort" not in (mine.finish_reason, other.finish_reason):  # cut off at another token
            assert mine.error is None
            assert mine.output == other.output
    assert sum(r.stats.preemptions for r in tight.requests) > 0
