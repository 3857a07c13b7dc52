#include "lora_plan.h"

#include <algorithm>
#include <atomic>

#include "threads.h"

namespace memos_engine {
namespace {

constexpr int32_t kRanks = 16;    // of one item
constexpr int32_t kAhead = 4;     // deltas: what is asked for sooner takes room from what is read now
constexpr int64_t kStart = 2048;  // bytes of an item's a, until the hardware prefetcher has seen the stream

void fetch_bytes(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at, 0, 3);
}

void fetch_block(const LoraWork& work, int64_t output) {
    const int64_t size = work.rank * size_of(work.dtype);
    fetch_bytes((const char*)work.b + output * size, size * kLoraBlock);
}

}  // namespace

void LoraStage::shrink(int64_t item, const void* x, const Level& level) const {
    if (item + 1 < shrinks_) {
        const LoraChunk& then = chunks_[item + 1];
        const LoraWork& work = deltas_[then.delta];
        fetch_bytes((const char*)work.a + (int64_t)then.rank * work.inputs * size_of(work.dtype), kStart);
    }
    const LoraChunk& chunk = chunks_[item];
    LoraWork work = deltas_[chunk.delta];
    work.x = x;
    level.lora_shrink(work, chunk.rank, chunk.rank_end, thread_scratch(level.lora_scratch(work)));
}

void LoraStage::fetch(int which, int count, int64_t output) const {
    const int32_t begin = first_[which], end = std::min(begin + kAhead, first_[which + count]);
    for (int32_t i = begin; i < end; ++i) fetch_block(deltas_[i], output);
}

void LoraStage::expand(int which, int count, void* const* out, int64_t out_token, int64_t output,
                       int64_t output_end, const Level& level) const {
    const int32_t end = first_[which + count];
    for (int p = 0; p < count; ++p) {
        for (int32_t i = first_[which + p]; i < first_[which + p + 1]; ++i) {
            if (i + kAhead < end) fetch_block(deltas_[i + kAhead], output);
            level.lora_expand(deltas_[i], out[p], out_token, output, output_end);
        }
    }
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

void LoraPlan::clear() {
    deltas_.clear(), chunks_.clear(), ends_.clear();
    floats_ = 0;
}

void LoraPlan::add(const LoraRows& rows, int64_t layer, const int* parts, int count, DType dtype,
                   int64_t inputs, int64_t x_token) {
    const size_t first = deltas_.size();
    int64_t floats = 0;
    End end = {};
    for (int which = 0; which < count; ++which) {
        for (int64_t i = 0; i < rows.segments; ++i) {
            const int64_t begin = rows.start[i], size = rows.start[i + 1] - begin;
            const LoraPart* slot = rows.slot[i] < 0 || size == 0 ? nullptr : rows.slots[rows.slot[i]];
            if (!slot) continue;
            const LoraPart* part = slot + layer * kLoraParts + parts[which];
            if (part->rank <= 0) continue;
            const int32_t delta = (int32_t)(deltas_.size() - first);
            LoraWork work = {
                part->a,    part->b,       nullptr,         rows.order + begin, nullptr,
                part->rank, (int32_t)size, (int32_t)inputs, (int32_t)x_token,   part->scale * rows.scale[i],
                dtype};
            floats += size * work.mid_row();
            deltas_.push_back(work);
            for (int32_t rank = 0; rank < part->rank; rank += kRanks)
                chunks_.push_back({delta, rank, std::min(part->rank, rank + kRanks)});
        }
        for (int p = which + 1; p <= kLoraShared; ++p) end.first[p] = (int32_t)(deltas_.size() - first);
    }
    end.deltas = deltas_.size(), end.chunks = chunks_.size();
    ends_.push_back(end);
    floats_ = std::max(floats_, floats);
}

void LoraPlan::place(float* mid) {
    size_t at = 0;
    for (const End& end : ends_) {
        for (float* to = mid; at < end.deltas; ++at) {
            LoraWork& work = deltas_[at];
            work.mid = to;
            to += work.count * work.mid_row();
        }
    }
}

LoraStage LoraPlan::stage(size_t index) const {
    const End before = index ? ends_[index - 1] : End{};
    const End& end = ends_[index];
    return {deltas_.data() + before.deltas, chunks_.data() + before.chunks, end.first,
            (int64_t)(end.chunks - before.chunks)};
}

Status lora_apply(const Lora& a, int threads) {
    if (a.rows.layers > 0 && (a.layer < 0 || a.layer >= a.rows.layers)) return Status::bad_lora_rows;
    if (const Status status = LoraPlan::check(a.rows, a.tokens); status != Status::ok) return status;
    LoraPlan plan;
    plan.add(a.rows, a.layer, a.part, a.parts, a.dtype, a.inputs, a.x_token);
    const LoraStage stage = plan.stage(0);
    if (stage.empty()) return Status::ok;
    std::vector<float> mid((size_t)plan.floats());
    plan.place(mid.data());
    const Level& level = *selected_level();
    parallel(stage.shrinks(), threads, [&](int64_t item) { stage.shrink(item, a.x, level); });
    constexpr int64_t kOutputs = 4 * kLoraBlock;  // of one item
    int64_t first[4] = {};
    for (int p = 0; p < a.parts; ++p) first[p + 1] = first[p] + (a.outputs[p] + kOutputs - 1) / kOutputs;
    parallel(first[a.parts], threads, [&](int64_t item) {
        int p = 0;
        while (item >= first[p + 1]) ++p;
        const int64_t begin = (item - first[p]) * kOutputs, end = std::min(a.outputs[p], begin + kOutputs);
        for (int64_t o = begin; o < end; o += kLoraBlock)
            stage.expand(p, 1, &a.out[p], a.out_token[p], o, std::min(end, o + kLoraBlock), level);
    });
    return Status::ok;
}

bool lora_copy(const void* from, void* to, int64_t n, DType from_dtype, DType to_dtype, int threads) {
    const Level& level = *selected_level();
    constexpr int64_t kNumbers = 1 << 16;  // of one item
    std::atomic<bool> finite{true};
    parallel((n + kNumbers - 1) / kNumbers, threads, [&](int64_t item) {
        const int64_t begin = item * kNumbers, some = std::min(kNumbers, n - begin);
        const char* source = (const char*)from + begin * size_of(from_dtype);
        if (!level.lora_copy(source, (char*)to + begin * size_of(to_dtype), some, from_dtype, to_dtype))
            finite.store(false, std::memory_order_relaxed);
    });
    return finite.load();
}

void lora_pack(const LoraPack* modules, int64_t count, DType from, DType to, int threads) {
    const Level& level = *selected_level();
    parallel(count, threads, [&](int64_t i) {
        const int64_t floats = std::max<int64_t>(modules[i].rank, 1) * kLoraBlock + 16;
        level.lora_pack(modules[i], from, to, (float*)thread_scratch(floats * (int64_t)sizeof(float)));
    });
}

}  // namespace memos_engine
