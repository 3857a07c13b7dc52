"""Tensors that break docs/kernels.md: KernelContractError says which and why, and nothing is written."""

from __future__ import annotations

import pytest
import torch

from memos_engine import ops
from memos_engine.errors import KernelContractError, MemosEngineError


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("q", lambda t: t[0], "q must have 3 dimensions"),
        ("q", lambda t: t.int(), "q must be float32, float16 or bfloat16"),
        ("q", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "last dimension of q"),
        ("q", lambda t: t[:, :3], "multiple of kv_heads"),
        ("q", lambda t: t[..., :8], "head_dim 8"),
        ("k_pages", lambda t: t[0], "k_pages must have 4 dimensions"),
        ("v_pages", lambda t: t.half(), "v_pages must have k_pages's shape and dtype"),
        ("v_pages", lambda t: t[1:], "v_pages must have k_pages's shape and dtype"),
        ("block_table", lambda t: t.long(), "block_table must be int32"),
        ("block_table", lambda t: t[:1], r"block_table must be \[2, max_blocks\]"),
        ("query_start", lambda t: t[1:], "query_start must be"),
        ("query_start", lambda t: t.long(), "query_start must be torch.int32"),
        ("seq_lens", lambda t: t[:1], "query_start must be"),
        ("q_pos", lambda t: t[1:], "q_pos must be"),
        ("q_pos", lambda t: torch.stack((t, t), 1)[:, 0], "q_pos must be contiguous"),
        ("window", lambda _: -1, "window must be 0"),
    ],
)
def test_paged_attention(make_problem, field, change, words):
    problem = make_problem([40, 20], [3, 20])
    setattr(problem, field, change(getattr(problem, field)))
    with pytest.raises(KernelContractError, match=words):
        ops.paged_attention(*problem.args())


def test_paged_attention_outputs(make_problem):
    problem = make_problem([40], [3])
    for out in (
        torch.empty(3, 4, 8),
        torch.empty(3, 4, 16, dtype=torch.half),
        torch.empty(3, 4, 32)[..., ::2],
    ):
        with pytest.raises(KernelContractError, match="out"):
            ops.paged_attention(*problem.args(), out=out)
    for lse in (torch.empty(3, 3), torch.empty(3, 4, dtype=torch.double), torch.empty(4, 3).T):
        with pytest.raises(KernelContractError, match="lse must be contiguous float32"):
            ops.paged_attention(*problem.args(), lse=lse)


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, lambda t: t[0], "q must have 3 dimensions"),
        (0, lambda t: t[:, :3], "multiple of kv_heads"),
        (0, lambda t: t[..., :8], "head_dim 8"),
        (1, lambda t: t[0], "k_pages must have 4 dimensions"),
        (1, lambda t: t.int(), "k_pages must be float32"),
        (2, lambda t: t[:0], r"query_start must be torch.int32 \[1\]"),
        (2, lambda t: t[None], "query_start must be"),
        (2, lambda t: t.long(), "query_start must be torch.int32"),
        (3, lambda t: t[1:], r"q_pos must be torch.int32 \[23\]"),
        (4, lambda t: t[1:], r"lse must be contiguous float32 \[23, 4\]"),
        (4, lambda t: t.double(), "lse must be contiguous float32"),
        (4, lambda t: t.T.contiguous().T, "lse must be contiguous float32"),
        (5, lambda t: t.int(), "key_slots must be torch.int64"),
        (5, lambda t: t[:, None], "key_slots must be"),
        (6, lambda t: t[1:], r"key_pos must be torch.int32 \[60\]"),
        (6, lambda t: t.long(), "key_pos must be torch.int32"),
        (7, lambda t: t[1:], r"key_start must be torch.int32 \[3\]"),
        (8, lambda t: t[:, :1], r"weight must be contiguous float32 \[60, 2\]"),
        (8, lambda t: t.half(), "weight must be contiguous float32"),
        (9, lambda t: t[1:], r"scores must be contiguous float32 \[60\]"),
        (9, lambda t: torch.stack((t, t), 1)[:, 0], "scores must be contiguous"),
        (9, lambda t: t.to("meta"), "on one device"),
        (11, lambda _: -1, "window must be 0"),
    ],
)
def test_attention_probe(make_probe, place, change, words):
    args = list(make_probe([40, 20], [3, 20]).args())
    before = args[9].clone()
    args[place] = change(args[place])
    with pytest.raises(KernelContractError, match=words):
        ops.attention_probe(*args)
    assert place == 9 or torch.equal(args[9], before)


def kv(layers=()):
    new = torch.ones(*layers, 5, 2, 16)
    pages = torch.zeros(*layers, 4, 16, 2, 16)
    return {
        "k": new,
        "v": new.clone(),
        "k_pages": pages,
        "v_pages": pages.clone(),
        "slot_mapping": torch.arange(5),
        "positions": torch.arange(5, dtype=torch.int32),
        "cos_sin": torch.ones(10, 16),
    }


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("k", lambda t: t[..., 0], "k must have"),
        ("v", lambda t: t[..., :8], "v must have k's shape"),
        ("v", lambda t: t.half(), "v must have k's shape and dtype"),
        ("k_pages", lambda t: t[..., :1, :], "v_pages must have k_pages's shape"),
        ("slot_mapping", lambda t: t.int(), "slot_mapping must be torch.int64"),
        ("slot_mapping", lambda t: t[1:], "slot_mapping must be"),
        ("positions", lambda t: t.long(), "positions must be torch.int32"),
        ("cos_sin", lambda t: t.half(), "cos_sin must be contiguous float32"),
        ("cos_sin", lambda t: t[:, :5].contiguous(), "must be even"),
        ("cos_sin", lambda t: torch.ones(10, 18), "at most head_dim"),
        ("cos_sin", lambda t: torch.ones(10, 0), "must be even and at most"),
    ],
)
def test_write_kv(layers, field, change, words):
    args = kv(layers)
    args[field] = change(args[field])
    with pytest.raises(KernelContractError, match=words):
        (ops.splice_kv if layers else ops.append_kv)(*args.values())
    assert not args["v_pages"].any()


def test_write_kv_geometry():
    args = kv((3,))
    args["k"], args["v"] = args["k"][:2], args["v"][:2]
    with pytest.raises(KernelContractError, match="does not fit pages"):
        ops.splice_kv(*args.values())
    args = kv()
    args["k"], args["v"] = args["k"][:, :1], args["v"][:, :1]
    with pytest.raises(KernelContractError, match="does not fit pages"):
        ops.append_kv(*args.values())


def test_row_ops():
    x = torch.ones(3, 16)
    for call, words in [
        (lambda: ops.rms_norm(x, torch.ones(8), 1e-5), "weight must be"),
        (lambda: ops.rms_norm(x, torch.ones(16), 1e-5, torch.ones(2, 16)), "residual must have x's shape"),
        (lambda: ops.rms_norm(x[0], torch.ones(16), 1e-5), "x must have 2 dimensions"),
        (lambda: ops.silu_mul(x, x.half()), "up must have gate's shape and dtype"),
        (lambda: ops.silu_mul(x, x, x[:2]), "out must have gate's shape"),
        (lambda: ops.linear(x, torch.ones(4, 8)), "16 columns but weight has 8"),
        (lambda: ops.linear(x, torch.ones(4, 16).half()), "give both one dtype"),
        (lambda: ops.linear(x, torch.ones(4, 16), torch.ones(3, 5)), "out must be"),
        (lambda: ops.rope(x, torch.zeros(3, dtype=torch.int32), torch.ones(4, 16)), "x must have 3"),
        (lambda: ops.linear(x, torch.ones(4, 16, device="meta")), "on one device"),
    ]:
        with pytest.raises(KernelContractError, match=words):
            call()


def test_errors_are_ours_and_value_errors():
    with pytest.raises(MemosEngineError, match=r"docs/kernels\.md"):
        ops.rms_norm(torch.ones(3), torch.ones(3), 1e-5)
    assert issubclass(KernelContractError, ValueError)


def test_checks_can_be_turned_off():
    assert ops.set_checks(False) is True
    try:
        # A weight of another dtype is outside the contract of linear; unchecked, torch itself complains.
        with pytest.raises(RuntimeError):
            ops.linear(torch.ones(20, 16), torch.ones(4, 16).half())
    finally:
        assert ops.set_checks(True) is False
