// The argument list of the KV writers, shared by the CPU and the CUDA module.
#pragma once

#include <cstdint>

#include "memos_engine/kernels.h"

// Pointers come as integers; then sizes; then the strides of k, v, k_pages and v_pages without their last.
// What belongs to the scales of int8 sources, and then of int8 pages, stands at the end, all 0 without them.
#define ME_KV_WRITE_PARAMETERS                                                                              \
    uintptr_t k, uintptr_t v, uintptr_t k_pages, uintptr_t v_pages, uintptr_t slot, uintptr_t positions,    \
        uintptr_t cos_sin, int src_dtype, int page_dtype, int64_t layers, int64_t tokens, int64_t kv_heads, \
        int64_t head_dim, int64_t blocks, int64_t page, int64_t max_position, int64_t rotary_dim,           \
        int64_t k_layer, int64_t k_token, int64_t k_head, int64_t v_layer, int64_t v_token, int64_t v_head, \
        int64_t kp_layer, int64_t kp_block, int64_t kp_token, int64_t kp_head, int64_t vp_layer,            \
        int64_t vp_block, int64_t vp_token, int64_t vp_head, bool interleaved, uintptr_t k_scale,           \
        uintptr_t v_scale, int64_t groups, int64_t first_token, int64_t ks_layer, int64_t ks_group,         \
        int64_t ks_head, int64_t vs_layer, int64_t vs_token, int64_t vs_head, uintptr_t kp_scale,           \
        uintptr_t vp_scale, int64_t kps_layer, int64_t vps_layer

#define ME_KV_WRITE_ARGUMENTS                                                                               \
    memos_engine::KvWrite {                                                                                 \
        reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v),                                 \
            reinterpret_cast<void*>(k_pages), reinterpret_cast<void*>(v_pages),                             \
            reinterpret_cast<const int64_t*>(slot), reinterpret_cast<const int32_t*>(positions),            \
            reinterpret_cast<const float*>(cos_sin), static_cast<memos_engine::DType>(src_dtype),           \
            static_cast<memos_engine::DType>(page_dtype), layers, tokens, kv_heads, head_dim, blocks, page, \
            max_position, rotary_dim, k_layer, k_token, k_head, v_layer, v_token, v_head, kp_layer,         \
            kp_block, kp_token, kp_head, vp_layer, vp_block, vp_token, vp_head, interleaved,                \
            reinterpret_cast<const float*>(k_scale), reinterpret_cast<const float*>(v_scale), groups,       \
            first_token, ks_layer, ks_group, ks_head, vs_layer, vs_token, vs_head,                          \
            reinterpret_cast<float*>(kp_scale), reinterpret_cast<float*>(vp_scale), kps_layer, vps_layer    \
    }
