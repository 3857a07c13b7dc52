// Launchers of the CUDA kernels: device pointers, a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "memos_engine/kernels.h"

namespace memos_engine::cuda {

// Both return the launch's error code. Slots outside the pages are skipped.
cudaError_t append_kv(const KvWrite& args, cudaStream_t stream);  // args.layers == 1
cudaError_t splice_kv(const KvWrite& args, cudaStream_t stream);

}  // namespace memos_engine::cuda
