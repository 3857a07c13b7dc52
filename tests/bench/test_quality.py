"""The methods of `bench quality` on a tiny random model: they do what they say, and are scored so."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from memos_engine.bench import forced, splicing, xquad
from memos_engine.bench.options import Options
from memos_engine.bench.records import Stores

from memos_engine.decoder.sequence import TextSpan
from memos_engine.errors import MemosEngineError


@pytest.fixture(scope="module")
def make_case(engine, data):
    """make_case(spans=None) -> Case of the data's first prompt, or of other memories."""
    dataset = xquad.load("xquad_en", data)
    stores = Stores(engine.decoder, engine.layout, xquad.memory_spans(dataset, engine.layout, 3))
    (first,) = xquad.prompts(dataset, engine.layout, 3, Options(seed=5), 1)

    def make(spans=None):
        spans = spans or first.memories
        ids = (*engine.layout.anchor, *(t for span in spans for t in span), *first.query)
        (reference,) = forced.references(engine.decoder, [ids], engine.eos_token_ids)
        kept = stores.anchored(spans), stores.stored(spans), stores.neutral(spans)
        return splicing.Case(engine.decoder, stores.anchor, kept[0], first.query, reference, "k", *kept[1:])

    return make


def outcome(case, plan, stop=(2,)):
    return forced.evaluate(case.engine, [plan], [case.reference], stop)[0]


# -- methods -----------------------------------------------------------------------------------------


def test_computing_everything_again_equals_full_prefill(make_case):
    case = make_case()
    for way in (splicing.everything, splicing.full, splicing.computed):
        plan = way(case, 1.0)
        found = outcome(case, plan)
        assert max(found.kl) < 1e-9
        assert all(found.agree)
        assert found.answer == case.reference.answer
    forced.require_exact(case.engine, splicing.everything(case, 1.0), case.reference, (2,))


def test_a_broken_recompute_is_refused(make_case):
    case = make_case()
    with pytest.raises(MemosEngineError, match="another distribution than full prefill"):
        forced.require_exact(case.engine, splicing.anchored(case, 0.0), case.reference, (2,))


@pytest.mark.parametrize("share", [0.05, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("method", [m for m in splicing.METHODS if m.fixed is None], ids=lambda m: m.name)
def test_a_selection_has_its_size_and_stays_between_slot_0_and_the_query(make_case, method, share):
    case = make_case()
    plan = method.plan(case, share)
    behind = sum(record.num_tokens for record in case.memories[1:])
    assert len(plan.selected) == plan.recomputed == min(round(share * case.memory_tokens), behind)
    assert list(plan.selected) == sorted(set(plan.selected))
    assert min(plan.selected) >= case.starts[1]
    assert max(plan.selected) < len(case.ids) - len(case.query)
    assert tuple(t for span in plan.spans for t in span.token_ids) == case.ids


def test_first_k_takes_the_heads_and_cacheblend_what_deviates_most(make_case):
    case = make_case()
    taken = set(splicing.first_k(case, 0.25).selected)
    for start, record in zip(case.starts[1:], case.memories[1:], strict=True):
        inside = sorted(taken & set(range(start, start + record.num_tokens)))
        assert inside == list(range(start, start + len(inside)))
    chosen = splicing.cacheblend(case, 0.25).selected
    fresh = case.reference.v[1]
    stored = dict(enumerate(torch.cat([r.v[1] for r in case.memories]), case.starts[0]))
    apart = {p: float((fresh[p] - stored[p]).norm()) for p in case.candidates}
    assert min(apart[p] for p in chosen) >= max(apart[p] for p in case.candidates if p not in chosen)
    slot_0 = range(case.starts[0], case.starts[1])
    assert max(float((fresh[p] - stored[p]).abs().max()) for p in slot_0) < 1e-5  # exact as it is stored


def test_a_later_memory_never_changes_an_earlier_recomputed_key(make_case, engine):
    """At a fixed selection: what public code's mask gets wrong. An earlier memory, as a control, does."""

    def keys(spans, selected):
        case = make_case(spans)
        plan = replace(splicing.anchored(case, 0.0), selected=selected)
        runner = engine.decoder.runner
        with forced.laid_out(engine.decoder, [plan]) as (request,):
            forced.forward(engine.decoder, [request], [[*selected, *request.pending]], [1])
            blocks, page = torch.tensor(request.blocks), engine.decoder.pool.page
            at = torch.tensor(selected)
            return runner.cache.k[:, blocks[at // page], at % page].clone()

    base = make_case()
    first, second, third = (record.token_ids for record in base.memories)
    other = tuple(reversed(third))
    middle = range(base.starts[1], base.starts[2])
    inside = tuple(random.Random(0).sample(middle, 12))
    later = tuple(range(base.starts[2] + 3, base.starts[2] + 9))
    selected = tuple(sorted((*inside, *later)))
    before = keys((first, second, third), selected)
    after = keys((first, second, other), selected)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-5)
    assert (before[1:, 12:] - after[1:, 12:]).abs().max() > 1e-2
    turned = keys((tuple(reversed(first)), second, third), selected)
    assert (before[1:, :12] - turned[1:, :12]).abs().max() > 1e-2


def test_recomputed_tokens_see_the_recomputed_ones_before_them(make_case):
    """With a whole leading run computed again, that run is exact, whatever stands behind it."""
    case = make_case()
    run = tuple(range(case.starts[1], case.starts[2]))
    plan = replace(splicing.anchored(case, 0.0), selected=run)
    keys = []
    for one in (plan, splicing.computed(case, 1.0)):
        with forced.laid_out(case.engine, [one]) as (request,):
            forced.forward(case.engine, [request], [[*one.selected, *request.pending]], [1])
            blocks, at = torch.tensor(request.blocks), torch.tensor(run)
            page = case.engine.pool.page
            keys.append(case.engine.runner.cache.k[:, blocks[at // page], at % page].clone())
    torch.testing.assert_close(*keys, rtol=0, atol=1e-5)


def test_an_own_answer_is_the_one_of_decoding_alone(make_case):
    """The answer leaves the reference's path at its first other token; here token by token instead."""
    case = make_case()
    plan = splicing.shuffled_values(case, 0.0)
    found = outcome(case, plan)
    assert found.answer != case.reference.answer
    with forced.laid_out(case.engine, [plan]) as (request,):
        (logits,) = forced.forward(case.engine, [request], [request.pending], [1])
        request.tokens.append(int(logits.argmax()))
        forced.decode(case.engine, [request], (2,))
        assert found.answer == tuple(request.output)


def test_plans_are_scored_alike_alone_and_together(make_case, monkeypatch):
    case = make_case()
    plans = [method.plan(case, 0.25) for method in splicing.METHODS]
    together = forced.evaluate(case.engine, plans, [case.reference] * len(plans), (2,))
    monkeypatch.setattr(forced, "ROWS", 1)
    for plan, found in zip(plans, together, strict=True):
        alone = outcome(case, plan)
        assert alone.answer == found.answer
        assert alone.kl == pytest.approx(found.kl, abs=1e-6)
    case.engine.check_integrity()
    assert case.engine.pool.available == case.engine.pool.num_blocks - 1


def test_records_leave_the_cache_when_room_is_short(engine):
    spans = [engine.layout.memory(f"Number {i}.") for i in range(4)]
    stores = Stores(engine.decoder, engine.layout, spans)
    (record,) = stores.anchored(spans[:1])
    small = Stores(engine.decoder, engine.layout, spans, nbytes=2 * record.nbytes)
    (first,) = small.anchored(spans[:1])
    assert small.anchored(spans[:1])[0] is first
    assert len(small.anchored(spans)) == 4  # more than it keeps
    assert small.anchored(spans[:1])[0] is not first


def test_a_span_of_text_alone_is_a_plan(make_case):
    case = make_case()
    plan = forced.Plan((TextSpan(case.query),))
    assert outcome(case, plan).kl[0] > 0
