"""Time to first token: full prefill, prefix reuse and spliced memory, with transformers in the same run.

One process, each system with weights of its own, systems in turn, a fresh order of memories in every round.
Engine scope: token ids in, first token out; records wait in host memory.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from memos_engine.bench.machine import machine
from memos_engine.bench.texts import facts
from transformers import AutoModelForCausalLM, AutoTokenizer

from memos_engine.config import ConfigError, DecoderConfig, SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.record import KVRecord, ids_digest
from memos_engine.decoder.sequence import KVSpan, Span, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.models import resolve
from memos_engine.prompt import PromptLayout


@dataclass(frozen=True)
class TtftConfig:
    """context: memory tokens, split evenly over `memories`; query: tokens computed behind them."""

    model: str = "smollm2"
    dtype: str = "bfloat16"
    contexts: tuple[int, ...] = (1024,)
    query: int = 32
    memories: int = 4
    n: int = 9
    warmup: int = 2
    seed: int = 0
    threads: int | None = None
    peers: tuple[str, ...] = ("transformers",)

    def __post_init__(self) -> None:
        unknown = set(self.peers) - {"transformers"}
        if unknown:
            raise ConfigError(f"peers {', '.join(sorted(unknown))}: this bench knows transformers.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r}: use float32 or bfloat16.")
        least = 16 * self.memories
        if min(self.contexts) < least:
            raise ConfigError(
                f"context: at least 16 tokens for each of the {self.memories} memories ({least})."
            )


Run = Callable[[], tuple[float, int]]


def run(config: TtftConfig, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Returns the result document (rows as in the design: `ttft`)."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = resolve(config.model)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, config.dtype), attn_implementation="sdpa", local_files_only=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    spec = ModelSpec.from_folder(folder)
    weights = Weights.from_folder(folder, spec, getattr(torch, config.dtype))
    most = max(config.contexts) + config.query + 512
    engine = DecoderEngine(spec, weights, DecoderConfig(dtype=config.dtype, pool_tokens=most))
    rows: list[dict[str, Any]] = []
    for context in config.contexts:
        rows += _measure(config, context, engine, model, PromptLayout(tokenizer), progress)
    return {
        "bench": "ttft",
        "version": 1,
        "machine": machine(),
        "config": asdict(config),
        "rows": rows,
    }


def _measure(
    config: TtftConfig,
    context: int,
    engine: DecoderEngine,
    model: Any,
    layout: PromptLayout,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    anchor = layout.anchor
    sizes = [context // config.memories + (i < context % config.memories) for i in range(config.memories)]
    close = len(layout.turn_close)
    spans = [_exactly(layout.memory(facts(i, size)), size, close) for i, size in enumerate(sizes)]
    question = "Where does Anna live? " * (1 + config.query // 5)
    query = _exactly(layout.query(question), config.query, tail=close + 10)
    anchor_span = KVSpan(_record(engine, (), anchor))
    records = [_record(engine, anchor, span) for span in spans]
    rng = random.Random(config.seed)
    samples: dict[tuple[str, str], list[float]] = {}
    agree = {"splice": 0, "prefix": 0, "transformers": 0}
    rounds = config.warmup + config.n
    for round_ in range(rounds):
        order = rng.sample(range(config.memories), config.memories)
        ids = (*anchor, *(t for i in order for t in spans[i]), *query)
        spliced: list[Span] = [anchor_span, *(KVSpan(records[i]) for i in order), TextSpan(query)]
        plain: list[Span] = [TextSpan(ids)]
        bare: list[Span] = [anchor_span, TextSpan(query)]
        systems: dict[tuple[str, str], Run] = {
            ("memos_engine", "full"): lambda p=plain: _ours(engine, p),  # type: ignore[misc]
            ("memos_engine", "prefix"): lambda p=plain: _ours(engine, p, keep=True),  # type: ignore[misc]
            ("memos_engine", "splice"): lambda s=spliced: _ours(engine, s),  # type: ignore[misc]
            ("memos_engine", "query_only"): lambda b=bare: _ours(engine, b),  # type: ignore[misc]
        }
        if "transformers" in config.peers:
            systems["transformers", "full"] = lambda i=ids: _transformers(model, i)  # type: ignore[misc]
        tokens: dict[tuple[str, str], int] = {}
        for key, system in _rotated(systems, round_):
            ms, tokens[key] = system()
            if round_ >= config.warmup:
                samples.setdefault(key, []).append(ms)
        if round_ >= config.warmup:
            full = tokens["memos_engine", "full"]
            agree["splice"] += tokens["memos_engine", "splice"] == full
            agree["prefix"] += tokens["memos_engine", "prefix"] == full
            agree["transformers"] += tokens.get(("transformers", "full")) == full
        progress(f"{context} tokens: round {round_ + 1} of {rounds}")
    return [
        _row(config, context, key, values, agree) for key, values in sorted(samples.items(), key=_mode_order)
    ]


def _ours(engine: DecoderEngine, spans: list[Span], keep: bool = False) -> tuple[float, int]:
    """One request to its first token. keep: the same prompt runs first, so that its pages are there."""
    engine.forget_prefixes()
    once = SamplingParams(max_new_tokens=1)
    if keep:
        list(engine.generate(spans, once))
    (out,) = engine.generate(spans, once)
    return out.sequence.stats.ttft_ms, out.token


@torch.inference_mode()
def _transformers(model: Any, ids: tuple[int, ...]) -> tuple[float, int]:
    start = time.perf_counter()
    logits = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).logits
    token = int(logits[0, -1].argmax())
    return (time.perf_counter() - start) * 1e3, token


def _record(engine: DecoderEngine, left: tuple[int, ...], span: tuple[int, ...]) -> KVRecord:
    k, v = engine.encode_span(left, span)
    return KVRecord(k, v, span, "bench", ids_digest(left))


def _exactly(ids: tuple[int, ...], size: int, tail: int) -> tuple[int, ...]:
    """A span of just `size` tokens: its middle is cut, its last `tail` tokens (the end of the turn) stay."""
    if len(ids) < size:
        raise ValueError(f"{size} tokens were asked for, the text gives {len(ids)}")
    tail = min(tail, size)
    return ids[: size - tail] + ids[len(ids) - tail :]


def _rotated(systems: dict[tuple[str, str], Run], by: int) -> Iterator[tuple[tuple[str, str], Run]]:
    items = list(systems.items())
    by %= len(items)
    yield from items[by:] + items[:by]


def _mode_order(item: tuple[tuple[str, str], list[float]]) -> tuple[str, int]:
    (system, mode), _ = item
    return system, ["full", "prefix", "splice", "query_only"].index(mode)


def _row(
    config: TtftConfig, context: int, key: tuple[str, str], values: list[float], agree: dict[str, int]
) -> dict[str, Any]:
    system, mode = key
    same = agree.get(mode if system == "memos_engine" else system)
    return {
        "system": system,
        "mode": mode,
        "scope": "engine",
        "reuse": {"full": "none", "prefix": "prefix", "splice": "pages", "query_only": "none"}[mode],
        "context": 0 if mode == "query_only" else context,
        "query": config.query,
        "memories": 0 if mode == "query_only" else config.memories,
        "recompute": {"full": 1.0, "splice": 0.0}.get(mode),
        "dtype": config.dtype,
        "tier": "host" if mode == "splice" else None,
        "ttft_ms_p50": round(statistics.median(values), 3),
        "ttft_ms_p95": round(sorted(values)[min(len(values) - 1, int(0.95 * len(values)))], 3),
        "same_first_token": None if same is None or mode == "query_only" else round(same / config.n, 3),
        "n": len(values),
    }
