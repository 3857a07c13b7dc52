// memos_engine._cpu: pointers come as integers (tensor.data_ptr()), sizes and strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_kv_write.h"
#include "memos_engine/stack.h"

namespace py = pybind11;
using namespace memos_engine;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using Size = int64_t;

template <class F>
int unlocked(F&& f) {
    py::gil_scoped_release release;
    return static_cast<int>(f());
}

int py_paged_attention(Address q, Address out, Address lse, Address k, Address v, Address block_table,
                       Address query_start, Address seq_lens, Address q_pos, int q_dtype, int kv_dtype,
                       Size tokens, Size requests, Size heads, Size kv_heads, Size head_dim, Size blocks,
                       Size page, Size max_blocks, Size table_stride, Size q_token, Size q_head,
                       Size out_token, Size out_head, Size k_block, Size k_token, Size k_head, Size v_block,
                       Size v_token, Size v_head, Size window, float sm_scale, Address k_scale,
                       Address v_scale, int threads) {
    const Attention args = {at<void>(q),
                            at<void>(out),
                            at<float>(lse),
                            at<void>(k),
                            at<void>(v),
                            at<int32_t>(block_table),
                            at<int32_t>(query_start),
                            at<int32_t>(seq_lens),
                            at<int32_t>(q_pos),
                            static_cast<DType>(q_dtype),
                            static_cast<DType>(kv_dtype),
                            tokens,
                            requests,
                            heads,
                            kv_heads,
                            head_dim,
                            blocks,
                            page,
                            max_blocks,
                            table_stride,
                            q_token,
                            q_head,
                            out_token,
                            out_head,
                            k_block,
                            k_token,
                            k_head,
                            v_block,
                            v_token,
                            v_head,
                            window,
                            sm_scale,
                            at<float>(k_scale),
                            at<float>(v_scale)};
    return unlocked([&] { return paged_attention(args, threads); });
}

int py_attention_probe(Address q, Address k, Address query_start, Address q_pos, Address lse, Address slot,
                       Address key_pos, Address key_start, Address weight, Address scores, int q_dtype,
                       int kv_dtype, Size tokens, Size requests, Size keys, Size heads, Size kv_heads,
                       Size head_dim, Size blocks, Size page, Size q_token, Size q_head, Size k_block,
                       Size k_token, Size k_head, Size window, float sm_scale, Address k_scale, int threads) {
    const Probe args = {at<void>(q),
                        at<void>(k),
                        at<int32_t>(query_start),
                        at<int32_t>(q_pos),
                        at<float>(lse),
                        at<int64_t>(slot),
                        at<int32_t>(key_pos),
                        at<int32_t>(key_start),
                        at<float>(weight),
                        at<float>(scores),
                        static_cast<DType>(q_dtype),
                        static_cast<DType>(kv_dtype),
                        tokens,
                        requests,
                        keys,
                        heads,
                        kv_heads,
                        head_dim,
                        blocks,
                        page,
                        q_token,
                        q_head,
                        k_block,
                        k_token,
                        k_head,
                        window,
                        sm_scale,
                        at<float>(k_scale)};
    return unlocked([&] { return attention_probe(args, threads); });
}

int py_write_kv(ME_KV_WRITE_PARAMETERS, int threads) {
    const KvWrite args = ME_KV_WRITE_ARGUMENTS;
    return unlocked([&] { return write_kv(args, threads); });
}

int py_rope(Address x, Address positions, Address cos_sin, int dtype, Size tokens, Size heads, Size head_dim,
            Size token, Size head, Size max_position, Size rotary_dim, bool interleaved, int threads) {
    const Rope args = {at<void>(x),
                       at<int32_t>(positions),
                       at<float>(cos_sin),
                       static_cast<DType>(dtype),
                       tokens,
                       heads,
                       head_dim,
                       token,
                       head,
                       max_position,
                       rotary_dim,
                       interleaved};
    return unlocked([&] { return rope(args, threads); });
}

void py_rms_norm(Address x, Address weight, Address residual, Address out, int dtype, int weight_dtype,
                 Size tokens, Size hidden, Size x_token, Size residual_token, Size out_token, float eps,
                 int threads) {
    const RmsNorm args = {at<void>(x),
                          at<void>(weight),
                          at<void>(residual),
                          at<void>(out),
                          static_cast<DType>(dtype),
                          static_cast<DType>(weight_dtype),
                          tokens,
                          hidden,
                          x_token,
                          residual_token,
                          out_token,
                          eps};
    unlocked([&] { return rms_norm(args, threads), 0; });
}

void py_silu_mul(Address gate, Address up, Address out, int dtype, Size tokens, Size width, Size gate_token,
                 Size up_token, Size out_token, int threads) {
    const SiluMul args = {at<void>(gate), at<void>(up), at<void>(out), static_cast<DType>(dtype),
                          tokens,         width,        gate_token,    up_token,
                          out_token};
    unlocked([&] { return silu_mul(args, threads), 0; });
}

int py_linear(Address x, Address weight, Address out, int dtype, Size tokens, Size inputs, Size outputs,
              Size x_token, Size weight_row, Size out_token, Address scale, int threads) {
    const Linear args = {at<void>(x), at<void>(weight), at<void>(out),   static_cast<DType>(dtype),
                         tokens,      inputs,           outputs,         x_token,
                         weight_row,  out_token,        at<float>(scale)};
    return unlocked([&] { return linear(args, threads); });
}

// One layer's pointers in the order of StackLayer, then max_position, rotary_dim, window.
StackLayer stack_layer(const std::vector<Address>& p, Size max_position, Size rotary_dim, Size window) {
    return {at<void>(p.at(0)),
            at<void>(p.at(1)),
            at<void>(p.at(2)),
            at<void>(p.at(3)),
            at<void>(p.at(4)),
            at<void>(p.at(5)),
            at<void>(p.at(6)),
            at<void>(p.at(7)),
            at<void>(p.at(8)),
            at<void>(p.at(9)),
            at<void>(p.at(10)),
            at<void>(p.at(11)),
            at<void>(p.at(12)),
            at<void>(p.at(13)),
            at<float>(p.at(14)),
            at<float>(p.at(15)),
            at<float>(p.at(16)),
            at<float>(p.at(17)),
            at<float>(p.at(18)),
            at<float>(p.at(19)),
            at<float>(p.at(20)),
            at<float>(p.at(21)),
            max_position,
            rotary_dim,
            window};
}

LoraRows lora_rows(const std::vector<Address>& p, Size segments, Size count, Size slots, Size layers) {
    return {at<const LoraPart* const>(p.at(0)),
            at<int32_t>(p.at(1)),
            at<int32_t>(p.at(2)),
            at<int32_t>(p.at(3)),
            at<float>(p.at(4)),
            segments,
            count,
            slots,
            layers};
}

int py_lora_apply(Address x, const std::vector<Address>& out, const std::vector<int>& part,
                  const std::vector<Size>& outputs, const std::vector<Size>& out_token, int dtype,
                  Size tokens, Size inputs, Size x_token, Size layer, const LoraRows& rows, int threads) {
    Lora args = {};
    args.x = at<void>(x), args.parts = static_cast<int>(out.size()), args.dtype = static_cast<DType>(dtype);
    for (size_t i = 0; i < out.size() && i < 3; ++i)
        args.out[i] = at<void>(out[i]), args.part[i] = part.at(i), args.outputs[i] = outputs.at(i),
        args.out_token[i] = out_token.at(i);
    args.tokens = tokens, args.inputs = inputs, args.x_token = x_token, args.layer = layer, args.rows = rows;
    return unlocked([&] { return lora_apply(args, threads); });
}

// modules: [count] of LoraPack.
void py_lora_pack(Address modules, Size count, int from, int to, int threads) {
    unlocked([&] {
        return lora_pack(at<LoraPack>(modules), count, static_cast<DType>(from), static_cast<DType>(to),
                         threads),
               0;
    });
}

bool py_lora_copy(Address from, Address to, Size n, int from_dtype, int to_dtype, int threads) {
    return unlocked([&] {
        return lora_copy(at<void>(from), at<void>(to), n, static_cast<DType>(from_dtype),
                         static_cast<DType>(to_dtype), threads);
    });
}

int py_run_stack(const Stack& stack, Address hidden, Address out, Address rows, Address slot,
                 Address positions, Address query_start, Address block_table, Address seq_lens, Size tokens,
                 Size wanted, Size requests, Size max_blocks, Size table_stride, const LoraRows* lora,
                 int threads) {
    const StackCall call = {at<void>(hidden),
                            at<void>(out),
                            at<int64_t>(rows),
                            at<int64_t>(slot),
                            at<int32_t>(positions),
                            at<int32_t>(query_start),
                            at<int32_t>(block_table),
                            at<int32_t>(seq_lens),
                            tokens,
                            wanted,
                            requests,
                            max_blocks,
                            table_stride,
                            lora ? *lora : LoraRows{}};
    return unlocked([&] { return run_stack(stack, call, threads); });
}

py::list isa_levels() {
    py::list levels;
    for (int i = 0; isa_name(i); ++i) levels.append(py::make_tuple(isa_name(i), isa_supported(i)));
    return levels;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels; memos_engine.ops.cpu is the way in";
    m.def("paged_attention", &py_paged_attention);
    m.def("attention_probe", &py_attention_probe);
    m.def("write_kv", &py_write_kv);
    m.def("rope", &py_rope);
    m.def("rms_norm", &py_rms_norm);
    m.def("silu_mul", &py_silu_mul);
    m.def("linear", &py_linear);
    m.def("lora_apply", &py_lora_apply);
    m.def("lora_pack", &py_lora_pack);
    m.def("lora_copy", &py_lora_copy);
    py::class_<LoraRows>(m, "LoraRows").def(py::init(&lora_rows));
    py::class_<Stack>(m, "Stack")
        .def(py::init([](Address final_norm, int dtype, int norm_dtype, Size hidden, Size inner, Size heads,
                         Size kv_heads, Size head_dim, float eps, float sm_scale, Address k_pages,
                         Address v_pages, Size blocks, Size page, const std::vector<Size>& strides,
                         int page_dtype, Address k_scale, Address v_scale, Size k_scale_layer,
                         Size v_scale_layer) {
            return Stack{{},
                         at<void>(final_norm),
                         static_cast<DType>(dtype),
                         static_cast<DType>(norm_dtype),
                         hidden,
                         inner,
                         heads,
                         kv_heads,
                         head_dim,
                         eps,
                         sm_scale,
                         at<void>(k_pages),
                         at<void>(v_pages),
                         blocks,
                         page,
                         strides.at(0),
                         strides.at(1),
                         strides.at(2),
                         strides.at(3),
                         strides.at(4),
                         strides.at(5),
                         strides.at(6),
                         strides.at(7),
                         static_cast<DType>(page_dtype),
                         at<float>(k_scale),
                         at<float>(v_scale),
                         k_scale_layer,
                         v_scale_layer};
        }))
        .def("add_layer",
             [](Stack& s, const std::vector<Address>& pointers, Size max_position, Size rotary_dim,
                Size window) { s.layers.push_back(stack_layer(pointers, max_position, rotary_dim, window)); })
        .def("run", &py_run_stack);
    m.def("isa_levels", &isa_levels, "[(name, supported here)], worst first");
    m.def("isa_select", &isa_select);
    m.def("isa_selected", &isa_selected);
}
