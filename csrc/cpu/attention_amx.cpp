// Attention of many rows on AMX tiles, for bfloat16. Compiled at every level, empty except at level `amx`.
//
// Queries are columns, as in attention.cpp: S^T = K Q^T, then O^T += V^T P^T. A tile product multiplies 16
// rows of 32 bfloat16 (A) with 16 pairs of rows of 16 columns (B) into 16x16 float32. K is A straight from
// its page; Q^T is packed into pairs once; P^T comes out of softmax in pairs; V^T is transposed once for each
// key block and serves all query tiles. Weights are rounded to bfloat16 before they meet V, as in any flash
// attention.
#include "amx.h"
#include "attention_rows.h"

namespace memos_engine {
namespace ME_LEVEL {

#if defined(__AMX_BF16__)
namespace {

constexpr int kBlock = 64;  // keys
constexpr int kTiles = kItemRows / kTileRows;
constexpr int64_t kMaxDim = 256;

struct Tile {
    uint32_t* q;  // [head_dim / 2][16] pairs of channels
    float* out;   // [head_dim][16]
    alignas(64) float max[kTileRows];
    alignas(64) float sum[kTileRows];
    alignas(64) int32_t pos[kTileRows];
    int32_t min_pos, max_pos;
};

struct Block {
    const uint16_t* k[kBlock / 16];  // 16 keys each
    int64_t k_bytes;                 // from key to key
    uint16_t* v;                     // [head_dim / 16][2][16 channels][32 keys]
    float* scores;                   // [64][16]
    uint32_t* weights;               // [32][16] pairs of keys
    int64_t key, n;
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
    _tile_stored(0, block.scores, 64);
    _tile_stored(1, block.scores + 16 * kTileRows, 64);
    _tile_stored(2, block.scores + 32 * kTileRows, 64);
    _tile_stored(3, block.scores + 48 * kTileRows, 64);
}

ME_INLINE void mask(const Tile& tile, const Block& block, int64_t n, int64_t window) {
    const __m512i pos = _mm512_load_si512(tile.pos);
    const __m512i reach = _mm512_set1_epi32(window > 0 && window < (1 << 30) ? (int32_t)window : 1 << 30);
    for (int64_t j = 0; j < n; ++j) {
        const __m512i behind = _mm512_sub_epi32(pos, _mm512_set1_epi32((int32_t)(block.key + j)));
        // As unsigned numbers, keys ahead of the row are far beyond any reach.
        const __mmask16 hidden = _mm512_cmpge_epu32_mask(behind, reach);
        _mm512_mask_store_ps(block.scores + j * kTileRows, hidden, _mm512_set1_ps(kMinusInf));
    }
}

// 2^x for x <= 0, -inf included; relative error 3e-6, far below a bfloat16 step. At -127 the polynomial is 1
// and the exponent field comes out as zero, which makes the result 0.
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
ME_INLINE void softmax(Tile& tile, const Block& block, int64_t n, int64_t dim, float scale_) {
    const __m512 scale = _mm512_set1_ps(scale_), minus_inf = _mm512_set1_ps(kMinusInf);
    __m512 top[2] = {minus_inf, minus_inf};
    for (int64_t j = 0; j < n; j += 2)
        for (int u = 0; u < 2; ++u)
            top[u] = _mm512_max_ps(top[u], _mm512_load_ps(block.scores + (j + u) * kTileRows));
    const __m512 old = _mm512_load_ps(tile.max);
    const __m512 now = _mm512_max_ps(old, _mm512_mul_ps(_mm512_max_ps(top[0], top[1]), scale));
    const __mmask16 none = _mm512_cmp_ps_mask(now, minus_inf, _CMP_EQ_OQ);
    const __m512 base = _mm512_mask_mov_ps(now, none, _mm512_setzero_ps());
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < n; j += 2) {
        __m512 weight[2];
        for (int u = 0; u < 2; ++u) {
            const __m512 s = _mm512_load_ps(block.scores + (j + u) * kTileRows);
            weight[u] = exp2_fast(_mm512_fmsub_ps(s, scale, base));
            total[u] = _mm512_add_ps(total[u], weight[u]);
        }
        _mm512_store_si512(block.weights + j / 2 * kTileRows, pair(weight[0], weight[1]));
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
            _tile_loadd(4, block.weights + step * 16 * kTileRows, 64);
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

void open_tile(const Rows& rows, const AttentionItem& item, Tile& tile, int64_t row) {
    const int64_t dim = rows.a.head_dim;
    tile.min_pos = INT32_MAX, tile.max_pos = INT32_MIN;
    for (int lane = 0; lane < kTileRows; ++lane) {
        // Lanes without a row repeat the last one; nothing of theirs is stored.
        const int64_t r = item.row + (row + lane < item.rows ? row + lane : item.rows - 1);
        tile.pos[lane] = rows.position(r);
        tile.min_pos = tile.pos[lane] < tile.min_pos ? tile.pos[lane] : tile.min_pos;
        tile.max_pos = tile.pos[lane] > tile.max_pos ? tile.pos[lane] : tile.max_pos;
        tile.max[lane] = kMinusInf, tile.sum[lane] = 0;
        const uint16_t* q = rows.query<BFloat16>(r);
        for (int64_t p = 0; p < dim / 2; ++p) tile.q[p * kTileRows + lane] = load_bits<uint32_t>(q + 2 * p);
    }
    std::memset(tile.out, 0, dim * kTileRows * sizeof(float));
}

void close_tile(const Rows& rows, const AttentionItem& item, const Tile& tile, int64_t row) {
    const int64_t dim = rows.a.head_dim;
    alignas(64) float line[kMaxDim];
    for (int lane = 0; lane < kTileRows && row + lane < item.rows; ++lane) {
        const int64_t r = row + lane;
        const float total = tile.sum[lane];
        const float factor = item.partial ? 1.0f : total > 0 ? 1.0f / total : 0.0f;
        for (int64_t d = 0; d < dim; ++d) line[d] = tile.out[d * kTileRows + lane] * factor;
        if (item.partial) {
            item.partial[r] = tile.max[lane], item.partial[item.rows + r] = total;
            std::memcpy(item.partial + 2 * item.rows + r * dim, line, dim * sizeof(float));
        } else {
            narrow<BFloat16>(rows.out<BFloat16>(item.row + r), line, dim);
            rows.store_lse(item.row + r, tile.max[lane], total);
        }
    }
}

}  // namespace

int64_t amx_scratch(int64_t dim) {
    return dim * kTiles * kTileRows * (2 + 4) + kBlock * dim * 4 + kBlock * kTileRows * (4 + 2);
}

bool attention_amx(const Attention& a, const AttentionItem& item, float* scratch) {
    const int64_t dim = a.head_dim;
    if (a.q_dtype != DType::bf16 || a.kv_dtype != DType::bf16 || dim % 32 || dim > kMaxDim || a.sm_scale <= 0)
        return false;
    _tile_loadconfig(&kConfig);
    char* next = (char*)scratch;
    const auto take = [&next](int64_t bytes) { return (next += bytes) - bytes; };
    Block block;
    block.scores = (float*)take(kBlock * kTileRows * 4);
    block.weights = (uint32_t*)take(kBlock * kTileRows * 2);
    block.v = (uint16_t*)take(kBlock * dim * 2);
    uint16_t* copies = (uint16_t*)take(kBlock * dim * 2);
    const Rows rows(a, item);
    const int tiles = (item.rows + kTileRows - 1) / kTileRows;
    Tile tile[kTiles];
    int32_t nearest = INT32_MAX;
    for (int t = 0; t < tiles; ++t) {
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
        block.key = key, block.n = n;
        transpose_values((const uint16_t*)a.v, v_at, n, dim, block.v);
        for (int t = 0; t < tiles; ++t) {
            const int64_t seen = tile[t].max_pos - key + 1;
            if (seen <= 0) continue;
            const int64_t used = seen < n ? seen : n, m = round_up(used, 32);
            score(tile[t], block, round_up(used, 16), dim);
            const bool all =
                key + used - 1 <= tile[t].min_pos && (a.window <= 0 || key > tile[t].max_pos - a.window);
            if (!all) mask(tile[t], block, used, a.window);
            for (int64_t j = used; j < m; ++j)
                _mm512_store_ps(block.scores + j * kTileRows, _mm512_set1_ps(kMinusInf));
            softmax(tile[t], block, m, dim, a.sm_scale * kLog2E);
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
