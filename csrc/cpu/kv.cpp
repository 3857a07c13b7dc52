// RoPE, and the writing of K and V into pages. One rotation serves both, compiled without contraction into
// fused multiply-adds: its results are then the same bits on every level and in the torch reference. Sources
// of int8 are widened and scaled in registers, on their way into the rotation.
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

struct Int8 {
    typedef int8_t T;
    // One instruction, where GCC's own conversion takes the bytes out of the vector one by one.
    static ME_INLINE F load(const T* p) {
#if defined(__AVX512F__)
        const I wide = (I)_mm512_cvtepi8_epi32(load_bits<__m128i>(p));
#elif defined(__AVX2__)
        const I wide = (I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_bits<int64_t>(p)));
#elif defined(__SSE4_1__)
        const I wide = (I)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load_bits<int32_t>(p)));
#else
        typedef int8_t B __attribute__((vector_size(kWidth)));
        const I wide = __builtin_convertvector(load_bits<B>(p), I);
#endif
        return __builtin_convertvector(wide, F);
    }
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

template <class To, class Heads>
void write_tokens(const KvWrite& a, Heads heads, int64_t layer, int64_t token, int64_t token_end) {
    typedef typename To::T D;
    D* k_pages = (D*)a.k_pages + layer * a.kp_layer;
    D* v_pages = (D*)a.v_pages + layer * a.vp_layer;
    // Heads of a token that lie side by side on both ends are one copy.
    const bool dense = !Heads::kScaled && a.v_head == a.head_dim && a.vp_head == a.head_dim;
    for (int64_t i = token; i < token_end; ++i) {
        const int64_t slot = a.slot[i];
        if (slot < 0) continue;
        const int64_t block = slot / a.page, offset = slot % a.page;
        const Angles t = a.cos_sin ? angles(a.cos_sin, a.positions[i], a.rotary_dim) : Angles{};
        D* k_to = k_pages + block * a.kp_block + offset * a.kp_token;
        D* v_to = v_pages + block * a.vp_block + offset * a.vp_token;
        for (int64_t h = 0; h < a.kv_heads; ++h)
            rotate<To>(heads.k(i, h), k_to + h * a.kp_head, a.head_dim, t, a.interleaved);
        if (dense) {
            convert<To>(heads.v(i, 0), v_to, a.kv_heads * a.head_dim);
        } else {
            for (int64_t h = 0; h < a.kv_heads; ++h)
                convert<To>(heads.v(i, h), v_to + h * a.vp_head, a.head_dim);
        }
    }
}

}  // namespace

void write_kv(const KvWrite& a, int64_t layer, int64_t token, int64_t token_end) {
    with_dtype(a.page_dtype, [&](auto to) {
        typedef decltype(to) To;
        if (a.k_scale) return write_tokens<To>(a, Int8Heads{a, layer}, layer, token, token_end);
        with_dtype(a.src_dtype, [&](auto from) {
            write_tokens<To>(a, FloatHeads<decltype(from)>{a, layer}, layer, token, token_end);
        });
    });
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
