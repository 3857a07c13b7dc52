// What products of a few dozen rows in bfloat16 share: x as tiles of 16 rows, their pairs of inputs side by
// side in lanes, and y^T tiles on their way to y. Weights are read once, from where they lie. Libraries pack
// the weights instead, which costs more than the product when there are few rows of x.
#pragma once

#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {

// Defined in linear_amx.cpp where there are AMX tiles, else in linear_pairs.cpp.
bool linear_tiles_fits(const Linear&);
void linear_tiles(const Linear&, const void* packed, int64_t output, int64_t output_end);

namespace {

constexpr int64_t kTokens = 16;  // of one tile
constexpr int64_t kOutputs = 16;
constexpr int64_t kInputs = 32;

ME_INLINE int64_t token_tiles(const Linear& a) { return (a.tokens + kTokens - 1) / kTokens; }

ME_INLINE int64_t tiles_scratch(const Linear& a) { return token_tiles(a) * kTokens * a.inputs * 2; }

#if defined(__AVX512BF16__)
ME_INLINE bool whole_tiles(const Linear& a) {
    return a.dtype == DType::bf16 && a.inputs % kInputs == 0 && a.outputs % kOutputs == 0;
}

// [tiles][inputs / 2][16 tokens] pairs of inputs; tokens behind the last are zeros.
inline void pack_tiles(const Linear& a, uint32_t* packed) {
    for (int64_t tile = 0; tile < token_tiles(a); ++tile) {
        for (int64_t i = 0; i < a.inputs; i += kInputs) {
            __m512i rows[16];
            for (int64_t t = 0; t < kTokens; ++t) {
                const int64_t token = tile * kTokens + t;
                const uint16_t* x = (const uint16_t*)a.x + token * a.x_token + i;
                rows[t] = token < a.tokens ? _mm512_loadu_si512(x) : _mm512_setzero_si512();
            }
            transpose(rows);
            uint32_t* to = packed + (tile * a.inputs + i) / 2 * kTokens;
            for (int p = 0; p < 16; ++p) _mm512_storeu_si512(to + p * kTokens, rows[p]);
        }
    }
}

// One tile of y^T [16 outputs][16 tokens] to y.
ME_INLINE void store_outputs(const Linear& a, const float* tile, int64_t token, int64_t output) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(tile + i * 16);
    transpose(rows);
    uint16_t* out = (uint16_t*)a.out + token * a.out_token + output;
    const int64_t n = a.tokens - token < kTokens ? a.tokens - token : kTokens;
    for (int64_t t = 0; t < n; ++t) {
        const __m256bh y = _mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[t]));
        _mm256_storeu_si256((__m256i*)(out + t * a.out_token), (__m256i)y);
    }
}
#else
inline void pack_tiles(const Linear&, uint32_t*) {}
#endif

}  // namespace

}  // namespace ME_LEVEL
}  // namespace memos_engine
