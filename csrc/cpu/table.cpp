// The functions of one level, gathered for dispatch.cpp.
#include "level.h"

#define ME_STRING_(x) #x
#define ME_STRING(x) ME_STRING_(x)

namespace memos_engine {
namespace ME_LEVEL {

void attention(const Attention&, const AttentionItem&, float*);
void attention_decode(const Attention&, const AttentionItem&, float*);
void attention_merge(const Attention&, const AttentionItem*, int);
int64_t attention_scratch(int64_t head_dim);
int64_t decode_scratch(int64_t head_dim);
int64_t probe_scratch(int64_t head_dim);
void probe_pack(const Probe&, ProbeTile&, float*);
void probe(const Probe&, const ProbeItem&, float*);
void write_kv(const KvWrite&, int64_t, int64_t, int64_t, float*);
void rope(const Rope&, int64_t, int64_t);
void rms_norm(const RmsNorm&, int64_t, int64_t, float*);
void silu_mul(const SiluMul&, int64_t, int64_t);
void add_rows(const AddRows&, int64_t, int64_t);
int64_t linear_scratch(const Linear&);
void linear_pack(const Linear&, void*);
void linear(const Linear&, const void*, int64_t, int64_t);
int64_t lora_scratch(const LoraWork&);
void lora_shrink(const LoraWork&, int64_t, int64_t, void*);
void lora_expand(const LoraWork&, void*, int64_t, int64_t, int64_t);
void lora_pack(const LoraPack&, DType, DType, float*);
bool lora_copy(const void*, void*, int64_t, DType, DType);

extern const Level level;
const Level level = {
    attention,     attention_decode, attention_merge, attention_scratch, decode_scratch,
    probe_scratch, probe_pack,       probe,           write_kv,          rope,
    rms_norm,      silu_mul,         add_rows,        linear_scratch,    linear_pack,
    linear,        lora_scratch,     lora_shrink,     lora_expand,       lora_pack,
    lora_copy,
};

}  // namespace ME_LEVEL
}  // namespace memos_engine
