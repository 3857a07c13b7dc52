// What one block of threads does for lora_apply: one segment of rows, one tile of one projection's outputs.
//
// The work is written as phases, `each([&](int thread) {...})`: every thread goes through a phase, and none
// begins the next before all have ended it. On a GPU that is a barrier; on the host a loop over threads, so
// that a test can run this file without a GPU. What a later phase reads is in shared memory, never in a
// register. The idea of gathering weights by pointer, one row at a time, is Punica's BGMV (arXiv 2310.18547).
#pragma once

#include <cmath>

#include "memos_engine/kernels.h"

#ifdef __CUDACC__
#define ME_DEVICE __device__ inline
#else
#define ME_DEVICE inline
#endif

namespace memos_engine::cuda {

constexpr int kLoraThreads = 512;  // of a block
constexpr int kLoraLanes = 32;     // threads that share one row of a
constexpr int kLoraGroup = 4;      // rows of x that a row of a is read for at once
constexpr int kLoraRanks = 32;     // rows of a between two barriers

// Shared memory of a block. Behind it lie kLoraGroup rows of max_rank floats: x a^T, scaled.
struct LoraShared {
    LoraPart part;  // read by one thread: the others must see the same, whatever is published meanwhile
    float scale;
    int64_t begin, end;  // of the segment, in order
    int64_t row[kLoraGroup];
    float partial[kLoraRanks][kLoraGroup][kLoraLanes + 1];  // one more: lanes' sums lie in different banks
};

inline int64_t lora_shared_bytes(int64_t max_rank) {
    return (int64_t)sizeof(LoraShared) + kLoraGroup * max_rank * (int64_t)sizeof(float);
}

// Outputs of one tile: every tile shrinks for itself, so there are no more than it takes to fill a device.
inline int64_t lora_tile_outputs(const Lora& a) {
    constexpr int64_t kBlocks = 128;  // that fill one, as few at a time fit a multiprocessor
    int64_t outputs = 0;
    for (int i = 0; i < a.parts; ++i) outputs += a.outputs[i];
    const int64_t wanted = a.rows.segments < kBlocks ? kBlocks / a.rows.segments : 1;
    const int64_t steps = outputs / (wanted * kLoraThreads);
    return (steps > 1 ? steps : 1) * kLoraThreads;
}

// Tiles of all projections.
inline int64_t lora_tiles(const Lora& a, int64_t tile_outputs) {
    int64_t tiles = 0;
    for (int i = 0; i < a.parts; ++i) tiles += (a.outputs[i] + tile_outputs - 1) / tile_outputs;
    return tiles;
}

// Sixteen bytes, read at once.
template <class T>
struct alignas(16) LoraPack16 {
    static constexpr int kCount = 16 / sizeof(T);
    T value[kCount];
};

// One lane's share of the products of a row of a with G rows of x. E: an element type, how to widen it to
// float and how to round a float to it.
template <class E, int G>
ME_DEVICE void lora_dot(const typename E::T* a, const typename E::T* const* x, int64_t inputs, int lane,
                        bool packed, float* sum) {
    typedef typename E::T T;
    typedef LoraPack16<T> Pack;
    constexpr int N = Pack::kCount;
    if (packed) {
#pragma unroll 4
        for (int64_t i = (int64_t)lane * N; i < inputs; i += kLoraLanes * N) {
            const Pack w = *(const Pack*)(a + i);
            for (int g = 0; g < G; ++g) {
                const Pack v = *(const Pack*)(x[g] + i);
                for (int j = 0; j < N; ++j) sum[g] = fmaf(E::widen(w.value[j]), E::widen(v.value[j]), sum[g]);
            }
        }
    } else {
#pragma unroll 4
        for (int64_t i = lane; i < inputs; i += kLoraLanes) {
            const float w = E::widen(a[i]);
            for (int g = 0; g < G; ++g) sum[g] = fmaf(w, E::widen(x[g][i]), sum[g]);
        }
    }
}

// Rows of a from `rank` on, at most kLoraRanks of them, times the group's rows of x.
template <class E, int G>
ME_DEVICE void lora_shrink(const Lora& a, LoraShared& s, int rank, bool packed, int thread) {
    typedef typename E::T T;
    const int lane = thread % kLoraLanes;
    const T* x[G];
    for (int g = 0; g < G; ++g) x[g] = (const T*)a.x + s.row[g] * a.x_token;
    for (int r = thread / kLoraLanes; r < kLoraRanks && rank + r < s.part.rank;
         r += kLoraThreads / kLoraLanes) {
        float sum[G] = {};
        lora_dot<E, G>((const T*)s.part.a + (int64_t)(rank + r) * a.inputs, x, a.inputs, lane, packed, sum);
        for (int g = 0; g < G; ++g) s.partial[r][g][lane] = sum[g];
    }
}

template <int G>
ME_DEVICE void lora_reduce(LoraShared& s, float* mid, int max_rank, int rank, int thread) {
    for (int i = thread; i < kLoraRanks * G; i += kLoraThreads) {
        const int r = i / G, g = i % G;
        if (rank + r >= s.part.rank) continue;
        float sum = 0;
        for (int lane = 0; lane < kLoraLanes; ++lane) sum += s.partial[r][g][lane];
        mid[g * max_rank + rank + r] = sum * s.scale;
    }
}

// Outputs from `output` to `output_end` of the group's first n rows.
template <class E, int G>
ME_DEVICE void lora_expand(const LoraShared& s, const float* mid, int max_rank, int64_t n, typename E::T* out,
                           int64_t out_token, int64_t output, int64_t output_end, int thread) {
    typedef typename E::T T;
    const int rank = s.part.rank;
    for (int64_t o = output + thread; o < output_end; o += kLoraThreads) {
        const T* b = (const T*)s.part.b + o / kLoraBlock * rank * kLoraBlock + o % kLoraBlock;
        float sum[G] = {};
#pragma unroll 8
        for (int r = 0; r < rank; ++r) {
            const float w = E::widen(b[r * kLoraBlock]);
            for (int g = 0; g < G; ++g) sum[g] = fmaf(w, mid[g * max_rank + r], sum[g]);
        }
        for (int g = 0; g < G; ++g) {
            if (g >= n) break;
            T* to = out + s.row[g] * out_token + o;
            E::narrow(to, E::widen(*to) + sum[g]);
        }
    }
}

// G rows at a time of the segment that `s` describes.
template <class E, int G, class Each>
ME_DEVICE void lora_rows(const Lora& a, LoraShared& s, float* mid, int max_rank, int which, int64_t output,
                         int64_t output_end, const Each& each) {
    typedef typename E::T T;
    const int64_t pitch = a.x_token * (int64_t)sizeof(T), width = a.inputs * (int64_t)sizeof(T);
    const bool packed =
        (((uintptr_t)a.x | (uintptr_t)s.part.a | (uintptr_t)pitch | (uintptr_t)width) & 15) == 0;
    const int rank = s.part.rank;
    const int64_t begin = s.begin, end = s.end;
    for (int64_t first = begin; first < end; first += G) {
        const int64_t n = end - first < G ? end - first : G;
        each([&](int thread) {  // the last row again where the group is not full
            if (thread < G) s.row[thread] = a.rows.order[first + (thread < n ? thread : n - 1)];
        });
        for (int r = 0; r < rank; r += kLoraRanks) {
            each([&](int thread) { lora_shrink<E, G>(a, s, r, packed, thread); });
            each([&](int thread) { lora_reduce<G>(s, mid, max_rank, r, thread); });
        }
        each([&](int thread) {
            lora_expand<E, G>(s, mid, max_rank, n, (T*)a.out[which], a.out_token[which], output, output_end,
                              thread);
        });
    }
}

// What a segment is about: nothing for a negative slot, an empty one, or one without this projection. A slot
// that is not there and a rank beyond max_rank count as nothing too: no memory is read for them.
ME_DEVICE void lora_look(const Lora& a, LoraShared& s, int64_t segment, int which, int max_rank) {
    s.part.rank = 0;
    const int32_t slot = a.rows.slot[segment];
    s.begin = a.rows.start[segment], s.end = a.rows.start[segment + 1];
    if (slot < 0 || slot >= a.rows.slot_count || s.begin < 0 || s.end > a.rows.count || s.begin >= s.end)
        return;
    const LoraPart* parts = a.rows.slots[slot];
    if (!parts) return;
    const LoraPart part = parts[a.layer * kLoraParts + a.part[which]];
    if (part.rank <= 0 || part.rank > max_rank) return;
    s.scale = part.scale * a.rows.scale[segment];
    s.part = part;
}

// tile: counted over all projections, `tile_outputs` (a multiple of kLoraBlock) of one projection each.
template <class E, class Each>
ME_DEVICE void lora_block(const Lora& a, int64_t segment, int64_t tile, int64_t tile_outputs, int max_rank,
                          void* shared, const Each& each) {
    LoraShared& s = *(LoraShared*)shared;
    float* mid = (float*)(&s + 1);
    int which = 0;
    for (; which < a.parts; ++which) {
        const int64_t tiles = (a.outputs[which] + tile_outputs - 1) / tile_outputs;
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (which == a.parts) return;
    each([&](int thread) {
        if (thread == 0) lora_look(a, s, segment, which, max_rank);
    });
    if (s.part.rank == 0) return;
    const int64_t output = tile * tile_outputs, rest = a.outputs[which] - output;
    const int64_t output_end = output + (rest < tile_outputs ? rest : tile_outputs);
    if (s.end - s.begin == 1)
        lora_rows<E, 1>(a, s, mid, max_rank, which, output, output_end, each);
    else
        lora_rows<E, kLoraGroup>(a, s, mid, max_rank, which, output, output_end, each);
}

}  // namespace memos_engine::cuda
