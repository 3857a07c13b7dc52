"""What memories that are not needed cost an answer: fits `DISTRACTION` of memory/need.py.

Questions of LoCoMo's dialogues behind the memories that retrieval finds for them, 0 to COUNTS[-1]; turns, or
runs of turns of about 200 tokens. Every plan is full prefill; scored are the log likelihood of the answer, a
token, and the F1 of the model's greedy one, both less what the question alone gives. The model:
`gain = c + needed x a x (1 - d x thousands of other tokens)`, needed: whether a memory with the evidence is
in front. d is what is shipped, from the F1 of every other dialogue; the ones between check it.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from memos_engine.bench.document import Document, Row
from memos_engine.bench.forced import FORCED, Plan, Reference, evaluate
from memos_engine.bench.locomo import Dialogue, dialogues
from memos_engine.bench.need import remembered
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.retrieval import DATASET
from memos_engine.bench.stats import Interval, bootstrap
from memos_engine.bench.target import open_target
from memos_engine.bench.xquad import DatasetError, answer_f1, find

from memos_engine.api import MemoryEngine
from memos_engine.config import DecoderConfig
from memos_engine.decoder.sequence import TextSpan
from memos_engine.memory.embed import default_embedder
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore

LENGTHS = (0, 200)  # tokens of a memory, about; 0: a turn each
COUNTS = (0, 1, 2, 4, 8)
QUESTIONS = 40  # of a dialogue
RESAMPLES = 1000
PARTS = ("fitted on", "held out")
POOL = 8192
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """A question; one entry for each of COUNTS. others: tokens of memories without evidence."""

    needed: tuple[bool, ...]
    others: tuple[int, ...]
    log_likelihood: tuple[float, ...]
    f1: tuple[float, ...]


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench distraction`; a unit is one length and one dialogue."""
    document = Document("distraction", options)
    path = find(DATASET, options.data)
    found = dialogues(json.loads(path.read_text()))[: 2 if options.quick else None]
    if len(found) < 2:
        raise DatasetError(f"{path} holds {len(found)} dialogue; fitting and checking need two.")
    with open_target(options) as target, tempfile.TemporaryDirectory() as folder:
        decoder = DecoderConfig(dtype=options.dtype, pool_tokens=min(POOL, target.spec.max_positions))
        with (
            MemoryEngine.open(target.folder, decoder=decoder) as engine,
            MemoryStore.open(Path(folder) / "store") as store,
        ):
            scorer = _Scorer(engine, MemOperator(store, default_embedder()), options)
            scored: dict[tuple[int, str], list[Scored]] = {}
            for length in LENGTHS:
                for number, dialogue in enumerate(found):
                    progress(f"answering, {length or 'turns'}", number, len(found))
                    answered = scored.setdefault((length, PARTS[number % 2]), [])
                    answered += scorer.dialogue(f"{number}-{length}", dialogue, length)
    for (length, which), some in scored.items():
        document.add(f"{which} {length}", _rows(length, which, some, options.seed))
    for which in PARTS:
        both = [one for (_, part), some in scored.items() if part == which for one in some]
        document.add(which, [], _distractions(which, both, options.seed), [])
    document.note(
        f"{options.rounds(QUESTIONS, 3)} questions a dialogue, without the adversarial ones, which have no "
        f"answer. log_likelihood: nats a token of the answer (its first {FORCED}), less that behind no "
        "memory; answer_f1: of the greedy answer. distraction: d of the model, the share of a needed "
        "memory's worth that a thousand tokens of other memories take; intervals are bootstraps over "
        "questions."
    )
    return document.finish()


class _Scorer:
    def __init__(self, engine: MemoryEngine, operator: MemOperator, options: Options) -> None:
        self.engine, self.operator, self.stop = engine, operator, list(engine.eos_token_ids)
        self.count, self.random = options.rounds(QUESTIONS, 3), random.Random(options.seed)

    def dialogue(self, name: str, dialogue: Dialogue, length: int) -> list[Scored]:
        who = Principal(DATASET, name)
        holder = remembered(self.operator, who, dialogue, length)
        questions = [question for question in dialogue.questions if question.answer]
        out = []
        for question in self.random.sample(questions, min(self.count, len(questions))):
            hits = self.operator.recall(who, question.text, k=COUNTS[-1])
            evidence = {holder[turn] for turn in question.evidence}
            spans = [self.engine.layout.memory(hit.cube.body or "") for hit in hits]
            held = [hit.cube.id in evidence for hit in hits]
            others = [len(span) * (not there) for span, there in zip(spans, held, strict=True)]
            log_likelihood, f1 = self._scores(question.text, question.answer, spans)
            out.append(
                Scored(
                    tuple(any(held[:k]) for k in COUNTS),
                    tuple(sum(others[:k]) for k in COUNTS),
                    tuple(log_likelihood),
                    tuple(f1),
                )
            )
        return out

    def _scores(
        self, question: str, answer: str, spans: Sequence[tuple[int, ...]]
    ) -> tuple[list[float], list[float]]:
        """Behind each of COUNTS memories."""
        layout, tokenizer = self.engine.layout, self.engine.tokenizer
        ids = tokenizer.encode(answer, add_special_tokens=False)[:FORCED]
        # All mass on the answer's tokens: KL from that is their negative log likelihood.
        log_probs = torch.full((len(ids), self.engine.decoder.spec.vocab_size), -1e4, dtype=torch.float64)
        log_probs[torch.arange(len(ids)), torch.tensor(ids)] = 0.0
        reference = Reference(tuple(ids), log_probs, torch.empty(0), torch.empty(0))
        prompts = [
            (*layout.anchor, *(i for span in spans[:k] for i in span), *layout.query(question))
            for k in COUNTS
        ]
        plans = [Plan((TextSpan(prompt),)) for prompt in prompts]
        found = evaluate(self.engine.decoder, plans, [reference] * len(plans), self.stop)
        texts = [
            tokenizer.decode([i for i in one.answer if i not in self.stop], skip_special_tokens=True)
            for one in found
        ]
        return [-statistics.fmean(one.kl) for one in found], [answer_f1(text, (answer,)) for text in texts]


def _rows(length: int, part: str, scored: Sequence[Scored], seed: int) -> list[Row]:
    rows: list[Row] = []
    for at, count in enumerate(COUNTS):
        f1 = bootstrap([one.f1[at] for one in scored], seed=seed)
        gain = [one.log_likelihood[at] - one.log_likelihood[0] for one in scored]
        rows.append(
            {
                "part": part,
                "tokens": length or "a turn",
                "memories": count,
                "questions": len(scored),
                "found": round(statistics.fmean(one.needed[at] for one in scored), 3),
                "other_tokens": round(statistics.fmean(one.others[at] for one in scored), 1),
                "log_likelihood": round(statistics.fmean(gain), 4),
                "answer_f1": round(f1.value, 4),
                "f1_low": round(f1.low, 4),
                "f1_high": round(f1.high, 4),
            }
        )
    return rows


def _distractions(part: str, scored: Sequence[Scored], seed: int) -> list[dict[str, Any]]:
    """d by each measure, with its interval."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(scored), (RESAMPLES, len(scored)))
    out = []
    for name in ("f1", "log_likelihood"):
        x, y = _model(scored, name)
        drawn = [distraction(x[some].reshape(-1, 3), y[some].ravel()) for some in draws]
        drawn = [d for d in drawn if not math.isnan(d)] or [math.nan]
        low, high = np.percentile(drawn, (2.5, 97.5))
        found = Interval(distraction(x.reshape(-1, 3), y.ravel()), float(low), float(high))
        row = {"name": f"distraction, by {name}", "part": part, "questions": len(scored)}
        out.append(row | found.public(3))
    return out


def _model(scored: Sequence[Scored], name: str) -> tuple[Floats, Floats]:
    """`[questions, counts, 3]` and `[questions, counts]`: what explains the gain, and the gain."""
    needed = np.asarray([one.needed[1:] for one in scored], np.float64)
    others = np.asarray([one.others[1:] for one in scored], np.float64) / 1e3
    gains = np.asarray([getattr(one, name) for one in scored], np.float64)
    x = np.stack([np.ones_like(needed), needed, needed * others], axis=2)
    return x, gains[:, 1:] - gains[:, :1]


def distraction(x: Floats, y: Floats) -> float:
    """d: least squares of `y = c + a x needed - a x d x needed x others`."""
    _, needed, others = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(-others / needed) if needed else math.nan
