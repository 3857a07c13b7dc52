// Where an attention item's rows and keys lie. Included by the files that are compiled once per level.
#pragma once

#include "level.h"
#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kMinusInf = -__builtin_inff();

ME_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A packed row is (token, query head within the group); heads of one token are neighbours.
struct Rows {
    const Attention& a;
    int64_t group, first_token, first_head;

    ME_INLINE Rows(const Attention& args, const AttentionItem& item)
        : a(args),
          group(args.heads / args.kv_heads),
          first_token(args.query_start[item.request]),
          first_head(item.kv_head * group) {}

    ME_INLINE int64_t token(int64_t row) const { return first_token + row / group; }
    ME_INLINE int64_t head(int64_t row) const { return first_head + row % group; }
    ME_INLINE int32_t position(int64_t row) const { return a.q_pos[token(row)]; }

    template <class S>
    ME_INLINE const typename S::T* query(int64_t row) const {
        return (const typename S::T*)a.q + token(row) * a.q_token + head(row) * a.q_head;
    }
    template <class S>
    ME_INLINE typename S::T* out(int64_t row) const {
        return (typename S::T*)a.out + token(row) * a.out_token + head(row) * a.out_head;
    }
    ME_INLINE void store_lse(int64_t row, float max2, float denominator) const {
        if (!a.lse) return;
        const float natural = denominator > 0 ? max2 * kLn2 + __builtin_logf(denominator) : kMinusInf;
        a.lse[token(row) * a.heads + head(row)] = natural;
    }
};

// Element offsets of keys key ... key + n - 1 in the pages of K and V.
ME_INLINE void locate(const Attention& a, const AttentionItem& item, int64_t key, int64_t n, int64_t* k_at,
                      int64_t* v_at) {
    const int32_t* table = a.block_table + item.request * a.table_stride;
    int64_t entry = key / a.page, offset = key % a.page;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t block = table[entry];
        k_at[i] = block * a.k_block + offset * a.k_token + item.kv_head * a.k_head;
        v_at[i] = block * a.v_block + offset * a.v_token + item.kv_head * a.v_head;
        if (++offset == a.page) offset = 0, ++entry;
    }
}

// Scales of int8 pages, of keys key ... key + n - 1 and `heads` heads from the item's own on: to[h * stride +
// i].
ME_INLINE void gather_scales(const Attention& a, const AttentionItem& item, const float* scale, int64_t heads,
                             int64_t key, int64_t n, float* to, int64_t stride) {
    const int32_t* table = a.block_table + item.request * a.table_stride;
    int64_t entry = key / a.page, offset = key % a.page;
    for (int64_t i = 0; i < n; ++i) {
        const float* from = scale + (table[entry] * a.page + offset) * a.kv_heads + item.kv_head;
        for (int64_t h = 0; h < heads; ++h) to[h * stride + i] = from[h];
        if (++offset == a.page) offset = 0, ++entry;
    }
}

}  // namespace

int64_t amx_scratch(int64_t head_dim);
// False, with nothing done, where the level has no AMX or the call is not one for it.
bool attention_amx(const Attention&, const AttentionItem&, float* scratch);
// The same where the level has no products of pairs of bfloat16, or tiles besides.
int64_t pairs_scratch(int64_t head_dim);
bool attention_pairs(const Attention&, const AttentionItem&, float* scratch);

}  // namespace ME_LEVEL
}  // namespace memos_engine
