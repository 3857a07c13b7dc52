"""Launches paged_attention: which shapes of program a call needs, and the scratch memory between two kernels.

Nothing here reads a tensor's values, so that a CUDA graph can capture it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from memos_engine.kernels.paged_attention import attend_kernel, join_kernel
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One shape of program, for the requests of at most `most_rows` query rows (0: of any number).

    block_m: rows of a tile, heads packed. segments: most parts of a request's keys (a power of two), each
    of at least `segment_keys` keys. Segments are made until a request has `programs` programs.
    """

    most_rows: int
    block_m: int
    segments: int
    segment_keys: int
    warps: int
    programs: int = 128


# Decoding; a question behind spliced memories; a long prefill, which fills the GPU without segments.
SHAPES = (Shape(16, 16, 16, 128, 4), Shape(256, 64, 8, 256, 4), Shape(0, 128, 1, 1, 8))
_DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def paged_attention(
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
    shapes: tuple[Shape, ...] = SHAPES,
) -> Tensor:
    """As `ops.backend.Backend.paged_attention`. max_query_len saves launches that would find nothing to do;
    dense tells nothing more."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    tokens, heads, dim = q.shape
    requests, kv_heads = seq_lens.shape[0], k_pages.shape[2]
    if tokens == 0 or requests == 0:
        return out
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    # Triton's interpreter, which runs CPU tensors, cannot multiply bfloat16.
    # What int8 holds is exact in either short float.
    same = k_pages.dtype in (q.dtype, torch.int8)
    fast = same and q.dtype in _DOT and (q.device.type != "cpu" or q.dtype == torch.float16)
    dot = _DOT[q.dtype] if fast else tl.float32
    common = {"KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "WINDOW": window, "LSE": lse is not None}
    for shape, fewest in choose(shapes, requests, min(max_query_len or tokens, tokens)):
        block_m = max(_block_m(shape.block_m, block_d, dot), triton.next_power_of_2(group))
        block_q, most = block_m // group, shape.most_rows
        scratch = min(tokens, requests * most) if shape.segments > 1 else 0
        parts = q.new_empty((scratch, heads, shape.segments, block_d), dtype=torch.float32)
        tops, sums = (q.new_empty((scratch, heads, shape.segments), dtype=torch.float32) for _ in range(2))
        cut = {
            "FEWEST_ROWS": fewest, "MOST_ROWS": most, "SEGMENTS": shape.segments,
            "SEGMENT_KEYS": shape.segment_keys, "PROGRAMS": shape.programs,
            "BLOCK_M": block_m, "BLOCK_D": block_d,
        }  # fmt: skip
        attend_kernel[(_tiles(tokens, requests, block_q, most), kv_heads, shape.segments)](
            q, k_pages, v_pages, block_table, query_start, seq_lens, q_pos,
            out, out if lse is None else lse, parts, tops, sums, requests, sm_scale * math.log2(math.e),
            *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            block_table.stride(0), *out.stride()[:2],
            out if k_page_scale is None else k_page_scale,
            out if v_page_scale is None else v_page_scale,
            **common, **cut, PAGE=k_pages.shape[1], DOT=dot, SCALED=k_page_scale is not None,
            BLOCK_N=_block_n(block_d, dot), num_warps=8 if dot is tl.float32 else shape.warps, num_stages=2,
        )  # fmt: skip
        if scratch:
            join_kernel[(scratch, heads)](
                query_start, seq_lens, out, out if lse is None else lse, parts, tops, sums, requests,
                *out.stride()[:2], **common, **cut, num_warps=2,
            )  # fmt: skip
    return out


def choose(shapes: tuple[Shape, ...], requests: int, longest: int) -> Iterator[tuple[Shape, int]]:
    """The shapes that a call needs, each with the fewest rows of its requests. One request needs one."""
    fewest = 1
    for shape in shapes:
        covers_all = shape.most_rows == 0 or shape.most_rows >= longest
        if requests > 1 or covers_all:
            yield shape, fewest if requests > 1 else 1
        if covers_all:
            return
        fewest = shape.most_rows + 1


def _tiles(tokens: int, requests: int, block_q: int, most: int) -> int:
    """Tiles that `first_place` deals out."""
    tiles = tokens // block_q + (requests if block_q > 1 else 0)
    return min(tiles, requests * -(-most // block_q)) if most else tiles


def _block_m(block_m: int, block_d: int, dot: tl.dtype) -> int:
    """Rows of a tile that fit into registers."""
    return min(block_m, 32 if dot is tl.float32 else 128 if block_d <= 128 else 64)


def _block_n(block_d: int, dot: tl.dtype) -> int:
    """Keys of one step: two stages of K and V stay within 64 KiB of shared memory."""
    return max(16, min(64, (16 << 10) // (block_d * (4 if dot is tl.float32 else 2))))
