"""The Triton backend: the two ops that have a Triton kernel, the reference for the rest.

Imported only when a CUDA tensor arrives (or by a test in Triton's interpreter): `import triton` is slow.
"""

from __future__ import annotations

from memos_engine.kernels.append_kv import append_kv
from memos_engine.kernels.splice_kv import splice_kv
from memos_engine.ops.reference import linear, paged_attention, rms_norm, rope, silu_mul

NAME = "triton"

__all__ = ["append_kv", "linear", "paged_attention", "rms_norm", "rope", "silu_mul", "splice_kv"]
