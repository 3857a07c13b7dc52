// Attention of many rows: lanes of a vector are queries, so that softmax needs no sums across lanes.
//
// An item is up to 64 packed query rows, cut into tiles of 16. Keys come in blocks of 64, widened to float32
// once and used by all tiles. Softmax is the running one of Milakov and Gimelshein (arXiv 1805.02867), in
// powers of two.
#include "attention_rows.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

constexpr int kBlock = 64;                                 // keys
constexpr int kVectors = kTileRows / kWidth;               // of one tile row
constexpr int kStep = (kWidth == 16 ? 16 : 8) / kVectors;  // accumulator rows
constexpr int kTiles = kItemRows / kTileRows;
static_assert(kBlock % kStep == 0, "a key block is a whole number of steps");

struct Tile {
    float* q;    // [head_dim][16], scaled by sm_scale * log2(e)
    float* out;  // [padded][16]
    float max[kTileRows], sum[kTileRows];
    int32_t pos[kTileRows];
    int32_t min_pos, max_pos;
};

struct Block {
    const float* k;  // [64][padded]
    const float* v;
    float* scores;  // [64][16]
    int64_t key, n;
};

// scores[key][lane] = k[key] . q[lane], kStep keys at a time.
ME_INLINE void score(const Tile& tile, const Block& block, int64_t n, int64_t dim, int64_t padded) {
    for (int64_t j = 0; j < n; j += kStep) {
        F acc[kStep][kVectors] = {};
        const float* k = block.k + j * padded;
        for (int64_t d = 0; d < dim; ++d) {
            F q[kVectors];
            for (int w = 0; w < kVectors; ++w) q[w] = load(tile.q + d * kTileRows + w * kWidth);
            for (int i = 0; i < kStep; ++i)
                for (int w = 0; w < kVectors; ++w) acc[i][w] += k[i * padded + d] * q[w];
        }
        for (int i = 0; i < kStep; ++i)
            for (int w = 0; w < kVectors; ++w)
                store(block.scores + (j + i) * kTileRows + w * kWidth, acc[i][w]);
    }
}

ME_INLINE void mask(const Tile& tile, const Block& block, int64_t n, int64_t window) {
    for (int w = 0; w < kVectors; ++w) {
        const I pos = load_bits<I>(tile.pos + w * kWidth);
        const I reach =
            window > 0 ? splat((int32_t)(window < (1 << 30) ? window : (1 << 30))) : splat(1 << 30);
        for (int64_t j = 0; j < n; ++j) {
            float* at = block.scores + j * kTileRows + w * kWidth;
            const I behind = pos - splat((int32_t)(block.key + j));  // how far the key lies behind the row
            const F s = load(at);
            const F low = behind >= 0 ? s : splat(kMinusInf);
            store(at, behind < reach ? low : splat(kMinusInf));
        }
    }
}

// Turns scores into weights, and rescales what the tile has summed so far when a row's maximum grew.
ME_INLINE void softmax(Tile& tile, const Block& block, int64_t n, int64_t padded) {
    for (int w = 0; w < kVectors; ++w) {
        float* scores = block.scores + w * kWidth;
        const F old = load(tile.max + w * kWidth);
        F top = old;
        for (int64_t j = 0; j < n; ++j) top = max(top, load(scores + j * kTileRows));
        // A row that has seen nothing yet keeps -inf; zero in its place makes every weight 0, not NaN.
        const F base = top == kMinusInf ? F{} : top;
        F total = {};
        for (int64_t j = 0; j < n; ++j) {
            const F weight = exp2_nonpositive(load(scores + j * kTileRows) - base);
            store(scores + j * kTileRows, weight);
            total += weight;
        }
        const F shrink = exp2_nonpositive(old - base);
        store(tile.sum + w * kWidth, load(tile.sum + w * kWidth) * shrink + total);
        store(tile.max + w * kWidth, top);
        for (int64_t d = 0; d < padded; ++d) {
            float* at = tile.out + d * kTileRows + w * kWidth;
            store(at, load(at) * shrink);
        }
    }
}

// out[d][lane] += v[key][d] * weight[key][lane], kStep channels at a time.
ME_INLINE void accumulate(const Tile& tile, const Block& block, int64_t n, int64_t dim, int64_t padded) {
    for (int64_t d = 0; d < dim; d += kStep) {
        F acc[kStep][kVectors];
        float* out = tile.out + d * kTileRows;
        for (int i = 0; i < kStep; ++i)
            for (int w = 0; w < kVectors; ++w) acc[i][w] = load(out + i * kTileRows + w * kWidth);
        const float* v = block.v + d;
        for (int64_t j = 0; j < n; ++j, v += padded) {
            F p[kVectors];
            for (int w = 0; w < kVectors; ++w) p[w] = load(block.scores + j * kTileRows + w * kWidth);
            for (int i = 0; i < kStep; ++i)
                for (int w = 0; w < kVectors; ++w) acc[i][w] += v[i] * p[w];
        }
        for (int i = 0; i < kStep; ++i)
            for (int w = 0; w < kVectors; ++w) store(out + i * kTileRows + w * kWidth, acc[i][w]);
    }
}

template <class Q>
void open_tile(const Rows& rows, const AttentionItem& item, Tile& tile, int64_t row, float* temp) {
    const int64_t dim = rows.a.head_dim, padded = round_up(dim, 16);
    const float scale = rows.a.sm_scale * kLog2E;
    tile.min_pos = INT32_MAX, tile.max_pos = INT32_MIN;
    for (int lane = 0; lane < kTileRows; ++lane) {
        // Lanes without a row repeat the last one; nothing of theirs is stored.
        const int64_t r = row + lane < item.rows ? row + lane : item.rows - 1;
        tile.pos[lane] = rows.position(item.row + r);
        tile.min_pos = tile.pos[lane] < tile.min_pos ? tile.pos[lane] : tile.min_pos;
        tile.max_pos = tile.pos[lane] > tile.max_pos ? tile.pos[lane] : tile.max_pos;
        tile.max[lane] = kMinusInf, tile.sum[lane] = 0;
        widen<Q>(temp, rows.query<Q>(item.row + r), dim, padded);
        for (int64_t d = 0; d < dim; ++d) tile.q[d * kTileRows + lane] = temp[d] * scale;
    }
    std::memset(tile.out, 0, padded * kTileRows * sizeof(float));
}

template <class Q>
void close_tile(const Rows& rows, const AttentionItem& item, const Tile& tile, int64_t row, float* temp) {
    const int64_t dim = rows.a.head_dim;
    for (int lane = 0; lane < kTileRows && row + lane < item.rows; ++lane) {
        const int64_t r = row + lane;
        const float total = tile.sum[lane];
        if (item.partial) {
            item.partial[r] = tile.max[lane], item.partial[item.rows + r] = total;
            float* to = item.partial + 2 * item.rows + r * dim;
            for (int64_t d = 0; d < dim; ++d) to[d] = tile.out[d * kTileRows + lane];
            continue;
        }
        const float inverse = total > 0 ? 1.0f / total : 0.0f;
        for (int64_t d = 0; d < dim; ++d) temp[d] = tile.out[d * kTileRows + lane] * inverse;
        narrow<Q>(rows.out<Q>(item.row + r), temp, dim);
        rows.store_lse(item.row + r, tile.max[lane], total);
    }
}

// K and V of keys key ... key + n - 1, widened.
template <class S>
void read_block(const Attention& a, const AttentionItem& item, int64_t key, int64_t n, float* keys,
                float* values) {
    const int64_t dim = a.head_dim, padded = round_up(dim, 16);
    int64_t k_at[kBlock], v_at[kBlock];
    locate(a, item, key, n, k_at, v_at);
    for (int64_t j = 0; j < n; ++j) {
        widen<S>(keys + j * padded, (const typename S::T*)a.k + k_at[j], dim, padded);
        widen<S>(values + j * padded, (const typename S::T*)a.v + v_at[j], dim, padded);
    }
    if (!a.k_scale) return;
    float k_scale[kBlock], v_scale[kBlock];
    gather_scales(a, item, a.k_scale, 1, key, n, k_scale, 0);
    gather_scales(a, item, a.v_scale, 1, key, n, v_scale, 0);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t d = j * padded; d < (j + 1) * padded; d += kWidth) {
            store(keys + d, load(keys + d) * k_scale[j]);
            store(values + d, load(values + d) * v_scale[j]);
        }
    }
}

template <class S>
void run(const Attention& a, const AttentionItem& item, float* scratch) {
    const int64_t dim = a.head_dim, padded = round_up(dim, 16);
    float* keys = scratch;
    float* values = keys + kBlock * padded;
    float* scores = values + kBlock * padded;
    float* temp = scores + kBlock * kTileRows;
    float* next = temp + padded;
    const Rows rows(a, item);
    const int tiles = (item.rows + kTileRows - 1) / kTileRows;
    Tile tile[kTiles];
    int32_t nearest = INT32_MAX;
    for (int t = 0; t < tiles; ++t) {
        tile[t].q = next, next += padded * kTileRows;
        tile[t].out = next, next += padded * kTileRows;
        with_dtype(a.q_dtype,
                   [&](auto q) { open_tile<decltype(q)>(rows, item, tile[t], t * kTileRows, temp); });
        nearest = tile[t].min_pos < nearest ? tile[t].min_pos : nearest;
    }
    int64_t key = item.key;
    if (a.window > 0 && nearest - a.window + 1 > key) key += (nearest - a.window + 1 - key) / kBlock * kBlock;
    for (; key < item.key_end; key += kBlock) {
        const int64_t n = item.key_end - key < kBlock ? item.key_end - key : kBlock;
        read_block<S>(a, item, key, n, keys, values);
        // Steps run over whole groups of keys; old scratch behind the last one could be NaN, so it is zeroed.
        const int64_t rest = round_up(n, kStep) - n;
        std::memset(keys + n * padded, 0, rest * padded * sizeof(float));
        std::memset(values + n * padded, 0, rest * padded * sizeof(float));
        for (int t = 0; t < tiles; ++t) {
            const int64_t seen = tile[t].max_pos - key + 1;
            if (seen <= 0) continue;
            const int64_t m = round_up(seen < n ? seen : n, kStep);
            const Block block = {keys, values, scores, key, n};
            score(tile[t], block, m, dim, padded);
            const bool all = m <= n && key + m - 1 <= tile[t].min_pos &&
                             (a.window <= 0 || key > tile[t].max_pos - a.window);
            if (!all) mask(tile[t], block, m, a.window);
            for (int64_t j = n; j < m; ++j)
                for (int w = 0; w < kVectors; ++w)
                    store(scores + j * kTileRows + w * kWidth, splat(kMinusInf));
            softmax(tile[t], block, m, padded);
            accumulate(tile[t], block, m, dim, padded);
        }
    }
    for (int t = 0; t < tiles; ++t)
        with_dtype(a.q_dtype,
                   [&](auto q) { close_tile<decltype(q)>(rows, item, tile[t], t * kTileRows, temp); });
}

}  // namespace

int64_t attention_scratch(int64_t head_dim) {
    const int64_t padded = round_up(head_dim, 16);
    const int64_t own =
        sizeof(float) * (2 * kBlock * padded + kBlock * kTileRows + padded + 2 * kTiles * padded * kTileRows);
    const int64_t amx = amx_scratch(head_dim), pairs = pairs_scratch(head_dim);
    const int64_t most = amx > pairs ? amx : pairs;
    return own > most ? own : most;
}

void attention(const Attention& a, const AttentionItem& item, float* scratch) {
    if (attention_amx(a, item, scratch) || attention_pairs(a, item, scratch)) return;
    with_page_dtype(a.kv_dtype, [&](auto kv) { run<decltype(kv)>(a, item, scratch); });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
