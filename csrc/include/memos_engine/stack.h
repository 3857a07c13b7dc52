// All layers of a decoder for a few rows, in one call and one parallel region.
//
// The plain pre-norm layer: RMS norm, q, k, v (with biases), RMS norm of q and k by head, RoPE, paged
// attention, o, residual; RMS norm, silu(gate) * up, down, residual. Every product is rounded to the dtype
// before it is added. Projections are [out, in], contiguous; what a layer lacks is null.
#pragma once

#include <vector>

#include "memos_engine/kernels.h"

namespace memos_engine {

struct StackLayer {
    const void *input_norm, *q, *k, *v, *o, *post_norm, *gate, *up, *down;
    const void *q_bias, *k_bias, *v_bias, *q_norm, *k_norm;
    const float* cos_sin;  // [max_position, rotary_dim]; null: no rotation
    // [outputs]: the projection is int8 (Linear); null: of the stack's dtype.
    const float *q_scale, *k_scale, *v_scale, *o_scale, *gate_scale, *up_scale, *down_scale;
    int64_t max_position, rotary_dim, window;
};

struct Stack {
    std::vector<StackLayer> layers;
    const void* final_norm;
    DType dtype, norm_dtype;
    int64_t hidden, inner, heads, kv_heads, head_dim;
    float eps, sm_scale;
    void *k_pages, *v_pages;  // [layers, blocks, page, kv_heads, head_dim]
    int64_t blocks, page;
    int64_t k_layer, k_block, k_token, k_head, v_layer, v_block, v_token, v_head;
    DType page_dtype;
    float *k_scale, *v_scale;  // of int8 pages: [layers, blocks, page, kv_heads], contiguous within a layer
    int64_t k_scale_layer, v_scale_layer;
};

struct StackCall {
    void* hidden;         // [tokens, hidden], the residual stream; overwritten
    void* out;            // [wanted, hidden], normalised
    const int64_t* rows;  // [wanted], or null: all
    const int64_t* slot;
    const int32_t *positions, *query_start, *block_table, *seq_lens;
    int64_t tokens, wanted, requests, max_blocks, table_stride;
    LoraRows lora;  // without segments, nothing of it is looked at
};

// Checks every index before anything is written.
Status run_stack(const Stack& stack, const StackCall& call, int threads);

}  // namespace memos_engine
