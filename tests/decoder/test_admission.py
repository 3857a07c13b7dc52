"""Who is admitted first: whoever has to start soonest."""

from __future__ import annotations

from memos_engine.config import Recompute, SamplingParams
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan


def add(engine, ids, start_by=None, new=4):
    return engine.add_request([TextSpan(tuple(ids))], SamplingParams(max_new_tokens=new), start_by=start_by)


def order(engine, requests):
    """Their numbers, as they got their first tokens."""
    first = []
    while any(r.finish_reason is None for r in requests):
        for out in engine.step():
            number = requests.index(out.sequence)
            if number not in first:
                first.append(number)
    engine.check_integrity()
    return first


def test_the_least_slack_goes_first(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32", max_batch=1)
    now = 1e6
    requests = [add(engine, random_ids(9, i), now + due) for i, due in enumerate((5.0, 1.0, 3.0, 1.0))]
    assert order(engine, requests) == [1, 3, 2, 0]


def test_without_deadlines_the_oldest_goes_first(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32", max_batch=1)
    requests = [add(engine, random_ids(9, i)) for i in range(4)]
    assert order(engine, requests) == [0, 1, 2, 3]


def test_who_waits_without_a_deadline_is_not_starved(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32", max_batch=1)
    patient = add(engine, random_ids(9, 0))
    late = add(engine, random_ids(9, 1), patient.start_by + 1.0)
    urgent = add(engine, random_ids(9, 2), patient.start_by - 1.0)
    assert order(engine, [patient, late, urgent]) == [2, 0, 1]


def test_what_lies_ahead_is_counted_in_rows(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    assert engine.ahead() == []
    running = add(engine, random_ids(20, 0))
    assert engine.ahead() == [20]
    engine.step()
    assert engine.ahead() == []  # it decodes: a row a step
    waiting = add(engine, random_ids(33, 1))
    assert engine.ahead() == [33]
    for request in (running, waiting):
        engine.abort(request)


def test_what_is_in_pages_is_found_without_holding_it(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    ids = random_ids(40, 0)
    assert engine.reusable(ids) == 0
    order(engine, [add(engine, ids)])
    assert engine.reusable(ids) == 32
    assert engine.reusable(ids, b"another owner") == 0
    assert engine.reusable([*ids[:20], 1, *ids[21:]]) == 16
    engine.check_integrity()


def test_a_first_pass_that_ends_too_late_gives_the_token(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    left, span, query = random_ids(8, 0), random_ids(24, 1), random_ids(6, 2)
    k, v = engine.encode_span(left, span)
    spans = [TextSpan(left), KVSpan(KVRecord(k, v, tuple(span), "x", ids_digest(()))), TextSpan(query)]
    late = engine.add_request(
        spans, SamplingParams(max_new_tokens=3), recompute=Recompute(0.5, deadline_ms=0.0)
    )
    plain = engine.add_request(spans, SamplingParams(max_new_tokens=3))
    order(engine, [late, plain])
    assert late.output == plain.output
    assert late.stats.recomputed_tokens == 0
