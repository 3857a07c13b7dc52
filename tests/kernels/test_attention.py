"""paged_attention on every level, against float64 on the already rounded inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from memos_engine.errors import KernelContractError
from memos_engine.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain_torch(problem):
    """Each request densely by torch's own attention, in the inputs' dtype."""
    out = torch.zeros_like(problem.q)
    for i in range(len(problem.seq_lens)):
        rows = slice(int(problem.query_start[i]), int(problem.query_start[i + 1]))
        if rows.start == rows.stop:
            continue
        q, k, v, visible = problem.request(i)
        # torch gives NaN to rows that see nothing.
        y = scaled_dot_product_attention(q, k, v, visible, scale=problem.sm_scale)
        out[rows] = y.masked_fill(~visible.any(-1)[:, None], 0).transpose(0, 1)
    return out


def check(backend, problem, assert_close):
    check_all([backend], problem, assert_close)


def check_all(backends, problem, assert_close):
    exact_lse = torch.empty(problem.q.shape[:2], dtype=torch.float64)
    exact = reference.paged_attention(*problem.wide(), lse=exact_lse)
    plain = plain_torch(problem)
    for backend in backends:
        lse = torch.full(problem.q.shape[:2], float("nan"))
        out = backend.paged_attention(*problem.args(), lse=lse)
        assert out.dtype == problem.q.dtype
        assert_close(out, plain, exact)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_page_edges(backend, make_problem, assert_close, dtype, length):
    check(backend, make_problem([length], [length], dtype=dtype), assert_close)
    check(backend, make_problem([length], [1], dtype=dtype), assert_close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (8, 1)])
def test_heads(backend, make_problem, assert_close, dtype, dim, heads, kv_heads):
    problem = make_problem([70, 3, 21, 40], [30, 1, 2, 3], heads, kv_heads, dim, dtype)
    check(backend, problem, assert_close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_rows_see_only_their_past(backend, make_problem, assert_close, dtype):
    problem = make_problem([150, 90], [40, 5], 6, 2, 64, dtype, scattered=True)
    check(backend, problem, assert_close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 64, 1000])
@pytest.mark.parametrize("scattered", [False, True])
def test_window(backend, make_problem, assert_close, dtype, window, scattered):
    problem = make_problem([200, 33], [70, 2], 4, 2, 32, dtype, window=window, scattered=scattered)
    check(backend, problem, assert_close)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (6, 6, 32), (4, 1, 96), (8, 1, 128)])
@pytest.mark.parametrize("rows", [9, 16, 33, 100])
def test_dozens_of_rows(backend, make_problem, assert_close, heads, kv_heads, dim, rows):
    """Where bfloat16 is multiplied in pairs: every number of tiles, the last one in part."""
    shape = (heads, kv_heads, dim, torch.bfloat16)
    check(backend, make_problem([211], [rows], *shape), assert_close)
    check(backend, make_problem([211], [rows], *shape, page=8, window=37, scattered=True), assert_close)


@pytest.mark.parametrize("scattered", [False, True])
def test_long_context(backend, make_problem, assert_close, scattered):
    for window in (0, 1500):
        problem = make_problem(
            [3333, 20], [32, 3], 9, 3, 64, torch.bfloat16, window=window, scattered=scattered
        )
        check(backend, problem, assert_close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_grow(backend, make_problem, assert_close, dtype):
    """Each block of keys has higher scores than the one before, for some rows: maxima and sums follow."""
    problem = make_problem([500], [60], 3, 1, 64, dtype, spread=0.5)
    blocks = problem.block_table[0, :32].long()
    problem.k_pages[blocks] += torch.linspace(-2, 2, 32)[:, None, None, None].to(dtype)
    problem.q[::2] += 0.25
    check(backend, problem, assert_close)


def test_rows_do_not_show_in_each_other(backend, make_problem):
    if backend is reference:
        pytest.skip("torch's products make no such promise")
    problem = make_problem([300], [20], 6, 2, 64, torch.bfloat16)
    wanted = backend.paged_attention(*problem.args())
    problem.q[::2] *= 30
    assert torch.equal(backend.paged_attention(*problem.args())[1::2], wanted[1::2])


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_split_keys_join(backend, make_problem, assert_close, rows):
    """Longer than one key range, on both sides of the switch between the decode and the tile kernel."""
    for length in (256, 257, 1100):
        check(backend, make_problem([length], [rows], 3, 1, 16), assert_close)
        check(backend, make_problem([length], [rows], 3, 1, 16, window=300, scattered=True), assert_close)


@pytest.mark.parametrize("rows", [1, 40])
def test_large_scores(backend, make_problem, rows):
    """Scores far beyond the range of exp in float32, where rounding them costs what it costs."""
    problem = make_problem([90], [rows], spread=8.0)
    problem.sm_scale = 1.0
    exact = reference.paged_attention(*problem.wide())
    torch.testing.assert_close(backend.paged_attention(*problem.args()).double(), exact, rtol=1e-3, atol=1e-3)


def test_nothing_visible(backend, make_problem):
    problem = make_problem([40, 40], [3, 20])
    problem.seq_lens[:] = 0
    lse = torch.ones(problem.q.shape[:2])
    assert not backend.paged_attention(*problem.args(), lse=lse).any()
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    problem.seq_lens[:] = 40
    problem.q_pos[:] = -1
    assert not backend.paged_attention(*problem.args()).any()


def test_nothing_visible_after_broken_values(backend, make_problem):
    """What an earlier call left in a worker's scratch is not read: NaN times weight 0 would stay NaN."""
    for rows in (1, 3, 8):
        broken = make_problem([40] * 8, [rows] * 8)
        broken.v_pages[:] = float("nan")
        assert backend.paged_attention(*broken.args()).isnan().all()
        broken.v_pages[:] = 1.0
        broken.q_pos[:] = -1
        lse = torch.ones(broken.q.shape[:2])
        assert torch.equal(backend.paged_attention(*broken.args(), lse=lse), torch.zeros_like(broken.q))
        assert torch.equal(lse, torch.full_like(lse, float("-inf")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_see_nothing(backend, make_problem, assert_close, dtype):
    problem = make_problem([40], [20], dim=32, dtype=dtype)
    problem.q_pos[::3] = -1
    lse = torch.zeros(problem.q.shape[:2])
    out = backend.paged_attention(*problem.args(), lse=lse)
    assert not out[::3].any()
    assert (lse[::3] == float("-inf")).all()
    assert_close(out, plain_torch(problem), reference.paged_attention(*problem.wide()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_beyond_the_last_visible_one_are_not_read(backend, make_problem, dtype):
    """A row in the middle of a sequence whose later slots are not written yet."""
    for rows in (1, 20):
        problem = make_problem([100], [rows], dim=32, dtype=dtype)
        problem.q_pos[:] = torch.arange(20 - rows, 20)
        wanted = backend.paged_attention(*problem.args())
        late = problem.block_table[0, 20 // 16].long()
        problem.k_pages[late, 4:] = float("nan")
        problem.v_pages[late, 4:] = float("nan")
        problem.block_table[0, 2:] = -1
        assert torch.equal(backend.paged_attention(*problem.args()), wanted)


def test_empty_requests(backend, make_problem, assert_close):
    check(backend, make_problem([5, 20, 7, 3], [0, 20, 0, 1]), assert_close)
    problem = make_problem([], [])
    assert backend.paged_attention(*problem.args()).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 32])
def test_strides_and_out(backend, make_problem, dtype, dim):
    problem = make_problem([50, 30], [20, 2], dim=dim, dtype=dtype)
    wanted = backend.paged_attention(*problem.args())
    blocks, page, kv_heads, dim = problem.k_pages.shape
    # K and V side by side, heads before slots (HND), queries as a slice of a fused projection.
    both = torch.full((blocks, 2, kv_heads, page, dim + 3), float("nan"), dtype=dtype)
    k_pages, v_pages = (both[:, side].transpose(1, 2)[..., :dim] for side in (0, 1))
    k_pages.copy_(problem.k_pages)
    v_pages.copy_(problem.v_pages)
    q = torch.randn(22, 9, dim).to(dtype)[:, 2:6]
    q.copy_(problem.q)
    wide_out = torch.full((22, 6, dim), 7.0, dtype=dtype)
    table = torch.full((2, 9), -1, dtype=torch.int32)[:, : problem.block_table.shape[1]]
    table.copy_(problem.block_table)
    problem.q, problem.k_pages, problem.v_pages, problem.block_table = q, k_pages, v_pages, table
    result = backend.paged_attention(*problem.args(), out=wide_out[:, 1:5])
    assert result.data_ptr() == wide_out[:, 1:5].data_ptr()
    assert torch.equal(result, wanted)
    assert (wide_out[:, 0] == 7).all()
    assert (wide_out[:, 5] == 7).all()


def test_pages_of_another_dtype(backend, make_problem, assert_close):
    problem = make_problem([60], [30])
    narrow = make_problem([60], [30], dtype=torch.bfloat16)
    problem.k_pages, problem.v_pages = narrow.k_pages, narrow.v_pages
    exact = reference.paged_attention(*problem.wide())
    assert_close(backend.paged_attention(*problem.args()), reference.paged_attention(*problem.args()), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_is_the_same_in_any_batch(backend, make_problem, dtype):
    """Bit for bit: neither its neighbours nor the number of threads may show."""
    problem = make_problem([300, 40, 17, 700], [1, 40, 3, 12], 6, 2, 32, dtype)
    together = backend.paged_attention(*problem.args())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for i in range(4):
        rows = slice(int(problem.query_start[i]), int(problem.query_start[i + 1]))
        count = rows.stop - rows.start
        alone = backend.paged_attention(
            problem.q[rows],
            problem.k_pages,
            problem.v_pages,
            problem.block_table[i : i + 1],
            torch.tensor([0, count], dtype=torch.int32),
            problem.seq_lens[i : i + 1],
            problem.q_pos[rows],
            problem.sm_scale,
        )
        assert torch.equal(alone, together[rows])
    torch.set_num_threads(threads)


def test_index_values_are_checked(backend, make_problem):
    if backend is reference:
        pytest.skip("torch checks the reference's indices")

    def broken(name, index, value):
        problem = make_problem([40, 20], [3, 20])
        getattr(problem, name)[index] = value
        return problem.args()

    for args, words in [
        (broken("block_table", (0, 1), 99), "block outside"),
        (broken("block_table", (1, 0), -1), "block outside"),
        (broken("query_start", 2, 24), "query_start"),
        (broken("query_start", 0, 10), "query_start"),
        (broken("seq_lens", 0, 10_000), "sees more keys"),
    ]:
        problem_args = list(args)
        if words == "sees more keys":
            problem_args[6] = torch.full_like(args[6], 9_999)
        with pytest.raises(KernelContractError, match=words):
            backend.paged_attention(*problem_args)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 1, 16), (3, 1, 64), (4, 2, 32), (6, 2, 96), (2, 2, 5)]),
    requests=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from([1, 8, 16, 32]),
    window=st.sampled_from([0, 0, 3, 40]),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    all_backends, make_problem, assert_close, shape, requests, dtype, page, window, scattered, seed
):
    lengths = [length for length, _ in requests]
    rows = [min(count, length) for length, count in requests]
    heads, kv_heads, dim = shape
    problem = make_problem(lengths, rows, heads, kv_heads, dim, dtype, page, window, scattered, seed=seed)
    check_all(all_backends(), problem, assert_close)
