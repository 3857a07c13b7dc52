// RoPE, and the writing of K and V into pages. One rotation serves both, compiled without contraction into
// fused multiply-adds: its results are then the same bits on every level and in the torch reference. Sources
// of int8 are widened and scaled in registers, on their way into the rotation; pages of int8 are quantised
// behind it.
#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

struct Angles {
    const float *cos, *sin;
    int64_t half;  // rotary_dim / 2
};

ME_INLINE Angles angles(const float* cos_sin, int64_t position, int64_t rotary_dim) {
    const float* row = cos_sin + position * rotary_dim;
    return {row, row + rotary_dim / 2, rotary_dim / 2};
}

// One head's source values: `load` and `some` give the first ones as floats, `+` moves on.
template <class S>
struct Stored {
    const typename S::T* at;
    ME_INLINE F load() const { return S::load(at); }
    ME_INLINE F some(int64_t n) const { return load_some<S>(at, n); }
    ME_INLINE Stored operator+(int64_t n) const { return {at + n}; }
};

// int8 with a scale for each channel.
struct ScaledByChannel {
    const int8_t* at;
    const float* scale;
    ME_INLINE F load() const { return Int8::load(at) * Float32::load(scale); }
    ME_INLINE F some(int64_t n) const { return load_some<Int8>(at, n) * load_some<Float32>(scale, n); }
    ME_INLINE ScaledByChannel operator+(int64_t n) const { return {at + n, scale + n}; }
};

// int8 with one scale.
struct Scaled {
    const int8_t* at;
    float scale;
    ME_INLINE F load() const { return Int8::load(at) * scale; }
    ME_INLINE F some(int64_t n) const { return load_some<Int8>(at, n) * scale; }
    ME_INLINE Scaled operator+(int64_t n) const { return {at + n, scale}; }
};

template <class To, class From>
ME_INLINE void convert(From from, typename To::T* to, int64_t n) {
    if constexpr (std::is_same<From, Stored<To>>::value) {
        if (from.at != to) std::memcpy(to, from.at, n * sizeof(*to));
    } else {
        int64_t i = 0;
        for (; i + kWidth <= n; i += kWidth) To::store(to + i, (from + i).load());
        if (i < n) store_some<To>(to + i, (from + i).some(n - i), n - i);
    }
}

// `to` may be where `from` is.
template <class To, class From>
ME_INLINE void rotate_halves(From from, typename To::T* to, int64_t dim, Angles t) {
    int64_t i = 0;
    for (; i + kWidth <= t.half; i += kWidth) {
        const F a = (from + i).load(), b = (from + (t.half + i)).load();
        const F cos = load(t.cos + i), sin = load(t.sin + i);
        To::store(to + i, a * cos - b * sin);
        To::store(to + t.half + i, b * cos + a * sin);
    }
    if (const int64_t n = t.half - i; n > 0) {
        const F a = (from + i).some(n), b = (from + (t.half + i)).some(n);
        const F cos = load_some<Float32>(t.cos + i, n), sin = load_some<Float32>(t.sin + i, n);
        store_some<To>(to + i, a * cos - b * sin, n);
        store_some<To>(to + t.half + i, b * cos + a * sin, n);
    }
    convert<To>(from + 2 * t.half, to + 2 * t.half, dim - 2 * t.half);
}

template <class To, class From>
ME_INLINE void rotate_pairs(From from, typename To::T* to, int64_t dim, Angles t) {
    for (int64_t i = 0; i < t.half; i += kWidth) {
        const int64_t n = t.half - i < kWidth ? t.half - i : kWidth;
        float x[2 * kWidth];
        for (int64_t j = 0; j < 2 * n; j += kWidth) {
            const From next = from + (2 * i + j);
            store(x + j, 2 * n - j < kWidth ? next.some(2 * n - j) : next.load());
        }
        for (int64_t p = 0; p < n; ++p) {
            const float a = x[2 * p], b = x[2 * p + 1], cos = t.cos[i + p], sin = t.sin[i + p];
            x[2 * p] = a * cos - b * sin;
            x[2 * p + 1] = b * cos + a * sin;
        }
        narrow<To>(to + 2 * i, x, 2 * n);
    }
    convert<To>(from + 2 * t.half, to + 2 * t.half, dim - 2 * t.half);
}

template <class To, class From>
ME_INLINE void rotate(From from, typename To::T* to, int64_t dim, Angles t, bool pairs) {
    if (t.half == 0)
        convert<To>(from, to, dim);
    else if (pairs)
        rotate_pairs<To>(from, to, dim, t);
    else
        rotate_halves<To>(from, to, dim, t);
}

// The heads of one layer's sources.
template <class S>
struct FloatHeads {
    static constexpr bool kScaled = false;
    const KvWrite& a;
    int64_t layer;
    ME_INLINE Stored<S> k(int64_t token, int64_t head) const {
        return {(const typename S::T*)a.k + layer * a.k_layer + token * a.k_token + head * a.k_head};
    }
    ME_INLINE Stored<S> v(int64_t token, int64_t head) const {
        return {(const typename S::T*)a.v + layer * a.v_layer + token * a.v_token + head * a.v_head};
    }
};

struct Int8Heads {
    static constexpr bool kScaled = true;
    const KvWrite& a;
    int64_t layer;
    ME_INLINE ScaledByChannel k(int64_t token, int64_t head) const {
        const int64_t group = (a.first_token + token) / kScaleGroup;
        return {(const int8_t*)a.k + layer * a.k_layer + token * a.k_token + head * a.k_head,
                a.k_scale + layer * a.ks_layer + group * a.ks_group + head * a.ks_head};
    }
    ME_INLINE Scaled v(int64_t token, int64_t head) const {
        return {(const int8_t*)a.v + layer * a.v_layer + token * a.v_token + head * a.v_head,
                a.v_scale[layer * a.vs_layer + token * a.vs_token + head * a.vs_head]};
    }
};

// Where a token's heads go, in pages of floats.
template <class To>
struct FloatPages {
    // Heads that lie side by side on both ends may be written as one.
    static constexpr bool kDense = true;
    const KvWrite& a;
    typename To::T *k_to, *v_to;

    ME_INLINE FloatPages(const KvWrite& args, int64_t layer, int64_t block, int64_t offset, float*)
        : a(args),
          k_to((typename To::T*)a.k_pages + layer * a.kp_layer + block * a.kp_block + offset * a.kp_token),
          v_to((typename To::T*)a.v_pages + layer * a.vp_layer + block * a.vp_block + offset * a.vp_token) {}

    template <class From>
    ME_INLINE void k(int64_t head, From from, Angles t) const {
        rotate<To>(from, k_to + head * a.kp_head, a.head_dim, t, a.interleaved);
    }
    template <class From>
    ME_INLINE void v(int64_t head, From from, int64_t n) const {
        convert<To>(from, v_to + head * a.vp_head, n);
    }
};

// x[0 ... n - 1] in 127ths of the largest size; x goes on with zeros up to a whole vector. Returns the scale,
// as ops/int8_kv.py defines it.
ME_INLINE float quantize(const float* x, int8_t* to, int64_t n) {
    constexpr float kLeast = 0x1p-126f, kMost = (float)((0x1p128 - 0x1p105) / 127);
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    F sizes = {};
    for (int64_t i = 0; i < n; i += kWidth) sizes = max((F)((U)load(x + i) & 0x7fffffffu), sizes);
    float largest = 0;
    for (int i = 0; i < kWidth; ++i) largest = sizes[i] > largest ? sizes[i] : largest;
    float scale = largest / 127.0f;
    scale = scale < kLeast ? kLeast : scale;
    scale = scale > kMost ? kMost : scale;
    for (int64_t i = 0; i < n; i += kWidth) {
        F multiple = load(x + i) / splat(scale);
        multiple = max(multiple, splat(-127.0f));
        multiple = multiple > 127.0f ? splat(127.0f) : multiple;
        const B narrow = __builtin_convertvector((I)(multiple + kMagic) - (I)splat(kMagic), B);
        if (n - i >= kWidth)
            store_bits(to + i, narrow);
        else
            std::memcpy(to + i, &narrow, n - i);
    }
    return largest > 0 ? scale : 0.0f;
}

// The same in pages of int8. Each head is rotated or widened in float32 before it is rounded, once.
struct Int8Pages {
    static constexpr bool kDense = false;
    const KvWrite& a;
    int8_t *k_to, *v_to;
    float *k_scale, *v_scale;
    float* row;  // [head_dim], and zeros behind it

    ME_INLINE Int8Pages(const KvWrite& args, int64_t layer, int64_t block, int64_t offset, float* scratch)
        : a(args),
          k_to((int8_t*)a.k_pages + layer * a.kp_layer + block * a.kp_block + offset * a.kp_token),
          v_to((int8_t*)a.v_pages + layer * a.vp_layer + block * a.vp_block + offset * a.vp_token),
          k_scale(a.kp_scale + layer * a.kps_layer + (block * a.page + offset) * a.kv_heads),
          v_scale(a.vp_scale + layer * a.vps_layer + (block * a.page + offset) * a.kv_heads),
          row(scratch) {
        store(row + a.head_dim, F{});
    }

    template <class From>
    ME_INLINE void k(int64_t head, From from, Angles t) const {
        rotate<Float32>(from, row, a.head_dim, t, a.interleaved);
        k_scale[head] = quantize(row, k_to + head * a.kp_head, a.head_dim);
    }
    template <class From>
    ME_INLINE void v(int64_t head, From from, int64_t n) const {
        convert<Float32>(from, row, n);
        v_scale[head] = quantize(row, v_to + head * a.vp_head, n);
    }
};

template <class Pages, class Heads>
void write_tokens(const KvWrite& a, Heads heads, int64_t layer, int64_t token, int64_t token_end,
                  float* row) {
    const bool dense = Pages::kDense && !Heads::kScaled && a.v_head == a.head_dim && a.vp_head == a.head_dim;
    for (int64_t i = token; i < token_end; ++i) {
        const int64_t slot = a.slot[i];
        if (slot < 0) continue;
        const Angles t = a.cos_sin ? angles(a.cos_sin, a.positions[i], a.rotary_dim) : Angles{};
        const Pages pages(a, layer, slot / a.page, slot % a.page, row);
        for (int64_t h = 0; h < a.kv_heads; ++h) pages.k(h, heads.k(i, h), t);
        if (dense) {
            pages.v(0, heads.v(i, 0), a.kv_heads * a.head_dim);
        } else {
            for (int64_t h = 0; h < a.kv_heads; ++h) pages.v(h, heads.v(i, h), a.head_dim);
        }
    }
}

template <class Pages>
void write_pages(const KvWrite& a, int64_t layer, int64_t token, int64_t token_end, float* row) {
    if (a.k_scale) return write_tokens<Pages>(a, Int8Heads{a, layer}, layer, token, token_end, row);
    with_dtype(a.src_dtype, [&](auto from) {
        write_tokens<Pages>(a, FloatHeads<decltype(from)>{a, layer}, layer, token, token_end, row);
    });
}

}  // namespace

void write_kv(const KvWrite& a, int64_t layer, int64_t token, int64_t token_end, float* row) {
    if (a.page_dtype == DType::i8) return write_pages<Int8Pages>(a, layer, token, token_end, row);
    with_dtype(a.page_dtype,
               [&](auto to) { write_pages<FloatPages<decltype(to)>>(a, layer, token, token_end, row); });
}

void rope(const Rope& a, int64_t token, int64_t token_end) {
    with_dtype(a.dtype, [&](auto s) {
        typedef decltype(s) S;
        for (int64_t i = token; i < token_end; ++i) {
            const Angles t = angles(a.cos_sin, a.positions[i], a.rotary_dim);
            for (int64_t h = 0; h < a.heads; ++h) {
                typename S::T* x = (typename S::T*)a.x + i * a.token + h * a.head;
                rotate<S>(Stored<S>{x}, x, a.head_dim, t, a.interleaved);
            }
        }
    });
}

}  // namespace ME_LEVEL
}  // namespace memos_engine
