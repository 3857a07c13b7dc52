"""Stored KV spliced into pages: exact where it must be, approximate pages never reused as exact."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import SamplingParams
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan
from memos_engine.errors import PayloadError


def record(engine, left, span):
    k, v = engine.encode_span(left, span)
    return KVRecord(k, v, tuple(span), "test", ids_digest(left))


def run(engine, spans, count=40):
    seq = engine.add_request(spans, SamplingParams(max_new_tokens=count))
    while seq.finish_reason is None:
        engine.step()
    engine.check_integrity()
    if seq.error is not None:
        raise seq.error
    return seq


@pytest.mark.parametrize(
    ("anchor", "memory", "query"), [(1, 1, 1), (20, 37, 9), (16, 16, 16), (31, 100, 32), (0, 33, 5)]
)
def test_a_spliced_prefix_gives_the_tokens_of_full_prefill(
    tiny_llama, make_engine, random_ids, anchor, memory, query
):
    engine = make_engine(tiny_llama(heads=6, kv_heads=2, seed=1), dtype="float32")
    a, m, q = random_ids(anchor, 1), random_ids(memory, 2), random_ids(query, 3)
    full = run(engine, [TextSpan(a + m + q)])
    engine.forget_prefixes()
    head = [TextSpan(a)] if a else []
    spliced = run(engine, [*head, KVSpan(record(engine, a, m)), TextSpan(q)])
    assert spliced.output == full.output
    assert spliced.fully_exact
    assert spliced.stats.spliced_tokens == memory
    assert spliced.stats.computed_tokens == anchor + query


def test_a_chain_of_exact_records_is_exact(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    a, m1, m2, q = random_ids(12, 1), random_ids(21, 2), random_ids(18, 3), random_ids(7, 4)
    full = run(engine, [TextSpan(a + m1 + m2 + q)])
    engine.forget_prefixes()
    spans = [KVSpan(record(engine, (), a)), KVSpan(record(engine, a, m1)), KVSpan(record(engine, a + m1, m2))]
    spliced = run(engine, [*spans, TextSpan(q)])
    assert spliced.fully_exact
    assert spliced.output == full.output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 5, 16, 31])
def test_an_unquantised_splice_equals_an_append_bit_for_bit(
    tiny_llama, make_engine, random_ids, dtype, start
):
    """Bit for bit: what a full prefill wrote into its pages, the splice of the same K and V writes."""
    engine = make_engine(
        tiny_llama(heads=6, kv_heads=2, dtype=dtype), dtype=str(dtype).removeprefix("torch.")
    )
    left, span = random_ids(start, 1), random_ids(23, 2)
    stored = record(engine, left, span)

    def pages(spans):
        """K and V of the span's positions after the first step of a request."""
        seq = engine.add_request(spans, SamplingParams(max_new_tokens=3))
        engine.step()
        blocks, where = torch.tensor(seq.blocks), slice(start, start + len(span))
        cache = engine.runner.cache
        taken = [t[:, blocks].flatten(1, 2)[:, where].clone().view(torch.uint8) for t in (cache.k, cache.v)]
        engine.abort(seq)
        engine.forget_prefixes()
        return taken

    # The append runs in the same forward shape as the build, so that only append and splice can differ.
    appended = pages([TextSpan(left + span)])
    head = [TextSpan(left)] if left else []
    spliced = pages([*head, KVSpan(stored), TextSpan(random_ids(4, 3))])
    assert torch.equal(appended[0], spliced[0])
    assert torch.equal(appended[1], spliced[1])


def test_approximate_pages_are_never_taken_for_exact_ones(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(seed=4), dtype="float32")
    a, m1, m2, q = random_ids(20, 1), random_ids(40, 2), random_ids(40, 3), random_ids(9, 4)
    truth = run(engine, [TextSpan(a + m1 + m2 + q)]).output
    engine.forget_prefixes()
    spliced = run(
        engine, [TextSpan(a), KVSpan(record(engine, a, m1)), KVSpan(record(engine, a, m2)), TextSpan(q)]
    )
    assert spliced.exact == len(a) + len(m1)
    again = run(engine, [TextSpan(a + m1 + m2 + q)])
    assert again.stats.prefix_tokens == (len(a) + len(m1)) // 16 * 16  # only the exact pages
    assert again.output == truth


def test_text_behind_an_approximate_splice_is_approximate(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    a, m, t, q = random_ids(20, 1), random_ids(30, 2), random_ids(30, 3), random_ids(5, 4)
    alone = record(engine, (), m)
    seq = run(engine, [TextSpan(a), KVSpan(alone), TextSpan(t), TextSpan(q)])
    assert seq.exact == len(a)
    assert run(engine, [TextSpan(a + m + t + q)]).stats.prefix_tokens == 16


def test_rotation_moves_a_record_without_changing_its_content(tiny_llama, make_engine, random_ids):
    """One layer deep nothing depends on what stands left, so a moved record is exact there."""
    engine = make_engine(tiny_llama(), dtype="float32")
    m = random_ids(18, 2)
    k0, v0 = engine.encode_span(random_ids(5, 8), m)
    k1, v1 = engine.encode_span(random_ids(77, 9), m)
    torch.testing.assert_close(k0[0], k1[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v0[0], v1[0], rtol=1e-5, atol=1e-5)


def test_a_record_of_another_shape_is_refused_and_frees_its_pages(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    wrong = KVRecord(torch.zeros(3, 4, 1, 16), torch.zeros(3, 4, 1, 16), (5, 6, 7, 8), "x", ids_digest(()))
    with pytest.raises(PayloadError, match="does not fit"):
        run(engine, [KVSpan(wrong), TextSpan((9,))])
    engine.check_integrity()
    assert engine.pool.available == engine.pool.num_blocks - 1


def test_salted_roots_do_not_share_pages(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    ids = random_ids(50)
    once = SamplingParams(max_new_tokens=1)
    list(engine.generate([TextSpan(ids)], once, root=b"tenant one"))
    (other,) = engine.generate([TextSpan(ids)], once, root=b"tenant two")
    assert other.sequence.stats.prefix_tokens == 0
    (same,) = engine.generate([TextSpan(ids)], once, root=b"tenant one")
    assert same.sequence.stats.prefix_tokens == 48
