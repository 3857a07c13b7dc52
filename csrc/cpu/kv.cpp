// RoPE, and the writing of K and V into pages. One rotation serves both, compiled without contraction into
// fused multiply-adds: its results are then the same bits on every level and in the torch reference.
#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

struct Angles {
    const float *cos, *sin;
    int64_t half;  // rotary_dim / 2
};

ME_INLINE Angles angles(const float* cos_sin, int64_t position, int64_t rotary_dim) {
    const float* row = cos_sin + position * rotary_dim;
    return {row, row + rotary_dim / 2, rotary_dim / 2};
}

template <class From, class To>
ME_INLINE void convert(const typename From::T* from, typename To::T* to, int64_t n) {
    if (From::dtype == To::dtype) {
        if ((const void*)from != (const void*)to) std::memcpy(to, from, n * sizeof(*from));
        return;
    }
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) To::store(to + i, From::load(from + i));
    if (i < n) store_some<To>(to + i, load_some<From>(from + i, n - i), n - i);
}

// `to` may be `from`.
template <class From, class To>
ME_INLINE void rotate_halves(const typename From::T* from, typename To::T* to, int64_t dim, Angles t) {
    int64_t i = 0;
    for (; i + kWidth <= t.half; i += kWidth) {
        const F a = From::load(from + i), b = From::load(from + t.half + i);
        const F cos = load(t.cos + i), sin = load(t.sin + i);
        To::store(to + i, a * cos - b * sin);
        To::store(to + t.half + i, b * cos + a * sin);
    }
    if (const int64_t n = t.half - i; n > 0) {
        const F a = load_some<From>(from + i, n), b = load_some<From>(from + t.half + i, n);
        const F cos = load_some<Float32>(t.cos + i, n), sin = load_some<Float32>(t.sin + i, n);
        store_some<To>(to + i, a * cos - b * sin, n);
        store_some<To>(to + t.half + i, b * cos + a * sin, n);
    }
    convert<From, To>(from + 2 * t.half, to + 2 * t.half, dim - 2 * t.half);
}

template <class From, class To>
ME_INLINE void rotate_pairs(const typename From::T* from, typename To::T* to, int64_t dim, Angles t) {
    for (int64_t i = 0; i < t.half; i += kWidth) {
        const int64_t n = t.half - i < kWidth ? t.half - i : kWidth;
        float x[2 * kWidth];
        widen<From>(x, from + 2 * i, 2 * n, 2 * kWidth);
        for (int64_t p = 0; p < n; ++p) {
            const float a = x[2 * p], b = x[2 * p + 1], cos = t.cos[i + p], sin = t.sin[i + p];
            x[2 * p] = a * cos - b * sin;
            x[2 * p + 1] = b * cos + a * sin;
        }
        narrow<To>(to + 2 * i, x, 2 * n);
    }
    convert<From, To>(from + 2 * t.half, to + 2 * t.half, dim - 2 * t.half);
}

template <class From, class To>
ME_INLINE void rotate(const typename From::T* from, typename To::T* to, int64_t dim, Angles t, bool pairs) {
    if (t.half == 0)
        convert<From, To>(from, to, dim);
    else if (pairs)
        rotate_pairs<From, To>(from, to, dim, t);
    else
        rotate_halves<From, To>(from, to, dim, t);
}

template <class From, class To>
void write_tokens(const KvWrite& a, int64_t layer, int64_t token, int64_t token_end) {
    typedef typename From::T S;
    typedef typename To::T D;
    const S* k = (const S*)a.k + layer * a.k_layer;
    const S* v = (const S*)a.v + layer * a.v_layer;
    D* k_pages = (D*)a.k_pages + layer * a.kp_layer;
    D* v_pages = (D*)a.v_pages + layer * a.vp_layer;
    // Heads of a token that lie side by side on both ends are one copy.
    const bool dense = a.v_head == a.head_dim && a.vp_head == a.head_dim;
    for (int64_t i = token; i < token_end; ++i) {
        const int64_t slot = a.slot[i];
        if (slot < 0) continue;
        const int64_t block = slot / a.page, offset = slot % a.page;
        const Angles t = a.cos_sin ? angles(a.cos_sin, a.positions[i], a.rotary_dim) : Angles{};
        const S* k_from = k + i * a.k_token;
        const S* v_from = v + i * a.v_token;
        D* k_to = k_pages + block * a.kp_block + offset * a.kp_token;
        D* v_to = v_pages + block * a.vp_block + offset * a.vp_token;
        for (int64_t h = 0; h < a.kv_heads; ++h)
            rotate<From, To>(k_from + h * a.k_head, k_to + h * a.kp_head, a.head_dim, t, a.interleaved);
        if (dense) {
            convert<From, To>(v_from, v_to, a.kv_heads * a.head_dim);
        } else {
            for (int64_t h = 0; h < a.kv_heads; ++h)
                convert<From, To>(v_from + h * a.v_head, v_to + h * a.vp_head, a.head_dim);
        }
    }
}

}  // namespace

void write_kv(const KvWrite& a, int64_t layer, int64_t token, int64_t token_end) {
    with_dtype(a.src_dtype, [&](auto from) {
        with_dtype(a.page_dtype,
                   [&](auto to) { write_tokens<decltype(from), decltype(to)>(a, layer, token, token_end); });
    });
}

void rope(const Rope& a, int64_t token, int64_t token_end) {
    with_dtype(a.dtype, [&](auto s) {
        typedef decltype(s) S;
        for (int64_t i = token; i < token_end; ++i) {
            const Angles t = angles(a.cos_sin, a.positions[i], a.rotary_dim);
            for (int64_t h = 0; h < a.heads; ++h) {
                typename S::T* x = (typename S::T*)a.x + i * a.token + h * a.head;
                rotate<S, S>(x, x, a.head_dim, t, a.interleaved);
            }
        }
    });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
