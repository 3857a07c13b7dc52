"""What decoding with weights of eight bits costs: the likelihood of real text, token by token, with whole and
with rounded weights over the same pages' contents.

Paragraphs of XQuAD are read teacher-forced: a first part as a prompt, which whole weights compute either way,
then one token a step. `nll` is in nats a token; `kl` of the rounded distribution from the whole one.
"""

from __future__ import annotations

from typing import Any

import torch
from memos_engine.bench.document import Document
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.stats import paired_bootstrap
from memos_engine.bench.systems import OURS
from memos_engine.bench.target import open_target
from memos_engine.bench.xquad import load

from memos_engine.config import ConfigError, DecoderConfig, SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.sequence import TextSpan
from memos_engine.decoder.weights import Weights
from memos_engine.prompt import load_tokenizer

PROMPT, LEAST, MOST = 32, 8, 96  # tokens of a paragraph: the prompt, those behind it


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench int8`."""
    if options.random_weights is not None or options.device != "cpu":
        raise ConfigError("bench int8 measures a pulled model on the CPU; leave those options out.")
    paragraphs = load(options.dataset, options.data).paragraphs
    document = Document("int8", options)
    unit = "whole and rounded"
    if document.has(unit):
        return document.finish()
    with open_target(options) as target:
        encode = load_tokenizer(target.folder).encode
        texts = [ids for text in paragraphs if len(ids := encode(text)) >= PROMPT + LEAST]
        texts = texts[: options.rounds(60, 6)]
        if not texts:
            raise ConfigError(f"bench int8 wants paragraphs of at least {PROMPT + LEAST} tokens.")
        weights = Weights.from_folder(target.folder, target.spec, getattr(torch, options.resolved_dtype))
        engine = DecoderEngine(target.spec, weights, DecoderConfig(dtype=options.resolved_dtype))
        whole: list[float] = []
        rounded: list[float] = []
        kl: list[float] = []
        agree: list[float] = []
        for done, ids in enumerate(texts):
            progress(unit, done, len(texts))
            a, b = (_forced(engine, ids, int8) for int8 in (False, True))
            following = torch.tensor(ids[PROMPT : PROMPT + MOST])[:, None]
            whole.append(-float(a.gather(1, following).mean()))
            rounded.append(-float(b.gather(1, following).mean()))
            kl.append(float((a.exp() * (a - b)).sum(1).mean()))
            agree.append(float((a.argmax(1) == b.argmax(1)).double().mean()))
    more = paired_bootstrap([rounded, whole], lambda a, b: (a - b).mean(axis=-1))
    common = {"system": OURS, "dtype": options.resolved_dtype, "n": len(texts)}
    document.add(
        unit,
        [
            {**common, "weights": "whole", "nll": _mean(whole), "kl_mean": 0.0, "top1": 1.0},
            {
                **common,
                "weights": "int8",
                "nll": _mean(rounded),
                "nll_more": round(more.value, 5),
                "nll_more_low": round(more.low, 5),
                "nll_more_high": round(more.high, 5),
                "kl_mean": _mean(kl),
                "top1": _mean(agree),
            },
        ],
    )
    return document.finish()


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 5)


def _forced(engine: DecoderEngine, ids: list[int], int8: bool) -> torch.Tensor:
    """Log-probabilities `[tokens, vocab] float64` of the tokens behind the prompt."""
    engine.runner.model.int8 = int8
    engine.forget_prefixes()
    params = SamplingParams(max_new_tokens=MOST + 1)
    seq = engine.add_request([TextSpan(tuple(ids[:PROMPT]))], params, sampled=False)
    seen = []
    for token in ids[PROMPT : PROMPT + MOST]:
        while seq.logits is None:
            engine.step()
        seen.append(seq.logits.double().log_softmax(-1))
        engine.feed(seq, token)
    engine.abort(seq)
    return torch.stack(seen)
