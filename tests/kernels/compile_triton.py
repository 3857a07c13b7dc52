"""Compiles every Triton kernel to machine code for sm_80 and sm_90, as its wrapper would launch it: no GPU.

Tensors are on the meta device and launches are replaced by compilations. Run in a process of its own, without
the interpreter; prints one JSON line for each kernel and target.
"""

from __future__ import annotations

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from memos_engine.ops import triton as backend
from memos_engine.ops.lora import LoraRows, LoraTable

TARGETS = [80, 90]
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def compile_instead(function, grid):
    def launch(*args, **named):
        options = {
            name: named.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in named
        }
        bound = dict(zip(function.arg_names, args, strict=False)) | named
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(function.params):
            value = bound[parameter.name]
            aligned = isinstance(value, torch.Tensor)
            if parameter.is_constexpr:
                signature[parameter.name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name], aligned = "i32", value % 16 == 0
            if aligned and not parameter.is_constexpr:
                attributes[(index,)] = [["tt.divisibility", 16]]
        for target in TARGETS:
            source = ASTSource(function, signature, constants, attributes)
            made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            row = {
                "kernel": function.__name__,
                "target": target,
                "types": sorted({t for t in signature.values() if t.startswith("*")}),
                "shared": made.metadata.shared,
                "tensor_cores": any(word in made.asm["ptx"] for word in ("mma.sync", "wgmma")),
                "fused_adds": "fma.rn.f32" in made.asm["ptx"],
                "bytes": len(made.asm["cubin"]),
            }
            print(json.dumps(row), flush=True)

    return launch


def meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def paged(dtype, kv_heads, dim, int8):
    """Pages of one layer, and their scales where they are int8."""
    scale = meta(50, 16, kv_heads, dtype=torch.float32) if int8 else None
    return meta(50, 16, kv_heads, dim, dtype=torch.int8 if int8 else dtype), scale


def attend(dtype, kv_heads, group, dim, window, int8=False):
    q, (pages, scale) = meta(400, kv_heads * group, dim, dtype=dtype), paged(dtype, kv_heads, dim, int8)
    lse = meta(400, kv_heads * group, dtype=torch.float32)
    table, starts, lengths, positions = meta(5, 99), meta(6), meta(5), meta(400)
    backend.paged_attention(
        q, pages, pages, table, starts, lengths, positions, 0.1, window, None, lse,
        k_page_scale=scale, v_page_scale=scale,
    )  # fmt: skip


def probe(dtype, kv_heads, group, dim, window, int8=False):
    q, (pages, scale) = meta(400, kv_heads * group, dim, dtype=dtype), paged(dtype, kv_heads, dim, int8)
    lse, weight = (meta(n, h, dtype=torch.float32) for n, h in ((400, kv_heads * group), (700, kv_heads)))
    slots, scores = meta(700, dtype=torch.int64), meta(700, dtype=torch.float32)
    starts, positions = meta(6), meta(400)
    backend.attention_probe(
        q, pages, starts, positions, lse, slots, meta(700), starts, weight, scores, 0.1, window, scale
    )


def lora(tokens):
    table = LoraTable(8, 4, 64, "meta")
    x, outs = meta(tokens, 4096, dtype=torch.bfloat16), [meta(tokens, 12288, dtype=torch.bfloat16)] * 2
    rows = LoraRows(meta(tokens), meta(33), meta(32), meta(32, dtype=torch.float32))
    backend.lora_apply(x, outs, table, 1, ("gate", "up"), rows)


def main():
    JITFunction.__getitem__ = compile_instead
    attend(torch.bfloat16, 8, 4, 128, 0)
    probe(torch.bfloat16, 8, 4, 128, 0)
    attend(torch.bfloat16, 8, 4, 128, 0, int8=True)
    probe(torch.bfloat16, 8, 4, 128, 0, int8=True)
    positions, slots = meta(400), meta(400, dtype=torch.int64)
    k, table = meta(2, 400, 8, 128, dtype=torch.bfloat16), meta(512, 128, dtype=torch.float32)
    pages = meta(2, 50, 16, 8, 128, dtype=torch.bfloat16)
    backend.splice_kv(k, k, pages, pages, slots, positions, table)
    eight, k_scale = meta(*k.shape, dtype=torch.int8), meta(2, 7, 8, 128, dtype=torch.float32)
    v_scale = meta(2, 400, 8, dtype=torch.float32)
    backend.splice_kv(eight, eight, pages, pages, slots, positions, table, False, k_scale, v_scale, 5)
    backend.append_kv(k[0], k[0], pages[0], pages[0], slots, positions, table)
    narrow, scale = meta(2, 50, 16, 8, 128, dtype=torch.int8), meta(2, 50, 16, 8, dtype=torch.float32)
    scales = {"k_page_scale": scale, "v_page_scale": scale}
    backend.splice_kv(k, k, narrow, narrow, slots, positions, table, **scales)
    scales = dict.fromkeys(scales, scale[0])
    backend.append_kv(k[0], k[0], narrow[0], narrow[0], slots, positions, table, **scales)
    backend.rope(k[0], positions, table)
    x = meta(400, 4096, dtype=torch.bfloat16)
    backend.rms_norm(x, meta(4096, dtype=torch.float32), 1e-5, x)
    backend.rms_norm(meta(400, 128, dtype=torch.float16), meta(128, dtype=torch.float16), 1e-5)
    backend.silu_mul(x, x)
    lora(64)
    lora(400)
    TARGETS.remove(90)  # what follows differs in no instruction that matters
    attend(torch.bfloat16, 1, 8, 256, 512)
    attend(torch.float32, 3, 3, 64, 0)
    probe(torch.bfloat16, 1, 8, 256, 512)
    probe(torch.float32, 3, 3, 64, 0)


if __name__ == "__main__":
    main()
