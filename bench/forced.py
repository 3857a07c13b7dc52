"""What a way to use stored KV makes of one prompt: one forward for all ways, scored teacher-forced.

The selected rows, the query's and the reference answer's run together: K and V are written before attention
and a row sees the keys at positions up to its own, so a recomputed token sees the recomputed ones before it
and none behind it (the published CacheBlend code masks scattered rows as if they were the last ones, and lets
them see later tokens). Nothing here enters the prefix index: nothing is reused between prompts or methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memos_engine.config import SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.layers import KVCapture
from memos_engine.decoder.sequence import Sequence as Request
from memos_engine.decoder.sequence import Span, TextSpan
from memos_engine.errors import MemosEngineError

FORCED = 16  # reference tokens whose distributions are compared
ANSWER = 24  # tokens of a greedy answer
ROWS = 2048  # of one forward: with more, its buffers are mapped afresh in every layer, which costs more


@dataclass(frozen=True)
class Plan:
    """What a method does with a prompt. spans: the whole prompt, the query last; selected: ascending
    positions inside spliced spans to compute again; recomputed: memory tokens that are computed."""

    spans: tuple[Span, ...]
    selected: tuple[int, ...] = ()
    recomputed: int = 0


@dataclass(frozen=True)
class Reference:
    """A full prefill and its greedy answer.

    answer: up to ANSWER ids, a stop token included; log_probs `[min(FORCED, answer), vocab] float64`; k, v
    `[layers, prompt, kv_heads, head_dim]`, K before RoPE: what a perfect splice would hold.
    """

    answer: tuple[int, ...]
    log_probs: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Outcome:
    """kl, agree: one per compared token; answer: the way's own greedy ids."""

    kl: tuple[float, ...]
    agree: tuple[bool, ...]
    answer: tuple[int, ...]
    recomputed: int


@contextmanager
def laid_out(engine: DecoderEngine, plans: Sequence[Plan]) -> Iterator[list[Request]]:
    """Requests with pages for prompt and answer and their records spliced; the pages go back at the end."""
    requests: list[Request] = []
    try:
        for plan in plans:
            request = Request(plan.spans, SamplingParams())
            engine.batcher.check(request)
            requests.append(request)
            request.blocks = engine.pool.allocate(_pages(engine, request.prompt_len))
            engine.runner.splice(request, request.layout(0))
        yield requests
    finally:
        for request in requests:
            engine.batcher.drop(request)


def forward(
    engine: DecoderEngine,
    requests: Sequence[Request],
    rows: Sequence[Sequence[int]],
    wanted: Sequence[int],
    capture: KVCapture | None = None,
) -> list[Tensor]:
    """Computes rows (ascending positions) of several requests, as many requests at once as ROWS allows.

    Returns logits `[wanted, vocab] float32` of each request's last `wanted` rows. A capture takes all rows,
    one request behind the other.
    """
    model = engine.runner.model
    out: list[Tensor] = []
    for run in _runs([len(own) for own in rows], ROWS):
        step = engine.runner.step_input([(requests[i], list(rows[i])) for i in run])
        ends = step.query_start[1:].tolist()
        last = [torch.arange(end - wanted[i], end) for i, end in zip(run, ends, strict=True)]
        hidden = model.forward(step, engine.runner.cache, rows=torch.cat(last), capture=capture)
        out += torch.split(model.logits(hidden), [wanted[i] for i in run])
        if capture is not None:
            capture.first += ends[-1]
    return out


def decode(
    engine: DecoderEngine, requests: Sequence[Request], stop: Sequence[int], keep: int = 0
) -> list[list[Tensor]]:
    """Goes on greedily, all requests together, until a stop token or ANSWER tokens; each request's newest
    token has not run yet. Returns the logits `[vocab]` of the first `keep` new tokens of each."""
    kept: list[list[Tensor]] = [[] for _ in requests]
    while True:
        live = [i for i, r in enumerate(requests) if len(r.output) < ANSWER and r.tokens[-1] not in set(stop)]
        if not live:
            return kept
        batch = [requests[i] for i in live]
        newest = [[len(request.tokens) - 1] for request in batch]
        for i, (logits,) in zip(live, forward(engine, batch, newest, [1] * len(batch)), strict=True):
            requests[i].tokens.append(int(logits.argmax()))
            if len(kept[i]) < keep:
                kept[i].append(logits)


def references(
    engine: DecoderEngine, prompts: Sequence[tuple[int, ...]], stop: Sequence[int]
) -> list[Reference]:
    """Full prefill of each prompt and its greedy answer; prompts that fit into the pool together share the
    decoding steps."""
    plans = [Plan((TextSpan(ids),)) for ids in prompts]
    return [found for group in _groups(engine, plans) for found in _references(engine, group, stop)]


def _references(engine: DecoderEngine, plans: Sequence[Plan], stop: Sequence[int]) -> list[Reference]:
    with laid_out(engine, plans) as requests:
        sizes = [request.prompt_len for request in requests]
        capture = KVCapture.empty(engine.spec, engine.runner.model.weights, sum(sizes))
        firsts = forward(engine, requests, [r.pending for r in requests], [1] * len(requests), capture)
        for request, (logits,) in zip(requests, firsts, strict=True):
            request.tokens.append(int(logits.argmax()))
        more = decode(engine, requests, stop, keep=FORCED - 1)
        k, v = (torch.split(part, sizes, dim=1) for part in (capture.k, capture.v))
        return [
            Reference(
                tuple(request.output),
                torch.log_softmax(torch.stack([*first, *rest]).double(), dim=-1),
                k[i].contiguous(),
                v[i].contiguous(),
            )
            for i, (request, first, rest) in enumerate(zip(requests, firsts, more, strict=True))
        ]


def evaluate(
    engine: DecoderEngine, plans: Sequence[Plan], against: Sequence[Reference], stop: Sequence[int]
) -> list[Outcome]:
    """Each plan's distributions over the answer of its reference, and its own greedy answer.

    One forward scores as many plans as the pool takes: the answer's tokens run as rows behind the query's.
    As long as a plan picks the reference's token its own answer is that too; what follows is decoded, all
    plans together.
    """
    pairs = iter(zip(plans, against, strict=True))
    out: list[Outcome] = []
    for group in _groups(engine, plans):
        with laid_out(engine, group) as requests:
            scored = [reference for _, (_, reference) in zip(group, pairs, strict=False)]
            rows = []
            for plan, request, reference in zip(group, requests, scored, strict=True):
                request.tokens += reference.answer[:-1]
                answer = range(request.prompt_len, len(request.tokens))
                rows.append([*plan.selected, *request.pending, *answer])
            found = forward(engine, requests, rows, [len(reference.answer) for reference in scored])
            agreed = []
            for request, reference, logits in zip(requests, scored, found, strict=True):
                picks = logits.argmax(dim=-1).tolist()
                agreed.append([a == b for a, b in zip(picks, reference.answer, strict=True)])
                kept = agreed[-1].index(False) + 1 if False in agreed[-1] else len(picks)
                request.tokens[request.prompt_len :] = picks[:kept]
            decode(engine, requests, stop)
            for plan, request, reference, logits, agree in zip(
                group, requests, scored, found, agreed, strict=True
            ):
                kl = kl_divergence(reference.log_probs, logits[:FORCED])
                out.append(Outcome(tuple(kl), tuple(agree[:FORCED]), tuple(request.output), plan.recomputed))
    return out


def kl_divergence(log_probs: Tensor, logits: Tensor) -> list[float]:
    """KL(reference || method) of each row, in nats. log_probs `[n, vocab] float64`, logits `[n, vocab]`."""
    other = torch.log_softmax(logits.double(), dim=-1)
    divergence = F.kl_div(other, log_probs, reduction="none", log_target=True).sum(dim=-1)
    return [max(0.0, float(value)) for value in divergence]  # rounding can leave -1e-16


def require_exact(
    engine: DecoderEngine, plan: Plan, reference: Reference, stop: Sequence[int], bound: float = 1e-6
) -> None:
    """Refuses to go on unless a plan that computes everything gives what full prefill gives."""
    (outcome,) = evaluate(engine, [plan], [reference], stop)
    worst = max(outcome.kl)
    if not worst < bound:
        raise MemosEngineError(
            f"Recomputing every memory token gives another distribution than full prefill (KL {worst:.2e}, "
            f"allowed {bound:.0e}): the decoder or its kernels are broken on this machine, and no figure of "
            "this bench would mean anything. Try MEMOS_ENGINE_CPU_ISA=reference and report it."
        )


def _pages(engine: DecoderEngine, prompt: int) -> int:
    return -(-(prompt + ANSWER) // engine.pool.page)


def _groups(engine: DecoderEngine, plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """Plans in runs that fit into the pool together."""
    sizes = [_pages(engine, sum(len(span.token_ids) for span in plan.spans)) for plan in plans]
    for run in _runs(sizes, engine.pool.available):
        yield [plans[i] for i in run]


def _runs(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices in runs whose sizes sum to at most `most`; what is larger stands alone."""
    runs: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = most
        runs[-1].append(index)
        room -= size
    return runs
