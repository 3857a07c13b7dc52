#include "lora_plan.h"

#include <algorithm>

#include "threads.h"

namespace memos_engine {
namespace {

constexpr int32_t kRanks = 8;  // of one item

int64_t mid_row(const LoraWork& work) { return (work.part->rank + 15) / 16 * 16; }

}  // namespace

void LoraStage::shrink(int64_t item, const void* x, const Level& level) const {
    const Chunk& chunk = chunks_[(size_t)item];
    LoraWork work = deltas_[(size_t)chunk.delta].work;
    work.x = x;
    level.lora_shrink(work, chunk.rank, chunk.rank_end, thread_scratch(level.lora_scratch(work)));
}

void LoraStage::fetch(int which, int64_t output) const {
    for (const Delta& delta : deltas_) {
        if (delta.which != which) continue;
        const int64_t size = delta.work.part->rank * size_of(delta.work.dtype);
        const char* b = (const char*)delta.work.part->b + output * size;
        for (int64_t at = 0; at < size * kLoraBlock; at += 64) __builtin_prefetch(b + at, 0, 2);
    }
}

void LoraStage::expand(int which, void* out, int64_t out_token, int64_t output, int64_t output_end,
                       const Level& level) const {
    for (const Delta& delta : deltas_)
        if (delta.which == which) level.lora_expand(delta.work, out, out_token, output, output_end);
}

Status LoraPlan::check(const LoraRows& rows, int64_t tokens) {
    if (rows.segments <= 0) return Status::ok;
    if (rows.start[0] != 0) return Status::bad_lora_rows;
    for (int64_t i = 0; i < rows.segments; ++i) {
        const bool ascending = rows.start[i + 1] >= rows.start[i] && rows.start[i + 1] <= rows.count;
        if (!ascending || rows.slot[i] >= rows.slot_count) return Status::bad_lora_rows;
    }
    for (int64_t i = 0; i < rows.start[rows.segments]; ++i)
        if (rows.order[i] < 0 || rows.order[i] >= tokens) return Status::bad_lora_rows;
    return Status::ok;
}

void LoraPlan::make(LoraStage& stage, const LoraRows& rows, int64_t layer, const int* parts, int count,
                    DType dtype, int64_t inputs, int64_t x_token) {
    for (int which = 0; which < count; ++which) {
        for (int64_t i = 0; i < rows.segments; ++i) {
            const int64_t first = rows.start[i], size = rows.start[i + 1] - first;
            const LoraPart* slot = rows.slot[i] < 0 || size == 0 ? nullptr : rows.slots[rows.slot[i]];
            if (!slot) continue;
            const LoraPart* part = slot + layer * kLoraParts + parts[which];
            if (part->rank <= 0) continue;
            const int32_t delta = (int32_t)stage.deltas_.size();
            stage.deltas_.push_back(
                {{part, nullptr, dtype, inputs, x_token, rows.order + first, size, rows.scale[i], nullptr, 0},
                 which});
            for (int32_t rank = 0; rank < part->rank; rank += kRanks)
                stage.chunks_.push_back({delta, rank, std::min(part->rank, rank + kRanks)});
        }
    }
}

int64_t LoraPlan::floats(const LoraStage& stage) {
    int64_t total = 0;
    for (const LoraStage::Delta& delta : stage.deltas_) total += delta.work.count * mid_row(delta.work);
    return total;
}

void LoraPlan::place(LoraStage& stage, float* mid) {
    for (LoraStage::Delta& delta : stage.deltas_) {
        delta.work.mid = mid, delta.work.mid_row = mid_row(delta.work);
        mid += delta.work.count * delta.work.mid_row;
    }
}

Status lora_apply(const Lora& a, int threads) {
    if (a.rows.layers > 0 && (a.layer < 0 || a.layer >= a.rows.layers)) return Status::bad_lora_rows;
    if (const Status status = LoraPlan::check(a.rows, a.tokens); status != Status::ok) return status;
    LoraStage stage;
    LoraPlan::make(stage, a.rows, a.layer, a.part, a.parts, a.dtype, a.inputs, a.x_token);
    if (stage.empty()) return Status::ok;
    std::vector<float> mid((size_t)LoraPlan::floats(stage));
    LoraPlan::place(stage, mid.data());
    const Level& level = *selected_level();
    parallel(stage.shrinks(), threads, [&](int64_t item) { stage.shrink(item, a.x, level); });
    constexpr int64_t kOutputs = 4 * kLoraBlock;  // of one item
    int64_t first[4] = {};
    for (int p = 0; p < a.parts; ++p) first[p + 1] = first[p] + (a.outputs[p] + kOutputs - 1) / kOutputs;
    parallel(first[a.parts], threads, [&](int64_t item) {
        int p = 0;
        while (item >= first[p + 1]) ++p;
        const int64_t begin = (item - first[p]) * kOutputs, end = std::min(a.outputs[p], begin + kOutputs);
        stage.expand(p, a.out[p], a.out_token[p], begin, end, level);
    });
    return Status::ok;
}

void lora_pack(const LoraPack* modules, int64_t count, DType from, DType to, int threads) {
    const Level& level = *selected_level();
    parallel(count, threads, [&](int64_t i) {
        const int64_t floats = std::max<int64_t>(modules[i].rank, 1) * kLoraBlock + 16;
        level.lora_pack(modules[i], from, to, (float*)thread_scratch(floats * (int64_t)sizeof(float)));
    });
}

}  // namespace memos_engine
