// A stored record into the pages of all layers.
#include "kv.h"
#include "write_token.cuh"

namespace memos_engine::cuda {

template <class From, class To>
__global__ void splice_kernel(const KvWrite args) {
    write_token<From, To>(args, blockIdx.y, blockIdx.x);
}

cudaError_t splice_kv(const KvWrite& args, cudaStream_t stream) {
    if (args.tokens == 0 || args.layers == 0) return cudaSuccess;
    const dim3 grid((unsigned)args.tokens, (unsigned)args.layers);
    const auto launch = [&](auto* from, auto* to) {
        using From = std::remove_pointer_t<decltype(from)>;
        using To = std::remove_pointer_t<decltype(to)>;
        splice_kernel<From, To><<<grid, threads_for(args), 0, stream>>>(args);
    };
    with_types(args, launch);
    return cudaGetLastError();
}

}  // namespace memos_engine::cuda
