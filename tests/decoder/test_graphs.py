"""GraphRunner on a CPU: sizes, padding and buffers, with a recorder that keeps the work and runs it again."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, fields

import pytest
import torch

from memos_engine.config import SamplingParams
from memos_engine.decoder.graphs import GraphRunner, graph_runner
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import StepInput
from memos_engine.decoder.model import PagedDecoder
from memos_engine.decoder.sequence import TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights

PAGE, BLOCKS = 16, 90


class Recorder:
    """Addresses of the inputs are fixed at recording, as in a CUDA graph; each replay runs the work anew."""

    def __init__(self):
        self.recorded = []

    def record(self, work):
        out = work()
        self.recorded.append(out.shape[0])

        def replay():
            out.copy_(work())

        return replay, out


class Broken:
    def record(self, work):
        raise RuntimeError("no capture today")


@dataclass
class Twins:
    """One model over two caches of the same content: what a graph does must equal the eager way."""

    model: PagedDecoder
    eager: KVCache
    graphed: KVCache
    graphs: GraphRunner
    tables: list[list[int]]
    lengths: list[int]
    random: torch.Generator

    def step(self, requests, counts, positions=None):
        """New rows for the requests, at their ends unless `positions` says otherwise."""
        tables = [self.tables[r] for r in requests]
        width = max(-(-(self.lengths[r] + n) // PAGE) for r, n in zip(requests, counts, strict=True))
        table = torch.zeros(len(requests), width, dtype=torch.int32)
        where, slots, lengths = [], [], []
        for row, (r, count) in enumerate(zip(requests, counts, strict=True)):
            table[row] = torch.tensor(tables[row][:width])
            at = positions or list(range(self.lengths[r], self.lengths[r] + count))
            where += at
            slots += [tables[row][p // PAGE] * PAGE + p % PAGE for p in at]
            lengths.append(at[-1] + 1)
            self.lengths[r] = max(self.lengths[r], lengths[-1])
        start = torch.tensor([0, *counts]).cumsum(0).int()
        ids = torch.randint(5, 211, (sum(counts),), generator=self.random)
        where, lengths = (torch.tensor(x, dtype=torch.int32) for x in (where, lengths))
        return StepInput(ids, where, torch.tensor(slots), start, table, lengths)

    def check(self, step, rows=None, fits=True):
        wanted = self.model.forward(step, self.eager, rows=rows)
        got = self.graphs.run(step, rows)
        assert (got is not None) == fits
        if not fits:
            got = self.model.forward(step, self.graphed, rows=rows)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
        for a, b in ((self.graphed.k, self.eager.k), (self.graphed.v, self.eager.v)):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
            assert not a[:, 0].any()  # padding never writes: the null block stays zero
        return got


@pytest.fixture
def twins(tiny_llama):
    def make(max_batch=8, prefill_rows=(16, 32), recorder=None, requests=9, model=None):
        hf = model or tiny_llama()
        spec = ModelSpec.from_config(hf.config, type(hf).__name__)
        model = PagedDecoder(spec, Weights.from_model(hf, spec))
        caches = [KVCache(spec, BLOCKS, PAGE, torch.float32, torch.device("cpu")) for _ in range(2)]
        random = torch.Generator().manual_seed(0)
        free = (torch.randperm(BLOCKS - 1, generator=random) + 1).tolist()
        each = (BLOCKS - 1) // requests
        tables = [free[i * each : (i + 1) * each] for i in range(requests)]
        graphs = GraphRunner(model, caches[1], max_batch, prefill_rows, recorder or Recorder())
        return Twins(model, *caches, graphs, tables, [0] * requests, random)

    return make


@pytest.mark.parametrize("count", range(1, 10))
def test_decoding_at_every_batch_size(twins, count):
    pair = twins()
    lengths = [1, 15, 16, 17, 33, 2, 40, 31, 9][:count]
    for request, length in enumerate(lengths):
        pair.check(pair.step([request], [length]), fits=length <= 32)
    for _ in range(3):  # across page edges: block tables grow while the graph stays
        pair.check(pair.step(range(count), [1] * count), fits=count <= 8)
    decoding = [size for size in pair.graphs._recorder.recorded if size <= 8]
    assert len(decoding) == len(set(decoding))  # each size was recorded once


def test_a_large_batch_leaves_nothing_in_a_small_one(twins):
    """Padding overwrites what an earlier step left in the buffers."""
    pair = twins()
    for request in range(8):
        pair.check(pair.step([request], [20 + request]))
    for count in (8, 5, 7, 3, 6, 1, 8, 3):
        pair.check(pair.step(range(8 - count, 8), [1] * count))
    pair.check(pair.step([0], [30]))
    pair.check(pair.step(range(5), [1] * 5))
    pair.check(pair.step([1], [3]))


@pytest.mark.parametrize("rows", [2, 15, 16, 17, 31, 32, 33])
def test_prefill_of_one_request(twins, rows):
    pair = twins()
    pair.check(pair.step([0], [3]))
    last = torch.tensor([rows - 1])
    pair.check(pair.step([0], [rows]), rows=last, fits=rows <= 32)
    pair.check(pair.step([0], [rows]), fits=rows <= 32)
    pair.check(pair.step([0, 1], [2, 2]), fits=False)  # several requests with several rows run eagerly


def test_scattered_rows(twins):
    """Rows that are computed again in the middle of a sequence see only their past."""
    pair = twins()
    pair.check(pair.step([0], [60]), fits=False)
    pair.check(pair.step([0], [5], positions=[3, 15, 16, 40, 58]))


def test_results_outlive_the_next_step(twins):
    pair = twins()
    pair.check(pair.step([0], [9]))
    first = pair.check(pair.step([0], [1]))
    kept = first.clone()
    pair.check(pair.step([0], [1]))
    assert torch.equal(first, kept)


def test_record_all_takes_the_largest_first(twins):
    pair = twins(max_batch=6)
    pair.graphs.record_all()
    assert pair.graphs._recorder.recorded == [32, 16, 6, 4, 2, 1]
    assert not pair.graphed.k.any()  # nothing is written while recording
    pair.check(pair.step([0], [20]))
    pair.check(pair.step(range(6), [1] * 6))
    assert len(pair.graphs._recorder.recorded) == 6


def test_recording_late_disturbs_nobody(twins):
    """A size is recorded in the middle of requests that live."""
    pair = twins()
    pair.check(pair.step([0], [20]))
    pair.check(pair.step([1], [9]))
    pair.check(pair.step([0, 1], [1, 1]))
    pair.check(pair.step([0, 1, 2], [1, 1, 1]))


def test_new_weights_drop_the_graphs(twins, tiny_llama):
    pair = twins()
    pair.check(pair.step([0], [20]))
    pair.check(pair.step([0], [1]))
    other = tiny_llama(seed=1)
    pair.model.weights = Weights.from_model(other, pair.model.spec)
    pair.check(pair.step([0], [1]))
    assert pair.graphs._recorder.recorded == [32, 1, 1]
    with torch.no_grad():  # values written into the same tensors are simply seen
        next(iter(other.parameters())).mul_(1.5)
    pair.check(pair.step([0], [1]))
    assert pair.graphs._recorder.recorded == [32, 1, 1]


def test_another_cache_drops_the_graphs(twins):
    pair = twins()
    pair.check(pair.step([0], [20]))
    larger = KVCache(pair.model.spec, BLOCKS, PAGE, torch.float32, torch.device("cpu"))
    larger.k.copy_(pair.graphed.k)
    larger.v.copy_(pair.graphed.v)
    pair.graphed = pair.graphs.cache = larger
    pair.check(pair.step([0], [2]))
    pair.check(pair.step([0], [1]))


def test_inputs_live_as_long_as_their_graph(twins):
    """A CUDA graph holds bare addresses: a recorder that forgets its work must lose no input."""
    seen = []

    class Forgetful:
        def record(self, work):
            step = work.__closure__[2].cell_contents
            values = [getattr(step, f.name) for f in fields(step)]
            seen.extend(weakref.ref(v) for v in values if isinstance(v, torch.Tensor))
            return (lambda: None), work()

    pair = twins(recorder=Forgetful())
    pair.graphs.run(pair.step([0], [1]))
    gc.collect()
    assert len(seen) == 6
    assert all(ref() is not None for ref in seen)


def test_a_failed_recording_means_eager(twins, caplog):
    pair = twins(recorder=Broken())
    pair.check(pair.step([0], [1]), fits=False)
    pair.check(pair.step([0], [1]), fits=False)
    assert caplog.text.count("CUDA graphs are off") == 1


def test_what_does_not_fit_is_eager(twins):
    pair = twins(max_batch=2, prefill_rows=())
    pair.check(pair.step([0], [5]), fits=False)
    pair.check(pair.step([0, 1, 2], [1, 1, 1]), fits=False)
    pair.check(pair.step([0, 1], [1, 1]))
    step = pair.step([0], [1])
    step.block_table = torch.zeros(1, 1000, dtype=torch.int32)
    assert pair.graphs.run(step) is None


def test_an_engine_runs_on_graphs(tiny_llama, make_engine, random_ids):
    """Decoding and short prefills replay; a larger pool and new weights mean new graphs."""
    model, other = tiny_llama(seed=3), tiny_llama(seed=4)
    plain, graphed = (make_engine(model, dtype="float32", pool_tokens=256, max_batch=4) for _ in range(2))
    recorder = Recorder()
    runner = graphed.runner
    runner.graphs = GraphRunner(runner.model, runner.cache, 4, (16, 32), recorder)
    params = SamplingParams(max_new_tokens=9)
    for change in (None, lambda e: e.grow(512), lambda e: e.use_weights(Weights.from_model(other, e.spec))):
        outputs, before = [], len(recorder.recorded)
        for engine in (plain, graphed):
            if change is not None:
                change(engine)
            requests = [engine.add_request([TextSpan(random_ids(n, n))], params) for n in (9, 30, 50)]
            while not engine.idle:
                engine.step()
            engine.check_integrity()
            outputs.append([r.output for r in requests])
        assert outputs[0] == outputs[1]
        assert len(recorder.recorded) > before
        engine.forget_prefixes()
        plain.forget_prefixes()


def test_the_runner_says_when_a_prefill_is_dense(tiny_llama, make_engine, random_ids):
    engine = make_engine(tiny_llama(), dtype="float32")
    seq = engine.add_request([TextSpan(random_ids(20))], SamplingParams(max_new_tokens=1))
    seq.blocks = [1, 2]
    rows = {(0, 1, 2): True, (0,): True, (0, 2, 3): False, (1, 2): False, (19,): False}
    for wanted, dense in rows.items():
        step = engine.runner.step_input([(seq, list(wanted))])
        assert (step.dense, step.max_query_len) == (dense, len(wanted))
    assert not engine.runner.step_input([(seq, [0, 1]), (seq, [0])]).dense


def test_only_a_gpu_gets_graphs(twins, monkeypatch):
    pair = twins()
    assert graph_runner(pair.model, pair.eager) is None
    device, ops = torch.device("cuda"), type("Ops", (), {"CAPTURABLE": True})
    fake = type("Model", (), {"weights": type("W", (), {"device": device}), "ops": ops})
    made = []
    monkeypatch.setattr("memos_engine.decoder.graphs.GraphRunner", lambda *a: made.append(a))
    graph_runner(fake, pair.eager, 4)
    assert made == [(fake, pair.eager, 4)]
    monkeypatch.setenv("MEMOS_ENGINE_CUDA_GRAPHS", "0")
    assert graph_runner(fake, pair.eager) is None
    monkeypatch.delenv("MEMOS_ENGINE_CUDA_GRAPHS")
    ops.CAPTURABLE = False
    assert graph_runner(fake, pair.eager) is None
