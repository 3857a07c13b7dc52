// One forward through all layers: stages of items, drawn by the threads of one parallel region.
#include "memos_engine/stack.h"

#include <algorithm>
#include <initializer_list>
#include <map>

#include "attention_plan.h"
#include "lora_plan.h"
#include "threads.h"

namespace memos_engine {
namespace {

constexpr int64_t kOutputs = kLoraBlock;  // of one item of a product
constexpr int64_t kStagesOfLayer = 8;
constexpr int kLoraGroups = 4;  // of projections that share their input: qkv, o, gate and up, down
constexpr int kGroupFirst[kLoraGroups] = {0, 3, 4, 6}, kGroupSize[kLoraGroups] = {3, 1, 2, 1};
constexpr int64_t kOwnRows = 8;  // so few rows are normed by every thread for itself, which saves a barrier

class Forward {
  public:
    Forward(const Stack& stack, const StackCall& call)
        : s_(stack),
          c_(call),
          level_(*selected_level()),
          element_(size_of(stack.dtype)),
          page_element_(size_of(stack.page_dtype)) {}

    Status check() const {
        if (c_.lora.segments > 0 && c_.lora.layers != (int64_t)s_.layers.size()) return Status::bad_lora_rows;
        if (const Status status = LoraPlan::check(c_.lora, c_.tokens); status != Status::ok) return status;
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
        char* at = shared_.claim(c_.tokens * element_ * (2 * q + 2 * kv + 2 * s_.hidden + 3 * s_.inner));
        const auto take = [&](int64_t width) {
            char* place = at;
            at += c_.tokens * width * element_;
            return place;
        };
        q_ = take(q), attended_ = take(q), k_ = take(kv), v_ = take(kv), x_ = take(s_.hidden),
        y_ = take(s_.hidden), gate_ = take(s_.inner), up_ = take(s_.inner), act_ = take(s_.inner);
        for (const StackLayer& layer : s_.layers) {
            if (plans_.count(layer.window)) continue;
            Planned& made = plans_[layer.window];
            made.plan = plan_attention(attention(layer, 0));
            for (size_t g = 0; g < made.plan.groups.size(); ++g)
                made.group_of.insert(made.group_of.end(), (size_t)made.plan.groups[g].count, (int32_t)g);
            made.done = std::vector<std::atomic<int>>(made.plan.groups.size());
        }
        if (c_.lora.segments > 0) prepare_lora();
    }

    void prepare_lora() {
        const size_t count = s_.layers.size() * kLoraGroups;
        shrunk_ = std::vector<std::atomic<int64_t>>(count);
        plan_.clear();
        for (size_t i = 0; i < count; ++i) {
            const int group = (int)(i % kLoraGroups);
            const int64_t q = s_.heads * s_.head_dim;
            const int64_t inputs = group == 1 ? q : group == 3 ? s_.inner : s_.hidden;
            int parts[3];
            for (int p = 0; p < kGroupSize[group]; ++p) parts[p] = kGroupFirst[group] + p;
            plan_.add(c_.lora, (int64_t)i / kLoraGroups, parts, kGroupSize[group], s_.dtype, inputs, inputs);
        }
        plan_.place((float*)mid_.claim(plan_.floats() * (int64_t)sizeof(float)));
        lora_.reserve(count);
        for (size_t i = 0; i < count; ++i) lora_.push_back(plan_.stage(i));
    }

    int64_t stages() const { return kStagesOfLayer * (int64_t)s_.layers.size() + 1 + (int64_t)lora_.size(); }

    void run(Team& team, int thread) {
        int64_t next = 0;
        const auto stage = [&](int64_t count, const auto& f) { team.stage(next++, count, thread, f); };
        const int64_t q = s_.heads * s_.head_dim, kv = s_.kv_heads * s_.head_dim;
        const int64_t q_items = items(q), kv_items = items(kv);
        // The deltas of a group of projections: threads share the first half of the work, and whoever comes
        // to the second half waits only for what is still under way then.
        const auto shrunk = [&](size_t layer, int group, const char* x) -> const LoraStage* {
            if (lora_.empty()) return nullptr;
            const size_t at = layer * kLoraGroups + (size_t)group;
            const LoraStage& lora = lora_[at];
            if (lora.empty()) return nullptr;
            const int64_t first = kStagesOfLayer * (int64_t)s_.layers.size() + 1;
            team.share(first + (int64_t)at, lora.shrinks(), thread, [&](int64_t item) {
                lora.shrink(item, x, level_);
                shrunk_[at].fetch_add(1, std::memory_order_release);
            });
            return &lora;
        };
        const char* rows = nullptr;  // of the residual stream, normed
        const auto normed = [&](const void* weight) {
            char* x = x_;
            if (c_.tokens <= kOwnRows) {
                x = own_x_.claim(c_.tokens * s_.hidden * element_);
                norm(c_.hidden, weight, x, c_.tokens, s_.hidden);
            } else {
                stage(c_.tokens, [&](int64_t token) {
                    const int64_t at = token * s_.hidden * element_;
                    norm((char*)c_.hidden + at, weight, x_ + at, 1, s_.hidden);
                });
            }
            rows = x;
        };
        for (size_t i = 0; i < s_.layers.size(); ++i) {
            const StackLayer& layer = s_.layers[i];
            normed(layer.input_norm);
            const char* x = pack(rows, layer.q_scale, s_.hidden, q);
            const LoraStage* lora = shrunk(i, 0, rows);
            stage(q_items + 2 * kv_items, [&](int64_t item) {
                const auto one = [&](int which, const void* weight, const float* scale, const void* bias,
                                     char* out, int64_t outputs, int64_t at) {
                    fetch(lora, which, 1, at);
                    product(x, weight, scale, bias, out, s_.hidden, outputs, at);
                    expand(lora, which, {out}, outputs, at);
                };
                if (item < q_items) return one(0, layer.q, layer.q_scale, layer.q_bias, q_, q, item);
                item -= q_items;
                if (item < kv_items) return one(1, layer.k, layer.k_scale, layer.k_bias, k_, kv, item);
                one(2, layer.v, layer.v_scale, layer.v_bias, v_, kv, item - kv_items);
            });
            stage(c_.tokens, [&](int64_t token) { place(layer, (int64_t)i, token); });
            Planned& planned = plans_.at(layer.window);
            const Attention a = attention(layer, (int64_t)i);
            stage((int64_t)planned.plan.items.size(), [&](int64_t item) { attend(a, planned, item); });
            x = pack(attended_, layer.o_scale, q, s_.hidden);
            lora = shrunk(i, 1, attended_);
            stage(items(s_.hidden), [&](int64_t item) { added(x, layer.o, layer.o_scale, q, lora, item); });
            normed(layer.post_norm);
            x = pack(rows, layer.gate_scale, s_.hidden, s_.inner);
            lora = shrunk(i, 2, rows);
            stage(items(s_.inner), [&](int64_t item) { gated(x, layer, lora, item); });
            x = pack(act_, layer.down_scale, s_.inner, s_.hidden);
            lora = shrunk(i, 3, act_);
            stage(items(s_.hidden),
                  [&](int64_t item) { added(x, layer.down, layer.down_scale, s_.inner, lora, item); });
        }
        stage(c_.wanted, [&](int64_t row) {
            const int64_t token = c_.rows ? c_.rows[row] : row, size = s_.hidden * element_;
            norm((char*)c_.hidden + token * size, s_.final_norm, (char*)c_.out + row * size, 1, s_.hidden);
        });
    }

  private:
    // Memory that a thread keeps from call to call, 64-byte aligned.
    struct Buffer {
        std::vector<char> bytes;
        char* claim(int64_t size) {
            if ((int64_t)bytes.size() < size + 64) bytes.resize((size_t)size + 64);
            return (char*)(((uintptr_t)bytes.data() + 63) / 64 * 64);
        }
    };
    static thread_local Buffer shared_, own_x_, packed_, mid_;

    struct Planned {
        AttentionPlan plan;
        std::vector<int32_t> group_of;       // of each item
        std::vector<std::atomic<int>> done;  // items of each group, over all layers
    };

    int64_t items(int64_t outputs) const { return (outputs + kOutputs - 1) / kOutputs; }

    Linear linear(const void* x, const void* weight, const float* scale, void* out, int64_t inputs,
                  int64_t outputs) const {
        return {x, weight, out, s_.dtype, c_.tokens, inputs, outputs, inputs, inputs, outputs, scale};
    }

    void norm(const void* x, const void* weight, void* out, int64_t tokens, int64_t width) const {
        const RmsNorm args = {x,      weight, nullptr, out, s_.dtype, s_.norm_dtype,
                              tokens, width,  width,   0,   width,    s_.eps};
        level_.rms_norm(args, 0, tokens, (float*)thread_scratch((width + 16) * (int64_t)sizeof(float)));
    }

    // x in the form that products read, in memory of this thread's own: packing twice costs less than
    // waiting.
    char* pack(const void* x, const float* scale, int64_t inputs, int64_t outputs) const {
        const Linear args = linear(x, nullptr, scale, nullptr, inputs, outputs);
        char* packed = packed_.claim(level_.linear_scratch(args));
        level_.linear_pack(args, packed);
        return packed;
    }

    void product(const char* x, const void* weight, const float* scale, const void* bias, void* out,
                 int64_t inputs, int64_t outputs, int64_t item) const {
        const int64_t begin = item * kOutputs, end = std::min(outputs, begin + kOutputs);
        level_.linear(linear(nullptr, weight, scale, out, inputs, outputs), x, begin, end);
        if (bias) level_.add_rows({out, bias, s_.dtype, c_.tokens, outputs, 0}, begin, end);
    }

    void fetch(const LoraStage* lora, int which, int count, int64_t item) const {
        if (lora) lora->fetch(which, count, item * kOutputs);
    }

    // Adds deltas to the products of all tokens with projections from `which` on.
    void expand(const LoraStage* lora, int which, std::initializer_list<void*> out, int64_t outputs,
                int64_t item) const {
        if (!lora) return;
        Team::await(shrunk_[(size_t)(lora - lora_.data())], lora->shrinks());
        const int64_t begin = item * kOutputs;
        const int count = (int)out.size();
        lora->expand(which, count, out.begin(), outputs, begin, std::min(outputs, begin + kOutputs), level_);
    }

    // A product that goes into the residual stream.
    void added(const char* x, const void* weight, const float* scale, int64_t inputs, const LoraStage* lora,
               int64_t item) const {
        fetch(lora, 0, 1, item);
        product(x, weight, scale, nullptr, y_, inputs, s_.hidden, item);
        expand(lora, 0, {y_}, s_.hidden, item);
        const int64_t begin = item * kOutputs, end = std::min(s_.hidden, begin + kOutputs);
        level_.add_rows({c_.hidden, y_, s_.dtype, c_.tokens, s_.hidden, s_.hidden}, begin, end);
    }

    void gated(const char* x, const StackLayer& layer, const LoraStage* lora, int64_t item) const {
        fetch(lora, 0, 2, item);
        product(x, layer.gate, layer.gate_scale, nullptr, gate_, s_.hidden, s_.inner, item);
        product(x, layer.up, layer.up_scale, nullptr, up_, s_.hidden, s_.inner, item);
        expand(lora, 0, {gate_, up_}, s_.inner, item);
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
        KvWrite args = {k_,
                        v_,
                        s_.k_pages,
                        s_.v_pages,
                        c_.slot,
                        c_.positions,
                        layer.cos_sin,
                        s_.dtype,
                        s_.page_dtype,
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
        args.kp_scale = s_.k_scale, args.vp_scale = s_.v_scale;
        args.kps_layer = s_.k_scale_layer, args.vps_layer = s_.v_scale_layer;
        float* row = (float*)thread_scratch((d + 16) * (int64_t)sizeof(float));
        level_.write_kv(args, index, token, token + 1, row);
    }

    // The thread that ends the last item of a set of rows joins its key ranges.
    void attend(const Attention& a, Planned& planned, int64_t item) const {
        const AttentionPlan& plan = planned.plan;
        run_attention_item(a, plan, item, level_);
        const size_t g = (size_t)planned.group_of[plan.items.size() - 1 - (size_t)item];
        const AttentionGroup& group = plan.groups[g];
        if (group.count == 1) return;
        if ((planned.done[g].fetch_add(1, std::memory_order_acq_rel) + 1) % group.count == 0)
            level_.attention_merge(a, &plan.items[(size_t)group.first], group.count);
    }

    Attention attention(const StackLayer& layer, int64_t index) const {
        const int64_t q = s_.heads * s_.head_dim, d = s_.head_dim;
        return {q_,
                attended_,
                nullptr,
                (char*)s_.k_pages + index * s_.k_layer * page_element_,
                (char*)s_.v_pages + index * s_.v_layer * page_element_,
                c_.block_table,
                c_.query_start,
                c_.seq_lens,
                c_.positions,
                s_.dtype,
                s_.page_dtype,
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
                s_.sm_scale,
                s_.k_scale ? s_.k_scale + index * s_.k_scale_layer : nullptr,
                s_.v_scale ? s_.v_scale + index * s_.v_scale_layer : nullptr};
    }

    const Stack& s_;
    const StackCall& c_;
    const Level& level_;
    const int64_t element_, page_element_;
    char *q_ = nullptr, *attended_ = nullptr, *k_ = nullptr, *v_ = nullptr, *x_ = nullptr, *y_ = nullptr;
    char *gate_ = nullptr, *up_ = nullptr, *act_ = nullptr;
    std::map<int64_t, Planned> plans_;   // by window
    static thread_local LoraPlan plan_;  // of whoever calls; kept, so that a step allocates next to nothing
    std::vector<LoraStage> lora_;        // kLoraGroups a layer; none where no row has an adapter
    std::vector<std::atomic<int64_t>> shrunk_;
};

thread_local Forward::Buffer Forward::shared_, Forward::own_x_, Forward::packed_, Forward::mid_;
thread_local LoraPlan Forward::plan_;

}  // namespace

Status run_stack(const Stack& stack, const StackCall& call, int threads) {
    if (call.tokens <= 0) return Status::ok;
    Forward forward(stack, call);
    if (const Status status = forward.check(); status != Status::ok) return status;
    forward.prepare();
    Team team(forward.stages(), std::max(threads, 1));
    parallel_team(
        team, threads, [](void* f, Team& t, int thread) { ((Forward*)f)->run(t, thread); }, &forward);
    return Status::ok;
}

}  // namespace memos_engine
