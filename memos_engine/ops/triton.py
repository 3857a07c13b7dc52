"""The Triton backend: a kernel for every op but `linear`, which is torch's matrix product.

Imported only when a CUDA tensor arrives (or by a test in Triton's interpreter): `import triton` is slow.
"""

from __future__ import annotations

from memos_engine.kernels.append_kv import append_kv
from memos_engine.kernels.attention_probe import attention_probe
from memos_engine.kernels.lora_apply import lora_apply
from memos_engine.kernels.paged_attention_launch import paged_attention
from memos_engine.kernels.rms_norm import rms_norm
from memos_engine.kernels.rope import rope
from memos_engine.kernels.silu_mul import silu_mul
from memos_engine.kernels.splice_kv import splice_kv
from memos_engine.ops.reference import linear

NAME = "triton"

__all__ = [
    "append_kv",
    "attention_probe",
    "linear",
    "lora_apply",
    "paged_attention",
    "rms_norm",
    "rope",
    "silu_mul",
    "splice_kv",
]
