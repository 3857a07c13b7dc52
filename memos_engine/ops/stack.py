"""All layers of a forward in one call: what a backend may offer beside the single ops.

A plan is made once for weights and pages and then run for each step, so that a step costs one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from memos_engine.ops.lora import LoraRows, LoraTable


@dataclass(frozen=True)
class StackLayer:
    """One plain pre-norm layer with SwiGLU. Projections `[out, in]`, norms `[hidden]`, norms of q and k and
    biases `[out]` or None. cos_sin: see `append_kv`, None for a layer without RoPE. window: 0 for none.
    Scales `[out] float32`: all projections are int8 (`ops.linear`), or None."""

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    cos_sin: Tensor | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    o_scale: Tensor | None = None
    gate_scale: Tensor | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    window: int = 0


class LayerStack(Protocol):
    """A plan over weights and pages. max_rows: rows up to which one call beats the single ops."""

    max_rows: int

    def run(
        self,
        hidden: Tensor,
        slot_mapping: Tensor,
        positions: Tensor,
        query_start: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        rows: Tensor | None = None,
        lora: tuple[LoraTable, LoraRows] | None = None,
    ) -> Tensor:
        """hidden `[tokens, hidden]`, overwritten; index tensors as in docs/kernels.md. Returns the normalised
        final states of `rows [n] int64`, or of all. lora: the deltas to add (`ops.lora_apply`)."""
