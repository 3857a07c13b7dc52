// memos_engine._cuda: device pointers and a stream as integers. Loading it needs no GPU and no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../bind_kv_write.h"
#include "kv.h"
#include "lora.h"

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

// lists: addresses of pointers, order, start, slot and scale; sizes: segments, rows in order, slots, layers.
void py_lora_apply(uintptr_t x, const std::vector<uintptr_t>& out, const std::vector<int>& part,
                   const std::vector<int64_t>& outputs, const std::vector<int64_t>& out_token, int dtype,
                   int64_t tokens, int64_t inputs, int64_t x_token, int64_t layer,
                   const std::vector<uintptr_t>& lists, const std::vector<int64_t>& sizes, int max_rank,
                   uintptr_t stream) {
    memos_engine::Lora a = {};
    a.x = (const void*)x, a.parts = (int)out.size(), a.dtype = static_cast<memos_engine::DType>(dtype);
    if (out.size() > 3) throw std::invalid_argument("lora_apply takes at most three outs");
    for (size_t i = 0; i < out.size(); ++i)
        a.out[i] = (void*)out[i], a.part[i] = part.at(i), a.outputs[i] = outputs.at(i),
        a.out_token[i] = out_token.at(i);
    a.tokens = tokens, a.inputs = inputs, a.x_token = x_token, a.layer = layer;
    a.rows = {(const memos_engine::LoraPart* const*)lists.at(0),
              (const int32_t*)lists.at(1),
              (const int32_t*)lists.at(2),
              (const int32_t*)lists.at(3),
              (const float*)lists.at(4),
              sizes.at(0),
              sizes.at(1),
              sizes.at(2),
              sizes.at(3)};
    check(memos_engine::cuda::lora_apply(a, max_rank, (cudaStream_t)stream), "lora_apply");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels; memos_engine.ops.cuda is the way in";
    m.def("append_kv", &py_append_kv);
    m.def("splice_kv", &py_splice_kv);
    m.def("lora_apply", &py_lora_apply);
    m.attr("LORA_MAX_RANK") = memos_engine::cuda::kLoraMostRank;
}
