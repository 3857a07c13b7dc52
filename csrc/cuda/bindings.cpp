// memos_engine._cuda: device pointers and a stream as integers. Loading it needs no GPU and no driver.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../bind_kv_write.h"
#include "kv.h"

namespace {

void check(cudaError_t error, const char* op) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(op) + " could not be launched: " + cudaGetErrorString(error));
}

void py_append_kv(ME_KV_WRITE_PARAMETERS, uintptr_t stream) {
    check(memos_engine::cuda::append_kv(ME_KV_WRITE_ARGUMENTS, (cudaStream_t)stream), "append_kv");
}

void py_splice_kv(ME_KV_WRITE_PARAMETERS, uintptr_t stream) {
    check(memos_engine::cuda::splice_kv(ME_KV_WRITE_ARGUMENTS, (cudaStream_t)stream), "splice_kv");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels; memos_engine.ops.cuda is the way in";
    m.def("append_kv", &py_append_kv);
    m.def("splice_kv", &py_splice_kv);
}
