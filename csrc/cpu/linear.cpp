// x @ weight^T for few rows of x: reading the weights is the whole cost, so each is read once, in order.
//
// Up to 8 rows here, in vector registers; on AMX tiles (linear_amx.cpp) as many as the caller likes.
#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {

bool linear_amx_fits(const Linear&);
int64_t linear_amx_scratch(const Linear&);
void linear_amx_pack(const Linear&, uint32_t*);
void linear_amx(const Linear&, const void*, int64_t, int64_t);

namespace {

ME_INLINE int64_t padded(const Linear& a) { return (a.inputs + 31) / 32 * 32; }

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

// C outputs for R rows; with one row, U sums each hide the latency of the additions.
template <class S, int R, int C, int U>
ME_INLINE void columns(const Linear& a, const void* packed, int64_t n) {
    typedef Dot<S> D;
    typedef typename S::T T;
    constexpr int64_t kStep = D::kElements;
    const typename D::P* x = (const typename D::P*)packed;
    const T* w = (const T*)a.weight + n * a.weight_row;
    const int64_t row = padded(a);
    F acc[U][R][C] = {};
    int64_t i = 0;
    for (; i + U * kStep <= a.inputs; i += U * kStep) {
        for (int u = 0; u < U; ++u) {
            for (int c = 0; c < C; ++c) {
                const T* at = w + c * a.weight_row + i + u * kStep;
                // Ahead of the hardware prefetcher, which stops at every page.
                __builtin_prefetch((const char*)at + 4096);
                const auto weights = D::load(at);
                for (int r = 0; r < R; ++r)
                    acc[u][r][c] = D::add(acc[u][r][c], weights, x + r * row + i + u * kStep);
            }
        }
    }
    for (; i < a.inputs; i += kStep) {
        for (int c = 0; c < C; ++c) {
            const T* at = w + c * a.weight_row + i;
            const auto weights = a.inputs - i >= kStep ? D::load(at) : D::load_part(at, a.inputs - i);
            for (int r = 0; r < R; ++r) acc[0][r][c] = D::add(acc[0][r][c], weights, x + r * row + i);
        }
    }
    for (int r = 0; r < R; ++r) {
        float y[C];
        for (int c = 0; c < C; ++c) {
            F total = acc[0][r][c];
            for (int u = 1; u < U; ++u) total += acc[u][r][c];
            y[c] = sum(total);
        }
        narrow<S>((T*)a.out + r * a.out_token + n, y, C);
    }
}

template <class S, int R>
void range(const Linear& a, const void* packed, int64_t n, int64_t end) {
    // As many sums as leave room for the operands: 16 of 32 registers, or 8 of 16. One row is read as a
    // single stream; more rows take several outputs at a time, so that each load of x serves all of them.
    constexpr int kSums = kWidth == 16 ? 16 : 8;
    constexpr int C = R == 1 ? 1 : kSums / R > 4 ? 4 : kSums / R;
    constexpr int U = R == 1 ? 4 : R == 2 ? kSums / 8 : 1;
    for (; n + C <= end; n += C) columns<S, R, C, U>(a, packed, n);
    for (; n < end; ++n) columns<S, R, 1, U>(a, packed, n);
}

}  // namespace

bool linear_fits(const Linear& a) { return a.tokens <= 8 || linear_amx_fits(a); }

int64_t linear_scratch(const Linear& a) {
    return linear_amx_fits(a) ? linear_amx_scratch(a) : a.tokens * padded(a) * sizeof(float);
}

void linear_pack(const Linear& a, void* packed) {
    if (linear_amx_fits(a)) return linear_amx_pack(a, (uint32_t*)packed);
    with_dtype(a.dtype, [&](auto s) {
        typedef Dot<decltype(s)> D;
        typedef typename D::T T;
        for (int64_t r = 0; r < a.tokens; ++r)
            D::pack((typename D::P*)packed + r * padded(a), (const T*)a.x + r * a.x_token, a.inputs,
                    padded(a));
    });
}

void linear(const Linear& a, const void* packed, int64_t output, int64_t output_end) {
    if (linear_amx_fits(a)) return linear_amx(a, packed, output, output_end);
    with_dtype(a.dtype, [&](auto s) {
        typedef decltype(s) S;
        switch (a.tokens) {
            case 1:
                return range<S, 1>(a, packed, output, output_end);
            case 2:
                return range<S, 2>(a, packed, output, output_end);
            case 3:
                return range<S, 3>(a, packed, output, output_end);
            case 4:
                return range<S, 4>(a, packed, output, output_end);
            case 5:
                return range<S, 5>(a, packed, output, output_end);
            case 6:
                return range<S, 6>(a, packed, output, output_end);
            case 7:
                return range<S, 7>(a, packed, output, output_end);
            default:
                return range<S, 8>(a, packed, output, output_end);
        }
    });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
