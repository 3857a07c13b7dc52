// Low-rank deltas for few rows: shrink and expand in one launch, slots read when the kernel runs.
#include <type_traits>

#include "elements.cuh"
#include "lora.h"
#include "lora_block.h"

namespace memos_engine::cuda {
namespace {

constexpr int64_t kMostSegments = 65535;

template <class Element>
struct OnDevice {
    typedef Element T;
    static __device__ float widen(T x) { return cuda::widen(x); }
    static __device__ void narrow(T* to, float x) { cuda::narrow(to, x); }
};

struct Threads {
    template <class Phase>
    __device__ void operator()(const Phase& phase) const {
        phase((int)threadIdx.x);
        __syncthreads();
    }
};

template <class T>
__global__ void __launch_bounds__(kLoraThreads)
    lora_kernel(const Lora args, int64_t tile_outputs, int max_rank) {
    extern __shared__ __align__(16) unsigned char shared[];
    lora_block<OnDevice<T>>(args, blockIdx.y, blockIdx.x, tile_outputs, max_rank, shared, Threads());
}

}  // namespace

cudaError_t lora_apply(const Lora& a, int max_rank, cudaStream_t stream) {
    if (a.rows.segments == 0 || a.rows.count == 0) return cudaSuccess;
    if (a.rows.segments > kMostSegments || max_rank > kLoraMostRank) return cudaErrorInvalidValue;
    const int64_t tile_outputs = lora_tile_outputs(a), tiles = lora_tiles(a, tile_outputs);
    if (tiles == 0) return cudaSuccess;
    const dim3 grid((unsigned)tiles, (unsigned)a.rows.segments);
    const size_t bytes = (size_t)lora_shared_bytes(max_rank);
    with_type(a.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same<T, int8_t>::value)
            lora_kernel<T><<<grid, kLoraThreads, bytes, stream>>>(a, tile_outputs, max_rank);
    });
    return cudaGetLastError();
}

}  // namespace memos_engine::cuda
