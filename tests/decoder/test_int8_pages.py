"""An engine with pages of int8: near one with whole pages, and as exact in itself."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import Recompute, SamplingParams
from memos_engine.decoder.graphs import GraphRunner
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.quantize import quantize_record
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan


@pytest.fixture
def engines(tiny_llama, make_engine):
    """engines() -> one with whole pages, one with int8 pages, over the same weights."""

    def make(**fields):
        model = tiny_llama(seed=1, heads=6, kv_heads=2)
        return [make_engine(model, dtype="float32", page_dtype=kind, **fields) for kind in ("auto", "int8")]

    return make


@pytest.fixture
def engine(engines):
    made = engines()[1]
    yield made
    made.check_integrity()


def logits(engine, spans, steps=()):
    """The logits behind a prompt, then behind each further token; and what was reused."""
    seq = engine.add_request(spans, SamplingParams(max_new_tokens=99), sampled=False)
    seen = []
    for token in (*steps, None):
        while seq.logits is None:
            engine.step()
        seen.append(seq.logits)
        if token is not None:
            engine.feed(seq, token)
    engine.finish(seq)
    return torch.stack(seen), seq.stats.prefix_tokens


def near(got, wanted, bound):
    """Products in other shapes change last bits, and now and then a rounding to eight bits."""
    assert ((got - wanted).norm(dim=-1) < bound * wanted.norm(dim=-1)).all()


def record(engine, left, ids):
    k, v = engine.encode_span(left, ids)
    return KVRecord(k, v, ids, "test", ids_digest(left))


def parts(cache):
    return cache.k, cache.v, cache.k_scale, cache.v_scale


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
def test_logits_are_near_those_of_whole_pages(engines, random_ids, length):
    steps = random_ids(12, 5)
    expected, got = (logits(e, [TextSpan(random_ids(length))], steps)[0] for e in engines())
    near(got, expected, 0.1)
    assert not torch.equal(got, expected)


def test_pages_take_less_than_a_third(engines):
    whole, narrow = (engine.runner.cache for engine in engines())
    assert narrow.nbytes == whole.nbytes // 4 + whole.nbytes // 16  # a scale of 4 bytes for 16 channels
    assert narrow.k.dtype == torch.int8


def test_one_by_one_is_the_batch(engine, random_ids):
    prompts = [random_ids(n, seed=n) for n in (5, 33, 16, 50)]
    alone = [engine.generate([TextSpan(ids)], SamplingParams(max_new_tokens=12)) for ids in prompts]
    wanted = [[o.token for o in outputs] for outputs in alone]
    engine.forget_prefixes()
    params = SamplingParams(max_new_tokens=12)
    seqs = [engine.add_request([TextSpan(ids)], params) for ids in prompts]
    while not engine.idle:
        engine.step()
    assert [seq.output for seq in seqs] == wanted


def test_chunks_and_reused_prefixes_are_the_whole_prompt(engines, random_ids):
    (_, engine), (_, chunked) = engines(), engines(prefill_chunk=7)
    ids, more = random_ids(60), random_ids(20, 2)
    wanted, fresh = logits(engine, [TextSpan(ids)])
    assert fresh == 0
    near(logits(chunked, [TextSpan(ids)])[0], wanted, 0.02)
    again, reused = logits(engine, [TextSpan(ids)])
    assert reused == 48
    near(again, wanted, 0.02)
    longer, reused = logits(engine, [TextSpan(ids + more)])
    assert reused == 48
    engine.forget_prefixes()
    near(longer, logits(engine, [TextSpan(ids + more)])[0], 0.02)


@pytest.mark.parametrize("start", [0, 5, 16, 31])
def test_an_unquantised_splice_equals_an_append_bit_for_bit(engine, random_ids, start):
    left, span = random_ids(start, 1), random_ids(23, 2)
    stored = record(engine, left, span)
    assert stored.k.dtype == torch.float32

    def pages(spans):
        seq = engine.add_request(spans, SamplingParams(max_new_tokens=3))
        engine.step()
        blocks, where = torch.tensor(seq.blocks), slice(start, start + len(span))
        taken = [t[:, blocks].flatten(1, 2)[:, where].clone() for t in parts(engine.runner.cache)]
        engine.abort(seq)
        engine.forget_prefixes()
        return taken

    appended = pages([TextSpan(left + span)])
    spliced = pages([*([TextSpan(left)] if left else []), KVSpan(stored), TextSpan(random_ids(4, 3))])
    assert all(torch.equal(a, b) for a, b in zip(appended, spliced, strict=True))
    assert appended[2].all()


def test_records_of_int8_are_near(engine, random_ids):
    anchor, span, query = random_ids(8, 1), random_ids(70, 2), TextSpan(random_ids(9, 3))
    whole = record(engine, anchor, span)
    stored = whole, quantize_record(whole)
    results = [logits(engine, [TextSpan(anchor), KVSpan(part), query])[0] for part in stored]
    near(*results, 0.1)


def test_recomputing_everything_is_full_prefill(engine, random_ids):
    """The probe reads int8 pages, and what it chooses is written over."""
    anchor, memories, query = random_ids(8, 1), [random_ids(30, s) for s in (2, 3)], random_ids(9, 4)
    spans = [KVSpan(record(engine, anchor, ids)) for ids in memories]
    params = SamplingParams(max_new_tokens=8)

    def run(spans, share):
        seq = engine.add_request(spans, params, recompute=Recompute(share))
        while seq.finish_reason is None:
            engine.step()
        engine.forget_prefixes()
        return seq

    full = run([TextSpan(anchor + memories[0] + memories[1] + query)], 0.0)
    assert run([TextSpan(anchor), *spans, TextSpan(query)], 1.0).output == full.output
    some = run([TextSpan(anchor), *spans, TextSpan(query)], 0.25)
    assert len(some.selected) == 15


def test_blocks_are_copied_with_their_scales(engine, random_ids):
    logits(engine, [TextSpan(random_ids(20))])
    cache = engine.runner.cache
    source = int(cache.k_scale[0, :, 0, 0].nonzero()[0])
    cache.copy_block(source, 9)
    before = [part.clone() for part in parts(cache)]
    assert all(part[:, 9].any() for part in before)
    assert all(torch.equal(part[:, 9], part[:, source]) for part in before)
    engine.runner.grow(cache.k.shape[1] + 5, [source, 9])
    for old, new in zip(before, parts(engine.runner.cache), strict=True):
        assert new.dtype == old.dtype
        assert new.shape[1] == old.shape[1] + 5
        assert torch.equal(new[:, [source, 9]], old[:, [source, 9]])


def test_the_null_block_stays_zero(engine, random_ids):
    logits(engine, [TextSpan(random_ids(40))], random_ids(5, 2))
    assert not any(part[:, 0].any() for part in parts(engine.runner.cache))


class Eager:
    """Stands in for CUDA: a replay runs the work again."""

    def record(self, work):
        out = work()
        return lambda: out.copy_(work()), out


def test_graphs_read_and_write_int8_pages(engine, random_ids):
    runner, spec = engine.runner, engine.spec
    caches = [KVCache(spec, 8, 16, torch.int8, torch.device("cpu")) for _ in range(2)]
    graphs = GraphRunner(runner.model, caches[1], 4, (16, 32), Eager())
    for first, count in ((0, 20), (20, 1), (21, 1)):
        seq_blocks = [3, 5]
        step = runner.step_input([(_Request(random_ids(22), seq_blocks), list(range(first, first + count)))])
        last = torch.tensor([count - 1])
        wanted = runner.model.forward(step, caches[0], rows=last)
        got = graphs.run(step, last)
        near(got, wanted, 0.02)
    assert not any(part[:, 0].any() for part in parts(caches[1]))


class _Request:
    """As much of a Sequence as index tensors need."""

    adapter = None

    def __init__(self, tokens, blocks):
        self.tokens, self.blocks = tokens, blocks


def test_pages_read_back_are_what_was_written(engine, random_ids):
    """As attach() hands them to transformers: floats in the model's dtype, near those of the forward."""
    ids = random_ids(16)
    k, v = engine.encode_span((), ids)
    seq = engine.add_request([TextSpan(ids)], SamplingParams(max_new_tokens=3))
    engine.step()
    _, v_read = engine.runner.cache.layer(1).read(torch.tensor(seq.blocks[:1]), torch.float32)
    engine.abort(seq)
    assert v_read.dtype == k.dtype
    torch.testing.assert_close(v_read[0], v[1], rtol=0, atol=float(v.abs().max()) / 200)
