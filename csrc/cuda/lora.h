// The launcher of lora_apply: device pointers, a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "memos_engine/kernels.h"

namespace memos_engine::cuda {

constexpr int kLoraMostRank = 256;  // of any delta, so that shared memory holds what stands between a and b

// Everything that `a` points to is read on the device, when the kernel runs. Returns the launch's error code.
cudaError_t lora_apply(const Lora& a, int max_rank, cudaStream_t stream);

}  // namespace memos_engine::cuda
