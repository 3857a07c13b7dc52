// Attention of many rows by products of pairs of bfloat16, for levels that have these but no AMX tiles.
// Compiled at every level, empty except at `avx512bf16`.
//
// Queries are lanes. Each pair that is broadcast, of two channels of a key or of two keys of V, meets up to
// four tiles of them, so that the products are the whole cost. K is read where it lies; V is interleaved by
// pairs of keys once for each block of them. Weights are rounded to bfloat16 before they meet V, as in any
// flash attention; their sums are not.
#include "attention_pairs.h"

namespace memos_engine {
namespace ME_LEVEL {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
namespace {

struct Keys {
    const uint16_t *k[kBlock], *v[kBlock];  // behind the last one: that one again; int8 where pages are
    int64_t n;
};

void find(const Attention& a, const AttentionItem& item, int64_t key, Keys& keys) {
    keys.n = item.key_end - key < kBlock ? item.key_end - key : kBlock;
    if (keys.n <= 0) return;
    int64_t k_at[kBlock], v_at[kBlock];
    locate(a, item, key, keys.n, k_at, v_at);
    const int64_t size = size_of(a.kv_dtype);
    for (int64_t j = 0; j < kBlock; ++j) {
        const int64_t from = j < keys.n ? j : keys.n - 1;
        keys.k[j] = (const uint16_t*)((const char*)a.k + k_at[from] * size);
        keys.v[j] = (const uint16_t*)((const char*)a.v + v_at[from] * size);
    }
}

ME_INLINE void prefetch(const Keys& keys, int64_t j, int64_t end, int64_t bytes) {
    if (keys.n <= 0) return;
    for (; j < end; ++j) {
        for (int64_t b = 0; b < bytes; b += 64) {
            __builtin_prefetch((const char*)keys.k[j] + b, 0, 2);
            __builtin_prefetch((const char*)keys.v[j] + b, 0, 2);
        }
    }
}

// A block of int8 keys as bfloat16, which holds all of their values: copies [2][64][head_dim].
void widen_keys(const Attention& a, const AttentionItem& item, int64_t key, const Keys& keys,
                uint16_t* copies, Keys& wide, Scales& scales) {
    const int64_t dim = a.head_dim;
    const auto widen = [](uint16_t* to, const uint16_t* from, int64_t d) {
        store_bits(to + d, _mm512_cvtneps_pbh((__m512)Int8::load((const int8_t*)from + d)));
    };
    std::memset(&scales, 0, sizeof(scales));
    gather_scales(a, item, a.k_scale, 1, key, keys.n, scales.k, 0);
    gather_scales(a, item, a.v_scale, 1, key, keys.n, scales.v, 0);
    wide.n = keys.n;
    for (int64_t j = 0; j < kBlock; ++j) {
        const int64_t from = j < keys.n ? j : keys.n - 1;
        uint16_t *k = copies + from * dim, *v = copies + (kBlock + from) * dim;
        wide.k[j] = k, wide.v[j] = v;
        for (int64_t d = 0; j < keys.n && d < dim; d += kWidth) {
            widen(k, keys.k[j], d);
            widen(v, keys.v[j], d);
        }
    }
}

// Keys, or channels, whose sums are in registers together: with T tiles each these fit, and are enough to
// hide the latency of a product.
constexpr int sums_of(int tiles) { return tiles < 4 ? 8 : 4; }

ME_INLINE __m512 add(__m512 acc, uint32_t pair, __m512i lanes) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int32_t)pair), (__m512bh)lanes);
}

// Scores [n][16] without sm_scale. Lines of the next block, `bytes` of each key, are asked for meanwhile, a
// few at a time.
template <int T>
ME_INLINE void score(const Tile* tile, const Keys& keys, const Keys& next, int64_t dim, int64_t bytes) {
    constexpr int K = sums_of(T);
    for (int64_t j = 0; j < keys.n; j += K) {
        prefetch(next, j, j + K, bytes);
        __m512 acc[K][T] = {};
        const uint16_t* const* k = keys.k + j;
        for (int64_t p = 0; p < dim / 2; ++p) {
            __m512i q[T];
            for (int t = 0; t < T; ++t) q[t] = _mm512_load_si512(tile[t].q + p * kTileRows);
            for (int i = 0; i < K; ++i) {
                const uint32_t pair = load_bits<uint32_t>(k[i] + 2 * p);
                for (int t = 0; t < T; ++t) acc[i][t] = add(acc[i][t], pair, q[t]);
            }
        }
        for (int i = 0; i < K; ++i)
            for (int t = 0; t < T; ++t) _mm512_store_ps(tile[t].scores + (j + i) * kTileRows, acc[i][t]);
    }
}

// V as [n / 2][head_dim] pairs of keys; the partner of an odd last key is zeros, whatever its slot holds.
ME_INLINE void pair_values(const Keys& keys, int64_t dim, uint32_t* to) {
    const auto load = [](const uint16_t* v) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)v));
    };
    for (int64_t j = 0; j < keys.n; j += 2, to += dim) {
        for (int64_t d = 0; d < dim; d += 16) {
            const __m512i even = load(keys.v[j] + d);
            const __m512i odd = j + 1 < keys.n ? load(keys.v[j + 1] + d) : _mm512_setzero_si512();
            _mm512_store_si512(to + d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

// out[d][lane] += V[key][d] * weight[key][lane] over pairs of keys.
template <int T>
ME_INLINE void accumulate(const Tile* tile, const uint32_t* values, int64_t pairs, int64_t dim) {
    constexpr int C = sums_of(T);
    for (int64_t d = 0; d < dim; d += C) {
        __m512 acc[C][T];
        for (int i = 0; i < C; ++i)
            for (int t = 0; t < T; ++t) acc[i][t] = _mm512_load_ps(tile[t].out + (d + i) * kTileRows);
        const uint32_t* v = values + d;
        for (int64_t p = 0; p < pairs; ++p, v += dim) {
            __m512i w[T];
            for (int t = 0; t < T; ++t) w[t] = _mm512_load_si512(tile[t].weights + p * kTileRows);
            for (int i = 0; i < C; ++i)
                for (int t = 0; t < T; ++t) acc[i][t] = add(acc[i][t], v[i], w[t]);
        }
        for (int i = 0; i < C; ++i)
            for (int t = 0; t < T; ++t) _mm512_store_ps(tile[t].out + (d + i) * kTileRows, acc[i][t]);
    }
}

// One block of keys, as bfloat16, against T tiles.
template <int T>
void attend(const Attention& a, Tile* tile, const Keys& keys, const Scales* scales, const Keys& next,
            int64_t key, uint32_t* values) {
    const int64_t even = round_up(keys.n, 2);
    score<T>(tile, keys, next, a.head_dim, a.head_dim * size_of(a.kv_dtype));
    for (int t = 0; t < T; ++t) weigh(a, tile[t], key, keys.n, even, scales);
    pair_values(keys, a.head_dim, values);
    accumulate<T>(tile, values, even / 2, a.head_dim);
}

}  // namespace

int64_t pairs_scratch(int64_t dim) {
    return kTiles * kTileRows * (dim * (2 + 4) + kBlock * (4 + 2)) + 3 * kBlock * dim * 2;
}

bool attention_pairs(const Attention& a, const AttentionItem& item, float* scratch) {
    if (!fits(a)) return false;
    const int64_t dim = a.head_dim;
    char* free = (char*)scratch;
    const auto take = [&free](int64_t bytes) { return (free += bytes) - bytes; };
    uint32_t* values = (uint32_t*)take(kBlock * dim * 2);
    uint16_t* copies = (uint16_t*)take(2 * kBlock * dim * 2);
    const Rows rows(a, item);
    const int tiles = (item.rows + kTileRows - 1) / kTileRows;
    Tile tile[kTiles];
    int32_t nearest = INT32_MAX;
    for (int t = 0; t < tiles; ++t) {
        tile[t].scores = (float*)take(kBlock * kTileRows * 4);
        tile[t].weights = (uint32_t*)take(kBlock * kTileRows * 2);
        tile[t].q = (uint32_t*)take(dim * kTileRows * 2);
        tile[t].out = (float*)take(dim * kTileRows * 4);
        open_tile(rows, item, tile[t], t * kTileRows);
        nearest = tile[t].min_pos < nearest ? tile[t].min_pos : nearest;
    }
    int64_t key = item.key;
    if (a.window > 0 && nearest - a.window + 1 > key) key += (nearest - a.window + 1 - key) / kBlock * kBlock;
    const bool int8 = a.kv_dtype == DType::i8;
    Keys keys[2], wide;
    Scales scales;
    find(a, item, key, keys[0]);
    prefetch(keys[0], 0, keys[0].n, dim * size_of(a.kv_dtype));
    for (int now = 0; key < item.key_end; key += kBlock, now ^= 1) {
        find(a, item, key + kBlock, keys[now ^ 1]);
        // Rows mostly ascend, so tiles that have seen all their keys are the first ones.
        int first = 0, last = tiles - 1;
        while (first < last && tile[first].max_pos < key) ++first;
        while (first < last && tile[last].max_pos < key) --last;
        if (int8) widen_keys(a, item, key, keys[now], copies, wide, scales);
        const auto run = [&](auto count) {
            attend<count()>(a, tile + first, int8 ? wide : keys[now], int8 ? &scales : nullptr, keys[now ^ 1],
                            key, values);
        };
        switch (last - first) {
            case 0:
                run(std::integral_constant<int, 1>{});
                break;
            case 1:
                run(std::integral_constant<int, 2>{});
                break;
            case 2:
                run(std::integral_constant<int, 3>{});
                break;
            default:
                run(std::integral_constant<int, 4>{});
        }
    }
    for (int t = 0; t < tiles; ++t) close_tile(rows, item, tile[t], t * kTileRows);
    return true;
}

#else

int64_t pairs_scratch(int64_t) { return 0; }
bool attention_pairs(const Attention&, const AttentionItem&, float*) { return false; }

#endif

}  // namespace ME_LEVEL
}  // namespace memos_engine
