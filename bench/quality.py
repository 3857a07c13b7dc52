"""What splicing stored KV costs in quality: distributions and answers against full prefill of the same ids.

Float32. Each prompt is anchor | memories, each a chat turn of its own, in an order drawn anew | question. The
reference is full prefill and its greedy answer until end of text; each method is scored on the reference's
tokens (KL, top-1) and by its own greedy answer (SQuAD's F1). Means weigh every prompt the same; intervals are
bootstraps over prompts, differences are paired by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from memos_engine.bench.document import Document, Row, read_result
from memos_engine.bench.forced import Outcome, evaluate, references, require_exact
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.records import Stores
from memos_engine.bench.splicing import METHODS, NEUTRAL, OWN, Case, Method, computed, everything
from memos_engine.bench.stats import bootstrap, paired_bootstrap
from memos_engine.bench.systematic import systematic_shares
from memos_engine.bench.xquad import (
    MEMORY_TOKENS,
    Dataset,
    Prompt,
    answer_contains,
    answer_f1,
    load,
    memory_spans,
    prompts,
)

from memos_engine.api import MemoryEngine
from memos_engine.config import ConfigError, DecoderConfig
from memos_engine.decoder.spec import ModelSpec
from memos_engine.models import resolve
from memos_engine.profile import ProfilePoint, SplicingProfile, save_profile

RECOMPUTE = (0.0, 0.15, 0.40)
BLOCK = 20  # prompts of one unit
TOGETHER = 4  # prompts that share forwards
POOL_BYTES = 768 << 20  # pages no request has touched cost nothing
FLOOR = "full_bf16"

# One method at one share, or one of its rows' raw figures over the prompts of a block.
Key = tuple[str, float]
Figures = dict[str, list[Any]]
Samples = dict[Key, Figures]

NOTES = (
    "Float32 against full prefill of the same ids, over its greedy answer until end of text, at most 16 "
    "tokens; kl_token1 is the first of them alone, kl_p99 the 99th percentile over all tokens of all "
    "prompts, kl_tokens and top1_tokens are means over all tokens, all other figures means over prompts. "
    "Nothing is reused between prompts or methods.",
    f"Memories are runs of whole sentences of a paragraph, about {MEMORY_TOKENS} tokens a prompt, divided by "
    "the number of memories: with 3 most paragraphs are whole or halved, with 8 a memory is a sentence or 2.",
    "Every method that splices has the memory in slot 0 exact by construction: its record was encoded behind "
    "just the anchor. It is never computed again, and its tokens count in the whole that r is a share of.",
    "full puts the reference's own keys and values through the splice and computes question and answer over "
    "them in other chunks (the numerical floor); full_bf16 is full prefill in bfloat16 (the noise floor of "
    "that dtype); none leaves the memories out.",
    f"{OWN} splices averages over left contexts of the owner's other memories (the whole set is the owner's) "
    "and computes again what a first pass of the query chooses; rank takes the same records and their own "
    f"order; {NEUTRAL} takes averages over left contexts that belong to nobody; anchored, random, first_k "
    "and cacheblend splice records encoded behind the anchor alone.",
    "cacheblend also has layers 0 and 1 of every memory token fresh, as published; r does not count them.",
    "Checked on the first prompt of every unit: computing every memory token behind slot 0 again, as "
    "scattered rows over spliced pages, gives the distributions of full prefill (KL below 1e-6).",
)


def run(options: Options, progress: Progress = silent, methods: Sequence[Method] = METHODS) -> dict[str, Any]:
    """Returns the result document; a unit is a block of prompts with one number of memories."""
    options, methods = _checked(options), _chosen(options.methods, methods)
    dataset = load(options.dataset, options.data)
    rounds = min(options.rounds(100, 10), len(dataset.questions))
    counts = tuple(dict.fromkeys(options.memories)) or ((3,) if options.quick else (3, 8))
    blocks = [(count, first) for count in counts for first in range(0, rounds, BLOCK)]
    units = [f"{count} memories, prompts {a + 1}-{min(a + BLOCK, rounds)}" for count, a in blocks]
    document = Document("quality", options)
    if not all(document.has(unit) for unit in units):
        kept = _kept(options, document)
        document.note(*NOTES)
        with _threads(options.threads):
            scorer: _Scorer | None = None
            for unit, (count, first) in zip(units, blocks, strict=True):
                if unit in kept:
                    continue
                scorer = scorer or _Scorer(options, dataset, rounds, methods)
                before = counts.index(count) * rounds

                def tell(done: int, count: int = count, before: int = before) -> None:
                    progress(f"{count} memories", before + done, rounds * len(counts))

                kept[unit] = _packed(count, scorer.block(count, first, tell))
                _aggregate(document, {name: kept[name] for name in units if name in kept})
                document.add(unit, ())
            if options.profile:
                document.note(_profiled(scorer or _Scorer(options, dataset, rounds, methods), document))
        document.data.pop("samples")  # rows hold each prompt's KL; the rest is for an interrupted run
    data: dict[str, Any] = document.finish()
    return data


# -- measuring ---------------------------------------------------------------------------------------


class _Scorer:
    """The engines, and what they make of a block of prompts."""

    def __init__(
        self, options: Options, dataset: Dataset, rounds: int, methods: Sequence[Method] = METHODS
    ) -> None:
        self.options, self.dataset, self.rounds = options, dataset, rounds
        shares = dict.fromkeys(options.recompute or RECOMPUTE)
        self.methods = [(m, r) for m in methods for r in m.shares(shares)]
        engine = self._open("float32")
        self.engine, self.layout, self.tokenizer = engine.decoder, engine.layout, engine.tokenizer
        self.stop = engine.eos_token_ids
        self.half = self._open("bfloat16").decoder
        self._neutral = any(method.name == NEUTRAL for method in methods)
        self._stores: dict[int, Stores] = {}
        self._prompts: dict[int, list[Prompt]] = {}

    def block(self, count: int, first: int, tell: Callable[[int], None]) -> Samples:
        """Scores prompts `first ...` with `count` memories by every method."""
        out: Samples = {}
        block = self.drawn(count)[first : first + BLOCK]
        spans = [span for prompt in block for span in prompt.memories[1:]]
        stores = self.stores(count)
        stores.prepare(spans, self._neutral)
        for at in range(0, len(block), TOGETHER):
            group = block[at : at + TOGETHER]
            scored = self._scored(group, stores)
            for done, (prompt, outcomes) in enumerate(zip(group, scored, strict=True), at + 1):
                for key, outcome in outcomes:
                    self._add(out.setdefault(key, {}), prompt, outcome)
                tell(first + done)
        return out

    def drawn(self, count: int) -> list[Prompt]:
        """The run's prompts with `count` memories."""
        if count not in self._prompts:
            drawn = prompts(self.dataset, self.layout, count, self.options, self.rounds)
            self._prompts = {count: drawn}
        return self._prompts[count]

    def stores(self, count: int) -> Stores:
        """The records of an owner who keeps the whole set in memories of this size."""
        if count not in self._stores:
            owned = memory_spans(self.dataset, self.layout, count)
            self._stores = {count: Stores(self.engine, self.layout, owned)}
        return self._stores[count]

    def _open(self, dtype: str) -> MemoryEngine:
        spec = ModelSpec.from_folder(resolve(self.options.model))
        token = 8 * spec.num_layers * spec.num_kv_heads * spec.head_dim  # K and V in float32
        tokens = max(min(spec.max_positions, 4096), POOL_BYTES // token)
        return MemoryEngine.open(self.options.model, decoder=DecoderConfig(dtype=dtype, pool_tokens=tokens))

    def _scored(self, group: Sequence[Prompt], stores: Stores) -> list[list[tuple[Key, Outcome]]]:
        """What every method makes of each prompt; all methods and prompts share forwards."""
        anchor = self.layout.anchor
        ids = [(*anchor, *chain.from_iterable(p.memories), *p.query) for p in group]
        cases = [
            Case(
                self.engine,
                stores.anchor,
                stores.anchored(prompt.memories),
                prompt.query,
                reference,
                prompt.key,
                stores.stored(prompt.memories),
                stores.neutral(prompt.memories) if self._neutral else (),
            )
            for prompt, reference in zip(group, references(self.engine, ids, self.stop), strict=True)
        ]
        if group[0].index % BLOCK == 0:
            require_exact(self.engine, everything(cases[0], 1.0), cases[0].reference, self.stop)
        jobs = [(case, method, share) for case in cases for method, share in self.methods]
        plans = [method.plan(case, share) for case, method, share in jobs]
        found = evaluate(self.engine, plans, [case.reference for case, _, _ in jobs], self.stop)
        keys = [(method.name, share) for method, share in self.methods]
        each = [found[i : i + len(keys)] for i in range(0, len(found), len(keys))]
        if not self.options.methods:
            plain = [computed(case, 1.0) for case in cases]
            floor = evaluate(self.half, plain, [case.reference for case in cases], self.stop)
            keys.append((FLOOR, 1.0))
            each = [[*own, noise] for own, noise in zip(each, floor, strict=True)]
        return [list(zip(keys, own, strict=True)) for own in each]

    def _add(self, figures: Figures, prompt: Prompt, outcome: Outcome) -> None:
        answer = self.tokenizer.decode(list(outcome.answer), skip_special_tokens=True)
        of_all = sum(len(span) for span in prompt.memories)
        row = {
            "kl": [_short(value) for value in outcome.kl],
            "top1": _short(sum(outcome.agree) / len(outcome.agree)),
            "f1": _short(answer_f1(answer, prompt.answers)),
            "contains": int(answer_contains(answer, prompt.answers)),
            "share": _short(outcome.recomputed / of_all),
        }
        for name, value in row.items():
            figures.setdefault(name, []).append(value)


# -- rows --------------------------------------------------------------------------------------------


def _aggregate(document: Document, kept: dict[str, Any]) -> None:
    """Makes the document's rows and differences anew from the blocks that are there."""
    document.data.update(samples=kept, rows=[], ratios=[])
    for count in dict.fromkeys(block["memories"] for block in kept.values()):
        samples: Samples = {}
        for block in kept.values():
            if block["memories"] == count:
                for entry in block["methods"]:
                    figures = samples.setdefault((entry["method"], entry["recompute"]), {})
                    for name, values in entry["figures"].items():
                        figures.setdefault(name, []).extend(values)
        document.data["rows"] += [_row(count, key, figures) for key, figures in samples.items()]
        document.data["ratios"] += differences(count, samples)


def _row(count: int, key: Key, figures: Figures) -> Row:
    per_prompt = [float(np.mean(values)) for values in figures["kl"]]
    kl, f1 = bootstrap(per_prompt), bootstrap(figures["f1"])
    tokens = [len(values) for values in figures["kl"]]
    return {
        "method": key[0],
        "recompute": key[1],
        "memories": count,
        "kl_mean": _short(kl.value),
        "kl_low": _short(kl.low),
        "kl_high": _short(kl.high),
        "kl_p99": _short(float(np.percentile(np.concatenate(figures["kl"]), 99))),
        "kl_token1": _short(float(np.mean([values[0] for values in figures["kl"]]))),
        "top1": round(float(np.mean(figures["top1"])), 4),
        "kl_tokens": _short(float(np.mean(np.concatenate(figures["kl"])))),
        "top1_tokens": round(float(np.average(figures["top1"], weights=tokens)), 4),
        "answer_f1": round(f1.value, 4),
        "f1_low": round(f1.low, 4),
        "f1_high": round(f1.high, 4),
        "answer_contains": round(float(np.mean(figures["contains"])), 4),
        "mean_recomputed": round(float(np.mean(figures["share"])), 4),
        "n": len(per_prompt),
        "samples": [_short(value) for value in per_prompt],
    }


def differences(count: int, samples: Samples) -> list[Row]:
    """KL of each method minus the engine's own at the same share (at r = 0 where it has none), and answer F1
    of each minus full prefill's."""
    out = []
    for (name, share), figures in samples.items():
        own = (OWN, share) if (OWN, share) in samples else (OWN, 0.0)
        if name not in (OWN, "full", FLOOR) and own in samples:
            here = "" if own[1] == share else f" at r={share:g}"
            title = f"KL of {name}{here} minus {OWN} at r={own[1]:g}"
            kl = [[float(np.mean(values)) for values in part["kl"]] for part in (figures, samples[own])]
            out.append(_difference(title, count, share, kl))
        if name != "full" and ("full", 1.0) in samples:
            title = f"answer F1 of {name} at r={share:g} minus full"
            out.append(_difference(title, count, share, [figures["f1"], samples["full", 1.0]["f1"]]))
    return out


def _difference(title: str, count: int, share: float, pair: Sequence[Sequence[float]]) -> Row:
    interval = paired_bootstrap(pair, lambda a, b: (a - b).mean(axis=-1))
    name = f"{title}, {count} {'memory' if count == 1 else 'memories'}"
    return {"name": name, "memories": count, "recompute": share, **interval.public(6)}


def _short(value: float) -> float:
    """Five significant digits: KL spans seven orders of magnitude."""
    return float(f"{value:.5g}")


def _profiled(scorer: _Scorer, document: Document) -> str:
    """Keeps the engine's curve for both dtypes; returns a note."""
    spans = [span for prompt in scorer.drawn(3)[:BLOCK] for span in prompt.memories[1:]]
    contexts = scorer.stores(3).contexts
    shares = systematic_shares(scorer.engine, scorer.layout.anchor, spans, contexts) or (None, None)
    keys = ("memories", "recompute", "kl_mean", "top1", "answer_f1", "n")
    own = [row for row in document.data["rows"] if row["method"] == OWN]
    points = tuple(ProfilePoint(**{key: row[key] for key in keys}) for row in own)
    profile = SplicingProfile(points, shares[0], shares[1], scorer.options.dataset)
    for engine in (scorer.engine, scorer.half):
        path = save_profile(profile, engine.runner.model.weights.digest, scorer.layout.digest)
    kept = f"The curve is kept in {path.parent.name}/."
    if shares[0] is None or shares[1] is None:
        return kept
    return (
        f"Of what neighbours do to K, {shares[0]:.0%} is the same whoever they are, to V {shares[1]:.0%} "
        f"({len(spans)} memories). {kept}"
    )


# -- options, resuming -------------------------------------------------------------------------------


def _chosen(names: Sequence[str], methods: Sequence[Method]) -> list[Method]:
    unknown = sorted(set(names) - {method.name for method in methods})
    if unknown:
        known = ", ".join(method.name for method in methods)
        raise ConfigError(f"method {unknown[0]!r} is unknown; bench quality has {known}.")
    return [method for method in methods if not names or method.name in names]


def _checked(options: Options) -> Options:
    if options.device != "cpu":
        raise ConfigError("bench quality compares in float32 on the CPU; leave out --device.")
    if options.random_weights is not None:
        raise ConfigError("bench quality needs a trained model: random weights have no answer to lose.")
    return replace(options, dtype="float32")


def _packed(count: int, samples: Samples) -> dict[str, Any]:
    methods = [
        {"method": name, "recompute": share, "figures": figures} for (name, share), figures in samples.items()
    ]
    return {"memories": count, "methods": methods}


def _kept(options: Options, document: Document) -> dict[str, Any]:
    """Raw figures of the blocks that an interrupted run left in the file."""
    if not document.data["units"] or document.path is None:
        return {}
    found = read_result(document.path).get("samples", {})
    document.data["units"] = [unit for unit in document.data["units"] if unit in found]
    return {unit: found[unit] for unit in document.data["units"]}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
