// csrc/cuda/lora_block.h without a GPU: blocks one after the other, the threads of a phase one after the
// other.
#include <cstdint>
#include <cstring>
#include <vector>

#include "lora_block.h"

namespace {

using memos_engine::cuda::kLoraThreads;

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

struct F32 {
    typedef float T;
    static float widen(T x) { return x; }
    static void narrow(T* to, float x) { *to = x; }
};

struct Bf16 {
    typedef uint16_t T;
    static float widen(T x) { return from_bits((uint32_t)x << 16); }
    static void narrow(T* to, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        *to = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // finite numbers only
    }
};

#ifdef __FLT16_MAX__
struct F16 {
    typedef _Float16 T;
    static float widen(T x) { return (float)x; }
    static void narrow(T* to, float x) { *to = (T)x; }
};
#endif

// A thread that reads in a phase what another writes in it would see something else in the other order.
struct Threads {
    bool backwards;
    template <class Phase>
    void operator()(const Phase& phase) const {
        for (int i = 0; i < kLoraThreads; ++i) phase(backwards ? kLoraThreads - 1 - i : i);
    }
};

template <class E>
void run(const memos_engine::Lora& a, int max_rank, int64_t tile_outputs, bool backwards) {
    const int64_t bytes = memos_engine::cuda::lora_shared_bytes(max_rank);
    std::vector<uint64_t> shared((size_t)bytes / sizeof(uint64_t) + 1);
    const int64_t tiles = memos_engine::cuda::lora_tiles(a, tile_outputs);
    for (int64_t segment = 0; segment < a.rows.segments; ++segment) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            std::memset(shared.data(), 0xff, (size_t)bytes);  // NaN: nobody may count on zeros
            memos_engine::cuda::lora_block<E>(a, segment, tile, tile_outputs, max_rank, shared.data(),
                                              Threads{backwards});
        }
    }
}

}  // namespace

// words: x, three outs, three parts, three outputs, three out_token, parts, dtype, tokens, inputs, x_token,
// layer, slots, order, start, slot, scale, segments, rows in order, slots there are, layers.
// tile_outputs: 0 for what a GPU takes. Returns that number, or -1 for a dtype that this compiler lacks.
extern "C" int64_t lora_block_run(const int64_t* words, int max_rank, int64_t tile_outputs, int backwards) {
    memos_engine::Lora a = {};
    const int64_t* at = words;
    a.x = (const void*)*at++;
    for (auto& out : a.out) out = (void*)*at++;
    for (auto& part : a.part) part = (int)*at++;
    for (auto& outputs : a.outputs) outputs = *at++;
    for (auto& token : a.out_token) token = *at++;
    a.parts = (int)*at++, a.dtype = (memos_engine::DType)*at++;
    a.tokens = *at++, a.inputs = *at++, a.x_token = *at++, a.layer = *at++;
    a.rows.slots = (const memos_engine::LoraPart* const*)*at++;
    a.rows.order = (const int32_t*)*at++, a.rows.start = (const int32_t*)*at++;
    a.rows.slot = (const int32_t*)*at++, a.rows.scale = (const float*)*at++;
    a.rows.segments = *at++, a.rows.count = *at++, a.rows.slot_count = *at++, a.rows.layers = *at++;
    if (tile_outputs == 0) tile_outputs = memos_engine::cuda::lora_tile_outputs(a);
    switch (a.dtype) {
        case memos_engine::DType::f32:
            run<F32>(a, max_rank, tile_outputs, backwards);
            return tile_outputs;
        case memos_engine::DType::bf16:
            run<Bf16>(a, max_rank, tile_outputs, backwards);
            return tile_outputs;
#ifdef __FLT16_MAX__
        case memos_engine::DType::f16:
            run<F16>(a, max_rank, tile_outputs, backwards);
            return tile_outputs;
#endif
        default:
            return -1;
    }
}
