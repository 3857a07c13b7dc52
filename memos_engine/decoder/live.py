"""Watches a live model, so that old KV never meets new weights and no hook or adapter is overlooked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import ModelError

_SAMPLES = 4  # elements read of each tensor
_KNOWN_CODE = ("transformers.", "torch.nn.")
_address: Callable[[Tensor], int] = methodcaller("data_ptr")
_version: Callable[[Tensor], int] = attrgetter("_version")


class LiveWeights:
    """A live model whose parameters an engine shares.

    Each call looks at every parameter: whether its slot holds the same object, at the same address, with the
    same version counter and the same four sampled elements. Writes through `.data` (as adapters are merged)
    change no counter: one that touches none of the sampled elements goes unseen.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._classes = [type(module) for module in model.modules()]
        self._remember()
        self._buffers = self._buffer_state()

    def refresh(self, decoder: DecoderEngine) -> bool:
        """Takes changed parameters over and forgets pages made with the old ones; True if there were any.

        Raises ModelError when they cannot be taken over: dtype or device changed, or tensors are missing.
        """
        if self._unchanged():
            return False
        weights = Weights.from_model(self.model, decoder.spec)
        if weights.dtype != decoder.runner.model.weights.dtype or weights.device != decoder.runner.device:
            raise ModelError("The model's dtype or device changed after attach(); call attach() again.")
        decoder.use_weights(weights)
        self._remember()
        return True

    def altered(self) -> str | None:
        """Why the model now computes something else than its weights say, or None: hooks, an exchanged
        `forward`, other modules, changed buffers."""
        if not _same(self._children, _values(self._module_slots)):
            self._remember_modules()
        if self._foreign is not None:
            return self._foreign
        if any(self._hooks):
            for hook in chain.from_iterable(hooks.values() for hooks in self._hooks):
                if not str(getattr(hook, "__module__", "")).startswith(_KNOWN_CODE):
                    return f"the model has a forward hook ({getattr(hook, '__qualname__', hook)})"
        if any(map(_has_forward, self._attributes)):
            return "a module's forward() was exchanged"
        if self._buffer_state() != self._buffers:
            return "a buffer of the model was changed after attach()"
        return None

    # -- what was seen ---------------------------------------------------------------------------

    def _remember(self) -> None:
        self._remember_modules()
        self._parameters: list[Tensor | None] = _values(self._parameter_slots)
        present = [p for p in self._parameters if p is not None]
        self._addresses, self._versions = _state(present)
        self._read = _sampler(present)
        self._contents = self._read()

    def _remember_modules(self) -> None:
        modules = list(self.model.modules())
        self._attributes = [module.__dict__ for module in modules]
        self._module_slots = [module._modules for module in modules if module._modules]
        self._parameter_slots = [module._parameters for module in modules if module._parameters]
        self._buffer_slots = [module._buffers for module in modules if module._buffers]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._children = _values(self._module_slots)
        self._foreign = _foreign(modules)
        if self._foreign is None and [type(module) for module in modules] != self._classes:
            self._foreign = "modules of the model were exchanged for others after attach()"

    def _unchanged(self) -> bool:
        if not _same(self._children, _values(self._module_slots)):
            return False
        parameters = _values(self._parameter_slots)
        if not _same(self._parameters, parameters):
            return False
        present = [p for p in parameters if p is not None]
        if _state(present) != (self._addresses, self._versions):
            return False  # before anything is read: freed memory must not be
        return self._read() == self._contents

    def _buffer_state(self) -> list[tuple[tuple[int, ...], bytes]]:
        """Buffers are few and small (rotary frequencies); they are compared whole."""
        present = [b for b in _values(self._buffer_slots) if b is not None and b.device.type != "meta"]
        return [(tuple(b.shape), _bytes(b)) for b in present]


def rotary_mismatch(model: Any, spec: ModelSpec) -> str | None:
    """Why the model rotates by other frequencies than its config says, or None. Rounding is no reason:
    `model.to(torch.bfloat16)` rounds them, here they stay float32."""
    expected = [rope.inv_freq(spec.head_dim) for rope in spec.ropes]
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            found = buffer.detach().float().cpu()
            rounding = float(torch.finfo(buffer.dtype).eps)
            if not any(e.shape == found.shape and torch.allclose(found, e, rounding, 0) for e in expected):
                return f"{name} holds other frequencies than the model's config"
    return None


def _has_forward(attributes: dict[str, Any]) -> bool:
    return "forward" in attributes


def _values(slots: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, slots)))


def _same(old: list[Any], new: list[Any]) -> bool:
    return len(old) == len(new) and all(map(is_, old, new))


def _state(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    return list(map(_address, tensors)), list(map(_version, tensors))


def _sampler(tensors: list[Tensor]) -> Callable[[], list[bytes]]:
    """Reads a few elements, spread over each contiguous tensor. To be called only while all are where they
    were: it reads by address where that is quickest."""
    views: dict[tuple[torch.dtype, str], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel() and tensor.device.type != "meta":
            count = min(_SAMPLES, tensor.numel())
            step = max(1, (tensor.numel() - 1) // max(1, count - 1))
            view = tensor.detach().as_strided((count,), (step,))
            views.setdefault((tensor.dtype, tensor.device.type), []).append(view)
    readers = [
        _by_address(group) if device == "cpu" else partial(_joined, group)
        for (_, device), group in views.items()
    ]
    return lambda: [read() for read in readers]


def _joined(views: list[Tensor]) -> bytes:
    return _bytes(torch.cat(views))


def _by_address(views: list[Tensor]) -> Callable[[], bytes]:
    """One gather over the whole range of addresses that the views span."""
    size = views[0].element_size()
    addresses = np.concatenate(
        [v.data_ptr() + np.arange(len(v), dtype=np.int64) * v.stride(0) * size for v in views]
    )
    addresses = addresses[addresses % size == addresses[0] % size]
    base = int(addresses.min())
    offsets = (addresses - base) // size
    extent = (int(offsets.max()) + 1) * size
    memory = memoryview((ctypes.c_uint8 * extent).from_address(base))
    span = np.frombuffer(memory, dtype=np.dtype(f"u{size}"))
    return lambda: span.take(offsets).tobytes()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _foreign(modules: list[Any]) -> str | None:
    """Modules by which others change what a model computes (adapters, quantised layers), by name."""
    for module in modules:
        if not type(module).__module__.startswith(_KNOWN_CODE):
            return f"the model holds a {type(module).__module__}.{type(module).__qualname__}"
    return None
