"""The kernels alone: pages, a KV record and your own model code. No engine, no store, no SQLite.

    python examples/custom_stack.py [model folder or alias]

A document's keys and values are caught in a plain transformers model and kept as a record. A question is then
computed behind the spliced record, layer by layer in plain torch around two of our ops.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memos_engine import ops
from memos_engine.decoder.blocks import BlockPool
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.models import resolve

PAGE, BLOCKS = 16, 64
DOCUMENT = "<|im_start|>user\nThe code of the blue box is 4862.<|im_end|>\n"
QUESTION = "<|im_start|>user\nWhat is the code of the blue box?<|im_end|>\n<|im_start|>assistant\n"


@torch.inference_mode()
def main(model: str = "smollm2") -> tuple[torch.Tensor, torch.Tensor]:
    folder = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    document, question = (tokenizer(text, return_tensors="pt").input_ids for text in (DOCUMENT, QUESTION))
    layers, kv_heads = hf.model.layers, hf.config.num_key_value_heads
    dim = layers[0].self_attn.head_dim

    # 1. A record from plain torch: what the K and V projections give, K before RoPE.
    caught: dict[torch.nn.Module, torch.Tensor] = {}
    projections = [p for layer in layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    hooks = [p.register_forward_hook(lambda p, _, out: caught.update({p: out[0]})) for p in projections]
    hf(document)
    for hook in hooks:
        hook.remove()
    k, v = (
        torch.stack([caught[p].view(-1, kv_heads, dim) for p in projections[i::2]]).clone() for i in (0, 1)
    )
    record = KVRecord(k, v, tuple(document[0].tolist()), identity="mine", left=ids_digest(()))

    # 2. Pages for document and question; the record goes in, its keys rotated to their positions.
    known, total = record.num_tokens, record.num_tokens + question.shape[1]
    blocks = torch.tensor(BlockPool(BLOCKS, PAGE).allocate(-(-total // PAGE)))
    positions = torch.arange(total, dtype=torch.int32)
    slots = blocks[positions // PAGE] * PAGE + positions % PAGE
    k_pages, v_pages = (torch.zeros(len(layers), BLOCKS, PAGE, kv_heads, dim) for _ in range(2))
    table = ops.rope_table(hf.model.rotary_emb.inv_freq, 1024)
    ops.splice_kv(record.k, record.v, k_pages, v_pages, slots[:known], positions[:known], table)

    # 3. The question alone, through your own layers.
    rows, x = positions[known:], hf.model.embed_tokens(question[0])
    batch = blocks.int()[None], torch.tensor([0, len(rows)]).int(), torch.tensor([total]).int(), rows
    for i, layer in enumerate(layers):
        attn, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(h).view(len(rows), -1, dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        ops.rope(q, rows, table)
        ops.append_kv(k, v, k_pages[i], v_pages[i], slots[known:], rows, table)
        out = ops.paged_attention(q, k_pages[i], v_pages[i], *batch, dim**-0.5)
        x = x + attn.o_proj(out.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = hf.lm_head(hf.model.norm(x[-1]))

    truth = hf(torch.cat([document, question], dim=1)).logits[0, -1]
    found, wanted = (tokenizer.decode(row.argmax()) for row in (logits, truth))
    print(f"next token {found!r}, by full prefill {wanted!r}")
    print(f"largest difference of a logit {float((logits - truth).abs().max()):.1e}; {known} tokens spliced")
    return logits, truth


if __name__ == "__main__":
    main(*sys.argv[1:2])
