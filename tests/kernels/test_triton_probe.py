"""Triton's attention_probe in the interpreter, against the whole matrix of softmax weights in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_engine.ops import reference

pytest.importorskip("triton")
from memos_engine.ops import cuda
from memos_engine.ops import triton as backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(probe):
    wanted = probe.exact()
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores.double(), wanted, rtol=1e-5, atol=4e-6)


def bits(scores):
    return scores.view(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_page_edges(make_probe, dtype, length):
    check(make_probe([length], [length], dtype=dtype))
    check(make_probe([length], [1], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 7), (9, 3, 64), (8, 2, 80), (8, 1, 128), (40, 1, 16)]
)
def test_heads(make_probe, dtype, heads, kv_heads, dim):
    check(make_probe([70, 3, 21], [24, 1, 5], heads, kv_heads, dim, dtype))


@pytest.mark.parametrize("window", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("scattered", [False, True])
def test_window(make_probe, window, scattered):
    check(make_probe([200, 90, 33], [24, 7, 2], 4, 2, 16, window=window, scattered=scattered))


def test_ragged_requests(make_probe):
    check(make_probe([5, 20, 7, 90, 60], [0, 12, 1, 3, 0], keys=[5, 0, 7, 33, 0]))
    check(make_probe([30, 20], [0, 0]))
    check(make_probe([30, 20], [3, 1], keys=[0, 0]))


def test_rows_and_keys_of_nobody(make_probe):
    """More keys in front of the first request than a program's block holds."""
    probe = make_probe([50, 40], [6, 2])
    wanted = probe.exact()
    probe.key_slots = torch.nn.functional.pad(probe.key_slots, (70, 35), value=10_000)
    probe.key_pos = torch.nn.functional.pad(probe.key_pos, (70, 35))
    probe.weight = torch.nn.functional.pad(probe.weight, (0, 0, 70, 35), value=1.0)
    probe.scores = torch.nn.functional.pad(probe.scores, (70, 35), value=7.0)
    probe.key_start += 70
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores[70:160].double(), wanted, rtol=1e-5, atol=4e-6)
    assert (probe.scores[:70] == 7).all()
    assert (probe.scores[160:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_left_out_and_rows_without_attention(make_probe, dtype):
    probe = make_probe([90, 20], [40, 2], 6, 2, 16, dtype, scattered=True)
    problem = probe.problem
    problem.q_pos[::3] = -1
    wanted = probe.exact()
    problem.q[::3] = float("nan")
    probe.lse[::3] = float("nan")
    problem.q_pos[::9] = 5
    probe.lse[::9] = float("-inf")
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores.double(), wanted, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("window", [0, 20])
def test_keys_that_no_row_sees_and_skipped_ones(make_probe, window):
    probe = make_probe([200], [12], 6, 2, 16, window=window)
    problem = probe.problem
    problem.q_pos[:] = torch.arange(108, 120)
    probe.lse[:] = 2.5
    untouched = (probe.key_pos < (108 - window + 1 if window else 0)) | (probe.key_pos >= 120)
    where = probe.key_slots[untouched]
    problem.k_pages[where // 16, where % 16] = float("nan")
    probe.key_slots[::7] = -1
    untouched[::7] = True
    probe.weight[untouched] = float("nan")
    probe.scores[untouched] = -0.0
    probe.scores[0] = float("nan")
    before, wanted = probe.scores.clone(), probe.scores.clone()
    reference.attention_probe(*probe.args()[:9], wanted, *probe.args()[10:])
    backend.attention_probe(*probe.args())
    assert torch.equal(bits(probe.scores)[untouched], bits(before)[untouched])
    torch.testing.assert_close(probe.scores[1:], wanted[1:], rtol=2e-5, atol=4e-6)


def test_calls_add_up(make_probe):
    probe = make_probe([70], [9], 6, 2, 16)
    probe.scores.zero_()
    backend.attention_probe(*probe.args())
    once = probe.scores.clone()
    backend.attention_probe(*probe.args())
    assert torch.equal(probe.scores, once + once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_request_is_the_same_in_any_batch(make_probe, dtype):
    probe = make_probe([100, 40, 17, 90, 30], [1, 24, 3, 12, 0], 3, 1, 16, dtype, keys=[70, 40, 0, 65, 3])
    alone = [probe.request(i) for i in range(5)]
    backend.attention_probe(*probe.args())
    for i, one in enumerate(alone):
        backend.attention_probe(*one.args())
        keys = slice(int(probe.key_start[i]), int(probe.key_start[i + 1]))
        assert torch.equal(one.scores, probe.scores[keys])


def test_strides(make_probe):
    probe = make_probe([50, 30], [20, 2])
    scores, problem = probe.scores.clone(), probe.problem
    backend.attention_probe(*probe.args())
    blocks, page, kv_heads, dim = problem.k_pages.shape
    both = torch.full((blocks, 2, kv_heads, page, dim + 3), float("nan"))
    k_pages, q = both[:, 1].transpose(1, 2)[..., :dim], torch.randn(22, 9, dim)[:, 2:6]
    k_pages.copy_(problem.k_pages)
    q.copy_(problem.q)
    backend.attention_probe(q, k_pages, *probe.args()[2:9], scores, *probe.args()[10:])
    assert torch.equal(scores, probe.scores)


def test_pages_of_another_dtype(make_probe):
    probe = make_probe([60], [20])
    probe.problem.k_pages = make_probe([60], [20], dtype=torch.bfloat16).problem.k_pages
    wanted = probe.scores.clone()
    reference.attention_probe(*probe.args()[:9], wanted, *probe.args()[10:])
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores, wanted, rtol=1e-5, atol=4e-6)


def test_the_cuda_backend_takes_it(make_probe):
    probes = [make_probe([40], [5]) for _ in range(2)]
    cuda.attention_probe(*probes[0].args())
    backend.attention_probe(*probes[1].args())
    assert torch.equal(probes[0].scores, probes[1].scores)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 1, 16), (3, 1, 32), (4, 2, 16), (2, 2, 5)]),
    requests=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=5
    ),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from([1, 8, 16, 24]),
    window=st.sampled_from([0, 0, 3, 40]),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batch(make_probe, shape, requests, dtype, page, window, scattered, seed):
    lengths = [length for length, _, _ in requests]
    rows = [min(count, length) for length, count, _ in requests]
    keys = [min(count, length) for length, _, count in requests]
    named = {"page": page, "window": window, "scattered": scattered, "seed": seed, "keys": keys}
    check(make_probe(lengths, rows, *shape, dtype, **named))
