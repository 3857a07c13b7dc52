// The CPU kernels as plain C++: raw pointers, sizes, and strides counted in elements. No Python, no torch.
//
// Shapes, dtypes and rounding are those of docs/kernels.md. Every function checks the index values that could
// lead it out of its tensors, and does nothing at all when it returns a status other than `ok`.
#pragma once

#include <cstdint>

namespace memos_engine {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };  // i8: of pages alone

enum class Status : int32_t {
    ok = 0,
    bad_query_start = 1,  // not ascending from 0, or beyond the rows of q
    table_too_short = 2,  // a request's visible keys need more blocks than block_table has columns
    bad_block = 3,        // block_table names a block outside the pages
    bad_slot = 4,         // slot_mapping names a slot outside the pages
    bad_position = 5,     // a position has no row in cos_sin
    bad_key_start = 6,    // not ascending from 0, or beyond the probed keys
    bad_key_slot = 7,     // key_slots names a slot outside the pages
    bad_group = 8,        // a source token lies in no group of k_scale
    bad_lora_rows = 9,    // segments do not ascend, or name a row, slot or layer that is not there
};

// softmax(q k^T * sm_scale) v over paged keys.
struct Attention {
    const void* q;               // [tokens, heads, head_dim]
    void* out;                   // like q
    float* lse;                  // [tokens, heads] contiguous, or null
    const void* k;               // [blocks, page, kv_heads, head_dim]
    const void* v;               // like k
    const int32_t* block_table;  // [requests, max_blocks]
    const int32_t* query_start;  // [requests + 1]
    const int32_t* seq_lens;     // [requests]
    const int32_t* q_pos;        // [tokens]
    DType q_dtype, kv_dtype;
    int64_t tokens, requests, heads, kv_heads, head_dim, blocks, page, max_blocks;
    int64_t table_stride;
    int64_t q_token, q_head, out_token, out_head;
    int64_t k_block, k_token, k_head, v_block, v_token, v_head;
    int64_t window;  // 0: none
    float sm_scale;
    const float* k_scale = nullptr;  // of int8 pages: [blocks, page, kv_heads] contiguous
    const float* v_scale = nullptr;  // like k_scale
};

// scores[j] += sum over the rows and heads of its request that see key j of exp(sm_scale * q . k - lse) *
// weight.
struct Probe {
    const void* q;               // [tokens, heads, head_dim]
    const void* k;               // [blocks, page, kv_heads, head_dim]
    const int32_t* query_start;  // [requests + 1]
    const int32_t* q_pos;        // [tokens]; negative: the row counts for nothing
    const float* lse;            // [tokens, heads] contiguous
    const int64_t* slot;         // [keys]; negative: the key is skipped
    const int32_t* key_pos;      // [keys]
    const int32_t* key_start;    // [requests + 1]
    const float* weight;         // [keys, kv_heads] contiguous
    float* scores;               // [keys]
    DType q_dtype, kv_dtype;
    int64_t tokens, requests, keys, heads, kv_heads, head_dim, blocks, page;
    int64_t q_token, q_head, k_block, k_token, k_head;
    int64_t window;  // 0: none
    float sm_scale;
    const float* k_scale = nullptr;  // of int8 pages: [blocks, page, kv_heads] contiguous
};

constexpr int64_t kScaleGroup = 64;  // tokens of a record that share the scales of int8 K

// Rotate K, round, scatter K and V into pages; `append_kv` is the case of one layer. With scales, k and v are
// int8 and src_dtype means nothing: K is k times the scale of its channel and of its token's group in the
// record, where token i is `first_token + i`; V is v times the scale of its token and head. With scales of
// pages, these are int8: each token's head is quantised to 127ths of its largest size.
struct KvWrite {
    const void* k;        // [layers, tokens, kv_heads, head_dim]
    const void* v;        // like k
    void* k_pages;        // [layers, blocks, page, kv_heads, head_dim]
    void* v_pages;        // like k_pages
    const int64_t* slot;  // [tokens]
    const int32_t* positions;
    const float* cos_sin;  // [max_position, rotary_dim] contiguous, or null
    DType src_dtype, page_dtype;
    int64_t layers, tokens, kv_heads, head_dim, blocks, page, max_position, rotary_dim;
    int64_t k_layer, k_token, k_head, v_layer, v_token, v_head;                            // source strides
    int64_t kp_layer, kp_block, kp_token, kp_head, vp_layer, vp_block, vp_token, vp_head;  // page strides
    bool interleaved;
    const float* k_scale = nullptr;  // [layers, groups, kv_heads, head_dim], the last contiguous
    const float* v_scale = nullptr;  // [layers, tokens, kv_heads]
    int64_t groups = 0, first_token = 0;
    int64_t ks_layer = 0, ks_group = 0, ks_head = 0;
    int64_t vs_layer = 0, vs_token = 0, vs_head = 0;
    float* kp_scale = nullptr;  // [layers, blocks, page, kv_heads], contiguous within a layer
    float* vp_scale = nullptr;  // like kp_scale
    int64_t kps_layer = 0, vps_layer = 0;
};

struct Rope {
    void* x;  // [tokens, heads, head_dim], in place
    const int32_t* positions;
    const float* cos_sin;
    DType dtype;
    int64_t tokens, heads, head_dim, token, head, max_position, rotary_dim;
    bool interleaved;
};

struct RmsNorm {
    const void* x;       // [tokens, hidden]
    const void* weight;  // [hidden]
    void* residual;      // [tokens, hidden], updated in place, or null
    void* out;           // [tokens, hidden], may be x
    DType dtype, weight_dtype;
    int64_t tokens, hidden, x_token, residual_token, out_token;
    float eps;
};

struct SiluMul {
    const void* gate;
    const void* up;
    void* out;  // all [tokens, width]
    DType dtype;
    int64_t tokens, width, gate_token, up_token, out_token;
};

// out[t, n] = sum over i of x[t, i] * weight[n, i]; with `scale` [outputs], weight is int8 and the sum is
// multiplied by scale[n].
struct Linear {
    const void* x;
    const void* weight;
    void* out;
    DType dtype;
    int64_t tokens, inputs, outputs, x_token, weight_row, out_token;
    const float* scale = nullptr;
};

constexpr int64_t kLoraBlock = 32;  // outputs of b that lie together
constexpr int kLoraParts = 7;       // q, k, v, o, gate, up, down

// One projection's delta: out += scale * b a x. What a slot's descriptors [layers][kLoraParts] are made of.
struct LoraPart {
    const void* a;  // [rank, inputs]
    const void* b;  // [ceil(outputs / kLoraBlock)][rank][kLoraBlock], zeros behind the last output
    int32_t rank;   // 0: none
    float scale;
};

// Rows by adapter. Rows that no segment names have none.
struct LoraRows {
    const LoraPart* const* slots = nullptr;  // [slot_count] descriptors; null: an empty slot
    const int32_t* order = nullptr;          // [count] rows of x, segment by segment; a row at most once
    const int32_t* start = nullptr;          // [segments + 1] into order
    const int32_t* slot = nullptr;           // [segments]; negative: none
    const float* scale = nullptr;            // [segments]
    int64_t segments = 0, count = 0, slot_count = 0, layers = 0;
};

// Adds the deltas of up to three projections that share x.
struct Lora {
    const void* x;  // [tokens, inputs]
    void* out[3];   // [tokens, outputs]
    int part[3];
    int64_t outputs[3], out_token[3];
    int parts;
    DType dtype;
    int64_t tokens, inputs, x_token, layer;
    LoraRows rows;
};

// a and b of one module into a slot: b is cut into blocks, both are rounded to the slot's dtype.
struct LoraPack {
    const void *a, *b;  // [rank, inputs], [outputs, rank], contiguous
    void *to_a, *to_b;
    int64_t rank, inputs, outputs;
};

Status paged_attention(const Attention& args, int threads);
Status attention_probe(const Probe& args, int threads);
Status write_kv(const KvWrite& args, int threads);
Status rope(const Rope& args, int threads);
void rms_norm(const RmsNorm& args, int threads);
void silu_mul(const SiluMul& args, int threads);
Status linear(const Linear& args, int threads);
Status lora_apply(const Lora& args, int threads);
void lora_pack(const LoraPack* modules, int64_t count, DType from, DType to, int threads);
// n numbers, rounded to another dtype; whether all that arrived is finite.
bool lora_copy(const void* from, void* to, int64_t n, DType from_dtype, DType to_dtype, int threads);

// Instruction set levels, worst first. `isa_name(i)` is null from the number of compiled levels on;
// `isa_supported(i)` asks the processor and the operating system. Without a choice the best one is used.
const char* isa_name(int index);
bool isa_supported(int index);
bool isa_select(const char* name);
const char* isa_selected();  // null: the machine has none of them

}  // namespace memos_engine
