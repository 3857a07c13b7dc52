"""Triton's paged_attention in the interpreter, against float64.

Small shapes of program make short requests take every way: whole, in segments, and both in one call. The
interpreter truncates where a GPU rounds to bfloat16, so there one step is allowed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from memos_engine.ops import reference

pytest.importorskip("triton")
from memos_engine.kernels import paged_attention_launch as launch
from memos_engine.kernels.paged_attention_launch import Shape, choose

SMALL = (Shape(4, 16, 4, 16, 4), Shape(20, 16, 2, 32, 4), Shape(0, 32, 1, 1, 4))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attend(problem, shapes=SMALL, **more):
    return launch.paged_attention(*problem.args(), shapes=shapes, **more)


def plain_torch(problem):
    out = torch.zeros_like(problem.q)
    for i in range(len(problem.seq_lens)):
        rows = slice(int(problem.query_start[i]), int(problem.query_start[i + 1]))
        if rows.start < rows.stop:
            q, k, v, visible = problem.request(i)
            y = scaled_dot_product_attention(q, k, v, visible, scale=problem.sm_scale)
            out[rows] = y.masked_fill(~visible.any(-1)[:, None], 0).transpose(0, 1)
    return out


def check(problem, assert_close, shapes=SMALL, **more):
    exact_lse = torch.empty(problem.q.shape[:2], dtype=torch.float64)
    exact = reference.paged_attention(*problem.wide(), lse=exact_lse)
    lse = torch.full(problem.q.shape[:2], float("nan"))
    out = torch.full_like(problem.q, float("nan"))
    assert attend(problem, shapes, out=out, lse=lse, **more) is out
    if problem.q.dtype == torch.bfloat16:
        torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-5)
    else:
        assert_close(out, plain_torch(problem), exact)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_page_edges(make_problem, assert_close, dtype, length):
    check(make_problem([length], [length], dtype=dtype), assert_close)
    check(make_problem([length], [1], dtype=dtype), assert_close)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 7), (9, 3, 16), (8, 2, 24), (8, 1, 16), (20, 1, 16)]
)
def test_heads(make_problem, assert_close, heads, kv_heads, dim):
    problem = make_problem([70, 3, 21], [24, 1, 5], heads, kv_heads, dim)
    check(problem, assert_close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shapes_in_use(make_problem, assert_close, dtype):
    """A decoding step of several segments, beside a question and a prefill of more rows than any segment."""
    check(make_problem([300], [1], 8, 2, 16, dtype), assert_close, launch.SHAPES)
    check(make_problem([140, 600, 270], [1, 20, 258], 1, 1, 16, dtype), assert_close, launch.SHAPES)


@pytest.mark.parametrize("window", [1, 5, 64, 1000])
@pytest.mark.parametrize("scattered", [False, True])
def test_window(make_problem, assert_close, window, scattered):
    problem = make_problem([200, 90, 33], [24, 7, 2], 4, 2, 16, window=window, scattered=scattered)
    check(problem, assert_close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_rows_see_only_their_past(make_problem, assert_close, dtype):
    check(make_problem([120, 90], [22, 3], 4, 2, 16, dtype, scattered=True), assert_close)


def test_keys_beyond_the_last_visible_one_are_not_read(make_problem):
    for rows in (1, 12, 20):
        problem = make_problem([100], [rows])
        problem.q_pos[:] = torch.arange(20 - rows, 20)
        wanted = attend(problem)
        late = problem.block_table[0, 20 // 16].long()
        problem.k_pages[late, 4:] = float("nan")
        problem.v_pages[late, 4:] = float("nan")
        problem.block_table[0, 2:] = -1
        assert torch.equal(attend(problem), wanted)


@pytest.mark.parametrize("rows", [3, 12, 24])
def test_nothing_visible(make_problem, assert_close, rows):
    problem = make_problem([40, 60], [rows, 2])
    problem.seq_lens[:] = 0
    lse = torch.ones(problem.q.shape[:2])
    assert not attend(problem, lse=lse).any()
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    problem.seq_lens[:] = torch.tensor([40, 60])
    problem.q_pos[:] = -1
    assert not attend(problem).any()
    problem = make_problem([80], [rows])
    problem.q_pos[::3] = -1
    lse = torch.zeros(problem.q.shape[:2])
    out = attend(problem, lse=lse)
    assert not out[::3].any()
    assert (lse[::3] == float("-inf")).all()
    assert_close(out, plain_torch(problem), reference.paged_attention(*problem.wide()))


def test_large_scores(make_problem):
    for rows in (1, 24):
        problem = make_problem([90], [rows], spread=8.0)
        problem.sm_scale = 1.0
        exact = reference.paged_attention(*problem.wide())
        torch.testing.assert_close(attend(problem).double(), exact, rtol=1e-3, atol=1e-3)


def test_empty_requests_and_rows_of_nobody(make_problem, assert_close):
    check(make_problem([5, 20, 7, 3, 60], [0, 12, 0, 1, 0]), assert_close)
    problem = make_problem([], [])
    assert attend(problem).shape == (0, 4, 16)
    problem = make_problem([50, 40], [6, 2])
    wanted = attend(problem)
    problem.q = torch.cat((torch.ones(3, 4, 16), problem.q, torch.ones(5, 4, 16)))
    problem.q_pos = torch.cat((torch.zeros(3), problem.q_pos, torch.zeros(5))).int()
    problem.query_start += 3
    out = torch.full_like(problem.q, 7.0)
    attend(problem, out=out)
    assert torch.equal(out[3:11], wanted)
    assert (out[:3] == 7).all()
    assert (out[11:] == 7).all()


def test_strides_and_out(make_problem):
    problem = make_problem([50, 30, 70], [20, 2, 7])
    wanted = attend(problem)
    blocks, page, kv_heads, dim = problem.k_pages.shape
    both = torch.full((blocks, 2, kv_heads, page, dim + 3), float("nan"))
    k_pages, v_pages = (both[:, side].transpose(1, 2)[..., :dim] for side in (0, 1))
    k_pages.copy_(problem.k_pages)
    v_pages.copy_(problem.v_pages)
    q = torch.randn(29, 9, dim)[:, 2:6]
    q.copy_(problem.q)
    wide_out = torch.full((29, 6, dim), 7.0)
    table = torch.full((3, 19), -1, dtype=torch.int32)[:, : problem.block_table.shape[1]]
    table.copy_(problem.block_table)
    problem.q, problem.k_pages, problem.v_pages, problem.block_table = q, k_pages, v_pages, table
    assert torch.equal(attend(problem, out=wide_out[:, 1:5]), wanted)
    assert (wide_out[:, [0, 5]] == 7).all()


def test_pages_of_another_dtype(make_problem, assert_close):
    for rows in (2, 30):
        problem, narrow = (make_problem([60], [rows], dtype=d) for d in (torch.float32, torch.bfloat16))
        problem.k_pages, problem.v_pages = narrow.k_pages, narrow.v_pages
        exact = reference.paged_attention(*problem.wide())
        assert_close(attend(problem), reference.paged_attention(*problem.args()), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_request_is_the_same_in_any_batch(make_problem, dtype):
    problem = make_problem([150, 40, 17, 90, 50], [1, 24, 3, 12, 0], 3, 1, 16, dtype)
    together = attend(problem)
    assert torch.equal(attend(problem, max_query_len=24), together)
    for i in range(5):
        rows = slice(int(problem.query_start[i]), int(problem.query_start[i + 1]))
        alone = launch.paged_attention(
            problem.q[rows],
            problem.k_pages,
            problem.v_pages,
            problem.block_table[i : i + 1],
            torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
            problem.seq_lens[i : i + 1],
            problem.q_pos[rows],
            problem.sm_scale,
            shapes=SMALL,
        )
        assert torch.equal(alone, together[rows])


def test_only_the_shapes_that_are_needed():
    first, second, last = SMALL
    assert list(choose(SMALL, 1, 3)) == [(first, 1)]
    assert list(choose(SMALL, 1, 5)) == [(second, 1)]
    assert list(choose(SMALL, 1, 21)) == [(last, 1)]
    assert list(choose(SMALL, 2, 4)) == [(first, 1)]
    assert list(choose(SMALL, 2, 21)) == [(first, 1), (second, 5), (last, 21)]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 1, 16), (3, 1, 32), (4, 2, 16), (2, 2, 5)]),
    requests=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from([1, 8, 16, 24]),
    window=st.sampled_from([0, 0, 3, 40]),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batch(make_problem, assert_close, shape, requests, dtype, page, window, scattered, seed):
    lengths = [length for length, _ in requests]
    rows = [min(count, length) for length, count in requests]
    heads, kv_heads, dim = shape
    problem = make_problem(lengths, rows, heads, kv_heads, dim, dtype, page, window, scattered, seed=seed)
    check(problem, assert_close)
