// What a low-rank delta adds to a block of outputs of one row, for kernels that have their sums in registers.
#pragma once

#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

constexpr int kBlockVectors = kLoraBlock / kWidth;

// How `mid` is kept: as what meets b.
template <class S>
struct Mid {
    typedef float T;
    static ME_INLINE T of(float x) { return x; }
};

// to = b mid for one block of b [ranks][kLoraBlock].
template <class S>
ME_INLINE void block_delta(const typename S::T* b, const float* mid, int32_t ranks, F (&to)[kBlockVectors]) {
    F even[kBlockVectors] = {}, odd[kBlockVectors] = {};  // a sum alone would wait for each of its products
    const auto add = [&](F(&sum)[kBlockVectors], int32_t rank) {
        for (int v = 0; v < kBlockVectors; ++v)
            sum[v] += S::load(b + rank * kLoraBlock + v * kWidth) * splat(mid[rank]);
    };
    int32_t rank = 0;
    for (; rank + 2 <= ranks; rank += 2) add(even, rank), add(odd, rank + 1);
    if (rank < ranks) add(even, rank);
    for (int v = 0; v < kBlockVectors; ++v) to[v] = even[v] + odd[v];
}

#if defined(__AVX512BF16__)
template <>
struct Mid<BFloat16> {
    typedef uint16_t T;
    static ME_INLINE T of(float x) { return (T)BFloat16::round(splat(x))[0]; }
};

// The same by products of pairs of ranks. Interleaving two ranks leaves outputs 0-3, 8-11, ... in one sum and
// 4-7, 12-15, ... in the other.
template <class S>
ME_INLINE void block_delta(const uint16_t* b, const uint16_t* mid, int32_t ranks, F (&to)[kBlockVectors]) {
    static_assert(kLoraBlock == 32, "a register");
    __m512 low[2] = {}, high[2] = {};
    const auto row = [&](int32_t rank) { return load_bits<__m512i>(b + rank * kLoraBlock); };
    const auto add = [&](int chain, __m512i even, __m512i odd, int32_t rank) {
        const auto pair = (__m512bh)_mm512_set1_epi32(load_bits<int32_t>(mid + rank));
        const auto lo = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        const auto hi = (__m512bh)_mm512_unpackhi_epi16(even, odd);
        low[chain] = _mm512_dpbf16_ps(low[chain], lo, pair);
        high[chain] = _mm512_dpbf16_ps(high[chain], hi, pair);
    };
    int32_t rank = 0;
    for (; rank + 4 <= ranks; rank += 4) {
        add(0, row(rank), row(rank + 1), rank);
        add(1, row(rank + 2), row(rank + 3), rank + 2);
    }
    if (rank + 2 <= ranks) add(0, row(rank), row(rank + 1), rank), rank += 2;
    if (rank < ranks) add(1, row(rank), __m512i{}, rank);
    const __m512i first = {0x100000000, 0x300000002, 0x1100000010, 0x1300000012,
                           0x500000004, 0x700000006, 0x1500000014, 0x1700000016};
    const __m512i lo = (__m512i)(low[0] + low[1]), hi = (__m512i)(high[0] + high[1]);
    to[0] = (F)_mm512_permutex2var_epi32(lo, first, hi);
    to[1] = (F)_mm512_permutex2var_epi32(lo, _mm512_add_epi32(first, _mm512_set1_epi32(8)), hi);
}
#endif

// What a product does about the deltas of its rows, block by block.
template <class S, int R>
struct Deltas {
    const LoraBeside* beside;
    F of[R][kBlockVectors];  // of the block at hand

    // Asks for the block behind the one at `output`: one line of four, behind which the hardware prefetcher
    // finds the others; asking for each cost more.
    ME_INLINE void fetch(int64_t output) const {
        for (int r = 0; r < R; ++r) {
            const LoraRow& row = beside->rows[r];
            const int64_t bytes = kLoraBlock * row.rank * (int64_t)sizeof(typename S::T);
            const char* next = (const char*)row.b + (output / kLoraBlock + 1) * bytes;
            for (int64_t at = 0; at < bytes; at += 4 * 64) __builtin_prefetch(next + at, 0, 2);
        }
    }

    ME_INLINE void make(int64_t output) {
        lora_await(*beside);
        for (int r = 0; r < R; ++r) {
            const LoraRow& row = beside->rows[r];
            const auto* b = (const typename S::T*)row.b + output * row.rank;
            const auto* mid = (const typename Mid<S>::T*)row.mid + row.row * lora_mid_row(row.rank);
            block_delta<S>(b, mid, row.rank, of[r]);
        }
    }
};

}  // namespace
}  // namespace ME_LEVEL
}  // namespace memos_engine
