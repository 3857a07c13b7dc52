"""A whole model with random weights on a device: decoding, prefill and first token against their floors, and
CUDA graphs against the eager way.

python -m memos_engine.bench.gpu_model DEVICE SHAPES TARGET
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from memos_engine.bench.gpu_lora import rows_of, table_of
from memos_engine.bench.gpu_timing import Rows, ceilings_of, median_ms
from memos_engine.bench.limits import Limits
from memos_engine.bench.options import Options
from memos_engine.bench.target import open_target, random_weights
from torch import Tensor

from memos_engine.decoder.graphs import GraphRunner, graph_runner
from memos_engine.decoder.kvcache import KVCache
from memos_engine.decoder.layers import StepInput
from memos_engine.decoder.model import PagedDecoder
from memos_engine.ops.lora import LoraTable

PAGE = 16


class Again:
    """Stands for CUDA's recorder on a CPU: a graph is the same work again."""

    def record(self, work):  # type: ignore[no-untyped-def]
        out = work()
        return (lambda: out.copy_(work())), out


def main() -> None:
    device, shapes, target = torch.device(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    small = device.type == "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    with open_target(Options(random_weights=shapes)) as opened:
        spec = opened.spec
    limits = Limits(spec, str(dtype)[6:], ceilings_of(device))
    rows = Rows(target, shapes=shapes, ceilings=limits.ceilings.public())
    model = PagedDecoder(spec, random_weights(spec, dtype, device))
    # requests, keys before the step, rows of the step
    steps = [(1, 40, 1), (3, 20, 1), (1, 0, 50), (1, 30, 9)] if small else [
        (1, 1023, 1), (1, 6063, 1), (8, 1023, 1), (32, 1023, 1), (1, 0, 167), (1, 1056, 32), (1, 6064, 167),
        (1, 0, 1056), (1, 0, 6064),
    ]  # fmt: skip
    tokens = max(requests * -(-(keys + count) // PAGE) * PAGE for requests, keys, count in steps)
    cache = KVCache(spec, tokens // PAGE + 1, PAGE, dtype, device)
    for pages in (cache.k, cache.v):
        pages[:, 1:].normal_()
    graphs = GraphRunner(model, cache, recorder=Again()) if small else graph_runner(model, cache)
    for requests, keys, count in steps:
        _measure(rows, model, cache, graphs, limits, requests, keys, count)
    hidden, inner = model.weights.layers[0].down.shape
    table = table_of((16,) * 4, hidden, {"gate": inner, "up": inner}, spec.num_layers, dtype, device)
    for requests, keys, count in steps:
        if count == 1:
            _measure(rows, model, cache, graphs, limits, requests, keys, count, table)
    wrong = [row for row in rows.rows if row["graph_differs"] is True]
    print(f"{len(wrong)} graphs differ" if wrong else f"{len(rows.rows)} rows")
    raise SystemExit(bool(wrong))


def step_input(cache: KVCache, vocab: int, requests: int, keys: int, count: int) -> StepInput:
    """`count` new rows behind `keys` keys for each request, in shuffled pages."""
    width, device = -(-(keys + count) // PAGE), cache.k.device
    table = (torch.randperm(cache.k.shape[1] - 1)[: requests * width] + 1).view(requests, width)
    at = torch.arange(keys, keys + count)
    slots = table[:, at // PAGE] * PAGE + at % PAGE
    ids = torch.randint(0, vocab, (requests * count,))
    return StepInput(
        token_ids=ids.to(device),
        positions=at.repeat(requests).int().to(device),
        slot_mapping=slots.flatten().to(device),
        query_start=(torch.arange(requests + 1) * count).int().to(device),
        block_table=table.int().to(device),
        seq_lens=torch.full((requests,), keys + count, dtype=torch.int32).to(device),
    )


def _measure(
    rows: Rows,
    model: PagedDecoder,
    cache: KVCache,
    graphs: GraphRunner | None,
    limits: Limits,
    requests: int,
    keys: int,
    count: int,
    table: LoraTable | None = None,
) -> None:
    """First tokens on the host: the forward, logits of the last rows, argmax. table: of adapters for all rows
    but the last of several."""
    device = cache.k.device
    step = step_input(cache, model.spec.vocab_size, requests, keys, count)
    if table is not None:
        slots = [i % len(table.fills) for i in range(requests)]
        slots[-1] = slots[-1] if requests == 1 else -1
        step = replace(step, lora=(table, rows_of(slots, device)))
    last = None if count == 1 else step.query_start[1:].long() - 1

    def eager() -> Tensor:
        return model.logits(model.forward(step, cache, rows=last))

    def graphed() -> Tensor | None:
        hidden = None if graphs is None else graphs.run(step, last)
        return None if hidden is None else model.logits(hidden)

    plain, by_graph = eager(), graphed()
    error = None if by_graph is None else ((by_graph - plain).norm() / plain.norm()).item()
    n = 5 if count > 1000 or device.type == "cpu" else 20
    limit = limits.forward(count, keys, requests)
    eager_ms = median_ms(lambda: eager().argmax(-1).tolist(), device, n)
    graph_ms = None
    if by_graph is not None:
        graph_ms = median_ms(lambda: graphed().argmax(-1).tolist(), device, n)  # type: ignore[union-attr]
    best = min(eager_ms, graph_ms or eager_ms)
    rows.add(
        op="decode" if count == 1 else "prefill",
        shape=f"{requests} x {count} rows behind {keys} keys" + (", adapters" if table else ""),
        backend=model.ops.NAME,
        ms_eager=eager_ms,
        ms_graph=graph_ms,
        ms_limit=limit,
        share_of_limit=limit / best,
        graph_error=error,
        # Other row counts take other matrix kernels, so that bits may differ, by no more than rounding.
        graph_differs=None if error is None else error > 0.03,
    )


if __name__ == "__main__":
    main()
