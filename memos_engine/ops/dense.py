"""Dense causal prefill by flash-attn or xformers, where one of them is installed; neither is a dependency.

Their kernels know no row positions of their own: they serve a request whose rows are positions 0, 1, 2, ...
and whose keys are those rows' alone. Everything else is `paged_attention`'s.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("memos_engine")

Prefill = Callable[[Tensor, Tensor, Tensor, float, int], Tensor | None]
_DTYPES = (torch.float16, torch.bfloat16)


def available() -> str | None:
    """The library in use, `flash_attn` or `xformers`, or None. The first call imports it."""
    return _library()[0]


def dense_prefill(q: Tensor, k: Tensor, v: Tensor, sm_scale: float, window: int = 0) -> Tensor | None:
    """Causal attention of one request over itself; None where no library is there, or not for this input.

    q `[tokens, heads, head_dim]`; k (rotated), v `[tokens, kv_heads, head_dim]`; all float16 or bfloat16. Row
    i is position i; with `window > 0` it sees the keys at positions `> i - window`. Returns `[tokens, heads,
    head_dim]`.
    """
    dim = q.shape[2]
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype or dim > 256 or dim % 8:
        return None
    name, prefill = _library()
    if prefill is None:
        return None
    try:
        return prefill(q, k, v, sm_scale, window)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:  # a GPU or a build that it has no kernel for
        log.warning("memos_engine: %s refused a prefill and is not asked again: %s", name, error)
        _library.cache_clear()
        _refused.add(str(name))
        return None


_refused: set[str] = set()


@functools.cache
def _library() -> tuple[str | None, Prefill | None]:
    makers: tuple[tuple[str, Callable[[], Prefill]], ...] = (("flash_attn", _flash), ("xformers", _xformers))
    for name, make in makers:
        if name in _refused or importlib.util.find_spec(name) is None:
            continue
        try:
            return name, make()
        except (ImportError, OSError, AttributeError) as error:  # built for another torch, usually
            log.warning("memos_engine: %s is installed but does not load: %s", name, error)
    return None, None


def _flash() -> Prefill:
    attend: Any = importlib.import_module("flash_attn").flash_attn_func

    def prefill(q: Tensor, k: Tensor, v: Tensor, sm_scale: float, window: int) -> Tensor | None:
        seen = (window - 1, 0) if window > 0 else (-1, -1)
        result: Tensor = attend(
            q[None], k[None], v[None], softmax_scale=sm_scale, causal=True, window_size=seen
        )
        return result[0]

    return prefill


def _xformers() -> Prefill:
    attend: Any = importlib.import_module("xformers.ops").memory_efficient_attention
    mask: Any = importlib.import_module("xformers.ops").LowerTriangularMask

    def prefill(q: Tensor, k: Tensor, v: Tensor, sm_scale: float, window: int) -> Tensor | None:
        if window > 0:
            return None
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        grouped = (1, tokens, kv_heads, heads // kv_heads, dim)  # its way to say GQA
        result: Tensor = attend(
            q.reshape(grouped),
            k[None, :, :, None].expand(grouped),
            v[None, :, :, None].expand(grouped),
            attn_bias=mask(),
            scale=sm_scale,
        )
        return result.reshape(tokens, heads, dim)

    return prefill
