"""Settings as frozen dataclasses, validated when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memos_engine.errors import MemosEngineError

DTYPES = ("auto", "float32", "bfloat16")
FORMS = ("auto", "text", "kv", "none")
KV_DTYPES = ("auto", "int8")
CONTEXTS = ("auto", "own", "neutral")
PAGE_DTYPES = ("auto", "int8")
SELECTIONS = ("attention", "rank")
EVICTIONS = ("value", "lru")
# Chosen on invented facts, apart from the demo's: of 48 questions SmolLM2-135M answers 34 from memories as
# text, against 26 with its template's own prompt, and splicing loses none of them (against 9).
SYSTEM_PROMPT = (
    "You are a helpful assistant with a memory. Use what the user told you before to answer the question."
)


class ConfigError(MemosEngineError, ValueError):
    """A setting is out of range; the message says which and what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class DecoderConfig:
    """How the decoder runs.

    dtype: compute dtype; auto takes bfloat16 where the machine computes in it, else float32. page_dtype: auto
    for the same, or int8 with a scale for each token and head: half of bfloat16's bytes, for a small loss.
    page: tokens a KV page holds. pool_tokens: KV pool size in tokens (None: the model's window, at most
    4096). max_batch: most requests that run at once. prefill_chunk: most prompt rows of one forward;
    prefill_beside: the same where other requests decode in it, and wait for it. int8_decode: steps of up to 8
    rows, and the output head, read weights rounded to 8 bits, beside the whole ones: faster on a CPU, for
    half the weights' memory and a small loss (docs/benchmarks.md); elsewhere it changes nothing.
    share_spliced: requests that splice the same records to the same positions share those pages.
    """

    dtype: str = "auto"
    page_dtype: str = "auto"
    page: int = 16
    pool_tokens: int | None = None
    prefill_chunk: int = 1024
    prefill_beside: int = 256
    max_batch: int = 32
    int8_decode: bool = False
    share_spliced: bool = True

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"dtype={self.dtype!r}: use one of {', '.join(DTYPES)}.")
        _require(self.page_dtype in PAGE_DTYPES, f"page_dtype={self.page_dtype!r}: auto or int8.")
        _require(self.page >= 1, f"page={self.page}: a page holds at least one token (16 is usual).")
        _require(self.pool_tokens is None or self.pool_tokens >= self.page, "pool_tokens: at least one page.")
        _require(self.prefill_chunk >= 1, "prefill_chunk: at least one token.")
        _require(self.prefill_beside >= 1, "prefill_beside: at least one token.")
        _require(self.max_batch >= 1, "max_batch: at least one request.")

    @property
    def resolved_dtype(self) -> str:
        return default_dtype() if self.dtype == "auto" else self.dtype


def default_dtype() -> str:
    """bfloat16 where the CPU (or a CUDA device) has instructions for it, else float32."""
    import torch

    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_available() or capabilities.get("avx512_bf16")
    return "bfloat16" if fast else "float32"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy; seed makes sampling repeatable.

    top_k 0 and top_p 1 switch those filters off. stop_token_ids end the answer and are not part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: must be at least 1.")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature={self.temperature}: must be 0 (greedy) or positive.",
        )
        _require(self.top_k >= 0, f"top_k={self.top_k}: must be 0 (off) or positive.")
        fits = self.seed is None or -(2**63) <= self.seed < 2**63
        _require(fits, f"seed={self.seed}: must fit into 64 bits.")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p}: must be in (0, 1].")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class Recompute:
    """Which part of the spliced memories a request computes again.

    share: memory tokens computed over all memory tokens (r); 1 is full prefill. by: attention (a first pass
    of the query over the stored KV finds what it looks at and what depends on its neighbours) or rank (the
    order that the records bring along, without a first pass). deadline_ms: counted from the request's
    arrival; where the first pass ends later, it gives the first token and nothing is computed again.
    """

    share: float = 0.0
    by: str = "attention"
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.share <= 1, f"recompute share {self.share}: must be between 0 and 1.")
        _require(self.by in SELECTIONS, f"by={self.by!r}: use one of {', '.join(SELECTIONS)}.")
        good = self.deadline_ms is None or (math.isfinite(self.deadline_ms) and self.deadline_ms >= 0)
        _require(good, f"deadline_ms={self.deadline_ms}: must be a number of at least 0, or None.")


@dataclass(frozen=True)
class MemoryConfig:
    """How memories enter a request.

    form: auto (stored KV where there is a usable record, else text), kv, text or none. recompute: share of
    their tokens to compute again, from 0 (fastest) to 1 (full prefill; docs/splicing.md); None: as much as
    the plan finds right. quality_tolerance: share of quality that a request without a budget gives for speed.
    ttft_budget_ms: time until the first token (docs/scheduling.md); None: the best answer. adapters: auto, or
    off: whether a plan may bind one of the owner's promoted adapters by itself (docs/parameter-memory.md).
    max_memories: most memories of one request. min_score: cosine below which a memory is left out.
    distraction: what a thousand memory tokens cost an answer, as a share of what one needed memory is worth:
    memories that promise less stay out; None: as measured (docs/scheduling.md), 0: all that fit enter. build:
    make missing KV records after the reply, off the request's path. kv_dtype: how KV is stored, in the
    model's dtype (auto) or as int8, at about half the bytes of bfloat16. contexts: what stands to the left of
    a memory while its KV for other slots than the first is made: the owner's own memories, neutral
    statements, or auto: own where there are at least 32. host_bytes: records kept in host memory.
    device_bytes: the same on a CUDA device, in front of it. eviction: which of them make way, those of least
    value (value; docs/transformations.md) or those longest unused (lru). canary: share of requests that are
    run again as full prefill, after the reply; where the first token is more than canary_kl nats away in the
    mean, splicing is turned off for the model. background: transform memories between requests, in a thread
    that starts after the first reply (docs/transformations.md); not for a live model, whose weights may
    change at any moment.
    """

    form: str = "auto"
    recompute: float | None = None
    quality_tolerance: float = 0.03
    adapters: str = "auto"
    ttft_budget_ms: float | None = None
    max_memories: int = 4
    min_score: float = 0.15
    distraction: float | None = None
    build: bool = True
    kv_dtype: str = "auto"
    contexts: str = "auto"
    canary: float = 0.0
    canary_kl: float = 0.25
    host_bytes: int = 128 << 20
    device_bytes: int = 512 << 20
    eviction: str = "value"
    background: bool = False

    def __post_init__(self) -> None:
        _require(self.form in FORMS, f"form={self.form!r}: use one of {', '.join(FORMS)}.")
        share, budget = self.recompute, self.ttft_budget_ms
        _require(share is None or 0 <= share <= 1, f"recompute={share}: must be between 0 and 1, or None.")
        _require(self.adapters in ("auto", "off"), f"adapters={self.adapters!r}: use auto or off.")
        _require(0 <= self.quality_tolerance <= 1, "quality_tolerance: a share, between 0 and 1.")
        good = budget is None or (math.isfinite(budget) and budget > 0)
        _require(good, f"ttft_budget_ms={budget}: milliseconds, more than 0, or None for the best answer.")
        _require(self.max_memories >= 0, "max_memories: must not be negative.")
        _require(-1 <= self.min_score <= 1, "min_score: a cosine, so between -1 and 1.")
        cost = self.distraction
        good = cost is None or (math.isfinite(cost) and cost >= 0)
        _require(good, f"distraction={cost}: must not be negative; None: as measured.")
        _require(
            self.kv_dtype in KV_DTYPES, f"kv_dtype={self.kv_dtype!r}: use one of {', '.join(KV_DTYPES)}."
        )
        _require(self.contexts in CONTEXTS, f"contexts={self.contexts!r}: use one of {', '.join(CONTEXTS)}.")
        _require(0 <= self.canary <= 1, f"canary={self.canary}: a share of requests, between 0 and 1.")
        _require(self.canary_kl > 0, f"canary_kl={self.canary_kl}: nats, more than 0.")
        _require(self.host_bytes >= 0, "host_bytes: must not be negative.")
        _require(self.device_bytes >= 0, "device_bytes: must not be negative.")
        _require(self.eviction in EVICTIONS, f"eviction={self.eviction!r}: value, lru.")
        _require(isinstance(self.background, bool), f"background={self.background!r}: True or False.")
