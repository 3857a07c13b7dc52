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
    const float* q;  // [rows][padded], scaled
    float* scores;   // [rows][256]
    float* out;      // [rows][padded]
    int64_t n, padded;
};

template <class S, int R>
void score(const Attention& a, const Work& w) {
    for (int64_t j = 0; j < w.n; ++j) {
        const typename S::T* k = (const typename S::T*)a.k + w.k_at[j];
        F acc[R] = {};
        for (int64_t d = 0; d < w.padded; d += kWidth) {
            const F key = S::load(k + d);
            for (int r = 0; r < R; ++r) acc[r] += key * load(w.q + r * w.padded + d);
        }
        for (int r = 0; r < R; ++r) w.scores[r * kDecodeKeys + j] = sum(acc[r]);
    }
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
    score<S, R>(a, w);
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
    return sizeof(float) * (kDecodeRows * (2 * padded + kDecodeKeys) + copies);
}

void attention_decode(const Attention& a, const AttentionItem& item, float* scratch) {
    const int64_t padded = round_up(a.head_dim, 16);
    int64_t k_at[kDecodeKeys], v_at[kDecodeKeys];
    float* q = scratch;
    float* scores = q + kDecodeRows * padded;
    float* out = scores + kDecodeRows * kDecodeKeys;
    const Rows rows(a, item);
    const float scale = a.sm_scale * kLog2E;
    for (int r = 0; r < item.rows; ++r) {
        float* to = q + r * padded;
        with_dtype(a.q_dtype, [&](auto t) {
            widen<decltype(t)>(to, rows.query<decltype(t)>(item.row + r), a.head_dim, padded);
        });
        for (int64_t d = 0; d < padded; d += kWidth) store(to + d, load(to + d) * scale);
    }
    const Work w = {k_at, v_at, q, scores, out, item.key_end - item.key, padded};
    locate(a, item, item.key, w.n, k_at, v_at);
    with_dtype(a.kv_dtype, [&](auto kv) {
        if (a.head_dim == padded)
            run<decltype(kv)>(a, item, w);
        else
            run_padded<decltype(kv)>(a, item, w, out + kDecodeRows * padded);
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
