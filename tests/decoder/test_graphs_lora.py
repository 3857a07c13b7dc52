"""Graphs of steps with adapters, with a recorder that keeps the work and runs it again: what a graph reads
from its buffers and from slots must equal the eager way."""

from __future__ import annotations

import pytest
import torch

from memos_engine.config import DecoderConfig
from memos_engine.decoder.adapter import Adapter, LowRank
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.graphs import GraphRunner
from memos_engine.decoder.sequence import TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.ops.lora import LoraTable

SIZES = {"q": (64, 48), "v": (32, 48), "o": (48, 64), "up": (80, 48), "down": (48, 80)}


class Recorder:
    """Each replay runs the work anew, over the tensors that it was recorded with."""

    def __init__(self, refuses=lambda: False):
        self.recorded, self.replayed, self.refuses = 0, 0, refuses

    def record(self, work):
        if self.refuses():
            raise RuntimeError("no capture today")
        out = work()
        self.recorded += 1

        def replay():
            self.replayed += 1
            out.copy_(work())

        return replay, out


def adapter(seed, rank=8, layers=(0, 1, 2)):
    make = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in layers:
        for name, (outputs, inputs) in SIZES.items():
            a, b = (torch.randn(s, generator=make) * 0.2 for s in ((rank, inputs), (outputs, rank)))
            modules[layer, name] = LowRank(a, b, 0.5)
    return Adapter(f"adapter {seed} of rank {rank}", modules)


@pytest.fixture(scope="module")
def parts(tiny_llama):
    model = tiny_llama()
    spec = ModelSpec.from_config(model.config, type(model).__name__)
    return spec, Weights.from_model(model, spec)


def engine_for(parts, recorder=None, prefill_rows=(16, 32)):
    engine = DecoderEngine(*parts, DecoderConfig(max_batch=8))
    if recorder is not None:
        runner = engine.runner
        runner.graphs = GraphRunner(runner.model, runner.cache, 8, prefill_rows, recorder)
    return engine


def prompt(n, first=5):
    return [1, *range(first, first + n - 1)]


def logits(engine, prompts, bindings, steps=4):
    """Of `steps` tokens of each request, which differ in length, so that batches shrink."""
    engine.forget_prefixes()
    seqs = [
        engine.add_request([TextSpan(tuple(p))], sampled=False, adapter=b)
        for p, b in zip(prompts, bindings, strict=True)
    ]
    found = [[] for _ in seqs]
    while any(s.finish_reason is None for s in seqs):
        while any(s.logits is None and s.finish_reason is None for s in seqs):
            engine.step()
        for i, seq in enumerate(seqs):
            if seq.finish_reason is None:
                found[i].append(seq.logits.clone())
                engine.finish(seq) if len(found[i]) == steps + i else engine.feed(seq, 7 + len(found[i]))
        assert not any(s.error for s in seqs)
    return [torch.stack(mine) for mine in found]


def close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


MIXED = [
    None,
    AdapterBinding(adapter(1, 4)),
    AdapterBinding(adapter(2, 64)),
    AdapterBinding(adapter(3, 1), 0.7, active_from=24),  # begins while it decodes
    AdapterBinding(adapter(1, 4), -0.5),
    AdapterBinding(adapter(1, 4)),
    None,
]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_mixed_batch_in_graphs_is_the_eager_one(parts, count):
    recorder = Recorder()
    graphed, plain = engine_for(parts, recorder), engine_for(parts)
    bindings = MIXED[-count:]
    prompts = [prompt(20 + i) for i in range(count)]
    close(logits(graphed, prompts, bindings, 6), logits(plain, prompts, bindings, 6))
    assert recorder.replayed >= 4 + count  # every decoding step, whatever adapters were in it
    assert {key[1] for key in graphed.runner.graphs._graphs} == ({True, False} if count > 1 else {False})
    graphed.check_integrity()


def test_a_short_prefill_with_an_adapter_is_a_graph(parts):
    recorder = Recorder()
    graphed, plain = engine_for(parts, recorder), engine_for(parts)
    for length, active_from in ((9, 0), (30, 3), (32, 31), (17, 0)):
        binding = [AdapterBinding(adapter(1), 1.0, active_from)]
        before = recorder.replayed
        close(logits(graphed, [prompt(length)], binding, 1), logits(plain, [prompt(length)], binding, 1))
        assert recorder.replayed == before + 1


def test_exchanges_under_a_graph_leave_no_trace(parts):
    """A, B, none in the slot, A: the same graphs, the same bits for A."""
    recorder = Recorder()
    engine, plain = engine_for(parts, recorder, ()), engine_for(parts)
    outcomes, counts = [], []
    for made in (adapter(1), adapter(2, 16), adapter(1)):
        binding = [AdapterBinding(made)]
        (mine,) = logits(engine, [prompt(20)], binding)
        close([mine], logits(plain, [prompt(20)], binding))
        outcomes.append(mine)
        counts.append(recorder.recorded)
        for digest in engine.adapters.resident():
            engine.adapters.evict(digest)
    assert torch.equal(outcomes[0], outcomes[2])
    assert not torch.equal(outcomes[0], outcomes[1])
    assert counts == [1, 1, 1]


def test_a_slot_that_changes_between_replays_is_seen(parts):
    """Between two tokens of one request, as a publish does it: one pointer write."""
    engine = engine_for(parts, Recorder(), ())
    seq = engine.add_request([TextSpan(tuple(prompt(20)))], sampled=False, adapter=MIXED[1])
    found = []
    for fill in (..., None, ...):
        while seq.logits is None:
            engine.step()
        found.append(seq.logits.clone())
        kept = engine.adapters.table.fills[seq.slot]
        engine.feed(seq, 9)
        if fill is None:
            engine.adapters.table.publish(seq.slot, None)
            engine.step()
            found.append(seq.logits.clone())
            engine.adapters.table.publish(seq.slot, kept)
            engine.feed(seq, 9)
    engine.abort(seq)
    base = engine_for(parts)
    other = base.add_request([TextSpan(tuple(prompt(20)))], sampled=False, adapter=MIXED[1])
    for step in range(2):
        while other.logits is None:
            base.step()
        torch.testing.assert_close(found[step], other.logits, atol=2e-4, rtol=2e-4)
        base.feed(other, 9)
    base.adapters.table.publish(other.slot, None)
    base.step()
    torch.testing.assert_close(found[2], other.logits, atol=2e-4, rtol=2e-4)
    base.abort(other)


def test_steps_without_adapters_keep_their_graphs_and_bits(parts):
    recorder = Recorder()
    engine = engine_for(parts, recorder)
    (before,) = logits(engine, [prompt(20)], [None])
    own = dict(engine.runner.graphs._graphs)
    logits(engine, [prompt(20)] * 2, [MIXED[2], None])
    (after,) = logits(engine, [prompt(20)], [None])
    assert torch.equal(before, after)
    assert all(engine.runner.graphs._graphs[key] is graph for key, graph in own.items())
    assert all(graph.step.lora is None for graph in own.values())


def test_record_all_makes_the_second_set_only_for_slots(parts):
    recorder = Recorder()
    engine = engine_for(parts, recorder)
    graphs = engine.runner.graphs
    graphs.record_all()
    assert recorder.recorded == 6
    graphs.record_all(LoraTable(0, 3, 8))
    assert recorder.recorded == 6
    graphs.record_all(engine.adapters.table)
    assert recorder.recorded == 12
    assert not engine.runner.cache.k.any()  # nothing is written while recording
    logits(engine, [prompt(20)] * 3, MIXED[:3])
    assert recorder.recorded == 12


def test_another_table_means_new_graphs_for_adapters_alone(parts):
    recorder = Recorder()
    engine = engine_for(parts, recorder)
    graphs = engine.runner.graphs
    graphs.record_all(engine.adapters.table)
    plain = {key: graph for key, graph in graphs._graphs.items() if not key[1]}
    graphs.record_all(LoraTable(4, 3, 8))
    assert recorder.recorded == 18
    assert all(graphs._graphs[key] is graph for key, graph in plain.items())


def test_a_recording_that_fails_with_adapters_turns_only_those_off(parts, caplog):
    adapted = []
    recorder = Recorder(lambda: bool(adapted))
    engine, plain = engine_for(parts, recorder), engine_for(parts)
    logits(engine, [prompt(20)], [None])
    kept = dict(engine.runner.graphs._graphs)
    adapted.append(True)
    for _ in range(2):
        close(logits(engine, [prompt(20)], MIXED[2:3]), logits(plain, [prompt(20)], MIXED[2:3]))
    assert engine.runner.graphs._graphs == kept
    assert caplog.text.count("off for steps with adapters") == 1
    before = recorder.replayed
    logits(engine, [prompt(20)], [None])
    assert recorder.replayed > before


def test_rows_are_copied_once_while_they_stay_the_same(parts, monkeypatch):
    engine = engine_for(parts, Recorder())
    loads = []
    real = torch.Tensor.__setitem__
    graphs = engine.runner.graphs

    def counted(tensor, *rest):
        if tensor.data_ptr() == graphs._lora.scale.data_ptr() and tensor.dtype == torch.float32:
            loads.append(1)
        return real(tensor, *rest)

    monkeypatch.setattr(torch.Tensor, "__setitem__", counted)
    logits(engine, [prompt(50)], MIXED[2:3], 8)
    assert len(loads) == 1


def test_who_joins_gets_nothing_of_who_has_left(parts):
    """The same rows in a graph of another size: behind them must be nothing of an earlier, larger batch."""

    def run(engine):
        engine.forget_prefixes()
        bindings = [AdapterBinding(adapter(i, 4)) for i in range(1, 5)]
        seqs = [engine.add_request([TextSpan(tuple(prompt(20)))], sampled=False, adapter=b) for b in bindings]

        def step(live, token):
            for seq in live:
                if seq.logits is not None:
                    engine.feed(seq, token)
            while any(s.logits is None for s in live):
                engine.step()

        step(seqs, 0)
        step(seqs, 7)
        for seq in seqs[1:]:
            engine.finish(seq)
        step(seqs[:1], 8)
        joined = engine.add_request([TextSpan(tuple(prompt(30, 60)))], sampled=False)
        step([joined], 0)
        step([seqs[0], joined], 9)
        found = [seqs[0].logits.clone(), joined.logits.clone()]
        for seq in (seqs[0], joined):
            engine.finish(seq)
        return found

    engine, wanted = engine_for(parts, Recorder()), run(engine_for(parts))
    for _ in range(2):  # recording clears the buffers: the second time finds them as they were left
        close(run(engine), wanted)
