"""lora_apply in CUDA C++. The work of a block (csrc/cuda/lora_block.h) runs here on the host, thread after
thread, against float64; how it is launched needs a GPU (bench/gpu_check.sh)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_engine import ops
from memos_engine.errors import KernelContractError
from memos_engine.ops import cuda, reference
from memos_engine.ops.lora import PARTS, LoraRows, LoraTable, pack, unblocked

ROOT = Path(__file__).parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAMES = ("q", "k", "v")


@pytest.fixture(scope="session")
def block(tmp_path_factory):
    """block(problem, tile=0, backwards=False): the blocks of a launch, one after the other."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("THE CUDA KERNEL OF lora_apply IS NOT TESTED: no C++ compiler, or no csrc/ here")
    target = tmp_path_factory.mktemp("lora") / "block.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{ROOT}/csrc/{folder}" for folder in ("include", "cuda")]
    source = str(Path(__file__).with_name("lora_block_host.cpp"))
    done = subprocess.run(
        [compiler, *flags, *includes, source, "-o", str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(target)).lora_block_run
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    function.restype = ctypes.c_int64

    def run(problem, tile=0, backwards=False):
        words = problem.words()
        used = function(words.data_ptr(), problem.table.max_rank, tile, backwards)
        if used < 0:
            pytest.skip(f"THE CUDA KERNEL OF lora_apply IS NOT TESTED in {problem.x.dtype}: no such compiler")
        return used

    run.function = function
    return run


class Problem:
    """Rows of x, up to three products in one wide tensor whose gaps are 7, and slots of any ranks."""

    def __init__(self, dtype, slots, inputs=100, outputs=(70, 33, 45), ranks=(), max_rank=64):
        make, layers = torch.Generator().manual_seed(0), 2
        self.parts, self.slots = NAMES[: len(outputs)], slots
        self.table = LoraTable(len(ranks) + 1, layers, max_rank)  # one is never published
        for slot, own in enumerate(ranks):
            deltas = {}
            for layer in range(layers):
                for part, n, rank in zip(self.parts, outputs, own, strict=True):
                    if rank:
                        a = torch.randn(rank, inputs, generator=make) / inputs**0.5
                        deltas[layer, part] = (a, torch.randn(n, rank, generator=make), 0.25 + slot)
            self.table.publish(slot, pack(deltas, layers, dtype))
        self.x = torch.randn(len(slots), inputs, generator=make).to(dtype)
        self.wide = torch.full((len(slots), sum(outputs) + 3 * len(outputs)), 7.0).to(dtype)
        ends = torch.tensor([n + 3 for n in outputs]).cumsum(0).tolist()
        self.outs = [self.wide[:, end - n - 3 : end - 3] for end, n in zip(ends, outputs, strict=True)]
        for out in self.outs:
            out.copy_(torch.randn(out.shape, generator=make))
        self.before = self.wide.clone()
        self.scales = [1.0, -0.5, 0.75, 2.0, 1.0, 1.0][: len(ranks) + 1]
        self.layer = layers - 1
        self.rows = self.by_slot()

    def by_slot(self):
        """A segment for each slot's rows, up to 16 of them, behind one of no rows and one of no adapter."""
        order, start, slot = [], [0, 0], [0]
        for own in sorted(set(self.slots)):
            mine = [i for i, s in enumerate(self.slots) if s == own]
            for at in range(0, len(mine), 16):
                order += mine[at : at + 16]
                start.append(len(order))
                slot.append(own)
        scale = [self.scales[s] if s >= 0 else 1.0 for s in slot]
        lists = (torch.tensor(x, dtype=torch.int32) for x in (order, start, slot))
        return LoraRows(*lists, torch.tensor(scale, dtype=torch.float32))

    def words(self):
        def three(values):
            return [*values, *[0] * (3 - len(values))]

        rows, x = self.rows, self.x
        lists = (self.table.pointers, rows.order, rows.start, rows.slot, rows.scale)
        words = [x.data_ptr(), *three([o.data_ptr() for o in self.outs])]
        words += three([PARTS.index(p) for p in self.parts]) + three([o.shape[1] for o in self.outs])
        words += [*three([o.stride(0) for o in self.outs]), len(self.outs), DTYPES[x.dtype], *x.shape]
        words += [x.stride(0), self.layer, *(t.data_ptr() for t in lists), len(rows.slot), len(rows.order)]
        return torch.tensor([*words, len(self.table.pointers), self.table.layers])

    def wanted(self):
        """In float64, row by row."""
        results = [out.double() for out in self.outs]
        for row, slot in enumerate(self.slots):
            for part, result in zip(self.parts, results, strict=True):
                fill = None if slot < 0 else self.table.fills[slot]
                delta = None if fill is None else fill.deltas.get((self.layer, part))
                if delta is not None:
                    middle = delta.a.double() @ self.x[row].double() * (delta.scale * self.scales[slot])
                    result[row] += unblocked(delta).double() @ middle
        return results

    def by_torch(self):
        outs = [out.clone() for out in self.outs]
        reference.lora_apply(self.x, outs, self.table, self.layer, self.parts, self.rows)
        return outs

    def check(self, run):
        wanted, torchs = self.wanted(), self.by_torch()
        run()
        gaps = torch.ones(self.wide.shape[1], dtype=torch.bool)
        for out, want, by_torch in zip(self.outs, wanted, torchs, strict=True):
            floor = torch.finfo(self.x.dtype).eps * want.abs().max()
            assert (out - want).abs().max() <= 2 * (by_torch - want).abs().max() + 2 * floor
            begin = (out.data_ptr() - self.wide.data_ptr()) // out.element_size()
            gaps[begin : begin + out.shape[1]] = False
        none = [i for i, s in enumerate(self.slots) if s < 0 or self.table.fills[s] is None]
        assert torch.equal(self.wide[:, gaps], self.before[:, gaps])
        assert torch.equal(self.wide[none], self.before[none])


RANKS = ((1, 3, 16), (64, 0, 5), (33, 32, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [96, 100, 31, 1])
@pytest.mark.parametrize("slots", [[0], [1], [2, -1, 0, 0, 1, 3, 2, 2, 2], [1] * 19], ids=str)
def test_a_block_against_float64(block, dtype, inputs, slots):
    """Odd ranks, inputs and outputs; rows without an adapter, of an empty slot, of a module without delta."""
    problem = Problem(dtype, slots, inputs, ranks=RANKS)
    problem.check(lambda: block(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tiles(block, dtype):
    for tile in (32, 64, 512):
        problem = Problem(dtype, [0, 2, 2, -1], 64, (1200, 33, 513), RANKS)
        problem.check(lambda p=problem, tile=tile: block(p, tile))
    assert block(problem) == 512


def test_tiles_grow_with_segments(block):
    """So that few blocks shrink the same rows, whatever the batch."""
    for segments, tile in ((1, 512), (40, 512), (300, 1024)):
        problem = Problem(torch.float32, [3] * segments, 4, (800, 700), ranks=((1, 1),) * 3)
        start = torch.arange(segments + 1, dtype=torch.int32)
        slot = torch.full((segments,), -1, dtype=torch.int32)
        problem.rows = LoraRows(problem.rows.order, start, slot, torch.ones(segments))
        assert block(problem) == tile


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_mixture_in_either_order_of_threads(block, data):
    """A barrier that is missing would show as a difference between the two orders, or as NaN."""
    ranks = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=3))
    slots = data.draw(st.lists(st.integers(-1, len(ranks)), min_size=1, max_size=9))
    outputs = tuple(data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=2)))
    arguments = (torch.float32, slots, data.draw(st.integers(1, 70)), outputs, ranks)
    forwards, backwards = Problem(*arguments), Problem(*arguments)
    forwards.check(lambda: block(forwards, 32))
    backwards.check(lambda: block(backwards, 32, True))
    assert torch.equal(forwards.wide, backwards.wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_batch(block, dtype):
    together = Problem(dtype, [0, 1, 0, 0, 1, 0, 0, 2], ranks=RANKS)
    block(together)
    for row, slot in enumerate(together.slots):
        alone = Problem(dtype, together.slots, ranks=RANKS)
        alone.slots = [slot if i == row else -1 for i in range(len(together.slots))]
        alone.rows = alone.by_slot()
        block(alone)
        assert torch.equal(alone.wide[row], together.wide[row])


def test_slots_are_read_when_it_runs(block):
    """What a captured graph does: the same arguments again after an exchange."""
    problem = Problem(torch.float32, [0, 1, 0], ranks=RANKS)
    words = problem.words()
    problem.words = lambda: words
    first, second = problem.table.fills[:2]
    outcomes = []
    for fill in (first, second, None, first):
        problem.table.publish(0, fill)
        problem.wide.copy_(problem.before)
        problem.check(lambda: block(problem))
        outcomes.append(problem.wide.clone())
    assert torch.equal(outcomes[0], outcomes[3])
    assert not torch.equal(outcomes[0], outcomes[1])


def test_what_is_not_there_is_not_read(block):
    """Slots, ranges and ranks out of bounds count as no adapter."""
    for name, value in (("slot", 77), ("start", 100), ("start", -5)):
        problem = Problem(torch.float32, [0], ranks=RANKS)
        getattr(problem.rows, name)[-1] = value
        block(problem)
        assert torch.equal(problem.wide, problem.before)
    problem = Problem(torch.float32, [0], ranks=RANKS, max_rank=8)
    untouched = problem.outs[2].clone()
    block(problem)  # rank 16 in a table of at most 8
    assert torch.equal(problem.outs[2], untouched)


class Native:
    """Stands for the CUDA module: keeps what it is called with, and runs the block on the host."""

    LORA_MAX_RANK = 256

    def __init__(self, block):
        self.block, self.calls = block, []

    def lora_apply(self, x, out, part, outputs, out_token, *rest):
        *sizes, lists, counts, max_rank, _ = rest

        def three(values):
            return [*values, *[0] * (3 - len(values))]

        words = [x, *three(out), *three(part), *three(outputs), *three(out_token), len(out), *sizes]
        self.calls.append(torch.tensor([*words, *lists, *counts]))
        assert self.block.function(self.calls[-1].data_ptr(), max_rank, 0, 0) > 0


@pytest.fixture
def native(block, monkeypatch):
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    made = Native(block)
    monkeypatch.setattr(cuda, "_native", made)
    return made


def test_the_backend_hands_over_what_the_kernel_takes(native):
    """The way from tensors to the kernel's arguments, all but the launch."""
    for outputs in ((70, 33, 45), (70, 33), (45,)):
        ranks = [own[: len(outputs)] for own in RANKS]
        problem = Problem(torch.bfloat16, [0, 2, -1, 1, 3], 96, outputs, ranks)
        wanted = problem.words()
        arguments = problem.x, problem.outs, problem.table, problem.layer, problem.parts, problem.rows
        problem.check(lambda a=arguments: cuda.lora_apply(*a))
        assert torch.equal(native.calls[-1], wanted)


def test_who_serves_which_step(native, monkeypatch):
    served = []
    other = type("Other", (), {"lora_apply": lambda *_: served.append("triton")})
    monkeypatch.setattr(cuda, "_triton", other)
    for dtype, rows, max_rank, by in (
        (torch.float32, 64, 64, "native"),
        (torch.float32, 65, 64, "triton"),
        (torch.float32, 3, 257, "triton"),
        (torch.float64, 3, 64, "reference"),
    ):
        before = len(native.calls), len(served)
        problem = Problem(dtype, [0] * rows, 8, (5,), ((2,),), max_rank=max_rank)
        cuda.lora_apply(problem.x, problem.outs, problem.table, 0, problem.parts, problem.rows)
        after = len(native.calls), len(served)
        found = {(1, 0): "native", (0, 1): "triton", (0, 0): "reference"}
        assert found[after[0] - before[0], after[1] - before[1]] == by
    nothing = LoraRows(*(torch.zeros(n, dtype=torch.int32) for n in (0, 1, 0)), torch.zeros(0))
    calls = len(native.calls)
    cuda.lora_apply(problem.x.float(), problem.outs, problem.table, 0, problem.parts, nothing)
    assert len(native.calls) == calls
    monkeypatch.setattr(cuda, "_native", None)
    problem = Problem(torch.float32, [0], 8, (5,), ((2,),))
    cuda.lora_apply(problem.x, problem.outs, problem.table, 0, problem.parts, problem.rows)
    assert served[-1] == "triton"
    assert len(native.calls) == calls


def test_a_rank_beyond_the_table_is_refused():
    problem = Problem(torch.float32, [0], ranks=RANKS, max_rank=8)
    with pytest.raises(KernelContractError, match="rank 16"):
        ops.lora_apply(problem.x, problem.outs, problem.table, 0, problem.parts, problem.rows)


def test_the_module_loads_and_says_what_it_cannot_launch():
    native = pytest.importorskip("memos_engine._cuda", reason="nvcc built no CUDA module")
    lists, sizes = [0] * 5, [1, 1, 1, 1]
    with pytest.raises(RuntimeError, match="lora_apply could not be launched"):
        native.lora_apply(0, [0], [0], [8], [8], 0, 1, 8, 8, 0, lists, sizes, native.LORA_MAX_RANK + 1, 0)
    with pytest.raises(ValueError, match="three"):
        native.lora_apply(0, [0] * 4, [0] * 4, [8] * 4, [8] * 4, 0, 1, 8, 8, 0, lists, sizes, 8, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU has run lora_apply in CUDA C++ here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_device(block, dtype):
    """The launch itself: the bits of the host's run, eagerly and replayed in a graph after an exchange."""
    from memos_engine.ops.lora import fill_from

    assert cuda._native is not None
    problem = Problem(dtype, [2, -1, 0, 0, 1, 3, 2, 2, 2], 96, (1200, 33, 513), RANKS)
    problem.check(lambda: block(problem))
    table = LoraTable(len(problem.table.fills), problem.table.layers, problem.table.max_rank, "cuda")
    for slot, fill in enumerate(problem.table.fills):
        if fill is not None:
            table.publish(slot, fill_from(fill.layout, fill.buffer, table.layers, dtype, "cuda"))
    rows = LoraRows(*(getattr(problem.rows, n).cuda() for n in ("order", "start", "slot", "scale")))
    wide = problem.before.cuda()
    outs = [wide.as_strided(o.shape, o.stride(), o.storage_offset()) for o in problem.outs]
    arguments = problem.x.cuda(), outs, table, problem.layer, problem.parts, rows
    cuda.lora_apply(*arguments)
    assert torch.equal(wide.cpu(), problem.wide)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.lora_apply(*arguments)
    for slot in range(len(table.fills)):
        table.publish(slot, None)
    wide.copy_(problem.before)
    graph.replay()
    assert torch.equal(wide.cpu(), problem.before)
