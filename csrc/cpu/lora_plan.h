// Which deltas the rows of a call have, and their work in items. For the files compiled once.
#pragma once

#include <stddef.h>

#include <vector>

#include "level.h"

namespace memos_engine {

struct LoraDelta {
    LoraWork work;
    int which;  // of the projections of its stage
};

struct LoraChunk {
    int32_t delta, rank, rank_end;
};

// The deltas of projections that share their input, for one forward; a view into a plan.
class LoraStage {
  public:
    LoraStage(const LoraDelta* deltas, const LoraChunk* chunks, int64_t count, int64_t shrinks)
        : deltas_(deltas), chunks_(chunks), count_(count), shrinks_(shrinks) {}

    bool empty() const { return count_ == 0; }
    int64_t shrinks() const { return shrinks_; }

    // x is the same for all; whoever calls it decides whose copy.
    void shrink(int64_t item, const void* x, const Level& level) const;
    // Asks for what `expand` will read of one block of outputs.
    void fetch(int which, int64_t output) const;
    void expand(int which, void* out, int64_t out_token, int64_t output, int64_t output_end,
                const Level& level) const;

  private:
    const LoraDelta* deltas_;
    const LoraChunk* chunks_;
    int64_t count_, shrinks_;
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
        size_t deltas, chunks;
    };
    std::vector<LoraDelta> deltas_;
    std::vector<LoraChunk> chunks_;
    std::vector<End> ends_;
    int64_t floats_ = 0;
};

}  // namespace memos_engine
