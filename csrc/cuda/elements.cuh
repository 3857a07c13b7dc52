// What the kernels know of element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "memos_engine/kernels.h"

namespace memos_engine::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float* to, float x) { *to = x; }
__device__ inline void narrow(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void narrow(__half* to, float x) { *to = __float2half_rn(x); }

// Calls f with a null pointer of the element type.
template <class F>
void with_type(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32:
            return f((float*)nullptr);
        case DType::bf16:
            return f((__nv_bfloat16*)nullptr);
        case DType::f16:
            return f((__half*)nullptr);
        case DType::i8:
            return f((int8_t*)nullptr);
    }
}

}  // namespace memos_engine::cuda
