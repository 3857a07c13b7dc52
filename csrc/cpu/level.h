// What one instruction set level offers: single-threaded functions over a range of the work. The files that
// are compiled once per level define these; planning, checks and threads are in files compiled once.
#pragma once

#include "memos_engine/kernels.h"

namespace memos_engine {

// Static, as helpers of one level must not be merged with those of another.
static inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

// Rows of one request and KV head, packed as row = token * group + head within the group, against a key
// range; a decode item is that for several heads.
struct AttentionItem {
    int32_t request, kv_head, kv_heads;
    int32_t row, rows;
    int32_t key, key_end;  // key_end <= seq_len and <= the last key that any of the rows sees, plus one
    float* partial;  // null: write `out`; else, by head: max [rows], sum [rows], result [rows][head_dim]
};

constexpr int kTileRows = 16;  // query rows side by side in vector lanes
constexpr int kItemRows = 4 * kTileRows;
constexpr int kDecodeRows = 8;    // up to here vector lanes hold channels instead
constexpr int kDecodeHeads = 8;   // most KV heads of one item in that case
constexpr int kDecodeKeys = 128;  // and its keys
constexpr int kSplitRows = 128;   // up to here keys are split as well, into ranges of kSplitKeys
constexpr int kSplitKeys = 512;

// 16 packed rows of one request and KV head, in the form that `probe` reads.
struct ProbeTile {
    const int32_t* tokens;  // of the request, those that count; packed row r is token r / group
    int32_t rows, kv_head, row;
    void* q;  // [head_dim][16] float32, or [head_dim / 2][16] pairs of bfloat16: the level chooses
    float shift[kTileRows];                     // -lse * log2(e); -inf: the row counts for nothing
    int32_t first[kTileRows], last[kTileRows];  // positions that a row sees
    int32_t min_first, max_first, min_last, max_last;
};

constexpr int kProbeKeys = 64;  // of one item

// A probe's item: up to kProbeKeys keys of one request, whose tiles lie KV head by KV head.
struct ProbeItem {
    const ProbeTile* tiles;
    int64_t tiles_per_head, key, keys;
};

// to += from over a range of columns, rounded once; rows may be strided (0: one row for all).
struct AddRows {
    void* to;
    const void* from;
    DType dtype;
    int64_t tokens, to_token, from_token;
};

// Rows of one adapter, and what a delta makes of them. `mid` [rows][mid_row] is between a and b, in the
// level's own form. One line: a step reads hundreds of these, each once, and comes to the delta's own bytes
// through it.
struct alignas(64) LoraWork {
    const void *a, *b;
    const void* x;  // [tokens, inputs]
    const int32_t* rows;
    float* mid;
    int32_t rank, count, inputs, x_token;
    float scale;  // of the delta and of the segment
    DType dtype;

    int64_t mid_row() const { return (rank + 15) / 16 * 16; }
};

struct Level {
    // `scratch` holds as many bytes as the function's own `..._scratch(head_dim)` says.
    void (*attention)(const Attention&, const AttentionItem&, float* scratch);
    void (*attention_decode)(const Attention&, const AttentionItem&, float* scratch);
    void (*attention_merge)(const Attention&, const AttentionItem* items, int count);
    int64_t (*attention_scratch)(int64_t head_dim);
    int64_t (*decode_scratch)(int64_t head_dim);
    int64_t (*probe_scratch)(int64_t head_dim);
    void (*probe_pack)(const Probe&, ProbeTile&, float* scratch);
    void (*probe)(const Probe&, const ProbeItem&, float* scratch);
    // `row`: head_dim floats and 16 more.
    void (*write_kv)(const KvWrite&, int64_t layer, int64_t token, int64_t token_end, float* row);
    void (*rope)(const Rope&, int64_t token, int64_t token_end);
    void (*rms_norm)(const RmsNorm&, int64_t token, int64_t token_end, float* weight);
    void (*silu_mul)(const SiluMul&, int64_t token, int64_t token_end);
    void (*add_rows)(const AddRows&, int64_t column, int64_t column_end);
    int64_t (*linear_scratch)(const Linear&);
    void (*linear_pack)(const Linear&, void* packed);  // x in the form that `linear` reads
    void (*linear)(const Linear&, const void* packed, int64_t output, int64_t output_end);
    int64_t (*lora_scratch)(const LoraWork&);
    // mid = scale * a x, for a range of ranks.
    void (*lora_shrink)(const LoraWork&, int64_t rank, int64_t rank_end, void* scratch);
    // out [tokens, outputs] += b mid, for a range of outputs that begins with a block.
    void (*lora_expand)(const LoraWork&, void* out, int64_t out_token, int64_t output, int64_t output_end);
    void (*lora_pack)(const LoraPack&, DType from, DType to, float* scratch);  // kLoraBlock * rank floats
    bool (*lora_copy)(const void* from, void* to, int64_t n, DType from_dtype, DType to_dtype);
};

const Level* selected_level();

}  // namespace memos_engine
