"""Computing spliced tokens again: which ones, in what order, and what that does to everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memos_engine.config import ConfigError, Recompute, SamplingParams
from memos_engine.decoder.averaging import encode_averaged
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.quantize import quantize_record
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan

ANCHOR, QUERY = 7, 9
SIZES = (20, 33, 12)


def params(count=12):
    return SamplingParams(max_new_tokens=count)


def finish(engine, *requests):
    for _ in range(10_000):
        if all(r.finish_reason for r in requests):
            engine.check_integrity()
            return [r.output for r in requests]
        engine.step()
    raise AssertionError("the requests do not end")


class Prompt:
    """anchor | memories | query over averaged records; the first memory's is exact."""

    def __init__(self, engine, random_ids, sizes=SIZES, seed=0):
        self.anchor, self.query = random_ids(ANCHOR, seed + 90), random_ids(QUERY, seed + 91)
        self.texts = [random_ids(n, seed + i) for i, n in enumerate(sizes)]
        left = [random_ids(n, 50 + n) for n in (11, 25, 40)]
        made = encode_averaged(engine, self.anchor, self.texts, left)
        pairs = zip(made, self.texts, strict=True)
        averaged = [KVRecord(a.k, a.v, ids, "", "", a.sigma_v, a.rank) for a, ids in pairs]
        k, v = engine.encode_span(self.anchor, self.texts[0])
        exact = KVRecord(k, v, self.texts[0], "", ids_digest(self.anchor))
        k, v = engine.encode_span((), self.anchor)
        self.head = KVSpan(KVRecord(k, v, self.anchor, "", ids_digest(())), memory=False)
        self.records = [exact, *averaged[1:]]

    @property
    def spans(self):
        return [self.head, *(KVSpan(r) for r in self.records), TextSpan(self.query)]

    @property
    def ids(self):
        return (*self.anchor, *(t for text in self.texts for t in text), *self.query)

    @property
    def candidates(self):
        first = ANCHOR + len(self.texts[0])
        return range(first, len(self.ids) - QUERY)

    def start(self, memory):
        return ANCHOR + sum(len(text) for text in self.texts[:memory])


@pytest.fixture
def engine(tiny_llama, make_engine):
    return make_engine(tiny_llama(heads=6, kv_heads=2, seed=3), dtype="float32")


@pytest.fixture
def prompt(engine, random_ids):
    return Prompt(engine, random_ids)


def first_logits(engine, spans, recompute=None):
    """Logits behind the prompt, and the request, which is given back."""
    request = engine.add_request(spans, sampled=False, recompute=recompute or Recompute())
    while request.logits is None:
        assert request.error is None, request.error
        engine.step()
    logits = request.logits
    engine.abort(request)
    engine.check_integrity()
    return logits, request


def test_all_of_it_is_full_prefill(engine, prompt):
    full, _ = first_logits(engine, [TextSpan(prompt.ids)])
    engine.forget_prefixes()
    whole, request = first_logits(engine, prompt.spans, Recompute(1.0))
    assert torch.equal(whole, full) or (whole - full).abs().max() < 1e-4
    assert request.fully_exact
    spliced, _ = first_logits(engine, prompt.spans)
    assert (spliced - full).abs().max() > 1e-2  # there was something to win


@pytest.mark.parametrize("by", ["attention", "rank"])
def test_every_approximate_token_again_is_full_prefill(engine, prompt, by):
    full, _ = first_logits(engine, [TextSpan(prompt.ids)])
    engine.forget_prefixes()
    refined, request = first_logits(engine, prompt.spans, Recompute(0.99, by))
    assert request.selected == tuple(prompt.candidates)
    assert (refined - full).abs().max() < 1e-4


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("by", ["attention", "rank"])
def test_the_share_is_met_to_the_token(engine, prompt, by, share):
    _, request = first_logits(engine, prompt.spans, Recompute(share, by))
    assert len(request.selected) == round(share * sum(SIZES))
    assert set(request.selected) <= set(prompt.candidates)
    assert list(request.selected) == sorted(set(request.selected))
    assert request.stats.recomputed_tokens == len(request.selected)
    passes = 2 if by == "attention" else 1
    assert request.stats.computed_tokens == len(request.selected) + passes * QUERY


def test_more_of_it_comes_nearer(engine, prompt):
    full, _ = first_logits(engine, [TextSpan(prompt.ids)])
    engine.forget_prefixes()
    distance = [
        float((first_logits(engine, prompt.spans, Recompute(r))[0] - full).square().sum())
        for r in (0.0, 0.3, 0.6, 0.99)
    ]
    assert distance[0] > distance[2] > distance[3]
    assert distance[3] < 1e-6


def test_what_may_vary_is_what_is_chosen(engine, prompt):
    """With sigma_v at a few tokens only, just they have a score."""
    marked = {1: (3, 4, 17), 2: (0, 11)}
    for memory, offsets in marked.items():
        sigma = torch.zeros_like(prompt.records[memory].sigma_v)
        sigma[:, list(offsets)] = 1.0
        prompt.records[memory] = replace(prompt.records[memory], sigma_v=sigma)
    wanted = sorted(prompt.start(m) + offset for m, offsets in marked.items() for offset in offsets)
    _, request = first_logits(engine, prompt.spans, Recompute(len(wanted) / sum(SIZES)))
    assert list(request.selected) == wanted


def test_ranks_choose_without_a_first_pass(engine, prompt):
    ranks = torch.arange(float(len(prompt.texts[1])))
    prompt.records[1] = replace(prompt.records[1], rank=ranks + 100)
    prompt.records[2] = replace(prompt.records[2], rank=torch.zeros(len(prompt.texts[2])))
    _, request = first_logits(engine, prompt.spans, Recompute(5 / sum(SIZES), "rank"))
    assert list(request.selected) == [prompt.start(1) + 33 - n for n in (5, 4, 3, 2, 1)]
    assert request.stats.probe_ms == 0.0


def test_records_without_statistics(engine, prompt):
    """Ranks fall back to the first tokens, the probe to attention alone."""
    prompt.records[1:] = [replace(r, rank=None, sigma_v=None) for r in prompt.records[1:]]
    _, request = first_logits(engine, prompt.spans, Recompute(4 / sum(SIZES), "rank"))
    assert set(request.selected) == {prompt.start(m) + i for m in (1, 2) for i in (0, 1)}
    _, request = first_logits(engine, prompt.spans, Recompute(0.25))
    assert len(request.selected) == round(0.25 * sum(SIZES))


def test_a_later_memory_never_changes_an_earlier_recomputed_key(engine, prompt, random_ids):
    """At a fixed selection: recomputed rows see no later row, whatever stands there."""
    prompt.records[1:] = [replace(r, rank=torch.arange(r.num_tokens, 0.0, -1.0)) for r in prompt.records[1:]]
    recompute = Recompute(12 / sum(SIZES), "rank")

    def keys():
        request = engine.add_request(prompt.spans, sampled=False, recompute=recompute)
        while request.logits is None:
            engine.step()
        where = [p for p in request.selected if p < prompt.start(2)]
        blocks = torch.tensor(request.blocks)
        found = engine.runner.cache.k[:, blocks].flatten(1, 2)[:, where].clone()
        engine.abort(request)
        return found, request.selected

    one, selected = keys()
    later = Prompt(engine, random_ids, seed=300)
    assert len(later.texts[2]) == SIZES[2]
    prompt.records[2] = replace(later.records[2], rank=prompt.records[2].rank)
    other, again = keys()
    assert selected == again
    assert one.shape[1] > 0
    assert torch.equal(one, other)


@pytest.mark.parametrize("chunk", [1, 5, 16, 1024])
def test_chunks_change_nothing(tiny_llama, make_engine, random_ids, engine, prompt, chunk):
    wanted = finish(engine, request := engine.add_request(prompt.spans, params(), recompute=Recompute(0.3)))
    other = make_engine(tiny_llama(heads=6, kv_heads=2, seed=3), dtype="float32", prefill_chunk=chunk)
    again = other.add_request(prompt.spans, params(), recompute=Recompute(0.3))
    assert finish(other, again) == wanted
    assert again.selected == request.selected


def test_a_batch_gives_what_each_request_gives_alone(engine, random_ids):
    sizes = [(9, 30), SIZES, (5, 6, 50)]
    prompts = [Prompt(engine, random_ids, each, seed=7 * i) for i, each in enumerate(sizes)]
    wishes = [Recompute(0.2), Recompute(0.4), Recompute(0.0)]
    alone = []
    for one, wish in zip(prompts, wishes, strict=True):
        request = engine.add_request(one.spans, params(), recompute=wish)
        alone.append((*finish(engine, request), request.selected))
    plain = engine.add_request([TextSpan(prompts[0].ids)], params())
    pairs = zip(prompts, wishes, strict=True)
    together = [engine.add_request(p.spans, params(), recompute=wish) for p, wish in pairs]
    outputs = finish(engine, plain, *together)
    assert [(out, r.selected) for out, r in zip(outputs[1:], together, strict=True)] == alone


def test_too_few_pages_replay_the_selection(tiny_llama, make_engine, random_ids, engine, prompt):
    wanted = finish(engine, request := engine.add_request(prompt.spans, params(40), recompute=Recompute(0.3)))
    tight = make_engine(tiny_llama(heads=6, kv_heads=2, seed=3), dtype="float32", pool_tokens=160)
    other = tight.add_request([TextSpan(random_ids(30, 9))], params(60))
    squeezed = tight.add_request(prompt.spans, params(40), recompute=Recompute(0.3))
    outputs = finish(tight, other, squeezed)
    assert squeezed.stats.preemptions > 0
    assert [outputs[1]] == wanted
    assert squeezed.selected == request.selected


def test_a_conversation_keeps_what_it_computed_again(engine, prompt, random_ids):
    """Also when its pages were given away: the next turn replays the selection."""

    def dialogue(lose):
        session = engine.open_session()
        one = engine.add_request(prompt.spans, params(5), session=session, recompute=Recompute(0.3))
        first = finish_session(one)
        if lose:
            engine.batcher.give_session_away()
            assert not session.blocks
        two = engine.add_request([TextSpan(random_ids(6, 77))], params(8), session=session)
        second = finish_session(two)
        engine.close_session(session)
        return first, second, one.selected, two

    def finish_session(request):
        while request.finish_reason is None:
            engine.step()
        engine.check_integrity()
        return request.output

    kept = dialogue(lose=False)
    lost = dialogue(lose=True)
    assert kept[:3] == lost[:3]
    assert kept[3].stats.recomputed_tokens == 0
    assert lost[3].stats.recomputed_tokens == len(lost[2]) > 0


def test_a_session_chooses_among_new_memories_only(engine, prompt, random_ids):
    other = Prompt(engine, random_ids, (15, 18), seed=40)
    session = engine.open_session()
    finish(engine, engine.add_request(prompt.spans, params(4), session=session, recompute=Recompute(0.3)))
    before = session.tokens
    new = [*(KVSpan(r) for r in other.records[1:]), TextSpan(other.query)]
    request = engine.add_request(new, params(4), session=session, recompute=Recompute(0.5))
    finish(engine, request)
    assert len(request.selected) == 9
    assert min(request.selected) >= before
    engine.close_session(session)


def test_a_deadline_that_has_passed_takes_the_first_pass(engine, prompt):
    spliced, _ = first_logits(engine, prompt.spans)
    hurried, request = first_logits(engine, prompt.spans, Recompute(0.3, deadline_ms=0))
    assert request.selected == ()
    assert request.stats.recomputed_tokens == 0
    torch.testing.assert_close(hurried, spliced, rtol=1e-5, atol=1e-5)
    _, patient = first_logits(engine, prompt.spans, Recompute(0.3, deadline_ms=1e6))
    assert patient.selected


def test_nothing_approximate_needs_no_probe(engine, prompt):
    spans = [prompt.head, KVSpan(prompt.records[0]), TextSpan(prompt.query)]
    _, request = first_logits(engine, spans, Recompute(0.5))
    assert request.selected == ()
    assert request.stats.computed_tokens == QUERY


def test_int8_in_the_first_slot_is_in_place_but_not_exact(engine, prompt):
    """Not worth computing again, and never in the prefix index."""
    prompt.records = [quantize_record(r) for r in prompt.records]
    _, request = first_logits(engine, prompt.spans, Recompute(0.3))
    assert request.exact == ANCHOR
    assert request.in_place == ANCHOR + SIZES[0]
    assert set(request.selected) <= set(prompt.candidates)
    plain = [prompt.head, KVSpan(prompt.records[0]), TextSpan(prompt.query)]
    request = engine.add_request(plain, params(4))
    finish(engine, request)
    held = engine.pool.match(request.keys)
    engine.pool.release(held)
    assert len(held) * engine.pool.page <= ANCHOR


def test_text_between_memories_is_computed_over_the_new_keys(engine, prompt, random_ids):
    """A memory that came as text, behind one that is refined, must equal full prefill at a full selection."""
    between = random_ids(10, 123)
    spans = prompt.spans
    spans.insert(3, TextSpan(between))
    ids = [t for span in spans for t in span.token_ids]
    full, _ = first_logits(engine, [TextSpan(tuple(ids))])
    engine.forget_prefixes()
    refined, request = first_logits(engine, spans, Recompute(0.99))
    assert len(request.selected) == SIZES[1] + SIZES[2]
    assert (refined - full).abs().max() < 1e-4


def test_abort_and_new_weights_under_way(tiny_llama, make_engine, engine, prompt):
    request = engine.add_request(prompt.spans, params(), recompute=Recompute(0.3))
    engine.step()
    engine.abort(request)
    engine.check_integrity()
    request = engine.add_request(prompt.spans, params(), recompute=Recompute(0.3))
    engine.step()
    other = make_engine(tiny_llama(heads=6, kv_heads=2, seed=4), dtype="float32")
    engine.use_weights(other.runner.model.weights)
    request_alone = other.add_request([TextSpan(prompt.ids)], params())
    (after,) = finish(engine, request)
    (plain,) = finish(other, request_alone)
    assert after[-11:] == plain[-11:] or after[1:] == plain[1:] or after == plain


@pytest.mark.parametrize(
    "fields",
    [{"share": -0.1}, {"share": 1.1}, {"share": float("nan")}, {"by": "magic"}, {"deadline_ms": -1.0}],
)
def test_impossible_wishes(fields):
    with pytest.raises(ConfigError):
        Recompute(**fields)
