// Which deltas the rows of a call have, and their work in items. For the files compiled once.
#pragma once

#include <vector>

#include "level.h"

namespace memos_engine {

// The deltas of projections that share their input, for one forward.
class LoraStage {
  public:
    struct Delta {
        LoraWork work;
        int which;  // of the projections
    };

    bool empty() const { return deltas_.empty(); }
    int64_t shrinks() const { return (int64_t)chunks_.size(); }

    // x is the same for all; whoever calls it decides whose copy.
    void shrink(int64_t item, const void* x, const Level& level) const;
    // Asks for what `expand` will read of one block of outputs.
    void fetch(int which, int64_t output) const;
    void expand(int which, void* out, int64_t out_token, int64_t output, int64_t output_end,
                const Level& level) const;

  private:
    friend class LoraPlan;
    struct Chunk {
        int32_t delta, rank, rank_end;
    };
    std::vector<Delta> deltas_;
    std::vector<Chunk> chunks_;
};

class LoraPlan {
  public:
    static Status check(const LoraRows& rows, int64_t tokens);
    // The deltas that the rows have for projections `parts` (0 ... kLoraParts - 1) of a layer.
    static void make(LoraStage& stage, const LoraRows& rows, int64_t layer, const int* parts, int count,
                     DType dtype, int64_t inputs, int64_t x_token);
    static int64_t floats(const LoraStage& stage);  // of `mid`, for all deltas of a stage
    static void place(LoraStage& stage, float* mid);
};

}  // namespace memos_engine
