// Cuts an attention call into items, runs them on all threads, joins split key ranges.
//
// How a request is cut depends only on its own rows and keys, never on its neighbours in the batch or on the
// number of threads: a row's result is the same bits in any batch.
#include "attention_plan.h"

#include <algorithm>

#include "threads.h"

namespace memos_engine {
namespace {

int32_t last_visible(const Attention& a, int64_t request, int64_t row, int64_t rows) {
    const int64_t group = a.heads / a.kv_heads, start = a.query_start[request];
    int32_t last = -1;
    for (int64_t t = start + row / group; t <= start + (row + rows - 1) / group; ++t)
        last = std::max(last, a.q_pos[t]);
    return std::min(last, a.seq_lens[request] - 1);
}

int32_t first_visible(const Attention& a, int64_t request, int64_t row, int64_t rows) {
    if (a.window <= 0) return 0;
    const int64_t group = a.heads / a.kv_heads, start = a.query_start[request];
    int64_t first = INT32_MAX;
    for (int64_t t = start + row / group; t <= start + (row + rows - 1) / group; ++t)
        first = std::min<int64_t>(first, a.q_pos[t] - a.window + 1);
    return (int32_t)std::max<int64_t>(first, 0);
}

}  // namespace

Status check_attention(const Attention& a) {
    if (a.requests > 0 && a.query_start[0] < 0) return Status::bad_query_start;
    for (int64_t b = 0; b < a.requests; ++b) {
        const int64_t start = a.query_start[b], end = a.query_start[b + 1];
        if (end < start || end > a.tokens) return Status::bad_query_start;
        if (start == end) continue;
        const int64_t group = a.heads / a.kv_heads, rows = (end - start) * group;
        const int64_t keys = last_visible(a, b, 0, rows) + 1;
        const int64_t blocks = keys > 0 ? (keys + a.page - 1) / a.page : 0;
        if (blocks > a.max_blocks) return Status::table_too_short;
        for (int64_t i = first_visible(a, b, 0, rows) / a.page; i < blocks; ++i) {
            const int32_t block = a.block_table[b * a.table_stride + i];
            if (block < 0 || block >= a.blocks) return Status::bad_block;
        }
    }
    return Status::ok;
}

AttentionPlan plan_attention(const Attention& a) {
    AttentionPlan plan;
    int64_t partial_floats = 0;
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t b = 0; b < a.requests; ++b) {
        const int64_t rows = (a.query_start[b + 1] - a.query_start[b]) * group;
        const int64_t step = rows <= kDecodeRows ? kDecodeRows : kItemRows;
        const int64_t heads = rows <= kDecodeRows ? kDecodeHeads : 1;
        const int64_t split = rows <= kDecodeRows ? kDecodeKeys : rows <= kSplitRows ? kSplitKeys : INT32_MAX;
        for (int64_t row = 0; row < rows; row += step) {
            const int64_t n = std::min(step, rows - row);
            const int64_t end = std::max(last_visible(a, b, row, n) + 1, 0);
            // Ranges start at multiples of their length, wherever the window begins.
            const int64_t begin = std::min<int64_t>(first_visible(a, b, row, n), end) / split * split;
            const int64_t parts = std::max<int64_t>(1, (end - begin + split - 1) / split);
            plan.work += (double)n * (end - begin) * a.kv_heads;
            for (int64_t h = 0; h < a.kv_heads; h += heads) {
                const int64_t some = std::min(heads, a.kv_heads - h);
                plan.groups.push_back({(int32_t)plan.items.size(), (int32_t)parts});
                for (int64_t part = 0; part < parts; ++part) {
                    const int64_t key = begin + part * split;
                    plan.items.push_back({(int32_t)b, (int32_t)h, (int32_t)some, (int32_t)row, (int32_t)n,
                                          (int32_t)key, (int32_t)std::min(end, key + split), nullptr});
                }
                if (parts > 1) partial_floats += parts * some * n * (2 + a.head_dim);
            }
        }
    }
    plan.partial.resize((size_t)partial_floats);
    float* at = plan.partial.data();
    for (const AttentionGroup& group : plan.groups) {
        if (group.count == 1) continue;
        for (int32_t i = group.first; i < group.first + group.count; ++i) {
            plan.items[(size_t)i].partial = at;
            at += plan.items[(size_t)i].kv_heads * plan.items[(size_t)i].rows * (2 + a.head_dim);
        }
    }
    return plan;
}

void run_attention_item(const Attention& a, const AttentionPlan& plan, int64_t index, const Level& level) {
    const AttentionItem& item = plan.items[plan.items.size() - 1 - (size_t)index];
    const int64_t rows = a.query_start[item.request + 1] - a.query_start[item.request];
    if (rows * (a.heads / a.kv_heads) <= kDecodeRows)
        level.attention_decode(a, item, (float*)thread_scratch(level.decode_scratch(a.head_dim)));
    else
        level.attention(a, item, (float*)thread_scratch(level.attention_scratch(a.head_dim)));
}

Status paged_attention(const Attention& a, int threads) {
    if (const Status status = check_attention(a); status != Status::ok) return status;
    const Level& level = *selected_level();
    const AttentionPlan plan = plan_attention(a);
    // A parallel region costs a few microseconds; below this much work it would cost more than it saves.
    constexpr double kMinWork = 4096;
    if (plan.work * (double)a.head_dim < kMinWork * 64) threads = 1;
    parallel((int64_t)plan.items.size(), threads, [&](int64_t i) { run_attention_item(a, plan, i, level); });
    for (const AttentionGroup& group : plan.groups)
        if (group.count > 1) level.attention_merge(a, &plan.items[(size_t)group.first], group.count);
    return Status::ok;
}

}  // namespace memos_engine
