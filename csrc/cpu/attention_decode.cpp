// Attention of a few rows (decode): lanes of a vector are channels, so that no lane idles.
//
// An item is up to 8 packed rows against up to 256 keys; scores of all of them fit into scratch, so softmax
// is a plain one. `attention_merge` joins the key ranges of one row by their maxima and sums.
#include "attention_rows.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

struct Work {
    const int64_t *k_at, *v_at;
    const float* q;            // [rows][padded]
    const uint16_t* narrow_q;  // the same in bfloat16, where the queries are bfloat16
    float* scores;             // [rows][256]
    float* out;                // [rows][padded]
    int64_t n, padded;
    float scale;
};

// How a query row is kept (`P`), and how kStep products with a key are added to a sum.
template <class S>
struct Product {
    typedef float P;
    static constexpr int64_t kStep = kWidth;
    static ME_INLINE F add(F acc, const typename S::T* k, F q) { return acc + S::load(k) * q; }
    static ME_INLINE F load(const P* q) { return load_bits<F>(q); }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 products, added in float32 by one instruction; for queries that are bfloat16 themselves.
struct BFloat16Pairs {};
template <>
struct Product<BFloat16Pairs> {
    typedef uint16_t P;
    static constexpr int64_t kStep = 32;
    static ME_INLINE F add(F acc, const uint16_t* k, __m512bh q) {
        return (F)_mm512_dpbf16_ps((__m512)acc, load_bits<__m512bh>(k), q);
    }
    static ME_INLINE __m512bh load(const P* q) { return load_bits<__m512bh>(q); }
};
#endif

// Lines that the loop below will want soon: keys of one head lie apart, where no prefetcher follows.
template <class T>
ME_INLINE void fetch(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

// scores[r][j] = q[r] . k[j] for kWidth keys at a time, whose sums are taken together.
template <class Pr, class T, int R>
void score(const Attention& a, const Work& w, const typename Pr::P* q, float scale) {
    constexpr int64_t kAhead = 2 * kWidth;  // keys
    const T *k = (const T*)a.k, *v = (const T*)a.v;
    for (int64_t j = 0; j < w.n; j += kWidth) {
        const T* key[kWidth];
        for (int i = 0; i < kWidth; ++i) {
            const int64_t at = j + i < w.n ? j + i : w.n - 1;
            const int64_t next = at + kAhead < w.n ? at + kAhead : w.n - 1;
            key[i] = k + w.k_at[at];
            fetch(k + w.k_at[next], w.padded);
            fetch(v + w.v_at[at], w.padded);
        }
        for (int r = 0; r < R; ++r) {
            F acc[kWidth] = {};
            for (int64_t d = 0; d < w.padded; d += Pr::kStep) {
                const auto part = Pr::load(q + r * w.padded + d);
                for (int i = 0; i < kWidth; ++i) acc[i] = Pr::add(acc[i], key[i] + d, part);
            }
            store(w.scores + r * kDecodeKeys + j, sums(acc) * scale);
        }
    }
}

template <class S, int R>
void scores(const Attention& a, const Work& w) {
    typedef typename S::T T;
#if defined(__AVX512BF16__)
    if constexpr (S::dtype == DType::bf16)
        if (w.narrow_q) return score<Product<BFloat16Pairs>, T, R>(a, w, w.narrow_q, w.scale);
#endif
    score<Product<S>, T, R>(a, w, w.q, w.scale);
}

template <class S, int R, int C>
ME_INLINE void accumulate_channels(const Attention& a, const Work& w, int64_t d) {
    F acc[R][C] = {};
    for (int64_t j = 0; j < w.n; ++j) {
        const typename S::T* v = (const typename S::T*)a.v + w.v_at[j] + d;
        for (int c = 0; c < C; ++c) {
            const F value = S::load(v + c * kWidth);
            for (int r = 0; r < R; ++r) acc[r][c] += value * w.scores[r * kDecodeKeys + j];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(w.out + r * w.padded + d + c * kWidth, acc[r][c]);
}

template <class S, int R>
void accumulate(const Attention& a, const Work& w) {
    constexpr int C = kWidth == 16 ? (R <= 4 ? 4 : 2) : (R <= 4 ? 2 : 1);
    int64_t d = 0;
    for (; d + C * kWidth <= w.padded; d += C * kWidth) accumulate_channels<S, R, C>(a, w, d);
    for (; d < w.padded; d += kWidth) accumulate_channels<S, R, 1>(a, w, d);
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

template <class S, int R>
void run_rows(const Attention& a, const AttentionItem& item, const Work& w) {
    scores<S, R>(a, w);
    const Rows rows(a, item);
    float top[R], total[R];
    for (int r = 0; r < R; ++r) {
        const int64_t pos = rows.position(item.row + r);
        const int64_t from = a.window > 0 ? pos - a.window + 1 - item.key : 0;
        total[r] = softmax(w.scores + r * kDecodeKeys, w.n, from, pos + 1 - item.key, top[r]);
    }
    accumulate<S, R>(a, w);
    for (int r = 0; r < R; ++r) {
        float* out = w.out + r * w.padded;
        if (item.partial) {
            item.partial[r] = top[r], item.partial[item.rows + r] = total[r];
            std::memcpy(item.partial + 2 * item.rows + r * a.head_dim, out, a.head_dim * sizeof(float));
            continue;
        }
        const float inverse = total[r] > 0 ? 1.0f / total[r] : 0.0f;
        for (int64_t d = 0; d < w.padded; d += kWidth) store(out + d, load(out + d) * inverse);
        with_dtype(a.q_dtype, [&](auto q) {
            narrow<decltype(q)>(rows.out<decltype(q)>(item.row + r), out, a.head_dim);
        });
        rows.store_lse(item.row + r, top[r], total[r]);
    }
}

template <class S>
void run(const Attention& a, const AttentionItem& item, const Work& w) {
    switch (item.rows) {
        case 1:
            return run_rows<S, 1>(a, item, w);
        case 2:
            return run_rows<S, 2>(a, item, w);
        case 3:
            return run_rows<S, 3>(a, item, w);
        case 4:
            return run_rows<S, 4>(a, item, w);
        case 5:
            return run_rows<S, 5>(a, item, w);
        case 6:
            return run_rows<S, 6>(a, item, w);
        case 7:
            return run_rows<S, 7>(a, item, w);
        default:
            return run_rows<S, 8>(a, item, w);
    }
}

// Head sizes that are no multiple of the vector width: widened, zero-padded copies stand in for the pages.
template <class S>
void run_padded(const Attention& a, const AttentionItem& item, Work w, float* copies) {
    Attention padded = a;
    int64_t at[kDecodeKeys];
    padded.k = copies, padded.v = copies + kDecodeKeys * w.padded;
    w.narrow_q = nullptr;
    for (int64_t j = 0; j < w.n; ++j) {
        at[j] = j * w.padded;
        widen<S>(copies + at[j], (const typename S::T*)a.k + w.k_at[j], a.head_dim, w.padded);
        widen<S>(copies + kDecodeKeys * w.padded + at[j], (const typename S::T*)a.v + w.v_at[j], a.head_dim,
                 w.padded);
    }
    w.k_at = w.v_at = at;
    run<Float32>(padded, item, w);
}

}  // namespace

int64_t decode_scratch(int64_t head_dim) {
    const int64_t padded = round_up(head_dim, 16);
    const int64_t copies = head_dim == padded ? 0 : 2 * kDecodeKeys * padded;
    return sizeof(float) * (kDecodeRows * (3 * padded + kDecodeKeys) + copies);
}

void attention_decode(const Attention& a, const AttentionItem& item, float* scratch) {
    const int64_t padded = round_up(a.head_dim, 16);
    int64_t k_at[kDecodeKeys], v_at[kDecodeKeys];
    float* q = scratch;
    float* scores = q + kDecodeRows * padded;
    float* out = scores + kDecodeRows * kDecodeKeys;
    uint16_t* narrow_q = (uint16_t*)(out + kDecodeRows * padded);
    float* copies = out + 2 * kDecodeRows * padded;
    const Rows rows(a, item);
    const bool pairs = a.q_dtype == DType::bf16 && padded % 32 == 0 && a.head_dim == padded;
    for (int r = 0; r < item.rows; ++r) {
        with_dtype(a.q_dtype, [&](auto t) {
            const auto* from = rows.query<decltype(t)>(item.row + r);
            widen<decltype(t)>(q + r * padded, from, a.head_dim, padded);
            if (pairs) std::memcpy(narrow_q + r * padded, from, padded * sizeof(uint16_t));
        });
    }
    const float scale = a.sm_scale * kLog2E;
    const Work w = {k_at,   v_at, q, pairs ? narrow_q : nullptr, scores, out, item.key_end - item.key,
                    padded, scale};
    locate(a, item, item.key, w.n, k_at, v_at);
    with_dtype(a.kv_dtype, [&](auto kv) {
        if (a.head_dim == padded)
            run<decltype(kv)>(a, item, w);
        else
            run_padded<decltype(kv)>(a, item, w, copies);
    });
}

// `items` are the key ranges of one set of rows, each with its partial result.
void attention_merge(const Attention& a, const AttentionItem* items, int count) {
    const AttentionItem& first = items[0];
    const Rows rows(a, first);
    for (int64_t r = 0; r < first.rows; ++r) {
        float top = kMinusInf, total = 0;
        for (int i = 0; i < count; ++i) top = items[i].partial[r] > top ? items[i].partial[r] : top;
        const float base = top == kMinusInf ? 0.0f : top;
        float* sum = first.partial + 2 * first.rows + r * a.head_dim;
        for (int i = 0; i < count; ++i) {
            const float weight = exp2_nonpositive(splat(items[i].partial[r] - base))[0];
            total += weight * items[i].partial[first.rows + r];
            const float* part = items[i].partial + 2 * first.rows + r * a.head_dim;
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

}  // namespace ME_LEVEL
}  // namespace memos_engine
