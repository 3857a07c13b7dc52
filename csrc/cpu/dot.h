// Products of x with rows of weights that are summed in float32.
#pragma once

#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

// How x is kept (`P`) and how kElements products are added to a sum. Missing elements read as zero.
template <class S>
struct Dot {
    typedef typename S::T T;
    typedef float P;
    static constexpr int kElements = kWidth;
    typedef F Weights;
    static ME_INLINE Weights load(const T* w) { return S::load(w); }
    static ME_INLINE Weights load_part(const T* w, int64_t n) { return load_some<S>(w, n); }
    static ME_INLINE F add(F acc, Weights w, const P* x) { return acc + w * load_bits<F>(x); }
    static ME_INLINE void pack(P* to, const T* x, int64_t n, int64_t size) { widen<S>(to, x, n, size); }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 products, added in float32 by one instruction.
template <>
struct Dot<BFloat16> {
    typedef uint16_t T;
    typedef uint16_t P;
    static constexpr int kElements = 32;
    typedef __m512bh Weights;
    static ME_INLINE Weights load(const T* w) { return load_bits<__m512bh>(w); }
    static ME_INLINE Weights load_part(const T* w, int64_t n) {
        T lanes[32] = {};
        std::memcpy(lanes, w, n * sizeof(T));
        return load(lanes);
    }
    static ME_INLINE F add(F acc, Weights w, const P* x) {
        return (F)_mm512_dpbf16_ps((__m512)acc, w, load_bits<__m512bh>(x));
    }
    static ME_INLINE void pack(P* to, const T* x, int64_t n, int64_t size) {
        std::memcpy(to, x, n * sizeof(T));
        std::memset(to + n, 0, (size - n) * sizeof(T));
    }
};
#endif

}  // namespace
}  // namespace ME_LEVEL
}  // namespace memos_engine
