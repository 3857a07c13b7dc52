// One forward through all layers: stages of items, drawn by the threads of one parallel region.
#include "memos_engine/stack.h"

#include <algorithm>
#include <map>

#include "attention_plan.h"
#include "threads.h"

namespace memos_engine {
namespace {

constexpr int64_t kOutputs = 64;  // of one item of a product
constexpr int64_t kStagesOfLayer = 10;

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

class Forward {
  public:
    Forward(const Stack& stack, const StackCall& call)
        : s_(stack), c_(call), level_(*selected_level()), element_(size_of(stack.dtype)) {}

    Status check() const {
        for (int64_t i = 0; i < c_.tokens; ++i)
            if (c_.slot[i] >= s_.blocks * s_.page) return Status::bad_slot;
        for (const StackLayer& layer : s_.layers) {
            if (!layer.cos_sin) continue;
            for (int64_t i = 0; i < c_.tokens; ++i)
                if (c_.positions[i] < 0 || c_.positions[i] >= layer.max_position) return Status::bad_position;
        }
        for (const StackLayer& layer : s_.layers)
            if (const Status status = check_attention(attention(layer, 0)); status != Status::ok)
                return status;
        return Status::ok;
    }

    void prepare() {
        const int64_t q = s_.heads * s_.head_dim, kv = s_.kv_heads * s_.head_dim;
        char* at = buffers_.claim(c_.tokens * element_ * (2 * q + 2 * kv + 2 * s_.hidden + 3 * s_.inner),
                                  packed_bytes());
        const auto take = [&](int64_t width) {
            char* place = at;
            at += c_.tokens * width * element_;
            return place;
        };
        q_ = take(q), attended_ = take(q), k_ = take(kv), v_ = take(kv), x_ = take(s_.hidden),
        y_ = take(s_.hidden), gate_ = take(s_.inner), up_ = take(s_.inner), act_ = take(s_.inner);
        packed_ = buffers_.packed;
        for (const StackLayer& layer : s_.layers)
            if (!plans_.count(layer.window)) plans_[layer.window] = plan_attention(attention(layer, 0));
    }

    int64_t stages() const { return kStagesOfLayer * (int64_t)s_.layers.size() + 1; }

    void run(Team& team) const {
        int64_t stage = 0;
        for (size_t i = 0; i < s_.layers.size(); ++i) {
            const StackLayer& layer = s_.layers[i];
            const int64_t q = s_.heads * s_.head_dim, kv = s_.kv_heads * s_.head_dim;
            team.stage(stage++, 1, [&](int64_t) {
                norm(c_.hidden, layer.input_norm, x_, c_.tokens, s_.hidden);
                pack(x_, s_.hidden, q);
            });
            const int64_t q_items = items(q), kv_items = items(kv);
            team.stage(stage++, q_items + 2 * kv_items, [&](int64_t item) {
                if (item < q_items) return product(layer.q, layer.q_bias, q_, s_.hidden, q, item);
                item -= q_items;
                if (item < kv_items) return product(layer.k, layer.k_bias, k_, s_.hidden, kv, item);
                product(layer.v, layer.v_bias, v_, s_.hidden, kv, item - kv_items);
            });
            team.stage(stage++, c_.tokens, [&](int64_t token) { place(layer, (int64_t)i, token); });
            const Attention a = attention(layer, (int64_t)i);
            const AttentionPlan& plan = plans_.at(layer.window);
            team.stage(stage++, (int64_t)plan.items.size(),
                       [&](int64_t item) { run_attention_item(a, plan, item, level_); });
            team.stage(stage++, 1, [&](int64_t) {
                for (const AttentionGroup& group : plan.groups)
                    if (group.count > 1)
                        level_.attention_merge(a, &plan.items[(size_t)group.first], group.count);
                pack(attended_, q, s_.hidden);
            });
            team.stage(stage++, items(s_.hidden), [&](int64_t item) { added(layer.o, q, item); });
            team.stage(stage++, 1, [&](int64_t) {
                norm(c_.hidden, layer.post_norm, x_, c_.tokens, s_.hidden);
                pack(x_, s_.hidden, s_.inner);
            });
            team.stage(stage++, items(s_.inner), [&](int64_t item) { gated(layer, item); });
            team.stage(stage++, 1, [&](int64_t) { pack(act_, s_.inner, s_.hidden); });
            team.stage(stage++, items(s_.hidden), [&](int64_t item) { added(layer.down, s_.inner, item); });
        }
        team.stage(stage, c_.wanted, [&](int64_t row) {
            const int64_t token = c_.rows ? c_.rows[row] : row;
            norm((char*)c_.hidden + token * s_.hidden * element_, s_.final_norm,
                 (char*)c_.out + row * s_.hidden * element_, 1, s_.hidden);
        });
    }

  private:
    // Buffers that a thread keeps from call to call.
    struct Buffers {
        std::vector<char> bytes, spare;
        char* packed = nullptr;
        char* claim(int64_t size, int64_t packed_size) {
            if ((int64_t)bytes.size() < size) bytes.resize((size_t)size);
            if ((int64_t)spare.size() < packed_size + 64) spare.resize((size_t)packed_size + 64);
            packed = (char*)(((uintptr_t)spare.data() + 63) / 64 * 64);
            return bytes.data();
        }
    };
    static thread_local Buffers buffers_;

    int64_t items(int64_t outputs) const { return (outputs + kOutputs - 1) / kOutputs; }

    Linear linear(const void* x, const void* weight, void* out, int64_t inputs, int64_t outputs) const {
        return {x, weight, out, s_.dtype, c_.tokens, inputs, outputs, inputs, inputs, outputs};
    }

    int64_t packed_bytes() const {
        const int64_t widest = std::max({s_.hidden, s_.inner, s_.heads * s_.head_dim});
        // Either form of `linear_pack`, whichever shape a product has.
        Linear rows = linear(nullptr, nullptr, nullptr, widest, 1),
               tiles = linear(nullptr, nullptr, nullptr, (widest + 31) / 32 * 32, 16);
        return std::max(level_.linear_scratch(rows), level_.linear_scratch(tiles));
    }

    void norm(const void* x, const void* weight, void* out, int64_t tokens, int64_t width) const {
        const RmsNorm args = {x,      weight, nullptr, out, s_.dtype, s_.norm_dtype,
                              tokens, width,  width,   0,   width,    s_.eps};
        level_.rms_norm(args, 0, tokens, (float*)thread_scratch((width + 16) * (int64_t)sizeof(float)));
    }

    void pack(const void* x, int64_t inputs, int64_t outputs) const {
        level_.linear_pack(linear(x, nullptr, nullptr, inputs, outputs), packed_);
    }

    void product(const void* weight, const void* bias, void* out, int64_t inputs, int64_t outputs,
                 int64_t item) const {
        const int64_t begin = item * kOutputs, end = std::min(outputs, begin + kOutputs);
        level_.linear(linear(nullptr, weight, out, inputs, outputs), packed_, begin, end);
        if (bias) level_.add_rows({out, bias, s_.dtype, c_.tokens, outputs, 0}, begin, end);
    }

    // A product that goes into the residual stream.
    void added(const void* weight, int64_t inputs, int64_t item) const {
        product(weight, nullptr, y_, inputs, s_.hidden, item);
        const int64_t begin = item * kOutputs, end = std::min(s_.hidden, begin + kOutputs);
        level_.add_rows({c_.hidden, y_, s_.dtype, c_.tokens, s_.hidden, s_.hidden}, begin, end);
    }

    void gated(const StackLayer& layer, int64_t item) const {
        product(layer.gate, nullptr, gate_, s_.hidden, s_.inner, item);
        product(layer.up, nullptr, up_, s_.hidden, s_.inner, item);
        const int64_t begin = item * kOutputs, width = std::min(s_.inner, begin + kOutputs) - begin;
        const int64_t at = begin * element_;
        const SiluMul args = {gate_ + at, up_ + at, act_ + at, s_.dtype, c_.tokens,
                              width,      s_.inner, s_.inner,  s_.inner};
        level_.silu_mul(args, 0, c_.tokens);
    }

    // Norms of q and k by head, rotation, and k and v into their pages.
    void place(const StackLayer& layer, int64_t index, int64_t token) const {
        const int64_t q = s_.heads * s_.head_dim, kv = s_.kv_heads * s_.head_dim, d = s_.head_dim;
        char* q_row = q_ + token * q * element_;
        char* k_row = k_ + token * kv * element_;
        if (layer.q_norm) norm(q_row, layer.q_norm, q_row, s_.heads, d);
        if (layer.k_norm) norm(k_row, layer.k_norm, k_row, s_.kv_heads, d);
        if (layer.cos_sin) {
            const Rope args = {q_, c_.positions,       layer.cos_sin,    s_.dtype, c_.tokens, s_.heads, d, q,
                               d,  layer.max_position, layer.rotary_dim, false};
            level_.rope(args, token, token + 1);
        }
        const KvWrite args = {k_,
                              v_,
                              s_.k_pages,
                              s_.v_pages,
                              c_.slot,
                              c_.positions,
                              layer.cos_sin,
                              s_.dtype,
                              s_.dtype,
                              1,
                              c_.tokens,
                              s_.kv_heads,
                              d,
                              s_.blocks,
                              s_.page,
                              layer.max_position,
                              layer.rotary_dim,
                              0,
                              kv,
                              d,
                              0,
                              kv,
                              d,
                              s_.k_layer,
                              s_.k_block,
                              s_.k_token,
                              s_.k_head,
                              s_.v_layer,
                              s_.v_block,
                              s_.v_token,
                              s_.v_head,
                              false};
        level_.write_kv(args, index, token, token + 1);
    }

    Attention attention(const StackLayer& layer, int64_t index) const {
        const int64_t q = s_.heads * s_.head_dim, d = s_.head_dim;
        return {q_,
                attended_,
                nullptr,
                (char*)s_.k_pages + index * s_.k_layer * element_,
                (char*)s_.v_pages + index * s_.v_layer * element_,
                c_.block_table,
                c_.query_start,
                c_.seq_lens,
                c_.positions,
                s_.dtype,
                s_.dtype,
                c_.tokens,
                c_.requests,
                s_.heads,
                s_.kv_heads,
                d,
                s_.blocks,
                s_.page,
                c_.max_blocks,
                c_.table_stride,
                q,
                d,
                q,
                d,
                s_.k_block,
                s_.k_token,
                s_.k_head,
                s_.v_block,
                s_.v_token,
                s_.v_head,
                layer.window,
                s_.sm_scale};
    }

    const Stack& s_;
    const StackCall& c_;
    const Level& level_;
    const int64_t element_;
    char *q_ = nullptr, *attended_ = nullptr, *k_ = nullptr, *v_ = nullptr, *x_ = nullptr, *y_ = nullptr;
    char *gate_ = nullptr, *up_ = nullptr, *act_ = nullptr, *packed_ = nullptr;
    std::map<int64_t, AttentionPlan> plans_;  // by window
};

thread_local Forward::Buffers Forward::buffers_;

}  // namespace

Status run_stack(const Stack& stack, const StackCall& call, int threads) {
    if (call.tokens <= 0) return Status::ok;
    Forward forward(stack, call);
    if (const Status status = forward.check(); status != Status::ok) return status;
    forward.prepare();
    Team team(forward.stages());
    parallel_team(team, threads, [](void* f, Team& t) { ((const Forward*)f)->run(t); }, &forward);
    return Status::ok;
}

}  // namespace memos_engine
