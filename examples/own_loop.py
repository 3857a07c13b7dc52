"""The parts without the engine: your own server keeps its loop and takes the paged cache and KV records.

    python examples/own_loop.py [model folder or alias]

A document is encoded once; every later request splices its stored keys and values behind the system prompt
and computes only its own question. No store, no SQLite, no retrieval.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer

from memos_engine.config import DecoderConfig, SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.models import resolve

DOCUMENT = "The key of Gull Cottage hangs in a blue box beside the back door. The code of the box is 4862."


def main(model: str = "smollm2") -> list[str]:
    folder = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = ModelSpec.from_folder(folder)
    engine = DecoderEngine(
        spec, Weights.from_folder(folder, spec, torch.float32), DecoderConfig(dtype="float32")
    )

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    head = ids("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    memory = ids(f"<|im_start|>user\n{DOCUMENT}<|im_end|>\n")
    k, v = engine.encode_span(head, memory)  # once, offline; K comes unrotated
    record = KVRecord(k, v, memory, identity="mine", left=ids_digest(head))

    answers = []
    for question in ("What is the code of the box?", "What colour is the box?"):
        tail = ids(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        request = engine.add_request(
            [TextSpan(head), KVSpan(record), TextSpan(tail)],
            SamplingParams(max_new_tokens=24, stop_token_ids=(tokenizer.eos_token_id,)),
        )
        while request.finish_reason is None:
            engine.step()  # your loop: other work goes between the steps
        answers.append(tokenizer.decode(request.output, skip_special_tokens=True))
        s = request.stats
        print(f"{question}  {answers[-1]}")
        print(f"  spliced {s.spliced_tokens}, reused {s.prefix_tokens}, computed {s.computed_tokens} tokens")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:2])
