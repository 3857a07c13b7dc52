"""paged_attention on the GPU: one source for decoding, chunked prefill and batches of both.

A program takes a few query rows of one request, with all query heads of one KV head packed into the rows of
its matrix products, and walks over keys with an online softmax (FlashAttention, arXiv 2205.14135). Requests
of few rows have too few programs to fill a GPU: their keys are split into segments (Flash-Decoding), which a
second kernel joins. How a request is cut follows from its own rows and keys alone, read on the device, so
that its bits are the same in any batch and the launch can be captured in a CUDA graph.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_place(query_start, request, UNIT: tl.constexpr, MOST: tl.constexpr):
    """Where a request begins in a list of units of UNIT rows, in which each of the requests with at most
    MOST units (0: with any number) has room for all of its own, and no two share a unit."""
    place = tl.load(query_start + request) // UNIT
    if UNIT > 1:
        place += request
    if MOST > 0:
        place = tl.minimum(place, request * MOST)
    return place


@triton.jit
def find_request(query_start, requests, place, UNIT: tl.constexpr, MOST: tl.constexpr):
    """The last request that begins at `place` or before it (the first one if none does)."""
    low = 0
    high = requests
    while high - low > 1:
        middle = (low + high) // 2
        if first_place(query_start, middle, UNIT, MOST) <= place:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def count_segments(
    rows,
    length,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Into how many segments a request's keys are split: enough for PROGRAMS programs, none too short."""
    keys = length
    if WINDOW > 0:
        keys = tl.minimum(length, WINDOW)
    wanted = tl.cdiv(PROGRAMS, tl.cdiv(rows, BLOCK_Q) * KV_HEADS)
    return tl.maximum(tl.minimum(tl.minimum(wanted, SEGMENTS), tl.cdiv(keys, SEGMENT_KEYS)), 1)


@triton.jit
def attend_kernel(
    q,
    k_pages,
    v_pages,
    block_table,
    query_start,
    seq_lens,
    q_pos,
    out,
    lse,
    parts,
    tops,
    sums,
    requests,
    scale,
    q_token,
    q_head,
    k_block,
    k_slot,
    k_head,
    v_block,
    v_slot,
    v_head,
    table_request,
    out_token,
    out_head,
    k_page_scale,
    v_page_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    LSE: tl.constexpr,
    DOT: tl.constexpr,
    SCALED: tl.constexpr,
    FEWEST_ROWS: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (tiles of BLOCK_Q rows, KV heads, segments); requests outside FEWEST_ROWS..MOST_ROWS are skipped.

    scale: sm_scale * log2(e). DOT: the dtype of the matrix products' operands. `parts`, `tops`, `sums`
    (float32; `[rows, heads, SEGMENTS, BLOCK_D]` and twice `[rows, heads, SEGMENTS]`) take what the segments
    found where there are several. SCALED: pages are int8; k_page_scale and v_page_scale are `[blocks, page,
    kv_heads]`, contiguous.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    MOST_TILES: tl.constexpr = (MOST_ROWS + BLOCK_Q - 1) // BLOCK_Q
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    request = find_request(query_start, requests, tile, BLOCK_Q, MOST_TILES)
    first = tl.load(query_start + request)
    rows = tl.load(query_start + request + 1) - first
    start = (tile - first_place(query_start, request, BLOCK_Q, MOST_TILES)) * BLOCK_Q
    if (start < 0) | (start >= rows) | (rows < FEWEST_ROWS):
        return
    if MOST_ROWS > 0:  # noqa: SIM102 - decided when compiled
        if rows > MOST_ROWS:
            return
    length = tl.load(seq_lens + request)
    segments = count_segments(
        rows, length, KV_HEADS, WINDOW, BLOCK_Q, SEGMENTS, SEGMENT_KEYS, PROGRAMS
    )  # fmt: skip
    if segment >= segments:
        return

    packed = tl.arange(0, BLOCK_M)
    row = start + packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    live = (row < rows) & (packed < BLOCK_Q * GROUP)
    channel = tl.arange(0, BLOCK_D)
    inside = channel < DIM
    token = (first + row).to(tl.int64)
    q_at = q + token[:, None] * q_token + head[:, None] * q_head + channel[None, :]
    query = tl.load(q_at, mask=live[:, None] & inside[None, :], other=0.0).to(DOT)
    position = tl.load(q_pos + token, mask=live, other=-1)

    # Keys that no row of the tile sees are not read.
    end = tl.minimum(length, tl.max(position, axis=0) + 1)
    begin = 0
    if WINDOW > 0:
        lowest = tl.min(tl.where(live, position, 2147483647), axis=0) - WINDOW + 1
        begin = tl.maximum(lowest, 0) // BLOCK_N * BLOCK_N
    if SEGMENTS > 1:
        span = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), segments) * BLOCK_N
        begin += segment * span
        end = tl.minimum(end, begin + span)

    table = block_table + request.to(tl.int64) * table_request
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(begin, end, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        there = key < end
        block = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64)
        slot = key % PAGE
        k_at = k_pages + (block * k_block + slot * k_slot + kv_head * k_head)[None, :] + channel[:, None]
        keys = tl.load(k_at, mask=inside[:, None] & there[None, :], other=0.0).to(DOT)
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        scale_at = (block * PAGE + slot) * KV_HEADS + kv_head
        if SCALED:
            scores = scores * tl.load(k_page_scale + scale_at, mask=there, other=0.0)[None, :]
        visible = (key[None, :] <= position[:, None]) & there[None, :]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: -inf - 0, never NaN
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        v_at = v_pages + (block * v_block + slot * v_slot + kv_head * v_head)[:, None] + channel[None, :]
        values = tl.load(v_at, mask=there[:, None] & inside[None, :], other=0.0)
        if SCALED:  # not folded into the weights: their product may be too small for a float16
            of_key = tl.load(v_page_scale + scale_at, mask=there, other=0.0)
            values = values.to(tl.float32) * of_key[:, None]
        values = values.to(DOT)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.dot(weights.to(DOT), values, input_precision="ieee")
        top = new_top

    if segments > 1:
        place = first_place(query_start, request, 1, MOST_ROWS) + row
        state = (place.to(tl.int64) * (KV_HEADS * GROUP) + head) * SEGMENTS + segment
        tl.store(tops + state, top, mask=live)
        tl.store(sums + state, total, mask=live)
        tl.store(parts + state[:, None] * BLOCK_D + channel[None, :], acc, mask=live[:, None])
    else:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_at = out + token[:, None] * out_token + head[:, None] * out_head + channel[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])
        if LSE:
            tl.store(lse + token * (KV_HEADS * GROUP) + head, natural_lse(top, total), mask=live)


@triton.jit
def natural_lse(top, total):
    """Natural log of the softmax denominator: the sum `total` of powers of two over `2 ** top`."""
    log = tl.log2(tl.where(total == 0.0, 1.0, total))
    return tl.where(total == 0.0, float("-inf"), (top + log) * 0.6931471805599453)


@triton.jit
def join_kernel(
    query_start,
    seq_lens,
    out,
    lse,
    parts,
    tops,
    sums,
    requests,
    out_token,
    out_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    LSE: tl.constexpr,
    FEWEST_ROWS: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows of `parts`, heads): joins a row's segments. The requests are those of `attend_kernel`."""
    place = tl.program_id(0)
    head = tl.program_id(1)
    request = find_request(query_start, requests, place, 1, MOST_ROWS)
    first = tl.load(query_start + request)
    rows = tl.load(query_start + request + 1) - first
    row = place - first_place(query_start, request, 1, MOST_ROWS)
    if (row < 0) | (row >= rows) | (rows < FEWEST_ROWS) | (rows > MOST_ROWS):
        return
    length = tl.load(seq_lens + request)
    segments = count_segments(
        rows, length, KV_HEADS, WINDOW, BLOCK_M // GROUP, SEGMENTS, SEGMENT_KEYS, PROGRAMS
    )  # fmt: skip
    if segments == 1:
        return

    segment = tl.arange(0, SEGMENTS)
    used = segment < segments
    state = (place.to(tl.int64) * (KV_HEADS * GROUP) + head) * SEGMENTS + segment
    top = tl.load(tops + state, mask=used, other=float("-inf"))
    total = tl.load(sums + state, mask=used, other=0.0)
    highest = tl.max(top, axis=0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(total * weight, axis=0)
    channel = tl.arange(0, BLOCK_D)
    part = tl.load(parts + state[:, None] * BLOCK_D + channel[None, :], mask=used[:, None], other=0.0)
    result = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    token = (first + row).to(tl.int64)
    to = out + token * out_token + head * out_head + channel
    tl.store(to, result.to(out.dtype.element_ty), mask=channel < DIM)
    if LSE:
        tl.store(lse + token * (KV_HEADS * GROUP) + head, natural_lse(highest, total))
