// Vectors of floats as wide as the level's registers, and conversions between them and storage.
//
// Everything is in an unnamed namespace: a helper with external linkage, compiled for AVX-512 in one file and
// for SSE in another, could be merged by the linker into one copy that the older machine cannot run.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memos_engine/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memos_engine {
namespace ME_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

#define ME_INLINE inline __attribute__((always_inline))

typedef float F __attribute__((vector_size(kWidth * 4)));
typedef int32_t I __attribute__((vector_size(kWidth * 4)));
typedef uint32_t U __attribute__((vector_size(kWidth * 4)));
typedef uint16_t H __attribute__((vector_size(kWidth * 2)));
typedef int8_t B __attribute__((vector_size(kWidth)));

template <class V, class T>
ME_INLINE V load_bits(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

template <class V, class T>
ME_INLINE void store_bits(T* p, V v) {
    std::memcpy(p, &v, sizeof(V));
}

ME_INLINE F load(const float* p) { return load_bits<F>(p); }
ME_INLINE void store(float* p, F v) { store_bits(p, v); }
ME_INLINE F splat(float x) {
#if defined(__AVX512F__)
    return (F)_mm512_set1_ps(x);
#else
    return F{} + x;
#endif
}
ME_INLINE I splat(int32_t x) { return I{} + x; }
ME_INLINE F max(F a, F b) { return a > b ? a : b; }

ME_INLINE float sum4(float v __attribute__((vector_size(16)))) { return (v[0] + v[2]) + (v[1] + v[3]); }

ME_INLINE float sum(F v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
    return sum4(_mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1));
#else
    return sum4(v);
#endif
}

// The sums of kWidth vectors, one a lane: a tree of shuffles costs two for each vector where separate sums
// cost as many as they have steps.
ME_INLINE F sums(const F (&v)[kWidth]) {
#if defined(__AVX512F__)
    F quad[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 a = (__m512)v[4 * i], b = (__m512)v[4 * i + 1];
        const __m512 c = (__m512)v[4 * i + 2], d = (__m512)v[4 * i + 3];
        const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
        const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
        quad[i] = (F)_mm512_unpacklo_pd(ab, cd) + (F)_mm512_unpackhi_pd(ab, cd);
    }
    const auto halves = [](F a, F b) {
        return _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) +
               _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
    };
    const __m512 low = halves(quad[0], quad[1]), high = halves(quad[2], quad[3]);
    return (F)_mm512_shuffle_f32x4(low, high, 0x88) + (F)_mm512_shuffle_f32x4(low, high, 0xdd);
#elif defined(__AVX2__)
    F quad[2];
    for (int i = 0; i < 2; ++i) {
        const __m256 a = (__m256)v[4 * i], b = (__m256)v[4 * i + 1];
        const __m256 c = (__m256)v[4 * i + 2], d = (__m256)v[4 * i + 3];
        const __m256d ab = (__m256d)(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
        const __m256d cd = (__m256d)(_mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d));
        quad[i] = (F)_mm256_unpacklo_pd(ab, cd) + (F)_mm256_unpackhi_pd(ab, cd);
    }
    const __m256 low = (__m256)quad[0], high = (__m256)quad[1];
    return (F)_mm256_permute2f128_ps(low, high, 0x20) + (F)_mm256_permute2f128_ps(low, high, 0x31);
#else
    return F{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
#endif
}

#if defined(__AVX512F__)
// 16x16 elements of 32 bits.
ME_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8) {
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}
#endif

// One struct per storage dtype: `load` widens kWidth elements, `store` rounds them to nearest even.
struct Float32 {
    typedef float T;
    static constexpr DType dtype = DType::f32;
    static ME_INLINE F load(const T* p) { return load_bits<F>(p); }
    static ME_INLINE void store(T* p, F v) { store_bits(p, v); }
};

struct BFloat16 {
    typedef uint16_t T;
    static constexpr DType dtype = DType::bf16;
    static ME_INLINE F load(const T* p) {
#if defined(__AVX512F__)  // GCC converts the halves apart
        return (F)((U)_mm512_cvtepu16_epi32(load_bits<__m256i>(p)) << 16);
#else
        return (F)(__builtin_convertvector(load_bits<H>(p), U) << 16);
#endif
    }
    static ME_INLINE U round(F v) {
        const U bits = (U)v;
        const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const U quiet_nan = (bits >> 16) | 0x40u;
        return v == v ? rounded : quiet_nan;
    }
    static ME_INLINE void store(T* p, F v) { store_bits(p, __builtin_convertvector(round(v), H)); }
};

struct Float16 {
    typedef uint16_t T;
    static constexpr DType dtype = DType::f16;
#if defined(__AVX512F__)
    static ME_INLINE F load(const T* p) { return (F)_mm512_cvtph_ps(load_bits<__m256i>(p)); }
    static ME_INLINE void store(T* p, F v) {
        store_bits(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#elif defined(__F16C__) && defined(__AVX2__)
    static ME_INLINE F load(const T* p) { return (F)_mm256_cvtph_ps(load_bits<__m128i>(p)); }
    static ME_INLINE void store(T* p, F v) {
        store_bits(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#else
    static ME_INLINE F load(const T* p) {
        const U bits = __builtin_convertvector(load_bits<H>(p), U);
        const U magnitude = bits & 0x7fffu;
        // 2^112 moves the exponent from half to single bias, subnormals included.
        U wide = (U)((F)(magnitude << 13) * 0x1p112f);
        wide = magnitude >= 0x7c00u ? (wide | 0x7f800000u) : wide;
        return (F)(wide | ((bits & 0x8000u) << 16));
    }
    static ME_INLINE void store(T* p, F v) {
        const U bits = (U)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        // Adding 0.5 makes the addition itself round a subnormal half to its last place.
        const U subnormal = (U)((F)magnitude + 0.5f) - (126u << 23);
        const U special = magnitude > 0x7f800000u ? (U{} + 0x7e00u) : (U{} + 0x7c00u);
        U half = magnitude < (113u << 23) ? subnormal : normal;
        half = magnitude >= (143u << 23) ? special : half;
        store_bits(p, __builtin_convertvector(half | sign, H));
    }
#endif
};

// Whole numbers, which mean something with their scale alone.
struct Int8 {
    typedef int8_t T;
    static constexpr DType dtype = DType::i8;
    // One instruction, where GCC's own conversion takes the bytes out of the vector one by one.
    static ME_INLINE F load(const T* p) {
#if defined(__AVX512F__)
        const I wide = (I)_mm512_cvtepi8_epi32(load_bits<__m128i>(p));
#elif defined(__AVX2__)
        const I wide = (I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_bits<int64_t>(p)));
#elif defined(__SSE4_1__)
        const I wide = (I)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load_bits<int32_t>(p)));
#else
        const I wide = __builtin_convertvector(load_bits<B>(p), I);
#endif
        return __builtin_convertvector(wide, F);
    }
};

// The first n < kWidth elements; missing ones read as zero.
template <class S>
ME_INLINE F load_some(const typename S::T* p, int64_t n) {
    typename S::T lanes[kWidth] = {};
    std::memcpy(lanes, p, n * sizeof(typename S::T));
    return S::load(lanes);
}

template <class S>
ME_INLINE void store_some(typename S::T* p, F v, int64_t n) {
    typename S::T lanes[kWidth];
    S::store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(typename S::T));
}

// Widens n elements; `to` gets zeros up to `padded`.
template <class S>
ME_INLINE void widen(float* to, const typename S::T* from, int64_t n, int64_t padded) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, S::load(from + i));
    for (; i < padded; i += kWidth) store(to + i, i < n ? load_some<S>(from + i, n - i) : F{});
}

template <class S>
ME_INLINE void narrow(typename S::T* to, const float* from, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) S::store(to + i, load(from + i));
    if (i < n) store_some<S>(to + i, load_some<Float32>(from + i, n - i), n - i);
}

// 2^x for x <= 0, -inf included; relative error 1e-7. The polynomial is a minimax fit of 2^f on [-0.5, 0.5].
// At -127 it is 1 and the exponent field comes out as zero: whatever is too small for a normal number becomes
// 0.
ME_INLINE F exp2_nonpositive(F x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    x = max(x, splat(-127.0f));
    const F shifted = x + kMagic;
    const F f = x - (shifted - kMagic);
    F p = splat(0.00015353362f);
    p = p * f + 0.0013398874f;
    p = p * f + 0.0096184369f;
    p = p * f + 0.055503324f;
    p = p * f + 0.24022648f;
    p = p * f + 0.69314718f;
    p = p * f + 1.0f;
    return (F)((U)p + ((U)shifted << 23));
}

// Calls f with the struct of a dtype.
template <class Fn>
ME_INLINE void with_dtype(DType dtype, Fn&& f) {
    switch (dtype) {
        case DType::f32:
            f(Float32{});
            break;
        case DType::bf16:
            f(BFloat16{});
            break;
        case DType::f16:
            f(Float16{});
            break;
        case DType::i8:
            break;
    }
}

// The same for pages, which may be int8.
template <class Fn>
ME_INLINE void with_page_dtype(DType dtype, Fn&& f) {
    if (dtype == DType::i8) return f(Int8{});
    with_dtype(dtype, f);
}

// Calls f with 1 to 8 rows, as a constant.
template <class Fn>
ME_INLINE void with_rows(int64_t rows, Fn&& f) {
    switch (rows) {
        case 1:
            return f(std::integral_constant<int, 1>{});
        case 2:
            return f(std::integral_constant<int, 2>{});
        case 3:
            return f(std::integral_constant<int, 3>{});
        case 4:
            return f(std::integral_constant<int, 4>{});
        case 5:
            return f(std::integral_constant<int, 5>{});
        case 6:
            return f(std::integral_constant<int, 6>{});
        case 7:
            return f(std::integral_constant<int, 7>{});
        default:
            return f(std::integral_constant<int, 8>{});
    }
}

}  // namespace
}  // namespace ME_LEVEL
}  // namespace memos_engine
