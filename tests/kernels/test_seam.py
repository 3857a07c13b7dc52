"""The choice of backend: by device, by level, without native code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from memos_engine import ops
from memos_engine.ops import reference

native = importlib.util.find_spec("memos_engine._cpu") is not None
needs_native = pytest.mark.skipif(not native, reason="native code was not built")

DESCRIBE = """
import json, sys
import memos_engine.ops as ops
assert "triton" not in sys.modules
print(json.dumps(ops.describe()))
assert "triton" not in sys.modules
"""
HIDE_NATIVE = """
import sys
sys.modules["memos_engine._cpu"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "memos_engine._cpu" else real(name, *rest)
"""


def run(code, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "MEMOS_ENGINE_CPU_ISA"} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def described(**variables):
    done = run(DESCRIBE, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_describe_names_every_op():
    table = ops.describe()
    assert set(table) == {*ops.OPS, "cpu", "cuda"}
    for op in ops.OPS:
        assert set(table[op]) == {"cpu", "cuda"}
    assert table["cpu"]["native"] is (ops.backend_for("cpu") is not reference)
    assert table["cpu"]["isa"] in table["cpu"]["isa_available"]


def test_every_backend_has_every_op():
    from memos_engine.ops import cuda, triton

    for backend in (ops.backend_for("cpu"), reference, cuda, triton):
        assert isinstance(backend.NAME, str)
        for op in ops.OPS:
            assert callable(getattr(backend, op))


def test_backend_follows_the_device():
    assert ops.backend_for("cpu") is ops.backend_for(torch.device("cpu"))
    assert ops.backend_for("meta") is reference
    assert ops.backend_for("cuda:0") is ops.backend_for(torch.device("cuda", 1))


@needs_native
def test_best_level_by_default():
    from memos_engine.ops import cpu

    table = described()
    assert table["cpu"]["isa"] == cpu.available()[-1]
    assert table["paged_attention"]["cpu"] == "native"


@needs_native
def test_each_level_can_be_forced():
    from memos_engine.ops import cpu

    for level in cpu.available():
        assert described(MEMOS_ENGINE_CPU_ISA=level)["cpu"]["isa"] == level


def test_reference_can_be_forced():
    table = described(MEMOS_ENGINE_CPU_ISA="reference")
    assert table["cpu"]["isa"] == "reference"
    assert table["paged_attention"]["cpu"] == "reference"


def test_unknown_level_is_an_error():
    done = run(DESCRIBE, MEMOS_ENGINE_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "MemosEngineError" in done.stderr
    assert "sse9" in done.stderr
    assert "reference" in done.stderr


@needs_native
def test_a_level_the_machine_lacks_is_an_error():
    from memos_engine import _cpu
    from memos_engine.errors import MemosEngineError
    from memos_engine.ops import cpu

    missing = [name for name, supported in _cpu.isa_levels() if not supported]
    if not missing:
        pytest.skip("this machine runs every level")
    before = cpu.isa()
    with pytest.raises(MemosEngineError, match="not supported by this machine"):
        cpu.select_isa(missing[0])
    assert cpu.isa() == before


def test_without_native_code_the_reference_works_and_says_so_once():
    code = (
        HIDE_NATIVE
        + """
import torch
import memos_engine.ops as ops
for _ in range(3):
    assert torch.equal(ops.silu_mul(torch.zeros(2, 3), torch.ones(2, 3)), torch.zeros(2, 3))
assert ops.describe()["cpu"]["native"] is False
"""
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("native CPU code was not built") == 1


def test_a_level_forced_without_native_code_is_an_error():
    done = run(HIDE_NATIVE + DESCRIBE, MEMOS_ENGINE_CPU_ISA="avx2")
    assert done.returncode != 0
    assert "was not built" in done.stderr


def test_float64_takes_the_reference():
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(ops.silu_mul(x, x), reference.silu_mul(x, x))


@needs_native
def test_works_with_any_number_of_threads():
    x, weight = torch.randn(4, 512), torch.randn(3000, 512)
    wanted = ops.linear(x, weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.linear(x, weight), wanted)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_works_before_and_beside_other_threads():
    """Several Python threads in native code at once: scratch is per thread, the GIL is free."""
    from concurrent.futures import ThreadPoolExecutor

    x, weight = torch.randn(4, 256), torch.randn(2000, 256)
    wanted = ops.linear(x, weight)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: ops.linear(x, weight), range(40)):
            assert torch.equal(got, wanted)
