"""Which backend a tensor's device gets. Nothing is imported before the first tensor of that kind arrives."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from memos_engine.errors import MemosEngineError

if TYPE_CHECKING:
    from memos_engine.ops.lora import LoraRows, LoraTable
    from memos_engine.ops.stack import LayerStack

ISA_VARIABLE = "MEMOS_ENGINE_CPU_ISA"
OPS = (
    "paged_attention",
    "attention_probe",
    "append_kv",
    "splice_kv",
    "rms_norm",
    "rope",
    "silu_mul",
    "linear",
    "lora_apply",
)

log = logging.getLogger("memos_engine")


class Backend(Protocol):
    """What a backend module offers. These functions do not check their arguments (`ops.contracts` does).

    `max_query_len` and `dense` of paged_attention are what the caller knows without asking the device: most
    rows of a request; that there is one request, whose rows are positions 0, 1, 2 and so on to its end. They
    change no result, and a backend may ignore them.
    """

    NAME: str

    def paged_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        q_pos: Tensor,
        sm_scale: float,
        window: int = 0,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        max_query_len: int | None = None,
        dense: bool = False,
        k_page_scale: Tensor | None = None,
        v_page_scale: Tensor | None = None,
    ) -> Tensor: ...

    def attention_probe(
        self,
        q: Tensor,
        k_pages: Tensor,
        query_start: Tensor,
        q_pos: Tensor,
        lse: Tensor,
        key_slots: Tensor,
        key_pos: Tensor,
        key_start: Tensor,
        weight: Tensor,
        scores: Tensor,
        sm_scale: float,
        window: int = 0,
        k_page_scale: Tensor | None = None,
    ) -> None: ...

    def append_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        slot_mapping: Tensor,
        positions: Tensor,
        cos_sin: Tensor | None,
        interleaved: bool = False,
        k_page_scale: Tensor | None = None,
        v_page_scale: Tensor | None = None,
    ) -> None: ...

    def splice_kv(
        self,
        src_k: Tensor,
        src_v: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        slot_mapping: Tensor,
        positions: Tensor,
        cos_sin: Tensor | None,
        interleaved: bool = False,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        first_token: int = 0,
        k_page_scale: Tensor | None = None,
        v_page_scale: Tensor | None = None,
    ) -> None: ...

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...

    def rope(self, x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> None: ...

    def silu_mul(self, gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor: ...

    def linear(
        self, x: Tensor, weight: Tensor, out: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor: ...

    def lora_apply(
        self,
        x: Tensor,
        outs: Sequence[Tensor],
        table: LoraTable,
        layer: int,
        parts: Sequence[str],
        rows: LoraRows,
    ) -> None: ...


def backend_for(device: torch.device | str) -> Backend:
    """The unchecked backend of a device: for callers that make their tensors right by construction."""
    return _backend(device.split(":")[0] if isinstance(device, str) else device.type)


def layer_stack_of(backend: Backend) -> Callable[..., LayerStack | None] | None:
    """A backend's way to run all layers of a small forward in one call, or None if it has none.

    It is called as `ops.cpu_stack.layer_stack` is, and answers None itself where dtypes, shapes or layouts
    are not for it. A backend of one's own may bring it as its attribute `layer_stack`.
    """
    if backend.NAME == "native":
        from memos_engine.ops import cpu_stack

        return cpu_stack.layer_stack
    return cast("Callable[..., LayerStack | None] | None", getattr(backend, "layer_stack", None))


@functools.cache
def _backend(kind: str) -> Backend:
    if kind == "cpu":
        return _cpu_backend()
    if kind == "cuda":
        from memos_engine.ops import cuda

        return cast(Backend, cuda)
    from memos_engine.ops import reference

    return cast(Backend, reference)


def _cpu_backend() -> Backend:
    from memos_engine.ops import reference

    forced = os.environ.get(ISA_VARIABLE, "").strip().lower()
    if forced == "reference":
        return cast(Backend, reference)
    if importlib.util.find_spec("memos_engine._cpu") is None:
        if forced:
            raise MemosEngineError(
                f"{ISA_VARIABLE}={forced} asks for native code, which was not built. Reinstall with a C++17 "
                "compiler, or unset the variable."
            )
        log.warning(
            "memos_engine: native CPU code was not built; the slower torch reference is used. "
            "Reinstall with a C++17 compiler for speed."
        )
        return cast(Backend, reference)
    from memos_engine.ops import cpu

    cpu.select_isa(forced)
    return cast(Backend, cpu)


def describe() -> dict[str, dict[str, Any]]:
    """Which path each op takes: `{op: {"cpu": path, "cuda": path}}`, and two entries for the backends.

    `["cpu"]` holds `native` (bool), `isa` (the level in use) and `isa_available`; `["cuda"]` holds
    `available`, `native` and `triton`. Nothing here starts a device.
    """
    cpu_backend = _backend("cpu")
    native = importlib.util.find_spec("memos_engine._cuda") is not None
    triton = importlib.util.find_spec("triton") is not None
    on_cpu = "reference" if cpu_backend.NAME == "reference" else "native"
    on_cuda = "triton" if triton else "reference"
    table: dict[str, dict[str, Any]] = {op: {"cpu": on_cpu, "cuda": on_cuda} for op in OPS}
    if cpu_backend.NAME == "reference":
        table["linear"]["cpu"] = "torch"
        table["cpu"] = {"native": False, "isa": "reference", "isa_available": ["reference"]}
    else:
        from memos_engine.ops import cpu

        table["linear"]["cpu"] = "native for few rows, torch for more"
        table["cpu"] = {"native": True, "isa": cpu.isa(), "isa_available": cpu.available()}
    for op in ("append_kv", "splice_kv"):
        table[op]["cuda"] = "native" if native else on_cuda
    if native:
        table["lora_apply"]["cuda"] = f"native for few rows, {on_cuda} for more"
    table["linear"]["cuda"] = "torch"
    table["cuda"] = {"available": torch.cuda.is_available(), "native": native, "triton": triton}
    return table
