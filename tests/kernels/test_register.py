"""torch.ops.memos_engine: schemas, fakes and mutation by torch's own checker, and through torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import memos_engine.ops.register  # noqa: F401
from memos_engine import ops

library = torch.ops.memos_engine


def kv(*layers):
    new = torch.randn(*layers, 5, 2, 16)
    pages = torch.zeros(*layers, 4, 16, 2, 16)
    slots, positions = torch.arange(5) + 20, torch.arange(5, dtype=torch.int32)
    return new, new.clone(), pages, pages.clone(), slots, positions


def probe(problem):
    lse = torch.full(problem.q.shape[:2], 3.0)
    slots, positions = torch.tensor([16, -1, 17]), torch.arange(3, dtype=torch.int32)
    start, weight, scores = torch.tensor([0, 2, 3], dtype=torch.int32), torch.rand(3, 2), torch.zeros(3)
    queries = (problem.q, problem.k_pages, problem.query_start, problem.q_pos, lse)
    return *queries, slots, positions, start, weight, scores, problem.sm_scale


def kv_int8():
    """Five tokens in the middle of a record, across the border of two groups."""
    k, v = (torch.randint(-127, 128, (3, 5, 2, 16), dtype=torch.int8) for _ in range(2))
    return k, v, torch.rand(3, 2, 2, 16), torch.rand(3, 5, 2), *kv(3)[2:]


def int8_pages(*layers):
    """K and V pages and their scales."""
    values, scale = torch.zeros(*layers, 4, 16, 2, 16, dtype=torch.int8), torch.zeros(*layers, 4, 16, 2)
    return values, values.clone(), scale, scale.clone()


def samples(make_problem):
    problem = make_problem([20, 5], [3, 1])
    # opcheck compares copies of the arguments, and NaN is not equal to itself.
    problem.k_pages.nan_to_num_()
    problem.v_pages.nan_to_num_()
    q, *rest = problem.args()
    table = ops.rope_table(torch.rand(8), 10)
    x, weight = torch.randn(3, 16), torch.randn(16)
    return {
        "paged_attention": (q, *rest),
        "paged_attention_out": (q, torch.zeros_like(q), torch.zeros(q.shape[:2]), *rest),
        "attention_probe": probe(problem),
        "append_kv": (*kv(), table),
        "splice_kv": (*kv(3), None),
        "splice_kv_int8": (*kv_int8(), table, False, 62),
        "rope": (torch.randn(3, 2, 16), torch.arange(3, dtype=torch.int32), table),
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, torch.randn(3, 16), weight, 1e-5),
        "silu_mul": (x, torch.randn(3, 16)),
        "linear": (x, torch.randn(7, 16)),
    }


NAMES = [
    "paged_attention",
    "paged_attention_out",
    "attention_probe",
    "append_kv",
    "splice_kv",
    "splice_kv_int8",
    "rope",
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "linear",
]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(make_problem, name):
    opcheck(getattr(library, name).default, samples(make_problem)[name])


def test_opcheck_over_int8_pages(make_problem):
    """The same ops: optional scales, read by some and written by others."""
    problem = make_problem([20, 5], [3, 1])
    q, _, _, *index, sm_scale, window = problem.args()
    place = (torch.arange(5) + 20, torch.arange(5, dtype=torch.int32), None, False)
    for layers, op, more in (((), library.append_kv, ()), ((2,), library.splice_kv, ())):
        (k, v, *_), (*pages, k_scale, v_scale) = kv(*layers), int8_pages(*layers)
        opcheck(op.default, (k, v, *pages, *place, *more, k_scale, v_scale))
        op(k, v, *pages, *place, *more, k_scale, v_scale)
        assert k_scale.any()
        assert pages[1].any()
    k, v, k_scale, v_scale, *_ = kv_int8()
    *pages, k_page_scale, v_page_scale = int8_pages(3)
    opcheck(
        library.splice_kv_int8.default,
        (k, v, k_scale, v_scale, *pages, *place, 62, k_page_scale, v_page_scale),
    )
    blocks = problem.k_pages.shape[0]
    values, scale = torch.ones(blocks, 16, 2, 16, dtype=torch.int8), torch.rand(blocks, 16, 2)
    attend = (q, values, values, *index, sm_scale, window, scale, scale)
    opcheck(library.paged_attention.default, attend)
    out = torch.zeros_like(q)
    opcheck(library.paged_attention_out.default, (q, out, None, *attend[1:]))
    queries, keys = probe(problem)[:5], probe(problem)[5:]
    probed = (q, values, *queries[2:], *keys, 0, scale)
    opcheck(library.attention_probe.default, probed)


def test_results_are_those_of_the_seam(make_problem):
    problem = make_problem([20, 5], [3, 1])
    wanted = ops.paged_attention(*problem.args())
    assert torch.equal(library.paged_attention(*problem.args()), wanted)
    out, lse = torch.zeros_like(problem.q), torch.zeros(problem.q.shape[:2])
    library.paged_attention_out(problem.q, out, lse, *problem.args()[1:])
    assert torch.equal(out, wanted)
    assert lse.all()
    k, v, k_scale, v_scale, *target = kv_int8()
    library.splice_kv_int8(k, v, k_scale, v_scale, *target, None, True, 62)
    got = [target[0].clone(), target[1].clone()]
    ops.splice_kv(k, v, target[0].zero_(), target[1].zero_(), *target[2:], None, True, k_scale, v_scale, 62)
    assert torch.equal(got[0], target[0])
    assert torch.equal(got[1], target[1])
    assert got[0].any()


def test_inside_a_compiled_function():
    """A mutating op between two pure ones: the compiler must keep the write and its order."""
    new, _, k_pages, v_pages, slots, positions = kv()
    table = ops.rope_table(torch.rand(8), 10)

    def step(new, k_pages, v_pages):
        doubled = new * 2
        library.append_kv(doubled, doubled, k_pages, v_pages, slots, positions, table)
        return k_pages.sum() + doubled.sum()

    wanted_k, wanted_v = k_pages.clone(), v_pages.clone()
    wanted = step(new, wanted_k, wanted_v)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(new, k_pages, v_pages)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(k_pages, wanted_k)
    assert torch.equal(v_pages, wanted_v)
