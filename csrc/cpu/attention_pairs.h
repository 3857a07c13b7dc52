// What the kernels of many rows in bfloat16 share: query tiles, masks, softmax. Queries are lanes, and
// operands are pairs of bfloat16 in 32 bits: of two channels where q meets K, of two keys where weights meet
// V.
#pragma once

#include "attention_rows.h"

namespace memos_engine {
namespace ME_LEVEL {

#if defined(__AVX512BF16__)
namespace {

constexpr int kBlock = 64;  // keys
constexpr int kTiles = kItemRows / kTileRows;
constexpr int64_t kMaxDim = 256;

struct Tile {
    uint32_t* q;        // [head_dim / 2][16] pairs of channels
    float* out;         // [head_dim][16]
    float* scores;      // [64][16], of one block of keys
    uint32_t* weights;  // [32][16] pairs of keys
    alignas(64) float max[kTileRows];
    alignas(64) float sum[kTileRows];
    alignas(64) int32_t pos[kTileRows];
    int32_t min_pos, max_pos;
};

// Whether the kernels take the call, over pages of either dtype.
ME_INLINE bool fits(const Attention& a) {
    return a.q_dtype == DType::bf16 && (a.kv_dtype == DType::bf16 || a.kv_dtype == DType::i8) &&
           a.head_dim % 32 == 0 && a.head_dim <= kMaxDim && a.sm_scale > 0;
}

// Scales of a block of int8 keys; behind the last one zeros.
struct Scales {
    float k[kBlock], v[kBlock];
};

ME_INLINE void mask(const Tile& tile, int64_t key, int64_t n, int64_t window) {
    const __m512i pos = _mm512_load_si512(tile.pos);
    const __m512i reach = _mm512_set1_epi32(window > 0 && window < (1 << 30) ? (int32_t)window : 1 << 30);
    for (int64_t j = 0; j < n; ++j) {
        const __m512i behind = _mm512_sub_epi32(pos, _mm512_set1_epi32((int32_t)(key + j)));
        // As unsigned numbers, keys ahead of the row are far beyond any reach.
        const __mmask16 hidden = _mm512_cmpge_epu32_mask(behind, reach);
        _mm512_mask_store_ps(tile.scores + j * kTileRows, hidden, _mm512_set1_ps(kMinusInf));
    }
}

// 2^x for x <= 0, -inf included; relative error 3e-6, far below a bfloat16 step. At -127 the polynomial
// is 1 and the exponent field comes out as zero, which makes the result 0.
ME_INLINE __m512 exp2_fast(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-127.0f));
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    const __m512 shifted = _mm512_add_ps(x, magic);
    const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
    __m512 p = _mm512_set1_ps(0.0095828529f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055906426f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24024099f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69312418f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

// Pairs of bfloat16 (rounded half up) from the weights of an even and an odd key.
ME_INLINE __m512i pair(__m512 even, __m512 odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
}

// Scores [n][16], n even, become pairs of weights; what the tile has summed so far is rescaled where needed.
// With scales of V, weights take them behind their sum.
template <bool kScaled>
ME_INLINE void softmax(Tile& tile, int64_t n, int64_t dim, float scale_, const float* of_values) {
    const __m512 scale = _mm512_set1_ps(scale_), minus_inf = _mm512_set1_ps(kMinusInf);
    __m512 top[2] = {minus_inf, minus_inf};
    for (int64_t j = 0; j < n; j += 2)
        for (int u = 0; u < 2; ++u)
            top[u] = _mm512_max_ps(top[u], _mm512_load_ps(tile.scores + (j + u) * kTileRows));
    const __m512 old = _mm512_load_ps(tile.max);
    // Relative to the exact maximum, so that a weight that outweighs the others is 1, which rounding keeps.
    const __m512 now = _mm512_max_ps(old, _mm512_mul_ps(_mm512_max_ps(top[0], top[1]), scale));
    // A row that has seen nothing yet keeps -inf; zero in its place makes every weight 0, not NaN.
    const __mmask16 none = _mm512_cmp_ps_mask(now, minus_inf, _CMP_EQ_OQ);
    const __m512 base = _mm512_mask_mov_ps(now, none, _mm512_setzero_ps());
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < n; j += 2) {
        __m512 weight[2];
        for (int u = 0; u < 2; ++u) {
            const __m512 s = _mm512_load_ps(tile.scores + (j + u) * kTileRows);
            weight[u] = exp2_fast(_mm512_fmsub_ps(s, scale, base));
            total[u] = _mm512_add_ps(total[u], weight[u]);
            if (kScaled) weight[u] = _mm512_mul_ps(weight[u], _mm512_set1_ps(of_values[j + u]));
        }
        _mm512_store_si512(tile.weights + j / 2 * kTileRows, pair(weight[0], weight[1]));
    }
    __m512 sum = _mm512_load_ps(tile.sum);
    if (_mm512_cmp_ps_mask(old, now, _CMP_NEQ_UQ)) {
        const __m512 shrink = exp2_fast(_mm512_sub_ps(old, base));
        sum = _mm512_mul_ps(sum, shrink);
        _mm512_store_ps(tile.max, now);
        for (int64_t d = 0; d < dim; ++d) {
            float* at = tile.out + d * kTileRows;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
        }
    }
    _mm512_store_ps(tile.sum, _mm512_add_ps(sum, _mm512_add_ps(total[0], total[1])));
}

// Raw scores of keys key ... key + n - 1 become weights of `padded` keys. scales: of int8 keys, else null.
ME_INLINE void weigh(const Attention& a, Tile& tile, int64_t key, int64_t n, int64_t padded,
                     const Scales* scales = nullptr) {
    for (int64_t j = 0; scales && j < n; ++j) {
        float* at = tile.scores + j * kTileRows;
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(scales->k[j])));
    }
    const bool all = key + n - 1 <= tile.min_pos && (a.window <= 0 || key > tile.max_pos - a.window);
    if (!all) mask(tile, key, n, a.window);
    for (int64_t j = n; j < padded; ++j)
        _mm512_store_ps(tile.scores + j * kTileRows, _mm512_set1_ps(kMinusInf));
    if (scales)
        softmax<true>(tile, padded, a.head_dim, a.sm_scale * kLog2E, scales->v);
    else
        softmax<false>(tile, padded, a.head_dim, a.sm_scale * kLog2E, nullptr);
}

inline void open_tile(const Rows& rows, const AttentionItem& item, Tile& tile, int64_t row) {
    const int64_t dim = rows.a.head_dim;
    const uint16_t* q[kTileRows];
    tile.min_pos = INT32_MAX, tile.max_pos = INT32_MIN;
    for (int lane = 0; lane < kTileRows; ++lane) {
        // Lanes without a row repeat the last one; nothing of theirs is stored.
        const int64_t r = item.row + (row + lane < item.rows ? row + lane : item.rows - 1);
        tile.pos[lane] = rows.position(r);
        tile.min_pos = tile.pos[lane] < tile.min_pos ? tile.pos[lane] : tile.min_pos;
        tile.max_pos = tile.pos[lane] > tile.max_pos ? tile.pos[lane] : tile.max_pos;
        tile.max[lane] = kMinusInf, tile.sum[lane] = 0;
        q[lane] = rows.query<BFloat16>(r);
    }
    for (int64_t d = 0; d < dim; d += 32) {
        __m512i part[16];
        for (int lane = 0; lane < 16; ++lane) part[lane] = _mm512_loadu_si512(q[lane] + d);
        transpose(part);
        for (int p = 0; p < 16; ++p) _mm512_store_si512(tile.q + (d / 2 + p) * kTileRows, part[p]);
    }
    std::memset(tile.out, 0, dim * kTileRows * sizeof(float));
}

inline void close_tile(const Rows& rows, const AttentionItem& item, const Tile& tile, int64_t row) {
    const int64_t dim = rows.a.head_dim, n = item.rows - row < kTileRows ? item.rows - row : kTileRows;
    for (int64_t d = 0; d < dim; d += 16) {
        __m512i part[16];
        for (int i = 0; i < 16; ++i) part[i] = _mm512_load_si512(tile.out + (d + i) * kTileRows);
        transpose(part);
        for (int64_t lane = 0; lane < n; ++lane) {
            const int64_t r = row + lane;
            const float total = tile.sum[lane], inverse = total > 0 ? 1.0f / total : 0.0f;
            if (item.partial)
                store(item.partial + 2 * item.rows + r * dim + d, (F)part[lane]);
            else
                BFloat16::store(rows.out<BFloat16>(item.row + r) + d, (F)part[lane] * inverse);
        }
    }
    for (int64_t lane = 0; lane < n; ++lane) {
        const int64_t r = row + lane;
        if (item.partial)
            item.partial[r] = tile.max[lane], item.partial[item.rows + r] = tile.sum[lane];
        else
            rows.store_lse(item.row + r, tile.max[lane], tile.sum[lane]);
    }
}

}  // namespace
#endif

}  // namespace ME_LEVEL
}  // namespace memos_engine
