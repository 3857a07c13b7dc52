// rms_norm and silu_mul over a range of rows.
#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

template <class S>
ME_INLINE F load_tail(const typename S::T* p, int64_t n) {
    return n >= kWidth ? S::load(p) : load_some<S>(p, n);
}

template <class S>
ME_INLINE void store_tail(typename S::T* p, F v, int64_t n) {
    if (n >= kWidth)
        S::store(p, v);
    else
        store_some<S>(p, v, n);
}

// Adds x to the residual where there is one, and returns the mean of the squares of the rounded sum.
template <class S>
ME_INLINE float add_and_square(const typename S::T* x, typename S::T* residual, int64_t n) {
    F acc[4] = {};
    int64_t i = 0;
    const auto step = [&](int64_t at, int64_t left) {
        F value = load_tail<S>(x + at, left);
        if (residual) {
            store_tail<S>(residual + at, load_tail<S>(residual + at, left) + value, left);
            value = load_tail<S>(residual + at, left);
        }
        return value * value;
    };
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
        for (int u = 0; u < 4; ++u) acc[u] += step(i + u * kWidth, kWidth);
    for (; i < n; i += kWidth) acc[0] += step(i, n - i);
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / (float)n;
}

template <class S>
void norm_rows(const RmsNorm& a, int64_t token, int64_t token_end, const float* weight) {
    typedef typename S::T T;
    for (int64_t i = token; i < token_end; ++i) {
        const T* x = (const T*)a.x + i * a.x_token;
        T* residual = a.residual ? (T*)a.residual + i * a.residual_token : nullptr;
        T* out = (T*)a.out + i * a.out_token;
        const float scale = 1.0f / __builtin_sqrtf(add_and_square<S>(x, residual, a.hidden) + a.eps);
        const T* from = residual ? residual : x;
        for (int64_t d = 0; d < a.hidden; d += kWidth) {
            const int64_t left = a.hidden - d;
            store_tail<S>(out + d, load_tail<S>(from + d, left) * scale * load(weight + d), left);
        }
    }
}

// x / (1 + e^-x), from the exponential of -|x|, which cannot overflow.
ME_INLINE F silu(F x) {
    constexpr float kLog2E = 1.44269504088896341f;
    const F magnitude = x < 0.0f ? -x : x;
    const F e = exp2_nonpositive(-magnitude * kLog2E);
    const F numerator = x < 0.0f ? x * e : x;
    return numerator / (1.0f + e);
}

}  // namespace

// `weight` is scratch for round_up(hidden, 16) floats.
void rms_norm(const RmsNorm& a, int64_t token, int64_t token_end, float* weight) {
    with_dtype(a.weight_dtype, [&](auto w) {
        typedef decltype(w) W;
        widen<W>(weight, (const typename W::T*)a.weight, a.hidden, a.hidden);
    });
    with_dtype(a.dtype, [&](auto s) { norm_rows<decltype(s)>(a, token, token_end, weight); });
}

void add_rows(const AddRows& a, int64_t column, int64_t column_end) {
    with_dtype(a.dtype, [&](auto s) {
        typedef decltype(s) S;
        typedef typename S::T T;
        for (int64_t i = 0; i < a.tokens; ++i) {
            T* to = (T*)a.to + i * a.to_token;
            const T* from = (const T*)a.from + i * a.from_token;
            for (int64_t d = column; d < column_end; d += kWidth) {
                const int64_t left = column_end - d;
                store_tail<S>(to + d, load_tail<S>(to + d, left) + load_tail<S>(from + d, left), left);
            }
        }
    });
}

void silu_mul(const SiluMul& a, int64_t token, int64_t token_end) {
    with_dtype(a.dtype, [&](auto s) {
        typedef decltype(s) S;
        typedef typename S::T T;
        for (int64_t i = token; i < token_end; ++i) {
            const T* gate = (const T*)a.gate + i * a.gate_token;
            const T* up = (const T*)a.up + i * a.up_token;
            T* out = (T*)a.out + i * a.out_token;
            for (int64_t d = 0; d < a.width; d += kWidth) {
                const int64_t left = a.width - d;
                store_tail<S>(out + d, silu(load_tail<S>(gate + d, left)) * load_tail<S>(up + d, left), left);
            }
        }
    });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
