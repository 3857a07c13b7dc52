// x @ weight^T for int8 weights with a scale for each output: half the bytes of bfloat16 to read.
//
// Weights are widened to floats as they come; where there are integer dot products, x of 16 bits is rounded
// to 16 bits of its row's largest value instead (bfloat16 holds fewer) and cut into two unsigned bytes: 256 *
// high + low - 32768. Two products of bytes and the sum of the weights then give the sum in whole
// numbers, the same bits whatever runs beside the row.
#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

constexpr int64_t kAhead = 6144;  // bytes that weights are asked for in advance; the best on Zen 4

// How a row of x is kept: kParts times padded elements, then the float that its sums are multiplied by.
struct Floats {
    typedef float Element;
    static constexpr int64_t kStep = kWidth, kParts = 1;
};

template <class Way>
ME_INLINE int64_t padded(const Linear& a) {
    return (a.inputs + Way::kStep - 1) / Way::kStep * Way::kStep;
}

template <class Way>
ME_INLINE int64_t row_bytes(const Linear& a) {
    const int64_t size = Way::kParts * padded<Way>(a) * (int64_t)sizeof(typename Way::Element);
    return (size + sizeof(float) + 63) / 64 * 64;
}

template <class Way>
ME_INLINE const typename Way::Element* row_of(const void* packed, const Linear& a, int64_t r) {
    return (const typename Way::Element*)((const char*)packed + r * row_bytes<Way>(a));
}

template <class Way>
ME_INLINE float* unit_of(const typename Way::Element* row, const Linear& a) {
    return (float*)(row + Way::kParts * padded<Way>(a));
}

template <class S>
void pack_row(const Linear& a, const typename S::T* x, float* row, float*) {
    widen<S>(row, x, a.inputs, padded<Floats>(a));
    *unit_of<Floats>(row, a) = 1.0f;
}

ME_INLINE F widened(const int8_t* w, int64_t n) {
    typedef int8_t B __attribute__((vector_size(kWidth)));
    int8_t lanes[kWidth] = {};
    std::memcpy(lanes, w, n);
    return __builtin_convertvector(__builtin_convertvector(load_bits<B>(lanes), I), F);
}

// Sums over the lanes of one row of weights with R rows of x, in units of x.
template <int R>
ME_INLINE void dots(const Linear& a, const int8_t* w, const float* x, F* total) {
    F sum[R] = {};
    int64_t i = 0;
    const auto step = [&](F weights) {
        for (int r = 0; r < R; ++r) sum[r] += weights * load(row_of<Floats>(x, a, r) + i);
    };
    for (; i + kWidth <= a.inputs; i += kWidth) {
        __builtin_prefetch((const char*)w + i + kAhead, 0, 2);
        step(widened(w + i, kWidth));
    }
    if (i < a.inputs) step(widened(w + i, a.inputs - i));
    for (int r = 0; r < R; ++r) total[r * kWidth] = sum[r];
}

template <class S>
struct WayOf {
    typedef Floats type;
};

#if defined(__AVX512VNNI__)
// Low bytes, then high bytes.
struct Bytes {
    typedef uint8_t Element;
    static constexpr int64_t kStep = 64, kParts = 2;
};

template <>
struct WayOf<BFloat16> {
    typedef Bytes type;
};
template <>
struct WayOf<Float16> {
    typedef Bytes type;
};

template <class S>
void pack_row(const Linear& a, const typename S::T* x, uint8_t* low, float* wide) {
    widen<S>(wide, x, a.inputs, padded<Bytes>(a));
    uint8_t* high = low + padded<Bytes>(a);
    F top = {}, odd = {};
    for (int64_t i = 0; i < padded<Bytes>(a); i += kWidth) {
        const F value = load(wide + i);
        top = max(top, max(value, -value)), odd += value * 0.0f;
    }
    const float largest = _mm512_reduce_max_ps((__m512)top);
    const float unit = largest > 0 ? largest / 32767.0f : 1.0f;
    *unit_of<Bytes>(low, a) = unit + sum(odd);  // NaN where an element is infinite or NaN
    for (int64_t i = 0; i < padded<Bytes>(a); i += kWidth) {
        const __m512i whole =
            _mm512_add_epi32(_mm512_cvtps_epi32((__m512)(load(wide + i) / unit)), _mm512_set1_epi32(32768));
        _mm_storeu_si128((__m128i*)(low + i), _mm512_cvtepi32_epi8(whole));
        _mm_storeu_si128((__m128i*)(high + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    }
}

ME_INLINE __m512i dot(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
}

template <int R>
ME_INLINE void dots(const Linear& a, const int8_t* w, const uint8_t* packed, F* total) {
    __m512i low[R], high[R], ones = _mm512_setzero_si512();
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_si512();
    const int64_t size = padded<Bytes>(a);
    const auto step = [&](int64_t i, __m512i weights) {
        // Ahead of the hardware prefetcher, which stops at every page.
        __builtin_prefetch((const char*)w + i + kAhead, 0, 2);
        ones = dot(ones, _mm512_set1_epi8(1), weights);
        for (int r = 0; r < R; ++r) {
            const uint8_t* x = row_of<Bytes>(packed, a, r) + i;
            low[r] = dot(low[r], load_bits<__m512i>(x), weights);
            high[r] = dot(high[r], load_bits<__m512i>(x + size), weights);
        }
    };
    int64_t i = 0;
    for (; i + Bytes::kStep <= a.inputs; i += Bytes::kStep) step(i, load_bits<__m512i>(w + i));
    if (i < a.inputs) {
        int8_t lanes[Bytes::kStep] = {};
        std::memcpy(lanes, w + i, a.inputs - i);
        step(i, load_bits<__m512i>(lanes));
    }
    for (int r = 0; r < R; ++r) {
        const __m512i centred = _mm512_sub_epi32(high[r], _mm512_slli_epi32(ones, 7));
        total[r * kWidth] = (F)_mm512_cvtepi32_ps(centred) * 256.0f + (F)_mm512_cvtepi32_ps(low[r]);
    }
}
#endif

// R rows of x against a single stream of weights; kWidth outputs are summed across lanes together.
template <class S, int R, class Element>
void stream(const Linear& a, const Element* packed, typename S::T* out, int64_t n, int64_t end) {
    typedef typename WayOf<S>::type Way;
    const int8_t* w = (const int8_t*)a.weight;
    for (; n < end; n += kWidth) {
        F total[R][kWidth] = {};
        const int64_t some = end - n < kWidth ? end - n : kWidth;
        for (int64_t c = 0; c < some; ++c) dots<R>(a, w + (n + c) * a.weight_row, packed, &total[0][c]);
        const F scale = some == kWidth ? load(a.scale + n) : load_some<Float32>(a.scale + n, some);
        for (int r = 0; r < R; ++r) {
            const F y = sums(total[r]) * (scale * *unit_of<Way>(row_of<Way>(packed, a, r), a));
            if (some == kWidth)
                S::store(out + r * a.out_token + n, y);
            else
                store_some<S>(out + r * a.out_token + n, y, some);
        }
    }
}

}  // namespace

// The rows, and one of floats to round from.
int64_t linear_int8_scratch(const Linear& a) {
    int64_t size = 0;
    with_dtype(a.dtype, [&](auto s) {
        typedef typename WayOf<decltype(s)>::type Way;
        size = a.tokens * row_bytes<Way>(a) + padded<Way>(a) * (int64_t)sizeof(float);
    });
    return size;
}

void linear_int8_pack(const Linear& a, void* packed) {
    with_dtype(a.dtype, [&](auto s) {
        typedef decltype(s) S;
        typedef typename WayOf<S>::type Way;
        float* wide = (float*)((char*)packed + a.tokens * row_bytes<Way>(a));
        for (int64_t r = 0; r < a.tokens; ++r)
            pack_row<S>(a, (const typename S::T*)a.x + r * a.x_token,
                        (typename Way::Element*)row_of<Way>(packed, a, r), wide);
    });
}

void linear_int8(const Linear& a, const void* packed, int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto s) {
        typedef decltype(s) S;
        int64_t n = begin;
        for (int64_t group; n < end; n = group) {
            group = a.tokens > 8 && n + 16 < end ? n + 16 : end;  // what stays in the nearest cache meanwhile
            for (int64_t t = 0; t < a.tokens; t += 8) {
                auto* out = (typename S::T*)a.out + t * a.out_token;
                const auto* x = row_of<typename WayOf<S>::type>(packed, a, t);
                with_rows(a.tokens - t, [&](auto r) { stream<S, r()>(a, x, out, n, group); });
            }
        }
    });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
