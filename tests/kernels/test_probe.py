"""attention_probe on every level, against the whole matrix of softmax weights in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_engine import ops
from memos_engine.errors import KernelContractError
from memos_engine.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(backend, probe):
    wanted = probe.exact()
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores.double(), wanted, rtol=1e-5, atol=4e-6)


def bits(scores):
    return scores.view(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 64, 65])
def test_page_edges(backend, make_probe, dtype, length):
    check(backend, make_probe([length], [length], dtype=dtype))
    check(backend, make_probe([length], [1], dim=1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (8, 1)])
def test_heads(backend, make_probe, dtype, dim, heads, kv_heads):
    check(backend, make_probe([70, 3, 21, 40], [30, 1, 2, 3], heads, kv_heads, dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_rows_see_only_their_past(backend, make_probe, dtype):
    check(backend, make_probe([150, 90], [40, 5], 6, 2, 64, dtype, scattered=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 64, 1000, 2**40])
@pytest.mark.parametrize("scattered", [False, True])
def test_window(backend, make_probe, dtype, window, scattered):
    check(backend, make_probe([200, 33], [70, 2], 4, 2, 32, dtype, window=window, scattered=scattered))


def test_ragged_requests(backend, make_probe):
    """Requests without rows or without keys, none at all, and a choice of keys."""
    check(backend, make_probe([5, 20, 7, 90, 60], [0, 12, 1, 3, 0], keys=[5, 0, 7, 33, 0]))
    check(backend, make_probe([30, 20], [0, 0]))
    check(backend, make_probe([700], [40], 9, 3, 64, torch.bfloat16, keys=[301]))
    zero, none = torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    q, pages, scores = torch.ones(0, 4, 16), torch.ones(2, 16, 2, 16), torch.empty(0)
    lse, weight = torch.empty(0, 4), torch.empty(0, 2)
    backend.attention_probe(q, pages, zero, none, lse, none.long(), none, zero, weight, scores, 0.25)


def test_rows_and_keys_of_nobody(backend, make_probe):
    probe = make_probe([50, 40], [6, 2])
    wanted = probe.exact()
    problem = probe.problem
    broken = torch.full((3, 4, 16), float("nan"))
    problem.q = torch.cat((broken, problem.q, broken))
    probe.lse = torch.cat((broken[..., 0], probe.lse, broken[..., 0]))
    problem.q_pos = torch.nn.functional.pad(problem.q_pos, (3, 3), value=99)
    problem.query_start += 3
    probe.key_slots = torch.nn.functional.pad(probe.key_slots, (70, 5), value=10_000)
    probe.key_pos = torch.nn.functional.pad(probe.key_pos, (70, 5))
    probe.weight = torch.nn.functional.pad(probe.weight, (0, 0, 70, 5), value=1.0)
    probe.scores = torch.nn.functional.pad(probe.scores, (70, 5), value=7.0)
    probe.key_start += 70
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores[70:160].double(), wanted, rtol=1e-5, atol=4e-6)
    assert (probe.scores[:70] == 7).all()
    assert (probe.scores[160:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_left_out(backend, make_probe, dtype):
    """Whatever a row with position -1 holds; the others sum up as if it were not there."""
    probe = make_probe([90, 20], [40, 2], 6, 2, 32, dtype, scattered=True)
    problem = probe.problem
    problem.q_pos[::3] = -1
    problem.q[::3] = float("nan")
    probe.lse[::3] = float("nan")
    kept = problem.q_pos >= 0
    counts = [int(kept[:40].sum()), int(kept.sum())]
    few = make_probe([90, 20], [40, 2], 6, 2, 32, dtype, scattered=True)
    few.problem.q, few.problem.q_pos, few.lse = problem.q[kept], problem.q_pos[kept], probe.lse[kept]
    few.problem.query_start = torch.tensor([0, *counts], dtype=torch.int32)
    check(backend, probe)
    check(backend, few)
    assert torch.equal(probe.scores, few.scores)
    before = probe.scores.clone()
    problem.q_pos[:] = -1
    backend.attention_probe(*probe.args())
    assert torch.equal(bits(probe.scores), bits(before))


def test_rows_that_see_nothing_have_no_part(backend, make_probe):
    """lse -inf: their attention came from no key, so none of them is paid anything."""
    probe = make_probe([60], [20])
    problem = probe.problem
    problem.q_pos[::2] = -1
    wanted = probe.exact()
    problem.q_pos[::2] = 59
    probe.lse[::2] = float("-inf")
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores.double(), wanted, rtol=1e-5, atol=4e-6)


def test_skipped_slots(backend, make_probe):
    probe = make_probe([90, 20], [30, 2])
    probe.key_slots[::3] = -1
    probe.key_slots[3] = -(2**40)
    probe.weight[::3] = float("nan")
    probe.scores[::6] = -0.0
    probe.scores[3::6] = float("nan")
    before, wanted = probe.scores.clone(), probe.exact()
    backend.attention_probe(*probe.args())
    assert torch.equal(bits(probe.scores)[::3], bits(before)[::3])
    kept = probe.key_slots >= 0
    torch.testing.assert_close(probe.scores[kept].double(), wanted[kept], rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 20])
def test_keys_that_no_row_sees(backend, make_probe, dtype, window):
    """Before every window and behind every row: their values and weights may be NaN, their scores keep
    their bits."""
    probe = make_probe([200, 30], [30, 1], 6, 2, 32, dtype, window=window)
    problem = probe.problem
    problem.q_pos[:30] = torch.arange(90, 120)
    problem.q_pos[30] = 3
    probe.lse[:] = 2.5
    first = 90 - window + 1 if window else 0
    unseen = (probe.key_pos < first) | (probe.key_pos >= 120)
    unseen[200:] = probe.key_pos[200:] > 3
    where = probe.key_slots[unseen]
    problem.k_pages[where // 16, where % 16] = float("nan")
    probe.weight[unseen] = float("nan")
    probe.scores[unseen] = -0.0
    wanted = probe.scores.clone()
    reference.attention_probe(*probe.args()[:9], wanted, *probe.args()[10:])
    backend.attention_probe(*probe.args())
    assert torch.equal(bits(probe.scores)[unseen], bits(torch.full((int(unseen.sum()),), -0.0)))
    assert torch.isfinite(probe.scores).all()
    torch.testing.assert_close(probe.scores, wanted, rtol=2e-5, atol=4e-6)


def test_calls_add_up(backend, make_probe):
    probe = make_probe([130], [9], 6, 2, 64)
    probe.scores.zero_()
    backend.attention_probe(*probe.args())
    once = probe.scores.clone()
    backend.attention_probe(*probe.args())
    assert torch.equal(probe.scores, once + once)


def test_all_of_the_attention_is_found(backend, make_probe):
    """With weight 1, what all keys are paid is one for each row and head; lse is the backend's own."""
    for dtype in DTYPES:
        probe = make_probe([300, 50], [20, 1], 9, 3, 64, dtype, scattered=True)
        backend.paged_attention(*probe.problem.args(), lse=probe.lse)
        probe.weight[:], probe.scores[:] = 1.0, 0.0
        backend.attention_probe(*probe.args())
        assert probe.scores[:300].sum().item() == pytest.approx(180, rel=1e-4)
        assert probe.scores[300:].sum().item() == pytest.approx(9, rel=1e-4)


@pytest.mark.parametrize("shift", [-60.0, -3.0, 5.0, 95.0])
def test_keys_outside_the_softmax(backend, make_probe, shift):
    """An lse of other keys: weights above one and tiny ones are what exp says."""
    probe = make_probe([80], [20], 4, 2, 32)
    probe.scores.zero_()
    wanted = probe.exact() * torch.exp(torch.tensor(-shift, dtype=torch.float64))
    probe.lse += shift
    backend.attention_probe(*probe.args())
    rounding = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(probe.scores.double(), wanted, rtol=4e-5, atol=max(rounding, 1e-37))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_is_the_same_in_any_batch(backend, make_probe, dtype):
    """Bit for bit: neither its neighbours nor the number of threads may show."""
    probe = make_probe([300, 40, 17, 700, 30], [1, 40, 3, 12, 0], 6, 2, 32, dtype, keys=[200, 40, 0, 500, 3])
    alone = [probe.request(i) for i in range(5)]
    again = probe.scores.clone()
    backend.attention_probe(*probe.args())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scores = again.clone()
            backend.attention_probe(*probe.args()[:9], scores, *probe.args()[10:])
            assert torch.equal(scores, probe.scores)
        torch.set_num_threads(1)
        for i, one in enumerate(alone):
            backend.attention_probe(*one.args())
            keys = slice(int(probe.key_start[i]), int(probe.key_start[i + 1]))
            assert torch.equal(one.scores, probe.scores[keys])
    finally:
        torch.set_num_threads(threads)


def test_keys_come_in_any_order_and_more_than_once(backend, make_probe):
    if backend is reference:
        pytest.skip("torch's matrix product knows where a key stands")
    probe = make_probe([150], [40], 6, 2, 64, torch.bfloat16)
    order = torch.cat((torch.randperm(150, generator=torch.Generator().manual_seed(5)), torch.arange(20)))
    other = probe.request(0)
    for name in ("key_slots", "key_pos", "weight", "scores"):
        setattr(other, name, getattr(probe, name)[order])
    other.key_start = torch.tensor([0, 170], dtype=torch.int32)
    backend.attention_probe(*probe.args())
    backend.attention_probe(*other.args())
    assert torch.equal(other.scores, probe.scores[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend, make_probe, dtype):
    probe = make_probe([50, 30], [20, 2], dtype=dtype)
    scores = probe.scores.clone()
    backend.attention_probe(*probe.args())
    problem = probe.problem
    blocks, page, kv_heads, dim = problem.k_pages.shape
    # Heads before slots (HND), queries as a slice of a fused projection.
    both = torch.full((blocks, 2, kv_heads, page, dim + 3), float("nan"), dtype=dtype)
    k_pages, q = both[:, 1].transpose(1, 2)[..., :dim], torch.randn(22, 9, dim).to(dtype)[:, 2:6]
    k_pages.copy_(problem.k_pages)
    q.copy_(problem.q)
    backend.attention_probe(q, k_pages, *probe.args()[2:9], scores, *probe.args()[10:])
    assert torch.equal(scores, probe.scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pages_of_another_dtype(backend, make_probe, dtype):
    probe = make_probe([60], [30])
    narrow = make_probe([60], [30], dtype=dtype)
    wanted = narrow.exact()
    # Wide queries or wide pages with the narrow ones' values, so that their lse holds.
    probe.problem.q, probe.problem.k_pages = narrow.problem.q.float(), narrow.problem.k_pages
    probe.lse = narrow.lse
    before = probe.scores.clone()
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores.double(), wanted, rtol=1e-5, atol=4e-6)
    probe.problem.q, probe.problem.k_pages = narrow.problem.q, narrow.problem.k_pages.float()
    probe.scores = before
    backend.attention_probe(*probe.args())
    torch.testing.assert_close(probe.scores.double(), wanted, rtol=1e-5, atol=4e-6)


def test_index_values_are_checked(backend, make_probe):
    if backend is reference:
        pytest.skip("torch checks the reference's indices")
    for place, index, value, words in [
        (5, 40, 10_000, "key_slots names a slot outside"),
        (5, 40, None, "key_slots names a slot outside"),
        (2, 2, 24, "query_start"),
        (2, 0, 10, "query_start"),
        (2, 0, -1, "query_start"),
        (7, 2, 61, "key_start"),
        (7, 0, 50, "key_start"),
        (7, 0, -1, "key_start"),
    ]:
        probe = make_probe([40, 20], [3, 20])
        args, before = probe.args(), probe.scores.clone()
        args[place][index] = probe.problem.k_pages.shape[0] * 16 if value is None else value
        with pytest.raises(KernelContractError, match=words):
            backend.attention_probe(*args)
        assert torch.equal(probe.scores, before)


def test_float64_and_the_checked_function(make_probe):
    probe = make_probe([40, 30], [10, 3])
    wanted = probe.exact()
    wide = make_probe([40, 30], [10, 3])
    wide.problem.q, wide.problem.k_pages = wide.problem.q.double(), wide.problem.k_pages.double()
    for one in (probe, wide):
        assert ops.attention_probe(*one.args()) is None
        torch.testing.assert_close(one.scores.double(), wanted, rtol=1e-5, atol=4e-6)


def test_the_reference_in_float64(make_probe):
    probe = make_probe([90, 40], [30, 3], 6, 2, 32, window=25, scattered=True)
    wide = list(probe.wide())
    wide[4] = torch.empty(33, 6, dtype=torch.float64)
    reference.paged_attention(*probe.problem.wide(), lse=wide[4])
    reference.attention_probe(*wide)
    torch.testing.assert_close(wide[9], probe.exact(), rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 1, 16), (3, 1, 64), (4, 2, 32), (6, 2, 96), (2, 2, 5)]),
    requests=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=4
    ),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from([1, 8, 16, 32]),
    window=st.sampled_from([0, 0, 3, 40]),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batch(all_backends, make_probe, shape, requests, dtype, page, window, scattered, seed):
    lengths = [length for length, _, _ in requests]
    rows = [min(count, length) for length, count, _ in requests]
    keys = [min(count, length) for length, _, count in requests]
    named = {"page": page, "window": window, "scattered": scattered, "seed": seed, "keys": keys}
    for backend in all_backends():
        check(backend, make_probe(lengths, rows, *shape, dtype, **named))
