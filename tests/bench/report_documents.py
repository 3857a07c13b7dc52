"""Small documents of every bench, as the tests of report and comparison need them."""

from __future__ import annotations

import statistics
from typing import Any

NASTY = "<script>alert(\"x\")</script> & 'quotes' $a_b$ \x00\x1b \ud800 " + "long" * 60
MACHINE = {
    "cpu": "A CPU <b>",
    "cores": 2,
    "memory_gib": 23.5,
    "gpu": None,
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "memos_engine": "0.1.0",
    "threads": 2,
    "load_average": 1.0,
    "ops": {"linear": {"cpu": "native"}},
}


def document(bench: str, rows: list[Any], **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "bench": bench,
        "version": 1,
        "complete": True,
        "machine": dict(MACHINE),
        "commit": "0123456789ab",
        "command": f"memos-engine bench {bench} --quick",
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 12.5,
        "config": {"model": "smollm2", "dtype": "float32", "contexts": [64, 128]},
        "ceilings": {"read": {"value": 20.0, "unit": "GB/s"}},
        "units": ["one"],
        "rows": rows,
        "ratios": [{"name": "full over splice", "context": 64, "value": 4.0, "low": 3.5, "high": 4.5}],
        "notes": ["A note."],
    }
    return found | more


def timed(values: list[float], name: str = "ttft_ms") -> dict[str, Any]:
    return {
        f"{name}_p50": statistics.median(values),
        f"{name}_p95": max(values),
        "n": len(values),
        "samples": values,
    }


def around(middle: float, n: int = 9, spread: float = 0.01) -> list[float]:
    """n fixed samples around a median."""
    return [middle * (1 + spread * (i - n // 2) / n) for i in range(n)]


def ttft_rows(scale: float = 1.0) -> list[dict[str, Any]]:
    rows = []
    modes = {"full": 100.0, "prefix": 20.0, "splice": 25.0, "query_only": 15.0, "text": 101.0}
    for context in (64, 128):
        for mode, ms in modes.items():
            rows.append(_ttft("memos_engine", mode, context, ms * context / 64 * scale))
        rows.append(_ttft("transformers", "full", context, 140.0 * context / 64))
        rows.append(_ttft("llamacpp", "full", context, 80.0 * context / 64))
    return rows


def _ttft(system: str, mode: str, context: int, ms: float) -> dict[str, Any]:
    bare = mode == "query_only"
    return {
        "system": system,
        "mode": mode,
        "scope": "engine",
        "reuse": "none",
        "context": 0 if bare else context,
        "query": 8,
        "memories": 0 if bare else 4,
        "recompute": {"full": 1.0, "splice": 0.0}.get(mode),
        "dtype": "float32",
        "tier": "host" if mode == "splice" else None,
        **timed(around(ms)),
        "share_of_limit": 0.5,
        "same_first_token": 1.0,
    }


def quality_rows() -> list[dict[str, Any]]:
    rows = [
        {"method": "full_bf16", "recompute": 1.0, "memories": 4, "kl_mean": 0.001, "n": 30},
        {"method": "none", "recompute": 0.0, "memories": 4, "kl_mean": 2.0, "n": 30},
    ]
    for method, factor in (("memos_engine", 1.0), ("random", 2.0)):
        for share in (0.0, 0.2, 1.0):
            kl = 0.1 * factor * (1 - share)
            row = {"method": method, "recompute": share, "memories": 4, "kl_mean": kl, "n": 30}
            rows.append(row | {"kl_low": kl * 0.9, "kl_high": kl * 1.1, "top1": 0.9, "answer_f1": 0.6})
    return rows


def all_documents() -> list[dict[str, Any]]:
    """One document of each bench, with rows that were not measured among them."""
    decode = [
        {"system": s, "context": c, "batch": 1, "dtype": "float32", "share_of_limit": 0.8,
         "tokens_per_s": 1000 / ms, **timed(around(ms), "ms_per_token")}
        for c in (64, 128)
        for s, ms in (("memos_engine", 10.0), ("vllm", 9.0), ("somebody", 12.0))
    ]  # fmt: skip
    decode.append({"system": "llamacpp", "status": "timeout", "reason": "over 120 s", "context": 64})
    kernels = [
        {"op": "linear", "backend": b, "shape": "32x64", "dtype": "float32", "us_p50": us, "us_p95": us,
         "share_of_limit": 10 / us}
        for b, us in (("native", 20.0), ("torch", 15.0))
    ]  # fmt: skip
    roofline = [
        {"ceiling": "gemm", "dtype": d, "rows": n, "value": v * n / (n + 8), "unit": "GFLOP/s"}
        for d, v in (("float32", 200.0), ("bfloat16", 900.0))
        for n in (1, 8, 64)
    ]
    roofline.append({"ceiling": "read", "value": 20.0, "unit": "GB/s"})
    roofline.append({"ceiling": "pcie", "status": "unsupported", "reason": "no GPU"})
    load = [
        {"system": s, "traffic": t, k: v, "requests": 50, "ttft_ms_p50": 40.0 * v, "ttft_ms_p95": 90.0 * v,
         "ttft_ms_p99": 99.0 * v, "goodput_per_s": g * v / (1 + v), "met_share": 0.9, "objective_ms": 200.0}
        for s, g in (("memos_engine", 4.0), ("transformers", 2.0))
        for t, k in (("open", "offered_per_s"), ("closed", "clients"))
        for v in (1, 2, 4)
    ]  # fmt: skip
    table5 = [
        {"model": "smollm2", "context": c, "query": 167, "build_ms": 50.0, "direct_ms": 100.0, "ours_ms": o,
         "reduction": 1 - o / 100, "break_even": 2, "paper_build_s": 0.9, "paper_kv_s": 0.1,
         "paper_direct_s": 2.0, "paper_reduction": 0.942}
        for c, o in ((583, 30.0), (6064, 120.0))
    ]  # fmt: skip
    memory = [{"system": "memos_engine", "dtype": "float32", "peak_mb": 1018.8, "pool_mb": 180.7}]
    return [
        document("ttft", ttft_rows()),
        document("decode", decode),
        document("quality", quality_rows(), complete=False),
        document("kernels", kernels),
        document("roofline", roofline),
        document("load", load),
        document("paper-table5", table5),
        document("memory", memory),
    ]
