// Checks of index values and division of the work among threads, for everything but attention.
#include <algorithm>

#include "level.h"
#include "threads.h"

namespace memos_engine {
namespace {

constexpr int64_t kMinBytes = 1 << 16;  // below this a parallel region costs more than it saves

// Calls f(begin, end) over [0, rows) in about four chunks a thread.
template <class F>
void parallel_rows(int64_t rows, int64_t bytes, int threads, const F& f) {
    if (rows <= 0) return;
    if (threads <= 1 || bytes < kMinBytes) return f(0, rows);
    const int64_t chunk = std::max<int64_t>(1, rows / (4 * threads));
    parallel((rows + chunk - 1) / chunk, threads,
             [&](int64_t i) { f(i * chunk, std::min(rows, (i + 1) * chunk)); });
}

bool positions_fit(const int32_t* positions, int64_t tokens, int64_t max_position, const int64_t* slot) {
    for (int64_t i = 0; i < tokens; ++i)
        if ((!slot || slot[i] >= 0) && (positions[i] < 0 || positions[i] >= max_position)) return false;
    return true;
}

}  // namespace

Status write_kv(const KvWrite& a, int threads) {
    for (int64_t i = 0; i < a.tokens; ++i)
        if (a.slot[i] >= a.blocks * a.page) return Status::bad_slot;
    if (a.cos_sin && !positions_fit(a.positions, a.tokens, a.max_position, a.slot))
        return Status::bad_position;
    const bool grouped = a.first_token >= 0 && a.first_token <= a.groups * kScaleGroup - a.tokens;
    if (a.k_scale && a.tokens > 0 && !grouped) return Status::bad_group;
    const Level& level = *selected_level();
    constexpr int64_t kTokens = 128;  // of one item
    const int64_t chunks = (a.tokens + kTokens - 1) / kTokens;
    const int64_t bytes = a.layers * a.tokens * a.kv_heads * a.head_dim * 2 * size_of(a.page_dtype);
    parallel(a.layers * chunks, bytes < kMinBytes ? 1 : threads, [&](int64_t i) {
        const int64_t token = i % chunks * kTokens;
        float* row = (float*)thread_scratch((a.head_dim + 16) * (int64_t)sizeof(float));
        level.write_kv(a, i / chunks, token, std::min(a.tokens, token + kTokens), row);
    });
    return Status::ok;
}

Status rope(const Rope& a, int threads) {
    if (!positions_fit(a.positions, a.tokens, a.max_position, nullptr)) return Status::bad_position;
    const Level& level = *selected_level();
    parallel_rows(a.tokens, a.tokens * a.heads * a.head_dim * size_of(a.dtype), threads,
                  [&](int64_t begin, int64_t end) { level.rope(a, begin, end); });
    return Status::ok;
}

void rms_norm(const RmsNorm& a, int threads) {
    const Level& level = *selected_level();
    parallel_rows(a.tokens, a.tokens * a.hidden * size_of(a.dtype), threads, [&](int64_t begin, int64_t end) {
        level.rms_norm(a, begin, end, (float*)thread_scratch((a.hidden + 16) * sizeof(float)));
    });
}

void silu_mul(const SiluMul& a, int threads) {
    const Level& level = *selected_level();
    parallel_rows(a.tokens, a.tokens * a.width * size_of(a.dtype), threads,
                  [&](int64_t begin, int64_t end) { level.silu_mul(a, begin, end); });
}

Status linear(const Linear& a, int threads) {
    if (a.tokens <= 0) return Status::ok;
    const Level& level = *selected_level();
    void* packed = thread_scratch(level.linear_scratch(a));
    level.linear_pack(a, packed);
    constexpr int64_t kOutputs = 32;  // that a level may like to have together
    const int64_t groups = (a.outputs + kOutputs - 1) / kOutputs;
    parallel_rows(groups, a.outputs * a.inputs * size_of(a.dtype), threads, [&](int64_t begin, int64_t end) {
        level.linear(a, packed, begin * kOutputs, std::min(a.outputs, end * kOutputs));
    });
    return Status::ok;
}

}  // namespace memos_engine
