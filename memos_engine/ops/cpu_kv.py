"""The native CPU writers of K and V: tensors to pointers, sizes and strides."""

from __future__ import annotations

from torch import Tensor, get_num_threads

from memos_engine.ops import reference
from memos_engine.ops.cpu_native import DTYPES, PAGE_DTYPES, check_status, native
from memos_engine.ops.int8_kv import NO_SCALES, native_arguments, page_arguments


def append_kv(
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
) -> None:
    tensors, rest = (k, v, k_pages, v_pages), (slot_mapping, positions, cos_sin, interleaved)
    page_scales = (k_page_scale, v_page_scale)
    scales = (*NO_SCALES, *page_arguments(*page_scales))
    if not _write(tensors, 1, (0, 0, 0, 0), *rest, scales):
        reference.append_kv(*tensors, *rest, *page_scales)


def splice_kv(
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
) -> None:
    tensors = (src_k, src_v, k_pages, v_pages)
    strides = (src_k.stride(0), src_v.stride(0), k_pages.stride(0), v_pages.stride(0))
    rest = (slot_mapping, positions, cos_sin, interleaved)
    page_scales = (k_page_scale, v_page_scale)
    scales = (*native_arguments(k_scale, v_scale, first_token), *page_arguments(*page_scales))
    if not _write(tensors, src_k.shape[0], strides, *rest, scales):
        reference.splice_kv(*tensors, *rest, k_scale, v_scale, first_token, *page_scales)


def _write(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    layers: int,
    layer_strides: tuple[int, int, int, int],
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool,
    scales: tuple[int, ...],
) -> bool:
    """Both writers; False when a dtype is not the native code's. scales: of int8 sources, then of pages."""
    k, v, k_pages, v_pages = tensors
    src_dtype, page_dtype = 0 if scales[0] else DTYPES.get(k.dtype), PAGE_DTYPES.get(k_pages.dtype)
    if src_dtype is None or page_dtype is None:
        return False
    tokens, kv_heads, dim = k.shape[-3:]
    check_status(
        native.write_kv(
            k.data_ptr(),
            v.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            slot_mapping.data_ptr(),
            positions.data_ptr(),
            0 if cos_sin is None else cos_sin.data_ptr(),
            src_dtype,
            page_dtype,
            layers,
            tokens,
            kv_heads,
            dim,
            k_pages.shape[-4],
            k_pages.shape[-3],
            *((0, 0) if cos_sin is None else cos_sin.shape),
            layer_strides[0],
            *k.stride()[-3:-1],
            layer_strides[1],
            *v.stride()[-3:-1],
            layer_strides[2],
            *k_pages.stride()[-4:-1],
            layer_strides[3],
            *v_pages.stride()[-4:-1],
            interleaved,
            *scales,
            get_num_threads(),
        )
    )
    return True
