// How an attention call is cut into items; the cut depends on each request's own rows and keys alone.
#pragma once

#include <vector>

#include "level.h"

namespace memos_engine {

struct AttentionGroup {
    int32_t first, count;  // items that make up one set of rows
};

struct AttentionPlan {
    std::vector<AttentionItem> items;
    std::vector<AttentionGroup> groups;
    std::vector<float> partial;
    double work = 0;  // rows x keys
};

Status check_attention(const Attention& a);
AttentionPlan plan_attention(const Attention& a);
// Item `index` counts from the last one: in a causal prompt the long ones, which must not be left for the
// end.
void run_attention_item(const Attention& a, const AttentionPlan& plan, int64_t index, const Level& level);

}  // namespace memos_engine
