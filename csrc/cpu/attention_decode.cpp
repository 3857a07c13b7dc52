// Attention of a few rows (decode): lanes of a vector are channels, so that no lane idles.
//
// An item is up to 8 packed rows of up to 8 KV heads against up to 128 keys. Heads of a key are neighbours in
// memory, so all of them are taken key by key: K and V are two streams in order, which memory delivers
// fastest. Scores of all keys fit into scratch, so softmax is a plain one. `attention_merge` joins the key
// ranges of one row by their maxima and sums.
#include <algorithm>

#include "attention_rows.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

// Lines are asked for so many keys before they are needed, one by one between the products: a burst of
// requests would wait for itself.
constexpr int64_t kAhead = 32;

struct Work {
    // K and V of the first head, by key. Behind the last key of K come the first ones of V, and behind those
    // of V what will be read next.
    const char *const *k, *const *v;
    int64_t heads;
    const float* q;                  // [heads][rows][padded]
    const uint16_t* narrow_q;        // the same in bfloat16, where the queries are bfloat16
    float* scores;                   // [heads][rows][128]
    float* out;                      // [heads][rows][padded]
    const float *k_scale, *v_scale;  // [heads][128] of int8 pages, else null
    void* widened;                   // room for kWidth int8 keys of a head as floats
    int64_t n, padded;
    float scale;
};

// How a query row is kept (`P`) and a key is read (`K`), and how kStep products of both are added to a sum.
template <class S>
struct Product {
    typedef float P;
    typedef typename S::T K;
    static constexpr int64_t kStep = kWidth;
    static ME_INLINE F add(F acc, const typename S::T* k, F q) { return acc + S::load(k) * q; }
    static ME_INLINE F load(const P* q) { return load_bits<F>(q); }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 products, added in float32 by one instruction; for queries that are bfloat16 themselves.
struct BFloat16Pairs {};
template <>
struct Product<BFloat16Pairs> {
    typedef uint16_t P, K;
    static constexpr int64_t kStep = 32;
    static ME_INLINE F add(F acc, const uint16_t* k, __m512bh q) {
        return (F)_mm512_dpbf16_ps((__m512)acc, load_bits<__m512bh>(k), q);
    }
    static ME_INLINE __m512bh load(const P* q) { return load_bits<__m512bh>(q); }
};
#endif

// A key for the products of all rows: int8 is widened to `room`, once for all of them.
template <class K>
ME_INLINE const K* readable(K*, const K* key, int64_t) {
    return key;
}
ME_INLINE const float* readable(float* room, const int8_t* key, int64_t n) {
    for (int64_t d = 0; d < n; d += kWidth) store(room + d, Int8::load(key + d));
    return room;
}
#if defined(__AVX512BF16__)
ME_INLINE const uint16_t* readable(uint16_t* room, const int8_t* key, int64_t n) {
    for (int64_t d = 0; d < n; d += 32) {
        const __m512 low = (__m512)Int8::load(key + d), high = (__m512)Int8::load(key + d + kWidth);
        store_bits(room + d, _mm512_cvtne2ps_pbh(high, low));  // exact: bfloat16 has eight bits
    }
    return room;
}
#endif

// scores[h][r][j] = q[h][r] . k[j][h] for kWidth keys at a time, whose sums are taken together.
template <class Pr, class T, int R>
void score(const Attention& a, const Work& w, const typename Pr::P* q) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t j = 0; j < w.n; j += kWidth) {
        for (int64_t h = 0; h < w.heads; ++h) {
            typedef typename Pr::K K;
            const K* key[kWidth];
            const T* next[kWidth];
            for (int i = 0; i < kWidth; ++i) {
                const int64_t at = j + i < w.n ? j + i : w.n - 1;
                key[i] = readable((K*)w.widened + i * w.padded, (const T*)w.k[at] + h * a.k_head, w.padded);
                next[i] = (const T*)w.k[at + kAhead] + h * a.k_head;
            }
            for (int r = 0; r < R; ++r) {
                const auto* query = q + (h * R + r) * w.padded;
                F acc[kWidth] = {};
                for (int64_t d = 0; d < w.padded; d += Pr::kStep) {
                    const auto part = Pr::load(query + d);
                    for (int i = 0; i < kWidth; ++i) {
                        acc[i] = Pr::add(acc[i], key[i] + d, part);
                        if (i % R == r && d % kLine == 0) __builtin_prefetch(next[i] + d, 0, 2);
                    }
                }
                F found = sums(acc) * w.scale;
                if (w.k_scale) found *= load(w.k_scale + h * kDecodeKeys + j);
                store(w.scores + (h * R + r) * kDecodeKeys + j, found);
            }
        }
    }
}

template <class S, int R>
void scores(const Attention& a, const Work& w) {
    typedef typename S::T T;
#if defined(__AVX512BF16__)
    if constexpr (S::dtype == DType::bf16 || S::dtype == DType::i8)
        if (w.narrow_q) return score<Product<BFloat16Pairs>, T, R>(a, w, w.narrow_q);
#endif
    typedef typename std::conditional<S::dtype == DType::i8, Float32, S>::type Read;
    score<Product<Read>, T, R>(a, w, w.q);
}

// Adds keys j ... end - 1 of one head, C vectors of channels, to its rows of out.
template <class S, int R, int C>
ME_INLINE void accumulate_channels(const Attention& a, const Work& w, int64_t h, int64_t d, int64_t j,
                                   int64_t end) {
    typedef typename S::T T;
    const int64_t at = h * a.v_head + d;
    const float* weights = w.scores + h * R * kDecodeKeys;
    float* out = w.out + h * R * w.padded + d;
    F acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = j ? load(out + r * w.padded + c * kWidth) : F{};
    for (; j < end; ++j) {
        const T *v = (const T*)w.v[j] + at, *next = (const T*)w.v[j + kAhead] + at;
        for (int c = 0; c < C; ++c) {
            if (c * kWidth * sizeof(T) % 64 == 0) __builtin_prefetch(next + c * kWidth, 0, 2);
            const F value = S::load(v + c * kWidth);
            for (int r = 0; r < R; ++r) acc[r][c] += value * weights[r * kDecodeKeys + j];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * w.padded + c * kWidth, acc[r][c]);
}

template <class S, int R>
void accumulate(const Attention& a, const Work& w) {
    constexpr int C = kWidth == 16 ? (R <= 4 ? 4 : 2) : (R <= 4 ? 2 : 1);
    int64_t j = 0, end = 0;
    do {  // once even without keys, so that `out` is zeros then
        end = j + kAhead < w.n ? j + kAhead : w.n;
        for (int64_t h = 0; h < w.heads; ++h) {
            int64_t d = 0;
            for (; d + C * kWidth <= w.padded; d += C * kWidth)
                accumulate_channels<S, R, C>(a, w, h, d, j, end);
            for (; d < w.padded; d += kWidth) accumulate_channels<S, R, 1>(a, w, h, d, j, end);
        }
        j = end;
    } while (j < w.n);
}

// Masks, exponentiates and sums one row's scores; keys that the row does not see get weight 0.
float softmax(float* scores, int64_t n, int64_t from, int64_t until, float& top) {
    const int64_t lo = from < 0 ? 0 : (from < n ? from : n);
    const int64_t hi = until < lo ? lo : (until < n ? until : n);
    for (int64_t j = 0; j < lo; ++j) scores[j] = kMinusInf;
    for (int64_t j = hi; j < round_up(n, kWidth); ++j) scores[j] = kMinusInf;
    F best = splat(kMinusInf);
    for (int64_t j = 0; j < n; j += kWidth) best = max(best, load(scores + j));
    top = kMinusInf;
    for (int i = 0; i < kWidth; ++i) top = best[i] > top ? best[i] : top;
    const float base = top == kMinusInf ? 0.0f : top;
    F total = {};
    for (int64_t j = 0; j < n; j += kWidth) {
        const F weight = exp2_nonpositive(load(scores + j) - base);
        store(scores + j, weight);
        total += weight;
    }
    return sum(total);
}

// Weights take the scales of int8 V: what they meet then are whole numbers.
ME_INLINE void weigh_values(float* weights, const float* scale, int64_t n) {
    for (int64_t j = 0; j < n; j += kWidth) store(weights + j, load(weights + j) * load(scale + j));
}

// The item's part for one of its heads.
ME_INLINE AttentionItem of_head(const Attention& a, AttentionItem item, int64_t h) {
    item.kv_head += (int32_t)h;
    if (item.partial) item.partial += h * item.rows * (2 + a.head_dim);
    return item;
}

template <class S, int R>
void run_rows(const Attention& a, const AttentionItem& whole, const Work& w) {
    scores<S, R>(a, w);
    float top[kDecodeHeads * R], total[kDecodeHeads * R];
    const Rows positions(a, whole);
    for (int64_t h = 0; h < w.heads; ++h) {
        for (int r = 0; r < R; ++r) {
            const int64_t pos = positions.position(whole.row + r);
            const int64_t from = a.window > 0 ? pos - a.window + 1 - whole.key : 0;
            float* of_row = w.scores + (h * R + r) * kDecodeKeys;
            total[h * R + r] = softmax(of_row, w.n, from, pos + 1 - whole.key, top[h * R + r]);
            if (w.v_scale) weigh_values(of_row, w.v_scale + h * kDecodeKeys, w.n);
        }
    }
    accumulate<S, R>(a, w);
    for (int64_t h = 0; h < w.heads; ++h) {
        const AttentionItem item = of_head(a, whole, h);
        const Rows rows(a, item);
        for (int r = 0; r < R; ++r) {
            float* out = w.out + (h * R + r) * w.padded;
            const float sum = total[h * R + r];
            if (item.partial) {
                item.partial[r] = top[h * R + r], item.partial[item.rows + r] = sum;
                std::memcpy(item.partial + 2 * item.rows + r * a.head_dim, out, a.head_dim * sizeof(float));
                continue;
            }
            const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
            for (int64_t d = 0; d < w.padded; d += kWidth) store(out + d, load(out + d) * inverse);
            with_dtype(a.q_dtype, [&](auto q) {
                narrow<decltype(q)>(rows.out<decltype(q)>(item.row + r), out, a.head_dim);
            });
            rows.store_lse(item.row + r, top[h * R + r], sum);
        }
    }
}

template <class S>
void run(const Attention& a, const AttentionItem& item, const Work& w) {
    with_rows(item.rows, [&](auto r) { run_rows<S, r()>(a, item, w); });
}

// Head sizes that are no multiple of the vector width, head by head: widened, zero-padded copies stand in for
// the pages.
template <class S>
void run_padded(const Attention& a, const AttentionItem& item, const Work& all, float* copies) {
    typedef typename S::T T;
    const char *k[kDecodeKeys + kAhead], *v[kDecodeKeys + kAhead];
    for (int64_t j = 0; j < all.n + kAhead; ++j) {
        const int64_t at = (j < all.n ? j : all.n - 1) * all.padded;
        k[j] = (const char*)(copies + at), v[j] = (const char*)(copies + kDecodeKeys * all.padded + at);
    }
    for (int64_t h = 0; h < all.heads; ++h) {
        Work w = all;
        w.narrow_q = nullptr, w.heads = 1, w.q += h * item.rows * w.padded, w.k = k, w.v = v;
        if (w.k_scale) w.k_scale += h * kDecodeKeys, w.v_scale += h * kDecodeKeys;
        for (int64_t j = 0; j < w.n; ++j) {
            widen<S>((float*)k[j], (const T*)all.k[j] + h * a.k_head, a.head_dim, w.padded);
            widen<S>((float*)v[j], (const T*)all.v[j] + h * a.v_head, a.head_dim, w.padded);
        }
        run<Float32>(a, of_head(a, item, h), w);
    }
}

// Addresses of the item's keys and of those to be fetched behind them.
void locate_all(const Attention& a, const AttentionItem& item, const char** k, const char** v) {
    const int64_t n = item.key_end - item.key, size = size_of(a.kv_dtype);
    if (n == 0) return;
    const int64_t behind = std::min<int64_t>(a.seq_lens[item.request], a.max_blocks * a.page) - item.key_end;
    const int64_t more = std::min(kAhead, behind);
    int64_t k_at[kDecodeKeys + kAhead], v_at[kDecodeKeys + kAhead];
    locate(a, item, item.key, n + more, k_at, v_at);
    for (int64_t j = 0; j < n; ++j)
        k[j] = (const char*)a.k + k_at[j] * size, v[j] = (const char*)a.v + v_at[j] * size;
    for (int64_t j = 0; j < kAhead; ++j) {
        k[n + j] = v[j < n ? j : n - 1];
        v[n + j] = j < more ? (const char*)a.k + k_at[n + j] * size : v[n - 1];
    }
}

}  // namespace

int64_t decode_scratch(int64_t head_dim) {
    const int64_t padded = round_up(head_dim, 16);
    const int64_t copies = head_dim == padded ? 0 : 2 * kDecodeKeys * padded;
    const int64_t of_heads = kDecodeRows * (3 * padded + kDecodeKeys) + 2 * kDecodeKeys;
    return sizeof(float) * (kDecodeHeads * of_heads + kWidth * padded + copies);
}

void attention_decode(const Attention& a, const AttentionItem& item, float* scratch) {
    const int64_t padded = round_up(a.head_dim, 16);
    const char *k[kDecodeKeys + kAhead], *v[kDecodeKeys + kAhead];
    const int64_t rows = item.kv_heads * item.rows;
    float* q = scratch;
    float* scores = q + rows * padded;
    float* out = scores + rows * kDecodeKeys;
    uint16_t* narrow_q = (uint16_t*)(out + rows * padded);
    float* k_scale = out + 2 * rows * padded;
    float* v_scale = k_scale + item.kv_heads * kDecodeKeys;
    float* widened = v_scale + item.kv_heads * kDecodeKeys;
    float* copies = widened + kWidth * padded;
    const bool pairs = a.q_dtype == DType::bf16 && padded % 32 == 0 && a.head_dim == padded;
    for (int64_t h = 0; h < item.kv_heads; ++h) {
        const Rows of(a, of_head(a, item, h));
        for (int r = 0; r < item.rows; ++r) {
            const int64_t to = (h * item.rows + r) * padded;
            with_dtype(a.q_dtype, [&](auto t) {
                const auto* from = of.query<decltype(t)>(item.row + r);
                widen<decltype(t)>(q + to, from, a.head_dim, padded);
                if (pairs) std::memcpy(narrow_q + to, from, padded * sizeof(uint16_t));
            });
        }
    }
    const float scale = a.sm_scale * kLog2E;
    const int64_t n = item.key_end - item.key;
    if (a.k_scale) {
        // Whole vectors of scales are read.
        std::memset(k_scale, 0, 2 * item.kv_heads * kDecodeKeys * sizeof(float));
        gather_scales(a, item, a.k_scale, item.kv_heads, item.key, n, k_scale, kDecodeKeys);
        gather_scales(a, item, a.v_scale, item.kv_heads, item.key, n, v_scale, kDecodeKeys);
    } else {
        k_scale = v_scale = nullptr;
    }
    const Work w = {k,      v,      item.kv_heads, q,       pairs ? narrow_q : nullptr,
                    scores, out,    k_scale,       v_scale, widened,
                    n,      padded, scale};
    locate_all(a, item, k, v);
    with_page_dtype(a.kv_dtype, [&](auto kv) {
        if (a.head_dim == padded)
            run<decltype(kv)>(a, item, w);
        else
            run_padded<decltype(kv)>(a, item, w, copies);
    });
}

// `items` are the key ranges of one set of rows, each with its partial result.
void attention_merge(const Attention& a, const AttentionItem* items, int count) {
    const AttentionItem& first = items[0];
    for (int64_t h = 0; h < first.kv_heads; ++h) {
        const Rows rows(a, of_head(a, first, h));
        const int64_t skipped = h * first.rows * (2 + a.head_dim);
        for (int64_t r = 0; r < first.rows; ++r) {
            float top = kMinusInf, total = 0;
            for (int i = 0; i < count; ++i) {
                const float its = items[i].partial[skipped + r];
                top = its > top ? its : top;
            }
            const float base = top == kMinusInf ? 0.0f : top;
            float* sum = first.partial + skipped + 2 * first.rows + r * a.head_dim;
            for (int i = 0; i < count; ++i) {
                const float* from = items[i].partial + skipped;
                const float weight = exp2_nonpositive(splat(from[r] - base))[0];
                total += weight * from[first.rows + r];
                const float* part = from + 2 * first.rows + r * a.head_dim;
                for (int64_t d = 0; d < a.head_dim; ++d) sum[d] = (i ? sum[d] : 0.0f) + weight * part[d];
            }
            const float inverse = total > 0 ? 1.0f / total : 0.0f;
            for (int64_t d = 0; d < a.head_dim; ++d) sum[d] *= inverse;
            with_dtype(a.q_dtype, [&](auto q) {
                narrow<decltype(q)>(rows.out<decltype(q)>(first.row + r), sum, a.head_dim);
            });
            rows.store_lse(first.row + r, top, total);
        }
    }
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
