"""What the CUDA backend chooses, with stand-ins: the reference, Triton, and libraries for dense prefill."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from memos_engine.ops import cuda, dense, reference


@pytest.fixture(autouse=True)
def forget():
    dense._library.cache_clear()
    dense._refused.clear()
    yield
    dense._library.cache_clear()
    dense._refused.clear()


@pytest.fixture
def install(monkeypatch):
    """install(name, **functions): a module that can be found and imported."""
    for name in ("flash_attn", "xformers"):
        monkeypatch.setitem(sys.modules, name, None)
    find = importlib.util.find_spec
    present = set()
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (
            (importlib.machinery.ModuleSpec(name, None) if name in present else None)
            if name in ("flash_attn", "xformers")
            else find(name, *a)
        ),
    )

    def make(name, **functions):
        module = ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        present.add(name.split(".")[0])

    return make


def dense_attention(q, k, v, scale, window=0):
    """q, k, v `[tokens, heads, dim]`."""
    group, n = q.shape[1] // k.shape[1], q.shape[0]
    k, v = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
    at = torch.arange(n)
    visible = at <= at[:, None]
    if window:
        visible &= at > at[:, None] - window
    return scaled_dot_product_attention(q.transpose(0, 1), k, v, visible, scale=scale).transpose(0, 1)


def flash(calls):
    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        assert causal
        left, right = window_size
        assert right == (0 if left >= 0 else -1)
        calls.append(q.shape)
        return dense_attention(q[0], k[0], v[0], softmax_scale, left + 1 if left >= 0 else 0)[None]

    return flash_attn_func


class LowerTriangularMask:
    pass


def xformers(calls):
    def memory_efficient_attention(q, k, v, attn_bias, scale):
        assert isinstance(attn_bias, LowerTriangularMask)
        assert q.shape == k.shape == v.shape
        calls.append(q.shape)
        return dense_attention(*(t[0].flatten(1, 2) for t in (q, k, v)), scale).view(q.shape)

    return memory_efficient_attention


def inputs(tokens=20, heads=6, kv_heads=2, dim=16, dtype=torch.float16):
    torch.manual_seed(0)
    return [torch.randn(tokens, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads)]


def test_without_a_library(install):
    assert dense.available() is None
    assert dense.dense_prefill(*inputs(), 0.25) is None


@pytest.mark.parametrize("window", [0, 1, 7])
def test_flash_attention(install, window):
    calls = []
    install("xformers")
    install("flash_attn", flash_attn_func=flash(calls))
    q, k, v = inputs()
    assert dense.available() == "flash_attn"
    torch.testing.assert_close(
        dense.dense_prefill(q, k, v, 0.25, window), dense_attention(q, k, v, 0.25, window)
    )
    assert calls == [(1, 20, 6, 16)]


def test_xformers(install):
    calls = []
    install("xformers")
    install(
        "xformers.ops",
        memory_efficient_attention=xformers(calls),
        LowerTriangularMask=LowerTriangularMask,
    )
    q, k, v = inputs()
    assert dense.available() == "xformers"
    torch.testing.assert_close(dense.dense_prefill(q, k, v, 0.25), dense_attention(q, k, v, 0.25))
    assert calls == [(1, 20, 2, 3, 16)]
    assert dense.dense_prefill(q, k, v, 0.25, 5) is None


def test_what_the_libraries_do_not_compute(install):
    install("flash_attn", flash_attn_func=flash([]))
    q, k, v = inputs()
    assert dense.dense_prefill(q.float(), k.float(), v.float(), 0.25) is None
    assert dense.dense_prefill(q, k.bfloat16(), v.bfloat16(), 0.25) is None
    assert dense.dense_prefill(*inputs(dim=20), 0.25) is None
    assert dense.dense_prefill(*inputs(dim=264), 0.25) is None


def test_a_library_that_refuses_is_not_asked_again(install, caplog):
    def no_kernel(*args, **named):
        calls.append(1)
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")

    calls = []
    install("flash_attn", flash_attn_func=no_kernel)
    assert dense.dense_prefill(*inputs(), 0.25) is None
    assert dense.dense_prefill(*inputs(), 0.25) is None
    assert len(calls) == 1
    assert "Ampere" in caplog.text

    def full(*args, **named):
        raise torch.OutOfMemoryError("full")

    dense._refused.clear()
    dense._library.cache_clear()
    install("flash_attn", flash_attn_func=full)
    with pytest.raises(torch.OutOfMemoryError):
        dense.dense_prefill(*inputs(), 0.25)


def test_a_library_that_does_not_load(install, caplog):
    install("flash_attn")  # no flash_attn_func
    assert dense.available() is None
    assert "does not load" in caplog.text


def test_dense_prefill_from_pages(install, make_problem, assert_close):
    calls = []
    install("flash_attn", flash_attn_func=flash(calls))
    problem = make_problem([37], [37], dtype=torch.float16)
    exact = reference.paged_attention(*problem.wide())
    plain = reference.paged_attention(*problem.args())
    assert_close(cuda.paged_attention(*problem.args(), dense=True), plain, exact)
    assert len(calls) == 1
    out = torch.zeros_like(problem.q)
    assert cuda.paged_attention(*problem.args(), out=out, dense=True) is out
    assert_close(out, plain, exact)
    lse = torch.zeros(37, 4)  # the libraries give none
    assert_close(cuda.paged_attention(*problem.args(), lse=lse, dense=True), plain, exact)
    assert lse.all()
    assert len(calls) == 2


def test_dense_flag_without_a_library(install, make_problem, assert_close):
    problem = make_problem([20], [20])
    exact = reference.paged_attention(*problem.wide())
    assert_close(
        cuda.paged_attention(*problem.args(), dense=True, max_query_len=20),
        reference.paged_attention(*problem.args()),
        exact,
    )


def test_float64_goes_to_the_reference(make_problem, make_probe):
    problem = make_problem([20], [3])
    wide = problem.wide()
    assert torch.equal(cuda.paged_attention(*wide), reference.paged_attention(*wide))
    probes = [make_probe([20], [3]).wide() for _ in range(2)]
    cuda.attention_probe(*probes[0])
    reference.attention_probe(*probes[1])
    assert torch.equal(probes[0][9], probes[1][9])
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(cuda.rms_norm(x, x[0], 1e-5), reference.rms_norm(x, x[0], 1e-5))
    assert torch.equal(cuda.silu_mul(x, x), reference.silu_mul(x, x))


def int8_record():
    k, v = (torch.randint(-127, 128, (2, 5, 3, 16), dtype=torch.int8) for _ in range(2))
    return (k, v), (torch.rand(2, 2, 3, 16), torch.rand(2, 5, 3), 62)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_int8_records_without_native_code(monkeypatch, dtype):
    monkeypatch.setattr(cuda, "_native", None)
    sources, scales = int8_record()
    at = (torch.arange(5), torch.arange(5, dtype=torch.int32), None, False)
    got, wanted = ([torch.zeros(2, 4, 16, 3, 16, dtype=dtype) for _ in range(2)] for _ in range(2))
    cuda.splice_kv(*sources, *got, *at, *scales)
    reference.splice_kv(*sources, *wanted, *at, *scales)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_int8_records_for_native_code(monkeypatch):
    """Its arguments, in the order of csrc/bind_kv_write.h: those of a splice of floats, then the scales."""
    calls = []
    native = SimpleNamespace(splice_kv=lambda *given: calls.append(given))
    monkeypatch.setattr(cuda, "_native", native)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=99))
    (k, v), scales = int8_record()
    at = (torch.arange(5), torch.arange(5, dtype=torch.int32), None, False)
    pages = [torch.zeros(2, 4, 16, 3, 16) for _ in range(2)]
    cuda.splice_kv(k, v, *pages, *at, *scales)
    cuda.splice_kv(k.float(), v.float(), *pages, *at)
    cuda.splice_kv(k[:, :0], v[:, :0], *pages, *at, scales[0][:, :0], scales[1][:, :0])
    pointers = [t.data_ptr() for t in (k, v, *pages)]
    assert calls[0][:4] == tuple(pointers)
    end = (*(t.data_ptr() for t in scales[:2]), 2, 62, 96, 48, 16, 15, 3, 1, 0, 0, 0, 0, 99)
    assert calls[0][-15:] == end
    assert calls[1][-15:] == (0,) * 14 + (99,)
    assert calls[0][6:-15] == calls[1][6:-15]
    narrow = torch.zeros(2, 4, 16, 3, 16, dtype=torch.int8), torch.zeros(2, 4, 16, 3)
    of_pages = {"k_page_scale": narrow[1], "v_page_scale": narrow[1]}
    cuda.splice_kv(k.float(), v.float(), narrow[0], narrow[0], *at, **of_pages)
    address = narrow[1].data_ptr()
    assert calls[-1][-15:] == (*(0,) * 10, address, address, 192, 192, 99)
    assert calls[-1][8] == 3
    assert len({len(given) for given in calls}) == 1
    names = (Path(__file__).parents[2] / "csrc/bind_kv_write.h").read_text()
    parameters = names.partition("#define ME_KV_WRITE_PARAMETERS")[2].partition("#define")[0]
    assert len(calls[0]) == parameters.count(",") + 2  # and the stream


def test_without_triton(monkeypatch, make_problem, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda._load_triton() is reference
    assert "Triton is not installed" in caplog.text
    monkeypatch.setattr(cuda, "_triton", reference)
    problem = make_problem([20, 9], [3, 1])
    wanted = reference.paged_attention(*problem.args())
    assert torch.equal(cuda.paged_attention(*problem.args(), max_query_len=3), wanted)
