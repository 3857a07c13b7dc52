// What append_kv and splice_kv share: one block of threads writes one token of one layer.
//
// Products and sums are rounded one by one (__fmul_rn, __fadd_rn are never fused), so that the rotation gives
// the bits of the reference.
#pragma once

#include <type_traits>

#include "elements.cuh"

namespace memos_engine::cuda {

// One head's source values as floats.
template <class From>
struct Stored {
    const From* at;
    __device__ float operator[](int64_t d) const { return widen(at[d]); }
};

// int8 with a scale for each channel.
struct ScaledByChannel {
    const int8_t* at;
    const float* scale;
    __device__ float operator[](int64_t d) const { return __fmul_rn((float)at[d], scale[d]); }
};

// int8 with one scale.
struct Scaled {
    const int8_t* at;
    float scale;
    __device__ float operator[](int64_t d) const { return __fmul_rn((float)at[d], scale); }
};

// The heads of one token.
template <class From>
struct Heads {
    const KvWrite& a;
    int64_t layer, token;
    __device__ Stored<From> k(int64_t h) const {
        return {(const From*)a.k + layer * a.k_layer + token * a.k_token + h * a.k_head};
    }
    __device__ Stored<From> v(int64_t h) const {
        return {(const From*)a.v + layer * a.v_layer + token * a.v_token + h * a.v_head};
    }
};

template <>
struct Heads<int8_t> {
    const KvWrite& a;
    int64_t layer, token;
    __device__ ScaledByChannel k(int64_t h) const {
        const int64_t group = (a.first_token + token) / kScaleGroup;
        return {(const int8_t*)a.k + layer * a.k_layer + token * a.k_token + h * a.k_head,
                a.k_scale + layer * a.ks_layer + group * a.ks_group + h * a.ks_head};
    }
    __device__ Scaled v(int64_t h) const {
        return {(const int8_t*)a.v + layer * a.v_layer + token * a.v_token + h * a.v_head,
                a.v_scale[layer * a.vs_layer + token * a.vs_token + h * a.vs_head]};
    }
};

template <class Head>
__device__ float rotated(const Head& head, int64_t d, const float* cos_sin, int64_t half, bool interleaved) {
    const float x = head[d];
    if (d >= 2 * half) return x;
    const bool first = interleaved ? d % 2 == 0 : d < half;
    const int64_t pair = interleaved ? d / 2 : d % half;
    const int64_t partner = interleaved ? (d ^ 1) : (first ? d + half : d - half);
    const float y = head[partner];
    const float along = __fmul_rn(x, cos_sin[pair]), across = __fmul_rn(y, cos_sin[half + pair]);
    return first ? __fsub_rn(along, across) : __fadd_rn(along, across);
}

constexpr unsigned kWarp = 32;

// One head to int8, by one warp: 127ths of the largest size, as ops/int8_kv.py defines it. `value(d)` is
// asked for twice: the second time costs less than a place to keep it.
template <class Value>
__device__ void quantize(const Value& value, int64_t dim, int8_t* to, float* scale_to) {
    constexpr float kLeast = 0x1p-126f, kMost = (float)((0x1p128 - 0x1p105) / 127);
    const unsigned lane = threadIdx.x % kWarp;
    float largest = 0;
    for (int64_t d = lane; d < dim; d += kWarp) largest = fmaxf(largest, fabsf(value(d)));
    for (unsigned step = kWarp / 2; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    const float scale = fminf(fmaxf(__fdiv_rn(largest, 127.0f), kLeast), kMost);
    for (int64_t d = lane; d < dim; d += kWarp) {
        const float multiple = fminf(fmaxf(__fdiv_rn(value(d), scale), -127.0f), 127.0f);
        to[d] = (int8_t)__float2int_rn(multiple);
    }
    if (lane == 0) *scale_to = largest > 0 ? scale : 0.0f;
}

// From is int8_t where there are scales of sources, To where there are scales of pages.
template <class From, class To>
__device__ void write_token(const KvWrite& a, int64_t layer, int64_t token) {
    const int64_t slot = a.slot[token];
    if (slot < 0 || slot >= a.blocks * a.page) return;
    const int64_t block = slot / a.page, offset = slot % a.page;
    const int64_t half = a.cos_sin ? a.rotary_dim / 2 : 0;
    const float* row = a.cos_sin ? a.cos_sin + a.positions[token] * a.rotary_dim : nullptr;
    const Heads<From> heads{a, layer, token};
    To* k_to = (To*)a.k_pages + layer * a.kp_layer + block * a.kp_block + offset * a.kp_token;
    To* v_to = (To*)a.v_pages + layer * a.vp_layer + block * a.vp_block + offset * a.vp_token;
    if constexpr (std::is_same<To, int8_t>::value) {
        float* k_scale = a.kp_scale + layer * a.kps_layer + slot * a.kv_heads;
        float* v_scale = a.vp_scale + layer * a.vps_layer + slot * a.kv_heads;
        for (int64_t h = threadIdx.x / kWarp; h < a.kv_heads; h += blockDim.x / kWarp) {
            const auto k = [&](int64_t d) { return rotated(heads.k(h), d, row, half, a.interleaved); };
            const auto v = [&](int64_t d) { return heads.v(h)[d]; };
            quantize(k, a.head_dim, k_to + h * a.kp_head, k_scale + h);
            quantize(v, a.head_dim, v_to + h * a.vp_head, v_scale + h);
        }
    } else {
        for (int64_t i = threadIdx.x; i < a.kv_heads * a.head_dim; i += blockDim.x) {
            const int64_t h = i / a.head_dim, d = i % a.head_dim;
            narrow(k_to + h * a.kp_head + d, rotated(heads.k(h), d, row, half, a.interleaved));
            narrow(v_to + h * a.vp_head + d, heads.v(h)[d]);
        }
    }
}

inline int threads_for(const KvWrite& a) {
    const int64_t elements = a.kv_heads * a.head_dim;
    return elements >= 256 ? 256 : elements > 128 ? 256 : elements > 64 ? 128 : 64;
}

// Calls f with null pointers of both element types, that of the sources (int8 by their scales) and that of
// the pages.
template <class F>
void with_types(const KvWrite& a, F&& f) {
    const DType from = a.k_scale ? DType::i8 : a.src_dtype;
    with_type(a.page_dtype, [&](auto* to) { with_type(from, [&](auto* source) { f(source, to); }); });
}

}  // namespace memos_engine::cuda
