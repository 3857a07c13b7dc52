// Attention of many rows on AMX tiles, for bfloat16. Compiled at every level, empty except at level `amx`.
//
// Queries are columns, as in attention.cpp: S^T = K Q^T, then O^T += V^T P^T. A tile product multiplies 16
// rows of 32 bfloat16 (A) with 16 pairs of rows of 16 columns (B) into 16x16 float32. K is A straight from
// its page; Q^T is packed into pairs once; P^T comes out of softmax in pairs; V^T is transposed once for each
// key block and serves all query tiles. Weights are rounded to bfloat16 before they meet V, as in any flash
// attention.
#include "amx.h"
#include "attention_pairs.h"

namespace memos_engine {
namespace ME_LEVEL {

#if defined(__AMX_BF16__)
namespace {

struct Block {
    const uint16_t* k[kBlock / 16];  // 16 keys each
    int64_t k_bytes;                 // from key to key
    uint16_t* v;                     // [head_dim / 16][2][16 channels][32 keys]
};

// Tile numbers are part of the instruction, hence the switch into constants.
template <int C>
ME_INLINE void multiply(const void* a, int64_t a_bytes) {
    _tile_loadd(5, a, a_bytes);
    if constexpr (C == 0) _tile_dpbf16ps(0, 5, 4);
    if constexpr (C == 1) _tile_dpbf16ps(1, 5, 4);
    if constexpr (C == 2) _tile_dpbf16ps(2, 5, 4);
    if constexpr (C == 3) _tile_dpbf16ps(3, 5, 4);
}

// scores [n][16], n a multiple of 16, for raw scores without sm_scale.
ME_INLINE void score(const Tile& tile, const Block& block, int64_t n, int64_t dim) {
    finish_stores();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim; d += 32) {
        _tile_loadd(4, tile.q + d / 2 * kTileRows, 64);
        multiply<0>(block.k[0] + d, block.k_bytes);
        if (n > 16) multiply<1>(block.k[1] + d, block.k_bytes);
        if (n > 32) multiply<2>(block.k[2] + d, block.k_bytes);
        if (n > 48) multiply<3>(block.k[3] + d, block.k_bytes);
    }
    _tile_stored(0, tile.scores, 64);
    _tile_stored(1, tile.scores + 16 * kTileRows, 64);
    _tile_stored(2, tile.scores + 32 * kTileRows, 64);
    _tile_stored(3, tile.scores + 48 * kTileRows, 64);
}

// Two tiles of 16 channels: out += V^T P^T over n keys, n a multiple of 32.
ME_INLINE void accumulate(const Tile& tile, const Block& block, int64_t n, int64_t dim) {
    constexpr int64_t kTileSize = 16 * 32;
    finish_stores();
    for (int64_t d = 0; d < dim; d += 32) {
        float* out = tile.out + d * kTileRows;
        const uint16_t* v = block.v + d / 16 * 2 * kTileSize;
        _tile_loadd(0, out, 64);
        _tile_loadd(1, out + 16 * kTileRows, 64);
        for (int64_t step = 0; step * 32 < n; ++step) {
            _tile_loadd(4, tile.weights + step * 16 * kTileRows, 64);
            multiply<0>(v + step * kTileSize, 64);
            multiply<1>(v + (2 + step) * kTileSize, 64);
        }
        _tile_stored(0, out, 64);
        _tile_stored(1, out + 16 * kTileRows, 64);
    }
}

// V of one block, transposed: keys behind the last are zeros, whatever their slots hold.
void transpose_values(const uint16_t* v, const int64_t* at, int64_t n, int64_t dim, uint16_t* to) {
    for (int64_t step = 0; step * 32 < round_up(n, 32); ++step) {
        for (int64_t d = 0; d < dim; d += 32) {
            // Interleaving whole rows leaves channels in two sets of four by four.
            __m512i low[16], high[16];
            for (int i = 0; i < 16; ++i) {
                const int64_t key = step * 32 + 2 * i;
                const __m512i zero = _mm512_setzero_si512();
                const __m512i even = key < n ? _mm512_loadu_si512(v + at[key] + d) : zero;
                const __m512i odd = key + 1 < n ? _mm512_loadu_si512(v + at[key + 1] + d) : zero;
                low[i] = _mm512_unpacklo_epi16(even, odd);
                high[i] = _mm512_unpackhi_epi16(even, odd);
            }
            transpose(low);
            transpose(high);
            for (int i = 0; i < 16; ++i) {
                for (int set = 0; set < 2; ++set) {
                    const int64_t channel = d + i / 4 * 8 + set * 4 + i % 4;
                    uint16_t* row = to + ((channel / 16 * 2 + step) * 16 + channel % 16) * 32;
                    _mm512_store_si512(row, set ? high[i] : low[i]);
                }
            }
        }
    }
}

}  // namespace

int64_t amx_scratch(int64_t dim) {
    return dim * kTiles * kTileRows * (2 + 4) + kBlock * dim * 4 + kBlock * kTileRows * (4 + 2);
}

bool attention_amx(const Attention& a, const AttentionItem& item, float* scratch) {
    const int64_t dim = a.head_dim;
    if (!fits(a) || a.kv_dtype != DType::bf16) return false;
    _tile_loadconfig(&kConfig);
    char* next = (char*)scratch;
    const auto take = [&next](int64_t bytes) { return (next += bytes) - bytes; };
    Block block;
    float* scores = (float*)take(kBlock * kTileRows * 4);
    uint32_t* weights = (uint32_t*)take(kBlock * kTileRows * 2);
    block.v = (uint16_t*)take(kBlock * dim * 2);
    uint16_t* copies = (uint16_t*)take(kBlock * dim * 2);
    const Rows rows(a, item);
    const int tiles = (item.rows + kTileRows - 1) / kTileRows;
    Tile tile[kTiles];
    int32_t nearest = INT32_MAX;
    for (int t = 0; t < tiles; ++t) {
        tile[t].scores = scores, tile[t].weights = weights;
        tile[t].q = (uint32_t*)take(dim * kTileRows * 2);
        tile[t].out = (float*)take(dim * kTileRows * 4);
        open_tile(rows, item, tile[t], t * kTileRows);
        nearest = tile[t].min_pos < nearest ? tile[t].min_pos : nearest;
    }
    int64_t key = item.key;
    if (a.window > 0 && nearest - a.window + 1 > key) key += (nearest - a.window + 1 - key) / kBlock * kBlock;
    for (; key < item.key_end; key += kBlock) {
        const int64_t n = item.key_end - key < kBlock ? item.key_end - key : kBlock;
        int64_t k_at[kBlock], v_at[kBlock];
        locate(a, item, key, n, k_at, v_at);
        const uint16_t* k = (const uint16_t*)a.k;
        const bool direct =
            a.page % 16 == 0;  // 16 keys then lie in one page; unused slots make unused scores
        for (int64_t j = 0; j < n && !direct; ++j) std::memcpy(copies + j * dim, k + k_at[j], dim * 2);
        for (int64_t j = 0; j < n; j += 16) block.k[j / 16] = direct ? k + k_at[j] : copies + j * dim;
        block.k_bytes = direct ? a.k_token * 2 : dim * 2;
        transpose_values((const uint16_t*)a.v, v_at, n, dim, block.v);
        for (int t = 0; t < tiles; ++t) {
            const int64_t seen = tile[t].max_pos - key + 1;
            if (seen <= 0) continue;
            const int64_t used = seen < n ? seen : n, m = round_up(used, 32);
            score(tile[t], block, round_up(used, 16), dim);
            weigh(a, tile[t], key, used, m);
            accumulate(tile[t], block, m, dim);
        }
    }
    _tile_release();
    for (int t = 0; t < tiles; ++t) close_tile(rows, item, tile[t], t * kTileRows);
    return true;
}

#else

int64_t amx_scratch(int64_t) { return 0; }
bool attention_amx(const Attention&, const AttentionItem&, float*) { return false; }

#endif

}  // namespace ME_LEVEL
}  // namespace memos_engine
