// Cuts an attention probe into items and runs them on all threads.
//
// Rows are packed once and read by every item. An item is a run of keys of one request, all of whose rows and
// heads it sums in a fixed order: a key's score is the same bits in any batch and with any number of threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "level.h"
#include "threads.h"

namespace memos_engine {
namespace {

constexpr double kMinWork = 4096 * 64;  // products; below this a parallel region costs more than it saves

Status check(const Probe& a) {
    if (a.requests > 0 && a.query_start[0] < 0) return Status::bad_query_start;
    if (a.requests > 0 && a.key_start[0] < 0) return Status::bad_key_start;
    for (int64_t b = 0; b < a.requests; ++b) {
        if (a.query_start[b + 1] < a.query_start[b] || a.query_start[b + 1] > a.tokens)
            return Status::bad_query_start;
        if (a.key_start[b + 1] < a.key_start[b] || a.key_start[b + 1] > a.keys) return Status::bad_key_start;
        for (int64_t j = a.key_start[b]; j < a.key_start[b + 1]; ++j)
            if (a.slot[j] >= a.blocks * a.page) return Status::bad_key_slot;
    }
    return Status::ok;
}

class Plan {
  public:
    explicit Plan(const Probe& a) : a_(a), tokens_((size_t)a.tokens) {
        std::vector<int64_t> first_tile;  // of each item's request, as tiles_ still grows
        int64_t used = 0;
        for (int64_t b = 0; b < a.requests; ++b) {
            const int64_t begin = used, keys = a.key_start[b + 1] - a.key_start[b];
            if (keys == 0) continue;
            for (int32_t t = a.query_start[b]; t < a.query_start[b + 1]; ++t)
                if (a.q_pos[t] >= 0) tokens_[(size_t)used++] = t;
            const int64_t rows = (used - begin) * (a.heads / a.kv_heads);
            const int64_t tiles = (rows + kTileRows - 1) / kTileRows, tile = (int64_t)tiles_.size();
            if (tiles == 0) continue;
            for (int64_t h = 0; h < a.kv_heads; ++h)
                for (int64_t row = 0; row < rows; row += kTileRows) {
                    ProbeTile made;
                    made.tokens = &tokens_[(size_t)begin], made.rows = (int32_t)rows;
                    made.kv_head = (int32_t)h, made.row = (int32_t)row;
                    tiles_.push_back(made);
                }
            for (int64_t key = 0; key < keys; key += kProbeKeys) {
                items_.push_back(
                    {nullptr, tiles, a.key_start[b] + key, std::min<int64_t>(kProbeKeys, keys - key)});
                first_tile.push_back(tile);
            }
            work_ += (double)rows * a.kv_heads * keys * a.head_dim;
        }
        for (size_t i = 0; i < items_.size(); ++i) items_[i].tiles = &tiles_[(size_t)first_tile[i]];
    }

    void run(int threads) {
        if (items_.empty()) return;
        if (work_ < kMinWork) threads = 1;
        const Level& level = *selected_level();
        const int64_t bytes = level.probe_scratch(a_.head_dim);
        // A tile is whole cache lines; so they begin at one.
        const int64_t floats = a_.head_dim * kTileRows;
        const std::unique_ptr<float[]> packed(new float[tiles_.size() * (size_t)floats + 16]);
        float* start = packed.get();
        while ((uintptr_t)start % 64) ++start;
        for (size_t i = 0; i < tiles_.size(); ++i) tiles_[i].q = start + i * (size_t)floats;
        parallel((int64_t)tiles_.size(), threads,
                 [&](int64_t i) { level.probe_pack(a_, tiles_[(size_t)i], (float*)thread_scratch(bytes)); });
        parallel((int64_t)items_.size(), threads,
                 [&](int64_t i) { level.probe(a_, items_[(size_t)i], (float*)thread_scratch(bytes)); });
    }

  private:
    const Probe& a_;
    std::vector<int32_t> tokens_;  // those that count, request by request
    std::vector<ProbeTile> tiles_;
    std::vector<ProbeItem> items_;
    double work_ = 0;
};

}  // namespace

Status attention_probe(const Probe& a, int threads) {
    if (const Status status = check(a); status != Status::ok) return status;
    Plan(a).run(threads);
    return Status::ok;
}

}  // namespace memos_engine
