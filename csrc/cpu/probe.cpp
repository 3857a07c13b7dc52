// How much attention query rows pay to chosen keys: scores, weights and their sums, and no result.
//
// As in attention.cpp, lanes of a vector are 16 packed query rows, so that rows packed once serve all keys
// and a key needs no transposition. Keys are copied (and widened) into a block once for each head; a lane
// keeps what its rows pay to a key, and sums across lanes are taken once for all rows, for many keys
// together.
//
// On AMX tiles, `score` of attention_amx.cpp would give the same scores in the same places from the same
// pairs of bfloat16 rows; only the products below would change.
#include "attention_rows.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

constexpr int kVectors = kTileRows / kWidth;               // of one tile row
constexpr int kStep = (kWidth == 16 ? 16 : 8) / kVectors;  // keys whose sums are in registers
static_assert(kProbeKeys % kStep == 0 && kProbeKeys % kWidth == 0, "a block is a whole number of steps");

// How rows and keys are kept (`T`), and how one key's element is multiplied with those of kWidth rows.
struct Wide {
    typedef float T;
    static constexpr int64_t kChannels = 1;  // of one element
    template <class S>
    static ME_INLINE void copy(T* to, const typename S::T* from, int64_t dim) {
        widen<S>(to, from, dim, round_up(dim, 16));
    }
    static ME_INLINE F add(F acc, T k, F q) { return acc + k * q; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, where queries and pages are both bfloat16: one instruction for two channels.
struct Pairs {
    typedef uint32_t T;
    static constexpr int64_t kChannels = 2;
    template <class S>
    static ME_INLINE void copy(T* to, const typename S::T* from, int64_t dim) {
        to[dim / 2] = 0;  // the second half of an odd last pair
        std::memcpy(to, from, dim * sizeof(uint16_t));
    }
    static ME_INLINE F add(F acc, T k, F q) {
        const __m512i both = _mm512_set1_epi32((int32_t)k);
        return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)both, (__m512bh)q);
    }
};
#endif

// Calls f with the way that a probe's rows and keys are kept, then the storage dtypes of q and of the pages.
template <class Fn>
ME_INLINE void with_product(const Probe& a, Fn&& f) {
#if defined(__AVX512BF16__)
    if (a.q_dtype == DType::bf16 && a.kv_dtype == DType::bf16) return f(Pairs{}, BFloat16{}, BFloat16{});
#endif
    with_dtype(a.q_dtype, [&](auto q) { with_page_dtype(a.kv_dtype, [&](auto kv) { f(Wide{}, q, kv); }); });
}

template <class Pr>
struct Block {
    typename Pr::T* k;        // [64][stride]
    float* paid;              // [64][kWidth], by lane: what rows of one head pay
    int32_t pos[kProbeKeys];  // of keys that count; of others any
    int64_t keys, stride, elements;
    int32_t min_pos, max_pos;  // of those that count
};

// x where the row sees the key; elsewhere -inf, whose power is 0.
ME_INLINE F visible(const ProbeTile& tile, int w, int32_t pos, F x) {
    const I first = load_bits<I>(tile.first + w * kWidth), last = load_bits<I>(tile.last + w * kWidth);
    const F low = splat(pos) >= first ? x : splat(kMinusInf);
    return splat(pos) <= last ? low : splat(kMinusInf);
}

// paid[key][lane] += exp(score of the lane's row and the key), kStep keys at a time.
template <class Pr, bool Masked>
void add_tile(const ProbeTile& tile, const Block<Pr>& block, float scale) {
    const typename Pr::T* q = (const typename Pr::T*)tile.q;
    F shift[kVectors];
    for (int w = 0; w < kVectors; ++w) shift[w] = load(tile.shift + w * kWidth);
    for (int64_t j = 0; j < block.keys; j += kStep) {
        F acc[kStep][kVectors] = {};
        const typename Pr::T* k = block.k + j * block.stride;
        for (int64_t d = 0; d < block.elements; ++d) {
            F rows[kVectors];
            for (int w = 0; w < kVectors; ++w) rows[w] = load_bits<F>(q + d * kTileRows + w * kWidth);
            for (int i = 0; i < kStep; ++i)
                for (int w = 0; w < kVectors; ++w)
                    acc[i][w] = Pr::add(acc[i][w], k[i * block.stride + d], rows[w]);
        }
        for (int i = 0; i < kStep; ++i) {
            float* paid = block.paid + (j + i) * kWidth;
            F total = load(paid);
            for (int w = 0; w < kVectors; ++w) {
                F x = acc[i][w] * scale + shift[w];
                if (Masked) x = visible(tile, w, block.pos[j + i], x);
                // A key of the row's own attention stays below 0 but for rounding; beyond 2^127 there is no
                // power to return.
                total += exp2_nonpositive(x > 127.0f ? splat(127.0f) : x);
            }
            store(paid, total);
        }
    }
}

// Finds the item's keys that count, those with a slot that some row may see: offsets into the pages, -1 for
// others. False if there are none.
template <class Pr>
bool locate_keys(const Probe& a, const ProbeItem& item, Block<Pr>& block, int64_t* at) {
    int32_t first = INT32_MAX, last = INT32_MIN;
    for (int64_t t = 0; t < item.tiles_per_head; ++t) {
        first = item.tiles[t].min_first < first ? item.tiles[t].min_first : first;
        last = item.tiles[t].max_last > last ? item.tiles[t].max_last : last;
    }
    block.min_pos = INT32_MAX, block.max_pos = INT32_MIN;
    for (int64_t j = 0; j < item.keys; ++j) {
        const int64_t slot = a.slot[item.key + j];
        const int32_t pos = a.key_pos[item.key + j];
        at[j] = -1, block.pos[j] = pos;
        if (slot < 0 || pos < first || pos > last) continue;
        at[j] = slot / a.page * a.k_block + slot % a.page * a.k_token;
        block.min_pos = pos < block.min_pos ? pos : block.min_pos;
        block.max_pos = pos > block.max_pos ? pos : block.max_pos;
    }
    return block.min_pos <= block.max_pos;
}

template <class Pr, class S>
void run(const Probe& a, const ProbeItem& item, float* scratch) {
    Block<Pr> block;
    block.stride = round_up(a.head_dim + 1, 16);
    block.elements = (a.head_dim + Pr::kChannels - 1) / Pr::kChannels;
    block.keys = round_up(item.keys, kStep);
    block.paid = scratch, block.k = (typename Pr::T*)(scratch + kProbeKeys * kWidth);
    int64_t at[kProbeKeys];
    if (!locate_keys(a, item, block, at)) return;
    for (int64_t j = item.keys; j < block.keys; ++j) at[j] = -1, block.pos[j] = block.max_pos;
    float total[kProbeKeys] = {};
    for (int64_t h = 0; h < a.kv_heads; ++h) {
        for (int64_t j = 0; j < block.keys; ++j) {
            typename Pr::T* to = block.k + j * block.stride;
            if (at[j] < 0) {
                std::memset((void*)to, 0, block.stride * sizeof(*to));
                continue;
            }
            Pr::template copy<S>(to, (const typename S::T*)a.k + at[j] + h * a.k_head, a.head_dim);
            if constexpr (std::is_same<S, Int8>::value) {
                const float scale = a.k_scale[a.slot[item.key + j] * a.kv_heads + h];
                for (int64_t d = 0; d < block.elements; ++d) to[d] *= scale;
            }
        }
        std::memset(block.paid, 0, kProbeKeys * kWidth * sizeof(float));
        for (int64_t t = 0; t < item.tiles_per_head; ++t) {
            const ProbeTile& tile = item.tiles[h * item.tiles_per_head + t];
            if (block.min_pos > tile.max_last || block.max_pos < tile.min_first) continue;
            if (block.max_pos <= tile.min_last && block.min_pos >= tile.max_first)
                add_tile<Pr, false>(tile, block, a.sm_scale * kLog2E);
            else
                add_tile<Pr, true>(tile, block, a.sm_scale * kLog2E);
        }
        for (int64_t j = 0; j < item.keys; j += kWidth) {
            F lanes[kWidth];
            for (int i = 0; i < kWidth; ++i) lanes[i] = load(block.paid + (j + i) * kWidth);
            const F paid = sums(lanes);
            for (int i = 0; i < kWidth && j + i < item.keys; ++i)
                // A key that no row of the head sees takes nothing from a weight, NaN included.
                if (paid[i] != 0) total[j + i] += paid[i] * a.weight[(item.key + j + i) * a.kv_heads + h];
        }
    }
    for (int64_t j = 0; j < item.keys; ++j)
        if (at[j] >= 0 && total[j] != 0) a.scores[item.key + j] += total[j];
}

template <class Pr, class S>
void pack(const Probe& a, ProbeTile& tile, float* scratch) {
    const int64_t group = a.heads / a.kv_heads, elements = (a.head_dim + Pr::kChannels - 1) / Pr::kChannels;
    typedef typename Pr::T T;
    T *row = (T*)scratch, *q = (T*)tile.q;
    tile.min_first = tile.min_last = INT32_MAX, tile.max_first = tile.max_last = INT32_MIN;
    for (int lane = 0; lane < kTileRows; ++lane) {
        // Lanes without a row repeat the last one and count for nothing.
        const bool some = tile.row + lane < tile.rows;
        const int64_t r = some ? tile.row + lane : tile.rows - 1;
        const int64_t token = tile.tokens[r / group], head = tile.kv_head * group + r % group;
        Pr::template copy<S>(row, (const typename S::T*)a.q + token * a.q_token + head * a.q_head,
                             a.head_dim);
        for (int64_t d = 0; d < elements; ++d) q[d * kTileRows + lane] = row[d];
        const float lse = a.lse[token * a.heads + head];
        tile.shift[lane] = some && lse > kMinusInf ? -lse * kLog2E : kMinusInf;
        const int64_t first = a.window > 0 ? (int64_t)a.q_pos[token] - a.window + 1 : INT32_MIN;
        tile.first[lane] = (int32_t)(first < INT32_MIN ? INT32_MIN : first), tile.last[lane] = a.q_pos[token];
        tile.min_first = tile.first[lane] < tile.min_first ? tile.first[lane] : tile.min_first;
        tile.max_first = tile.first[lane] > tile.max_first ? tile.first[lane] : tile.max_first;
        tile.min_last = tile.last[lane] < tile.min_last ? tile.last[lane] : tile.min_last;
        tile.max_last = tile.last[lane] > tile.max_last ? tile.last[lane] : tile.max_last;
    }
}

}  // namespace

int64_t probe_scratch(int64_t head_dim) {
    return sizeof(float) * kProbeKeys * (kWidth + round_up(head_dim + 1, 16));
}

void probe_pack(const Probe& a, ProbeTile& tile, float* scratch) {
    with_product(a,
                 [&](auto product, auto q, auto) { pack<decltype(product), decltype(q)>(a, tile, scratch); });
}

void probe(const Probe& a, const ProbeItem& item, float* scratch) {
    with_product(a, [&](auto product, auto q, auto kv) {
        (void)q;  // packed already
        run<decltype(product), decltype(kv)>(a, item, scratch);
    });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
