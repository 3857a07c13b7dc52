// New tokens into one layer's pages.
#include "kv.h"
#include "write_token.cuh"

namespace memos_engine::cuda {

template <class From, class To>
__global__ void append_kernel(const KvWrite args) {
    write_token<From, To>(args, 0, blockIdx.x);
}

cudaError_t append_kv(const KvWrite& args, cudaStream_t stream) {
    if (args.tokens == 0) return cudaSuccess;
    with_types(args, [&](auto* from, auto* to) {
        using From = std::remove_pointer_t<decltype(from)>;
        using To = std::remove_pointer_t<decltype(to)>;
        append_kernel<From, To><<<(unsigned)args.tokens, threads_for(args), 0, stream>>>(args);
    });
    return cudaGetLastError();
}

}  // namespace memos_engine::cuda
