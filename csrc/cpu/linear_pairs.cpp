// x @ weight^T for a few dozen rows by products of pairs of bfloat16, for levels that have these but no AMX
// tiles. Compiled at every level, empty except at `avx512bf16`.
//
// Rows of x are lanes: a pair of weights that is broadcast meets up to four tiles of them, so that no sum
// crosses lanes and the products are the whole cost.
#include "linear_tiles.h"

namespace memos_engine {
namespace ME_LEVEL {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
namespace {

// Outputs whose sums are in registers together: with T tiles each these fit, and hide a product's latency.
constexpr int sums_of(int tiles) { return tiles == 1 ? 16 : tiles == 2 ? 8 : 4; }

// T tiles of tokens against 16 outputs.
template <int T>
ME_INLINE void block(const Linear& a, const uint32_t* packed, int64_t tile, int64_t output) {
    constexpr int K = sums_of(T);
    alignas(64) float y[T][kOutputs * kTokens];
    const int64_t row = a.weight_row, x_tile = a.inputs / 2 * kTokens;
    const uint32_t* x = packed + tile * x_tile;
    for (int k = 0; k < kOutputs; k += K) {
        const uint16_t* w = (const uint16_t*)a.weight + (output + k) * row;
        __m512 acc[K][T] = {};
        for (int64_t i = 0; i < a.inputs; i += kInputs) {
            if (tile == 0)  // the next outputs are on their way while these are multiplied
                for (int o = 0; o < K; ++o) __builtin_prefetch(w + (kOutputs + o) * row + i);
            for (int64_t p = i / 2; p < (i + kInputs) / 2; ++p) {
                __m512i lanes[T];
                for (int t = 0; t < T; ++t) lanes[t] = _mm512_loadu_si512(x + t * x_tile + p * kTokens);
                for (int o = 0; o < K; ++o) {
                    const __m512i pair = _mm512_set1_epi32(load_bits<int32_t>(w + o * row + 2 * p));
                    for (int t = 0; t < T; ++t)
                        acc[o][t] = _mm512_dpbf16_ps(acc[o][t], (__m512bh)pair, (__m512bh)lanes[t]);
                }
            }
        }
        for (int o = 0; o < K; ++o)
            for (int t = 0; t < T; ++t) _mm512_store_ps(y[t] + (k + o) * kTokens, acc[o][t]);
    }
    for (int t = 0; t < T; ++t) store_outputs(a, y[t], (tile + t) * kTokens, output);
}

}  // namespace

// Where more than a fifth of the lanes would be empty, the kernels of few rows are faster.
bool linear_tiles_fits(const Linear& a) {
    return 4 * kTokens * token_tiles(a) <= 5 * a.tokens && whole_tiles(a);
}

void linear_tiles(const Linear& a, const void* packed, int64_t output, int64_t output_end) {
    const uint32_t* x = (const uint32_t*)packed;
    const int64_t tiles = token_tiles(a);
    for (; output < output_end; output += kOutputs) {
        for (int64_t tile = 0; tile < tiles; tile += 4) {
            switch (tiles - tile) {
                case 1:
                    block<1>(a, x, tile, output);
                    break;
                case 2:
                    block<2>(a, x, tile, output);
                    break;
                case 3:
                    block<3>(a, x, tile, output);
                    break;
                default:
                    block<4>(a, x, tile, output);
            }
        }
    }
}

#elif !defined(__AMX_BF16__)

bool linear_tiles_fits(const Linear&) { return false; }
void linear_tiles(const Linear&, const void*, int64_t, int64_t) {}

#endif

}  // namespace ME_LEVEL
}  // namespace memos_engine
