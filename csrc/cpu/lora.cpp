// Low-rank deltas for few rows of x: a and b are read once, in order, for all rows of their adapter.
//
// A row's sums do not depend on the rows beside it: they are the same bits in any batch.
#include "dot.h"
#include "level.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

constexpr int kGroup = 4;  // rows whose sums are in registers together

// How `mid` is kept: as what meets b.
template <class S>
struct Mid {
    typedef float T;
    static ME_INLINE T of(float x) { return x; }
};

#if defined(__AVX512BF16__)
template <>
struct Mid<BFloat16> {
    typedef uint16_t T;
    static ME_INLINE T of(float x) { return (T)BFloat16::round(splat(x))[0]; }
};
#endif

template <class S>
ME_INLINE int64_t padded(const LoraWork& a) {
    constexpr int64_t kStep = Dot<S>::kElements;
    return (a.inputs + kStep - 1) / kStep * kStep;
}

// C rows of a by R rows of x.
template <class S, int R, int C>
ME_INLINE void block(const LoraWork& a, const typename Dot<S>::P* const* x, int64_t row, int64_t rank) {
    typedef Dot<S> D;
    constexpr int64_t kStep = D::kElements;
    const typename S::T* w = (const typename S::T*)a.a + rank * a.inputs;
    F acc[C][R] = {};
    int64_t i = 0;
    for (; i + kStep <= a.inputs; i += kStep) {
        for (int c = 0; c < C; ++c) {
            const auto weights = D::load(w + c * a.inputs + i);
            for (int r = 0; r < R; ++r) acc[c][r] = D::add(acc[c][r], weights, x[r] + i);
        }
    }
    if (i < a.inputs) {
        for (int c = 0; c < C; ++c) {
            const auto weights = D::load_part(w + c * a.inputs + i, a.inputs - i);
            for (int r = 0; r < R; ++r) acc[c][r] = D::add(acc[c][r], weights, x[r] + i);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            ((typename Mid<S>::T*)a.mid)[(row + r) * a.mid_row() + rank + c] =
                Mid<S>::of(sum(acc[c][r]) * a.scale);
}

template <class S>
void shrink(const LoraWork& a, int64_t begin, int64_t end, void* scratch) {
    typedef Dot<S> D;
    typedef typename S::T T;
    typedef typename D::P P;
    const int64_t size = padded<S>(a);
    const bool direct = std::is_same<P, T>::value && size == a.inputs;  // x is read from where it lies
    for (int64_t row = 0; row < a.count; row += kGroup) {
        const int64_t n = a.count - row < kGroup ? a.count - row : kGroup;
        const P* x[kGroup];
        for (int64_t r = 0; r < n; ++r) {
            const T* from = (const T*)a.x + (int64_t)a.rows[row + r] * a.x_token;
            P* to = (P*)scratch + r * size;
            if (!direct) D::pack(to, from, a.inputs, size);
            x[r] = direct ? (const P*)(const void*)from : to;
        }
        with_rows(n, [&](auto r) {
            constexpr int R = r() < kGroup ? r() : kGroup;
            int64_t rank = begin;
            for (; rank + 4 <= end; rank += 4) block<S, R, 4>(a, x, row, rank);
            for (; rank < end; ++rank) block<S, R, 1>(a, x, row, rank);
            typename Mid<S>::T* mid = (typename Mid<S>::T*)a.mid + row * a.mid_row();
            for (int r = 0; r < R && end == a.rank && end % 2; ++r)
                mid[r * a.mid_row() + end] = 0;  // the other half of the last pair
        });
    }
}

// R rows by one block of outputs, of which the first n are there.
template <class S, int R>
ME_INLINE void blocks(const LoraWork& a, typename S::T* out, int64_t out_token, int64_t row,
                      const typename S::T* b, int64_t n) {
    constexpr int V = kLoraBlock / kWidth;
    constexpr int kChains = 2;  // even and odd ranks apart: a row alone would wait for each of its sums
    const float* mid = a.mid + row * a.mid_row();
    F acc[R][V] = {}, odd[R][V] = {};
    const auto add = [&](F(&to)[R][V], int64_t rank) {
        F w[V];
        for (int v = 0; v < V; ++v) w[v] = S::load(b + rank * kLoraBlock + v * kWidth);
        for (int r = 0; r < R; ++r) {
            const F middle = splat(mid[r * a.mid_row() + rank]);
            for (int v = 0; v < V; ++v) to[r][v] += w[v] * middle;
        }
    };
    int64_t rank = 0;
    for (; rank + kChains <= a.rank; rank += kChains) add(acc, rank), add(odd, rank + 1);
    if (rank < a.rank) add(acc, rank);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] += odd[r][v];
    for (int r = 0; r < R; ++r) {
        typename S::T* to = out + a.rows[row + r] * out_token;
        for (int v = 0; v < V && v * kWidth < n; ++v) {
            const int64_t some = n - v * kWidth;
            if (some >= kWidth)
                S::store(to + v * kWidth, S::load(to + v * kWidth) + acc[r][v]);
            else
                store_some<S>(to + v * kWidth, load_some<S>(to + v * kWidth, some) + acc[r][v], some);
        }
    }
}

#if defined(__AVX512BF16__)
// The same by products of pairs of ranks. Interleaving two ranks leaves outputs 0-3, 8-11, ... in one sum and
// 4-7, 12-15, ... in the other; outputs are widened and narrowed in the same order.
template <int R>
ME_INLINE void pairs(const LoraWork& a, uint16_t* out, int64_t out_token, int64_t row, const uint16_t* b,
                     int64_t n) {
    static_assert(kLoraBlock == 32, "a register");
    const uint16_t* mid = (const uint16_t*)a.mid + row * a.mid_row();
    const __m512i zero = _mm512_setzero_si512();
    __m512 low[R] = {}, high[R] = {};
    const auto add = [&](__m512i even, __m512i odd, int64_t rank) {
        const __m512bh lo = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        const __m512bh hi = (__m512bh)_mm512_unpackhi_epi16(even, odd);
        for (int r = 0; r < R; ++r) {
            const auto pair = (__m512bh)_mm512_set1_epi32(load_bits<int32_t>(mid + r * a.mid_row() + rank));
            low[r] = _mm512_dpbf16_ps(low[r], lo, pair), high[r] = _mm512_dpbf16_ps(high[r], hi, pair);
        }
    };
    int64_t rank = 0;
    for (; rank + 2 <= a.rank; rank += 2)
        add(load_bits<__m512i>(b + rank * 32), load_bits<__m512i>(b + (rank + 1) * 32), rank);
    if (rank < a.rank) add(load_bits<__m512i>(b + rank * 32), zero, rank);
    for (int r = 0; r < R; ++r) {
        uint16_t* to = out + (int64_t)a.rows[row + r] * out_token;
        uint16_t lanes[32];
        if (n < 32) std::memcpy(lanes, to, n * 2);
        const __m512i old = load_bits<__m512i>(n < 32 ? lanes : to);
        const U lo = BFloat16::round((F)_mm512_unpacklo_epi16(zero, old) + (F)low[r]);
        const U hi = BFloat16::round((F)_mm512_unpackhi_epi16(zero, old) + (F)high[r]);
        store_bits(n < 32 ? lanes : to, _mm512_packus_epi32((__m512i)lo, (__m512i)hi));
        if (n < 32) std::memcpy(to, lanes, n * 2);
    }
}
#endif

template <class S>
void expand(const LoraWork& a, void* out, int64_t out_token, int64_t output, int64_t end) {
    typedef typename S::T T;
    for (; output < end; output += kLoraBlock) {
        const T* b = (const T*)a.b + output * a.rank;
        const int64_t n = end - output < kLoraBlock ? end - output : kLoraBlock;
        for (int64_t row = 0; row < a.count; row += kGroup)
            with_rows(a.count - row < kGroup ? a.count - row : kGroup, [&](auto r) {
                constexpr int R = r() < kGroup ? r() : kGroup;
#if defined(__AVX512BF16__)
                if constexpr (std::is_same<S, BFloat16>::value)
                    return pairs<R>(a, (T*)out + output, out_token, row, b, n);
#endif
                blocks<S, R>(a, (T*)out + output, out_token, row, b, n);
            });
    }
}

template <class S, class D>
void packed(const LoraPack& m, float* scratch) {
    typedef typename S::T From;
    typedef typename D::T To;
    constexpr int64_t kPiece = kLoraBlock;
    const int64_t size = m.rank * m.inputs;
    for (int64_t i = 0; i < size; i += kPiece) {
        const int64_t n = size - i < kPiece ? size - i : kPiece;
        widen<S>(scratch, (const From*)m.a + i, n, kPiece);
        narrow<D>((To*)m.to_a + i, scratch, n);
    }
    for (int64_t output = 0; output < m.outputs; output += kLoraBlock) {
        const int64_t n = m.outputs - output < kLoraBlock ? m.outputs - output : kLoraBlock;
        widen<S>(scratch, (const From*)m.b + output * m.rank, n * m.rank, kLoraBlock * m.rank);
        for (int64_t rank = 0; rank < m.rank; ++rank) {
            float lanes[kLoraBlock];
            for (int64_t i = 0; i < kLoraBlock; ++i) lanes[i] = scratch[i * m.rank + rank];
            narrow<D>((To*)m.to_b + (output * m.rank + rank * kLoraBlock), lanes, kLoraBlock);
        }
    }
}

// Whether all that arrived is finite: what is not makes the sum of `0 * value` NaN.
template <class S, class D>
bool copied(const typename S::T* from, typename D::T* to, int64_t n) {
    constexpr int64_t kPiece = 1024;
    float piece[kPiece];
    F seen = {};
    for (int64_t i = 0; i < n; i += kPiece) {
        const int64_t some = n - i < kPiece ? n - i : kPiece;
        const int64_t whole = (some + kWidth - 1) / kWidth * kWidth;
        widen<S>(piece, from + i, some, whole);
        if (std::is_same<S, D>::value) {
            std::memcpy(to + i, from + i, some * sizeof(typename D::T));  // its bits, whatever they are
        } else {
            narrow<D>(to + i, piece, some);
            widen<D>(piece, to + i, some, whole);  // rounding may have made infinities
        }
        for (int64_t j = 0; j < whole; j += kWidth) seen += load(piece + j) * splat(0.0f);
    }
    return sum(seen) == 0.0f;
}

}  // namespace

bool lora_copy(const void* from, void* to, int64_t n, DType from_dtype, DType to_dtype) {
    bool finite = false;
    with_dtype(from_dtype, [&](auto s) {
        with_dtype(to_dtype, [&](auto d) {
            typedef decltype(s) S;
            typedef decltype(d) D;
            finite = copied<S, D>((const typename S::T*)from, (typename D::T*)to, n);
        });
    });
    return finite;
}

int64_t lora_scratch(const LoraWork& a) { return kGroup * (a.inputs + 32) * (int64_t)sizeof(float); }

void lora_shrink(const LoraWork& a, int64_t rank, int64_t rank_end, void* scratch) {
    with_dtype(a.dtype, [&](auto s) { shrink<decltype(s)>(a, rank, rank_end, scratch); });
}

void lora_expand(const LoraWork& a, void* out, int64_t out_token, int64_t output, int64_t output_end) {
    with_dtype(a.dtype, [&](auto s) { expand<decltype(s)>(a, out, out_token, output, output_end); });
}

void lora_pack(const LoraPack& m, DType from, DType to, float* scratch) {
    with_dtype(
        from, [&](auto s) { with_dtype(to, [&](auto d) { packed<decltype(s), decltype(d)>(m, scratch); }); });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
