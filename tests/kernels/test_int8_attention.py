"""paged_attention and attention_probe over int8 pages, against float64 from the values that these hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_engine import ops
from memos_engine.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def check(assert_close, plain_attention):
    """The rule for attention, against the same pages of floats."""

    def run(backends, narrow):
        exact_lse = torch.empty(narrow.problem.q.shape[:2], dtype=torch.float64)
        exact = reference.paged_attention(*narrow.floats(torch.float64).args(), lse=exact_lse)
        plain = plain_attention(narrow.floats())
        for backend in backends:
            lse = torch.full(exact_lse.shape, float("nan"))
            out = narrow.attend(backend, lse=lse)
            assert out.dtype == narrow.problem.q.dtype
            assert_close(out, plain, exact)
            torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=2e-6)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_page_edges(backend, make_int8_problem, check, dtype, length):
    for rows in {1, length}:
        check([backend], make_int8_problem([length], [rows], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (8, 1)])
def test_heads(backend, make_int8_problem, check, dtype, dim, heads, kv_heads):
    check([backend], make_int8_problem([70, 3, 21, 40], [30, 1, 2, 3], heads, kv_heads, dim, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 3, 9, 33, 100])
@pytest.mark.parametrize("scattered", [False, True])
def test_dozens_of_rows(backend, make_int8_problem, check, rows, scattered):
    """On both sides of the switch between the decode and the tile kernel, with a window and without."""
    for window in (0, 37):
        narrow = make_int8_problem(
            [211, 90], [rows, 5], 9, 3, 64, dtype=torch.bfloat16, window=window, scattered=scattered
        )
        check([backend], narrow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_context(backend, make_int8_problem, check, dtype):
    """Several ranges of keys are joined."""
    check([backend], make_int8_problem([2222, 700, 20], [1, 32, 3], 9, 3, 64, dtype=dtype))


def test_scales_of_all_sizes(backend, make_int8_problem, check):
    """Scales belong to their own token and head: here each differs from its neighbours by much."""
    for rows in (1, 40):
        narrow = make_int8_problem([150], [rows], 4, 2, 32, spread=0.3)
        for scale in narrow.scales.values():
            scale *= torch.exp2(torch.randint(-4, 3, scale.shape).float())
        check([backend], narrow)


def test_zero_scales_are_zeros(backend, make_int8_problem, check):
    narrow = make_int8_problem([90], [20], 4, 2, 16)
    for scale in narrow.scales.values():
        scale[:, ::3] *= 0
    check([backend], narrow)
    narrow.scales["v_page_scale"].nan_to_num_().zero_()
    assert not narrow.attend(backend).any()


def test_the_null_block_is_a_key_of_zeros(backend):
    """What padding of a captured step looks at."""
    pages, scale = torch.zeros(3, 16, 2, 16, dtype=torch.int8), torch.zeros(3, 16, 2)
    one = torch.ones(1, dtype=torch.int32)
    index = (0 * one[None], torch.tensor([0, 1], dtype=torch.int32), one, 0 * one)
    out = backend.paged_attention(
        torch.randn(1, 4, 16), pages, pages, *index, 0.25, k_page_scale=scale, v_page_scale=scale
    )
    assert not out.any()


def test_nothing_behind_the_last_visible_key_is_read(backend, make_int8_problem):
    for rows in (1, 12, 40):
        narrow = make_int8_problem([100], [rows])
        narrow.problem.q_pos[:] = torch.arange(60 - rows, 60)
        wanted = narrow.attend(backend)
        late = narrow.problem.block_table[0, 60 // 16].long()
        for scale in narrow.scales.values():
            scale[late, 60 % 16 :] = float("nan")
        assert torch.equal(narrow.attend(backend), wanted)
        assert torch.isfinite(wanted).all()


def test_one_by_one_is_the_batch(backend, make_int8_problem):
    if backend is reference:
        pytest.skip("torch's products make no such promise")
    narrow = make_int8_problem([150, 20, 400], [1, 12, 30], 6, 2, 64, dtype=torch.bfloat16)
    whole, problem = narrow.attend(backend), narrow.problem
    for i in range(3):
        rows = slice(int(problem.query_start[i]), int(problem.query_start[i + 1]))
        start = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        alone = replace(
            problem, q=problem.q[rows], q_pos=problem.q_pos[rows], query_start=start,
            block_table=problem.block_table[i : i + 1], seq_lens=problem.seq_lens[i : i + 1],
        )  # fmt: skip
        assert torch.equal(replace(narrow, problem=alone).attend(backend), whole[rows])


def test_pages_may_be_strided(backend, make_int8_problem):
    """K and V interleaved with heads before tokens, in one tensor."""
    narrow = make_int8_problem([100, 30], [20, 1], 6, 3, 16)
    k, v = narrow.problem.k_pages, narrow.problem.v_pages
    both = torch.stack((k, v), dim=1).transpose(2, 3).contiguous()
    views = (both[:, side].transpose(1, 2) for side in (0, 1))
    strided = replace(narrow.problem, **dict(zip(("k_pages", "v_pages"), views, strict=True)))
    wanted, got = narrow.attend(backend), replace(narrow, problem=strided).attend(backend)
    assert torch.equal(got, wanted)
    assert torch.equal(ops.paged_attention(*strided.args(), **narrow.scales), narrow.attend(ops))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (9, 3, 64), (8, 1, 7)])
@pytest.mark.parametrize("window", [0, 20])
def test_probe(backend, make_int8_probe, assert_close, dtype, heads, kv_heads, dim, window):
    probe, narrow = make_int8_probe(
        [70, 33, 5], [20, 33, 1], heads, kv_heads, dim, dtype=dtype, window=window
    )
    exact = replace(probe, problem=narrow.floats(torch.float64)).exact()
    plain = replace(probe, problem=narrow.floats(), scores=probe.scores.clone())
    reference.attention_probe(*plain.args())
    probe.key_slots[::7] = -1
    kept = probe.scores[::7].clone()
    exact[::7] = kept.double()
    plain.scores[::7] = kept
    backend.attention_probe(*probe.args(), k_page_scale=narrow.scales["k_page_scale"])
    assert torch.equal(probe.scores[::7], kept)
    assert_close(probe.scores, plain.scores, exact)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    dim=st.sampled_from([1, 8, 20, 32, 64, 96]),
    page=st.sampled_from([1, 3, 16]),
    window=st.sampled_from([0, 0, 1, 40]),
    dtype=st.sampled_from(DTYPES),
    scattered=st.booleans(),
    data=st.data(),
)
def test_any_batch(
    all_backends,
    make_int8_problem,
    check,
    lengths,
    kv_heads,
    group,
    dim,
    page,
    window,
    dtype,
    scattered,
    data,
):
    rows = [data.draw(st.integers(1, length)) for length in lengths]
    narrow = make_int8_problem(
        lengths, rows, kv_heads * group, kv_heads, dim,
        dtype=dtype, page=page, window=window, scattered=scattered, seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    check(all_backends(), narrow)
