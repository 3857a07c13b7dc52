"""What `attach()` costs: one `generate()` call over an empty store, without a store, the engine alone, and
transformers' own, in turn on the same weights."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from memos_engine.bench import stats, ttft
from memos_engine.bench.document import Document, Row
from memos_engine.bench.options import Options, Progress, rounds_shown, silent
from memos_engine.bench.systems import OURS, Arm, interleave
from memos_engine.bench.target import open_target

from memos_engine import attach, detach
from memos_engine.config import ConfigError, SamplingParams
from memos_engine.decoder.sequence import TextSpan
from memos_engine.prompt import load_tokenizer

WARMUP, NEW = 2, 16
EMPTY, PLAIN, ENGINE, OWN = "attached, empty store", "attached, no store", "engine alone", "own generate"


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench attach`: milliseconds of a whole call that makes 16 tokens."""
    if options.random_weights is not None or options.device != "cpu":
        raise ConfigError("bench attach measures a pulled model on the CPU; leave those options out.")
    document = Document("attach", options)
    contexts = options.contexts or (256,)
    rounds = options.rounds(20, 4) + WARMUP
    for done, context in enumerate(contexts):
        unit = f"{context} tokens"
        if not document.has(unit):
            shown = rounds_shown(progress, unit, done * rounds, len(contexts) * rounds)
            document.add(unit, *_measured(options, context, rounds, shown))
    return document.finish()


def _measured(
    options: Options, context: int, rounds: int, progress: Callable[[int], None]
) -> tuple[list[Row], list[Row]]:
    from transformers import AutoModelForCausalLM

    with open_target(options) as target, tempfile.TemporaryDirectory() as store:
        dtype = getattr(torch, options.resolved_dtype)
        tokenizer = load_tokenizer(target.folder)
        plain, empty = (AutoModelForCausalLM.from_pretrained(target.folder, dtype=dtype) for _ in range(2))
        for model in (plain, empty):
            model.generation_config.eos_token_id = None  # every call makes as many tokens
        attach(plain, tokenizer)
        attach(empty, tokenizer, store, "nobody")
        decoder = plain._memos_engine.engine.decoder
        params = SamplingParams(max_new_tokens=NEW)

        def generate(call: Callable[..., Any], ids: list[int]) -> None:
            call(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)

        calls: dict[str, Callable[[list[int]], object]] = {
            EMPTY: lambda ids: generate(empty.generate, ids),
            PLAIN: lambda ids: generate(plain.generate, ids),
            ENGINE: lambda ids: list(decoder.generate([TextSpan(tuple(ids))], params)),
            OWN: lambda ids: generate(type(plain).generate.__get__(plain), ids),
        }

        def timed(call: Callable[[list[int]], object], ids: list[int]) -> dict[str, Any]:
            for model in (plain, empty):
                model._memos_engine.engine.decoder.forget_prefixes()
            begun = time.perf_counter()
            call(ids)
            return {"ms": 1e3 * (time.perf_counter() - begun)}

        arms = [
            Arm("transformers" if mode == OWN else OURS, mode, lambda ids, c=call: timed(c, ids))
            for mode, call in calls.items()
        ]
        draw = random.Random(options.seed)
        prompts = [
            [draw.randrange(100, target.spec.vocab_size) for _ in range(context)] for _ in range(rounds)
        ]
        measured = interleave(arms, prompts, WARMUP, progress)
        for model in (plain, empty):
            detach(model)
    common = {"context": context, "dtype": options.resolved_dtype}
    rows = [
        {
            "system": arm.system,
            "mode": arm.mode,
            **common,
            **stats.timing(measured.samples(arm.key), "call_ms"),
        }
        for arm in arms
    ]
    wanted = [
        ("empty store / no store", (OURS, EMPTY), (OURS, PLAIN)),
        ("attached / engine alone", (OURS, EMPTY), (OURS, ENGINE)),
        ("attached / transformers' own", (OURS, EMPTY), ("transformers", OWN)),
    ]
    return rows, ttft.paired_ratios(measured, wanted, context=context)
