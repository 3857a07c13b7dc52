// Which deltas the rows of a call have, and their work in items. For the files compiled once.
#pragma once

#include <stddef.h>

#include <algorithm>
#include <vector>

#include "level.h"

namespace memos_engine {

constexpr int kLoraShared = 3;  // most projections that share their input

struct LoraChunk {
    int32_t delta, rank, rank_end;
};

// The deltas of projections that share their input, for one forward; a view into a plan.
class LoraStage {
  public:
    LoraStage(const LoraWork* deltas, const LoraChunk* chunks, const int32_t* first, int64_t shrinks)
        : deltas_(deltas), chunks_(chunks), shrinks_(shrinks) {
        std::copy(first, first + kLoraShared + 1, first_);
    }

    bool empty() const { return first_[kLoraShared] == 0; }
    int64_t shrinks() const { return shrinks_; }

    // x is the same for all; whoever calls it decides whose copy.
    void shrink(int64_t item, const void* x, const Level& level) const;
    // Asks for the first of what `expand` will read of one block of outputs, for `count` projections from
    // `which` on.
    void fetch(int which, int count, int64_t output) const;
    // out[i] [tokens, out_token] is of projection which + i.
    void expand(int which, int count, void* const* out, int64_t out_token, int64_t output, int64_t output_end,
                const Level& level) const;

  private:
    const LoraWork* deltas_;
    const LoraChunk* chunks_;
    int64_t shrinks_;
    int32_t first_[kLoraShared + 1];  // of `deltas_`, by projection
};

// Stages one after the other. Kept from step to step, it allocates nothing.
class LoraPlan {
  public:
    static Status check(const LoraRows& rows, int64_t tokens);

    void clear();
    // A stage: the deltas that the rows have for projections `parts` (0 ... kLoraParts - 1) of a layer.
    void add(const LoraRows& rows, int64_t layer, const int* parts, int count, DType dtype, int64_t inputs,
             int64_t x_token);
    int64_t floats() const { return floats_; }  // of `mid`, which stages use in turn
    void place(float* mid);
    LoraStage stage(size_t index) const;

  private:
    struct End {
        size_t deltas = 0, chunks = 0;
        int32_t first[kLoraShared + 1] = {};
    };
    std::vector<LoraWork> deltas_;
    std::vector<LoraChunk> chunks_;
    std::vector<End> ends_;
    int64_t floats_ = 0;
};

}  // namespace memos_engine
