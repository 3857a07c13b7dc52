"""Records that are still on their way: each layer is spliced when it comes, and never too late."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import Recompute, SamplingParams
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan
from memos_engine.errors import PayloadError
from memos_engine.tiers import RecordTiers


class Slow:
    """An arrival whose layers hold NaN until somebody waits for them."""

    def __init__(self, record: KVRecord) -> None:
        self.source = record
        self.moved = record.moved(lambda tensor: tensor.clone())
        self.moved.k.fill_(float("nan"))
        self.moved.v.fill_(float("nan"))
        object.__setattr__(self.moved, "arrival", self)
        self.waited: list[int] = []

    def wait(self, layer: int) -> None:
        self.waited.append(layer)
        self.moved.k[: layer + 1] = self.source.k[: layer + 1]
        self.moved.v[: layer + 1] = self.source.v[: layer + 1]

    @property
    def done(self) -> bool:
        return len(self.source.k) - 1 in self.waited


def records(engine, random_ids, count=3, tokens=37):
    out = []
    for seed in range(count):
        ids = random_ids(tokens + seed, 10 + seed)
        k, v = engine.encode_span(random_ids(5, 99), ids)
        sigma = torch.rand(v.shape[:3]).to(torch.float16)
        out.append(KVRecord(k, v, tuple(ids), "", "", sigma_v=sigma, rank=torch.rand(len(ids))))
    return out


def spans(random_ids, found, query=9):
    return [TextSpan(random_ids(6, 1)), *(KVSpan(one) for one in found), TextSpan(random_ids(query, 3))]


def finish(engine, seqs):
    while any(seq.finish_reason is None for seq in seqs):
        engine.step()
    engine.check_integrity()
    for seq in seqs:
        if seq.error is not None:
            raise seq.error
    return [seq.output for seq in seqs]


def answer(engine, prompt, recompute=0.0):
    params = SamplingParams(max_new_tokens=12)
    return finish(engine, [engine.add_request(prompt, params, recompute=Recompute(recompute))])


@pytest.mark.parametrize("recompute", [0.0, 0.3])
@pytest.mark.parametrize("page_dtype", ["auto", "int8"])
def test_answers_are_those_of_records_that_are_there(
    tiny_llama, make_engine, random_ids, recompute, page_dtype
):
    engine = make_engine(tiny_llama(), dtype="float32", page_dtype=page_dtype, share_spliced=False)
    found = records(engine, random_ids)
    expected = answer(engine, spans(random_ids, found), recompute)
    slow = [Slow(one) for one in found]
    got = answer(engine, spans(random_ids, [one.moved for one in slow]), recompute)
    assert got == expected
    assert all(one.waited == [0, 1, 2] for one in slow)  # one wait for each layer, in order


def test_a_layer_is_not_waited_for_before_its_turn(tiny_llama, make_engine, random_ids, monkeypatch):
    engine = make_engine(tiny_llama(), dtype="float32")
    slow = Slow(records(engine, random_ids, 1)[0])
    ops, seen = engine.runner.model.ops, []
    attention = ops.paged_attention

    def noted(*args, **named):
        seen.append(list(slow.waited))
        return attention(*args, **named)

    monkeypatch.setattr(ops, "paged_attention", noted)
    answer(engine, spans(random_ids, [slow.moved]))
    assert seen[:3] == [[0], [0, 1], [0, 1, 2]]


def test_shared_pages_may_be_copied_before_the_first_forward(tiny_llama, make_engine, random_ids):
    """Two requests of one step share pages of a record on its way, and compute parts of it again."""
    engine = make_engine(tiny_llama(), dtype="float32", share_spliced=True)
    found = records(engine, random_ids, 2, tokens=50)
    params = SamplingParams(max_new_tokens=8)
    queries = [9, 13]
    again = [Recompute(0.0), Recompute(0.4)]
    prompts = [spans(random_ids, found, query) for query in queries]
    expected = [
        finish(engine, [engine.add_request(prompt, params, recompute=r)])[0]
        for prompt, r in zip(prompts, again, strict=True)
    ]
    engine.forget_prefixes()
    slow = [Slow(one).moved for one in found]
    prompts = [spans(random_ids, slow, query) for query in queries]
    seqs = [engine.add_request(prompt, params, recompute=r) for prompt, r in zip(prompts, again, strict=True)]
    assert finish(engine, seqs) == expected
    assert seqs[1].stats.shared_tokens > 0


def test_a_failed_forward_leaves_nothing_for_the_next_owner_of_its_pages(
    tiny_llama, make_engine, random_ids, monkeypatch
):
    engine = make_engine(tiny_llama(), dtype="float32")
    found = records(engine, random_ids)
    plain = [TextSpan(random_ids(150, 7))]
    expected = answer(engine, plain)
    engine.forget_prefixes()
    forward = engine.runner.model.forward

    def broken(*args, **named):
        raise RuntimeError("no")

    monkeypatch.setattr(engine.runner.model, "forward", broken)
    with pytest.raises(RuntimeError):
        answer(engine, spans(random_ids, [Slow(one).moved for one in found]))
    monkeypatch.setattr(engine.runner.model, "forward", forward)
    assert engine.runner._arriving == []
    assert answer(engine, plain) == expected


def test_a_record_of_another_shape_is_refused_at_once(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    wrong = KVRecord(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8), (1, 2, 3, 4), "", "")
    with pytest.raises(PayloadError):
        answer(engine, spans(random_ids, [Slow(wrong).moved]))


def test_a_record_sinks_only_when_all_of_it_has_come(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    first, second, third = records(engine, random_ids, 3, tokens=20)
    room = second.nbytes
    tiers = RecordTiers(
        10 * room,
        room,
        lambda one: Slow(one).moved,
        lambda one: one.moved(lambda tensor: tensor.clone()),
        "lru",
    )
    tiers.put("first", first)
    tiers.put("second", second)
    assert torch.equal(tiers.host.records["first"].k, first.k)
    assert tiers.host.records["first"].arrival is None
    assert third.arrival is None
