"""Time to first token as a user meets it: tokenisation, retrieval, fetch and splice included.

A store with more memories than a request takes; every round asks something else, so that other memories come.
Our engine answers with spliced records (in host memory, on disk with a warm and with a cold page cache), with
the same memories pasted as text, and with none. A peer gets the pasted prompt as text; what finding the
memories took is added to its time, since a stack around it would have to find them too.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from memos_engine.bench import ttft
from memos_engine.bench.document import Document, Row
from memos_engine.bench.limits import Limits
from memos_engine.bench.options import Options
from memos_engine.bench.peers import registry
from memos_engine.bench.peers.process import PeerError, PeerProcess, worker_path
from memos_engine.bench.systems import OURS, Arm, Systems, interleave
from memos_engine.bench.target import Target
from memos_engine.bench.texts import facts, questions

STORED, SENTENCES, TAKEN = 24, 11, 4  # about 256 tokens a memory, about 1024 a request
TIERS = ("host", "disk-warm", "disk-cold")
TOKENS = 2048  # what such a prompt takes at most


def measure(
    options: Options,
    target: Target,
    limits: Limits,
    systems: Systems,
    rounds: int,
    document: Document,
    progress: Callable[[int], None],
) -> tuple[list[Row], list[Row]]:
    """Rows and ratios at request scope."""
    rng = random.Random(options.seed)
    asked = questions(rng, rounds)
    peers = [name for name in systems.names if name != OURS]
    with ExitStack() as stack:
        # A folder beside the results, where a disk is behind it: temporary folders may be memory.
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.out))
        try:
            engine = _engine(options, target, stack, folder, document)
        except PeerError as error:
            return [_absent(error)], []
        inputs = []
        for question in asked:
            inputs.append({"question": question, **engine.call("prompt", question=question)})
        arms = [
            Arm(OURS, f"splice:{tier}", lambda g, t=tier: _chat(engine, "splice", t, g)) for tier in TIERS
        ]
        arms += [
            Arm(OURS, mode, lambda g, m=mode: _chat(engine, m, None, g)) for mode in ("full", "query_only")
        ]
        for name in peers:
            arms.append(Arm(name, "full", lambda g, n=name: _pasted(systems, engine, n, g)))
        measured = interleave(arms, inputs, ttft.WARMUP, progress)
    rows = []
    sizes = measured.answers.get((OURS, "splice:host")) or measured.answers.get((OURS, "full")) or []
    mean = (
        {k: round(statistics.fmean(a[k] for a in sizes)) for k in _SIZES}
        if sizes
        else dict.fromkeys(_SIZES, 0)
    )
    for arm in arms:
        mode, _, tier = arm.mode.partition(":")
        limit = limits.first_token(mode, mean["anchor_tokens"], mean["memory_tokens"], mean["query_tokens"])
        fields = {
            "mode": mode,
            "scope": "request",
            "reuse": ttft.REUSE[mode],
            "context": 0 if mode == "query_only" else mean["memory_tokens"],
            "query": mean["query_tokens"],
            "memories": 0 if mode == "query_only" else TAKEN,
            "stored": STORED,
            "recompute": {"full": 1.0, "splice": 0.0}.get(mode),
            "dtype": limits.dtype,
            "tier": tier or None,
        }
        row = ttft.timed_row(arm, measured, fields, limit)
        if arm.system == OURS and "status" not in row:
            row["stages_ms"] = _stages(measured.answers[arm.key])
            short = [
                a for a in measured.answers[arm.key] if mode == "splice" and a["forms"] != ["kv"] * TAKEN
            ]
            if short:
                row["notes"] = f"{len(short)} of {row['n']} requests did not splice every memory"
        rows.append(row)
    wanted = [
        ("spliced from host memory / pasted as text, ours", (OURS, "splice:host"), (OURS, "full")),
        ("spliced from a cold disk / pasted as text, ours", (OURS, "splice:disk-cold"), (OURS, "full")),
        *(
            (f"spliced from host memory / pasted as text, {name}", (OURS, "splice:host"), (name, "full"))
            for name in peers
        ),
    ]
    ratios = ttft.paired_ratios(measured, wanted, scope="request", context=mean["memory_tokens"])
    return rows, ratios


_SIZES = ("anchor_tokens", "memory_tokens", "query_tokens")


def _engine(
    options: Options, target: Target, stack: ExitStack, folder: str, document: Document
) -> PeerProcess:
    threads = options.threads or torch.get_num_threads()
    argv = [sys.executable, worker_path("engine")]
    env = registry.thread_variables(threads)
    engine = stack.enter_context(PeerProcess(OURS, argv, env, options.peer_timeout))
    loaded = engine.call(
        "load",
        timeout=max(300, options.peer_timeout),
        model=str(target.folder),
        dtype=options.resolved_dtype,
        threads=threads,
        max_tokens=min(TOKENS, target.spec.max_positions),
        device=options.device,
        random_weights=target.random,
        folder=folder,
        memories=TAKEN,
    )
    document.note(*loaded["notes"])
    engine.call(
        "remember",
        timeout=max(300, options.peer_timeout),
        texts=[facts(10_000 + options.seed * 100 + i, SENTENCES) for i in range(STORED)],
    )
    return engine


def _chat(engine: PeerProcess, mode: str, tier: str | None, given: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = engine.call("chat", mode=mode, tier=tier, question=given["question"])
    return answer


def _pasted(systems: Systems, engine: PeerProcess, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Finding the memories is timed in the same round, so that a busy moment meets it as well."""
    found = engine.call("prompt", question=given["question"])
    answer: dict[str, Any] = systems.call(name, "request", text=found["text"])
    return {**answer, "ms": answer["ms"] + found["ms"]}


def _stages(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Median milliseconds of each stage."""
    names = answers[0]["timings"]
    return {name: round(statistics.median(a["timings"][name] for a in answers), 3) for name in names}


def _absent(error: PeerError) -> Row:
    return {
        "system": OURS,
        "mode": "splice",
        "scope": "request",
        "status": error.status,
        "reason": str(error),
    }
