// x @ weight^T for few rows of x: reading the weights is the whole cost, so each is read once, in order, from
// where it lies. With a few dozen rows the products count as well: in bfloat16 see linear_tiles.h.
#include "dot.h"
#include "linear_tiles.h"

namespace memos_engine {
namespace ME_LEVEL {

int64_t linear_int8_scratch(const Linear&);
void linear_int8_pack(const Linear&, void*);
void linear_int8(const Linear&, const void*, int64_t, int64_t);

namespace {

ME_INLINE int64_t padded(const Linear& a) { return (a.inputs + 31) / 32 * 32; }

// Sums of the products of one weight row with R rows of x; R * U sums hide the latency of the additions.
template <class S, int R>
ME_INLINE void dots(const Linear& a, const typename S::T* w, const typename Dot<S>::P* x, F* total) {
    typedef Dot<S> D;
    constexpr int64_t kStep = D::kElements;
    constexpr int U = R <= 2 ? 4 : R <= 4 ? 2 : 1;
    constexpr int64_t kAhead = R <= 2 ? 2048 : 6144;  // bytes; the best on Zen 4
    const int64_t row = padded(a);
    F acc[U][R] = {};
    int64_t i = 0;
    for (; i + U * kStep <= a.inputs; i += U * kStep) {
        for (int u = 0; u < U; ++u) {
            const auto* at = w + i + u * kStep;
            // Ahead of the hardware prefetcher, which stops at every page.
            __builtin_prefetch((const char*)at + kAhead, 0, 2);
            const auto weights = D::load(at);
            for (int r = 0; r < R; ++r) acc[u][r] = D::add(acc[u][r], weights, x + r * row + i + u * kStep);
        }
    }
    for (; i < a.inputs; i += kStep) {
        const auto weights = a.inputs - i >= kStep ? D::load(w + i) : D::load_part(w + i, a.inputs - i);
        for (int r = 0; r < R; ++r) acc[0][r] = D::add(acc[0][r], weights, x + r * row + i);
    }
    for (int r = 0; r < R; ++r) {
        for (int u = 1; u < U; ++u) acc[0][r] += acc[u][r];
        total[r * kWidth] = acc[0][r];
    }
}

// Up to eight rows of x: the weights are a single stream, which memory delivers fastest, and kWidth outputs
// are summed across lanes together.
template <class S, int R>
void stream(const Linear& a, const typename Dot<S>::P* x, int64_t n, int64_t end) {
    typedef typename S::T T;
    const T* w = (const T*)a.weight;
    T* out = (T*)a.out;
    for (; n < end; n += kWidth) {
        F total[R][kWidth];
        const int64_t some = end - n < kWidth ? end - n : kWidth;
        for (int64_t c = 0; c < some; ++c) dots<S, R>(a, w + (n + c) * a.weight_row, x, &total[0][c]);
        for (int r = 0; r < R; ++r)
            for (int64_t c = some; c < kWidth; ++c) total[r][c] = F{};
        for (int r = 0; r < R; ++r) {
            const F y = sums(total[r]);
            if (some == kWidth)
                S::store(out + r * a.out_token + n, y);
            else
                store_some<S>(out + r * a.out_token + n, y, some);
        }
    }
}

// R rows of x by C outputs: each load of weights or of x serves several products.
template <class S, int R, int C>
ME_INLINE void block(const Linear& a, const typename Dot<S>::P* x, typename S::T* out, int64_t n,
                     bool first) {
    typedef Dot<S> D;
    typedef typename S::T T;
    constexpr int64_t kStep = D::kElements;
    constexpr int kVectors = (R * C + kWidth - 1) / kWidth;
    const T* w = (const T*)a.weight + n * a.weight_row;
    const int64_t row = padded(a);
    // Whole blocks ahead, so that every line is asked for once.
    const int64_t size = C * a.weight_row * (int64_t)sizeof(T), ahead = (4096 / size + 1) * size;
    F acc[kVectors * kWidth] = {};
    const auto step = [&](int64_t i, auto load) {
        for (int c = 0; c < C; ++c) {
            const T* at = w + c * a.weight_row + i;
            if (first) __builtin_prefetch((const char*)at + ahead);
            const auto weights = load(at);
            for (int r = 0; r < R; ++r) acc[r * C + c] = D::add(acc[r * C + c], weights, x + r * row + i);
        }
    };
    int64_t i = 0;
    for (; i + kStep <= a.inputs; i += kStep) step(i, [](const T* at) { return D::load(at); });
    if (i < a.inputs) step(i, [&](const T* at) { return D::load_part(at, a.inputs - i); });
    T y[kVectors * kWidth];
    for (int v = 0; v < kVectors; ++v)
        S::store(y + v * kWidth, sums(*(const F(*)[kWidth])(acc + v * kWidth)));
    for (int r = 0; r < R; ++r) std::memcpy(out + r * a.out_token + n, y + r * C, C * sizeof(T));
}

// As many outputs at a time as leave room for the operands among 16 or 32 registers.
template <class S, int R>
void rows(const Linear& a, const typename Dot<S>::P* x, typename S::T* out, int64_t n, int64_t end,
          bool first) {
    constexpr int kSums = kWidth == 16 ? 16 : 8;
    constexpr int C = R == 1 || kSums < R * 2 ? 1 : R <= 2 ? kSums / 2 : R <= 4 ? kSums / 4 : 2;
    for (; n + C <= end; n += C) block<S, R, C>(a, x, out, n, first);
    for (; n < end; ++n) block<S, R, 1>(a, x, out, n, first);
}

// With more rows products cost more than reading: eight rows at a time, against groups of outputs that stay
// in the nearest cache meanwhile.
template <class S>
void range(const Linear& a, const void* packed, int64_t n, int64_t end) {
    typedef typename Dot<S>::P P;
    if (a.tokens <= 8)
        return with_rows(a.tokens, [&](auto r) { stream<S, r()>(a, (const P*)packed, n, end); });
    for (int64_t group; n < end; n = group) {
        group = n + 16 < end ? n + 16 : end;
        for (int64_t t = 0; t < a.tokens; t += 8) {
            const P* x = (const P*)packed + t * padded(a);
            typename S::T* out = (typename S::T*)a.out + t * a.out_token;
            with_rows(a.tokens - t, [&](auto r) { rows<S, r()>(a, x, out, n, group, t == 0); });
        }
    }
}

}  // namespace

int64_t linear_scratch(const Linear& a) {
    if (a.scale) return linear_int8_scratch(a);
    return linear_tiles_fits(a) ? tiles_scratch(a) : a.tokens * padded(a) * sizeof(float);
}

void linear_pack(const Linear& a, void* packed) {
    if (a.scale) return linear_int8_pack(a, packed);
    if (linear_tiles_fits(a)) return pack_tiles(a, (uint32_t*)packed);
    with_dtype(a.dtype, [&](auto s) {
        typedef Dot<decltype(s)> D;
        typedef typename D::T T;
        for (int64_t r = 0; r < a.tokens; ++r)
            D::pack((typename D::P*)packed + r * padded(a), (const T*)a.x + r * a.x_token, a.inputs,
                    padded(a));
    });
}

void linear(const Linear& a, const void* packed, int64_t output, int64_t output_end) {
    if (a.scale) return linear_int8(a, packed, output, output_end);
    if (linear_tiles_fits(a)) return linear_tiles(a, packed, output, output_end);
    with_dtype(a.dtype, [&](auto s) { range<decltype(s)>(a, packed, output, output_end); });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
